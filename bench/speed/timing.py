"""Timing: contenders take turns within a size, so that ratios come from the same seconds of the same machine."""

import ctypes
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .contenders import BASELINES, Contender, contenders
from .problems import Problem, Size, make_problem

SECONDS = 6.0  # a contender takes no further turn after so many, but has at least _MIN_SAMPLES
_MIN_SAMPLES = 3
# Where a contender's p80 is more than so many times its p20, somebody else used the machine: the size is measured
# again, so often at most, and the steadiest try is kept.
STEADY, TRIES = 2.0, 3


@dataclass(frozen=True)
class Row:
    """One contender at one size; times of forward and backward together."""

    group: str
    anchors: int
    positives: int
    delta: float
    scores: str
    case: str
    contender: str
    repeats: int
    tries: int  # how often the size was measured until it was steady
    p20_ms: float
    p50_ms: float
    p80_ms: float
    anchors_per_s: float  # at the median
    peak_extra_mib: float | None  # above the inputs, results included; None where it cannot be told
    ratios: dict[str, float]  # median time of each baseline / this median


def _time(contender: Contender) -> float:
    """Milliseconds on the clock of the host."""
    start = time.perf_counter()
    step = contender()
    elapsed = time.perf_counter() - start
    del step  # not before the clock has stopped: to free it is not the loss' work
    return 1e3 * elapsed


def resident(field: str) -> int:
    """Bytes that this process has in memory (Linux): VmRSS now, VmHWM at its peak."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def peak_memory(contender: Contender, problem: Problem) -> float | None:
    """MiB by which a step's peak exceeds what there was before, its results included.

    On a GPU what torch has allocated; on Linux what the process has in memory. Elsewhere None.
    """
    if problem.logits.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free but not given back would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = resident("VmRSS")
    contender()
    return (resident("VmHWM") - before) / 2**20


def _take_turns(found: dict[str, Contender], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, contender in found.items():
            if len(times[name]) < _MIN_SAMPLES or sum(times[name]) < 1e3 * SECONDS:
                times[name].append(_time(contender))
    return times


def _measure(size: Size, repeats: int, seed: int, tries: int) -> list[Row]:
    problem = make_problem(size, torch.device("cpu"), seed)
    found = contenders(size, problem)
    for contender in found.values():
        contender()
    peaks = {name: peak_memory(contender, problem) for name, contender in found.items()}
    times = _take_turns(found, repeats)
    quantiles = {
        name: torch.tensor(of, dtype=torch.float64)
        .quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
        .tolist()
        for name, of in times.items()
    }
    medians = {name: of[1] for name, of in quantiles.items()}
    return [
        Row(
            **size._asdict(),
            contender=name,
            repeats=len(times[name]),
            tries=tries,
            p20_ms=quantiles[name][0],
            p50_ms=medians[name],
            p80_ms=quantiles[name][2],
            anchors_per_s=1e3 * size.anchors / medians[name],
            peak_extra_mib=peaks[name],
            ratios={other: medians[other] / medians[name] for other in BASELINES if other in medians and other != name},
        )
        for name in found
    ]


def sweep(sizes: list[Size], repeats: int, seed: int) -> list[Row]:
    """Time all contenders at all sizes on the CPU; :mod:`bench.gpu` has GPUs."""
    rows: list[Row] = []
    with tqdm(sizes, desc="timing", unit="size") as progress:
        for size in progress:
            progress.set_postfix(group=size.group, N=size.anchors, P=size.positives)
            tried: list[list[Row]] = []
            while len(tried) < TRIES and (not tried or unsteadiness(tried[-1]) > STEADY):
                tried.append(_measure(size, repeats, seed, len(tried) + 1))
            rows += min(tried, key=unsteadiness)
    return rows


def unsteadiness(rows: list[Row]) -> float:
    """The largest p80 / p20 of the contenders at a size."""
    return max(row.p80_ms / row.p20_ms for row in rows)


def exponents(rows: list[Row], group: str, by: str, least: int) -> dict[str, float]:
    """Exponent of growth of each contender: slope of log time over log size, least squares, sizes from ``least``."""
    result: dict[str, float] = {}
    for name in dict.fromkeys(row.contender for row in rows):
        points = [
            (math.log(getattr(row, by)), math.log(row.p50_ms))
            for row in rows
            if row.group == group and row.contender == name and getattr(row, by) >= least
        ]
        if len(points) >= 3:
            x, y = torch.tensor(points, dtype=torch.float64).T
            x = x - x.mean()
            result[name] = float((x * y).sum() / (x * x).sum())
    return result
