"""Timing: contenders take turns within a size, so that ratios come from the same seconds of the same machine."""

import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from .steps import LOOP, Loss, Problem, contenders, make_problem, take_step


@dataclass(frozen=True)
class Row:
    """One contender at one size; times of forward and backward together."""

    anchors: int
    positives: int
    contender: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    anchors_per_s: float  # at the median
    speedup: float | None  # median over the repeats of time of the loop / time; None where the loop is left out
    peak_extra_mib: float | None  # above the inputs; None on a CPU, whose allocator does not tell


def _time(loss: Loss, problem: Problem) -> float:
    """Milliseconds on the clock of the host, from an idle device to an idle device."""
    wait = torch.cuda.synchronize if problem.logits.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    step = take_step(loss, problem)
    wait()
    elapsed = time.perf_counter() - start
    del step  # not before the clock has stopped: to free it is not the loss' work
    return 1e3 * elapsed


def _warm_up(loss: Loss, problem: Problem) -> float | None:
    """Take a step untimed; on a GPU return the peak of the memory that it took, in MiB, its results included."""
    if not problem.logits.is_cuda:
        take_step(loss, problem)
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    take_step(loss, problem)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def sweep(sizes: list[tuple[int, int]], device: torch.device, repeats: int, seed: int) -> list[Row]:
    """Time all contenders at all sizes (anchors, positives)."""
    rows: list[Row] = []
    total = repeats * sum(len(contenders(*size, device)) for size in sizes)
    with tqdm(total=total, desc="timing", unit="step") as progress:
        for anchors, positives in sizes:
            progress.set_postfix(N=anchors, P=positives)
            problem = make_problem(anchors, positives, device, seed)
            losses = contenders(anchors, positives, device)
            peaks = {name: _warm_up(loss, problem) for name, loss in losses.items()}
            times = {name: torch.empty(repeats, dtype=torch.float64) for name in losses}
            for repeat in range(repeats):
                for name, loss in losses.items():
                    times[name][repeat] = _time(loss, problem)
                    progress.update()
            for name, of_loss in times.items():
                p20, p50, p80 = of_loss.quantile(of_loss.new_tensor([0.2, 0.5, 0.8])).tolist()
                speedup = float((times[LOOP] / of_loss).quantile(0.5)) if LOOP in times else None
                rows.append(Row(anchors, positives, name, p20, p50, p80, 1e3 * anchors / p50, speedup, peaks[name]))
    return rows
