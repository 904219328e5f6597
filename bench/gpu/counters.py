"""What the kernels of a step move and reach, by the device's own counters, which ``ncu`` reads where it is there.

Each setting is a process of its own under ncu, which profiles all launches of one step after a first: no name of a
kernel is to be known here. Those that take long are kept.

``python -m bench.gpu.counters SETTING`` is that process.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.cuda import profiler

from alrp_triton import alrp_loss
from alrp_triton.dispatch import Backend

from ..run import ROOT
from ..speed.contenders import take_step
from ..speed.problems import CASES, Size, draw_problem
from .work import Context, Record, Skipped, Unit

_PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/bin/ncu")
TIME = "gpu__time_duration.sum"
FEW = (TIME, "dram__bytes_read.sum", "dram__bytes_write.sum", "launch__registers_per_thread")
METRICS = (
    *FEW,
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "lts__t_bytes.sum",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio",
)
_NOT_HERE = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Failed to initialize the profiler")
_LONG = 0.01  # a kernel with less of the step's time is left out
_BASE = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class Setting(NamedTuple):
    """A step to be looked at."""

    backend: Backend
    case: str
    scores: str
    dtype: str = "float32"


SETTINGS = {
    "RetinaNet, binned": Setting("triton_binned", "RetinaNet", "mid-training"),
    "RetinaNet, binned, initialisation": Setting("triton_binned", "RetinaNet", "initialisation"),
    "ATSS, tiled": Setting("triton_tiled", "ATSS", "mid-training"),
    "RetinaNet, binned, bfloat16": Setting("triton_binned", "RetinaNet", "mid-training", "bfloat16"),
}


def find_ncu() -> str | None:
    """Where it is."""
    places = [str(path) for pattern in _PLACES for path in sorted(Path("/").glob(pattern[1:]), reverse=True)]
    return shutil.which("ncu") or next((place for place in places if os.access(place, os.X_OK)), None)


def shards(rehearse: bool) -> list[str]:
    """One: what is counted is to be alone."""
    return ["all"]


def units(shard: str, context: Context) -> list[Unit]:
    """A unit a setting."""
    if context.rehearse:
        raise Skipped("a rehearsal has no device whose counters could be read")
    ncu = find_ncu()
    if ncu is None:
        raise Skipped("ncu is neither on the PATH nor in its usual places")
    return [Unit(name, partial(_profile, context, ncu, name)) for name in SETTINGS]


def _profile(context: Context, ncu: str, name: str) -> Iterator[Record]:
    yield {"what": "setting", "setting": name, **SETTINGS[name]._asdict(), "ncu": ncu}
    failed = ""
    for metrics in (METRICS, FEW):  # one that this ncu does not know spoils all
        done, text = _run(context, ncu, name, metrics)
        kernels = parse(text)
        if kernels:
            total = sum(kernel[TIME] or 0.0 for kernel in kernels)
            kept = [kernel for kernel in kernels if (kernel[TIME] or 0.0) >= _LONG * total]
            for kernel in kept:
                yield {"what": "kernel", "setting": name, **kernel}
            yield {"what": "step", "setting": name, "kernels": len(kernels), "kept": len(kept), "seconds": total}
            if failed:
                yield {"what": "fewer counters", "setting": name, "reason": failed}
            return
        failed = " ".join(re.findall(r"==(?:ERROR|WARNING)== .*", f"{text}\n{done.stdout}\n{done.stderr}"))[:400]
        failed = failed or f"exit status {done.returncode}: {done.stderr[-300:]}"
        if any(sign in failed for sign in _NOT_HERE):
            raise Skipped(f"ncu cannot read this machine's counters: {failed}")
    raise RuntimeError(f"ncu: {failed}")


def _run(
    context: Context, ncu: str, name: str, metrics: tuple[str, ...]
) -> tuple[subprocess.CompletedProcess[str], str]:
    """The process under ncu; and what ncu says."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        # Clocks stay as they are; all launches between start and stop of the profiler.
        command = [
            ncu,
            "--csv",
            "--page",
            "raw",
            "--print-units",
            "base",
            "--clock-control",
            "none",
            "--log-file",
            str(log),
        ]
        command += ["--target-processes", "all", "--profile-from-start", "off", "--metrics", ",".join(metrics)]
        command += [sys.executable, "-m", "bench.gpu.counters", name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=max(context.left, 1.0))
        return done, log.read_text() if log.exists() else ""


def number(text: str, unit: str) -> float | None:
    """A number as ncu prints it, in base units: bytes, seconds; None where there is none."""
    digits = text.replace(",", "").strip()
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", digits):
        return None
    value = float(digits)
    if found := re.fullmatch(r"([numKMGT]?)(second|byte|s|B)s?", unit.strip()):
        return value * _BASE[found[1]]
    return value


def parse(text: str) -> list[Record]:
    """Launches, longest first, from ncu's raw page in CSV: a row of names, one of units, and a row a launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]  # ncu talks between them
    if not lines:
        return []
    head, *rows = csv.reader(lines)
    metrics = [column for column in head if column in METRICS]  # ncu adds some hundred attributes of the device
    units = dict(zip(head, rows[0], strict=False)) if rows and not rows[0][0].strip() else {}
    found: list[Record] = []
    for cells in rows[1 if units else 0 :]:
        row = dict(zip(head, cells, strict=False))
        kernel: Record = {"kernel": row.get("Kernel Name", "").partition("(")[0], "grid": row.get("Grid Size", "")}
        kernel |= {metric: number(row.get(metric, ""), units.get(metric, "")) for metric in metrics}
        if TIME in kernel:
            found.append(kernel)
    return sorted(found, key=lambda kernel: -(kernel[TIME] or 0.0))


def main() -> None:
    """A step of a setting, and another between start and stop of the profiler."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.counters")
    parser.add_argument("setting", choices=SETTINGS)
    setting = SETTINGS[parser.parse_args().setting]
    size = Size("counters", *CASES[setting.case], 1.0, setting.scores, setting.case)
    problem = draw_problem(size, torch.device("cuda"), getattr(torch, setting.dtype), 0)
    step = partial(take_step, partial(alrp_loss, backend=setting.backend), problem)
    step()
    torch.cuda.synchronize()
    profiler.start()
    step()
    torch.cuda.synchronize()
    profiler.stop()


if __name__ == "__main__":
    main()
