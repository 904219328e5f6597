"""What is stored with a run, and its Markdown table."""

import os
import platform
import re
import subprocess
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .sweep import Row

ROOT = Path(__file__).resolve().parent.parent


def _git(*arguments: str) -> str | None:
    """Output of a git command in the repository; None where there is no git, repository or commit."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def describe_run(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date of a run that starts now."""
    changes = _git("status", "--porcelain", "--", ".", ":!bench/results")  # results change nothing that is measured
    return {
        "device": _device_name(device),
        "device_type": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "triton": import_module("triton").__version__ if find_spec("triton") else None,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--verify", "HEAD"),
        "dirty": None if changes is None else changes != "",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _number(value: float | None) -> str:
    """Three digits, never in exponent form; nothing for None."""
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def markdown(report: dict[str, Any]) -> str:
    """The table of a run, with what a reader needs to judge it."""
    run, settings = report["run"], report["settings"]
    commit = f"commit {run['commit'][:10]}" if run["commit"] else "no commit"
    conditions = (
        f"{run['device']} ({run['device_type']}; {run['cores']} cores, torch threads: {run['threads']}, load average "
        f"{run['load_average_before']} before the run), torch {run['torch']}, triton {run['triton']}, Python "
        f"{run['python']}, {commit}{' with changes' if run['dirty'] else ''}, {run['date']}."
    )
    task = (
        f"Forward + backward of the whole loss, {settings['dtype']}, delta = {settings['delta']:g}, "
        f"{settings['repeats']} repeats. Speed-up: against the {settings['baseline']}. {report['rule']}"
    )
    lines = [
        conditions,
        "",
        task,
        "",
        "| N | P | | p20 ms | p50 ms | p80 ms | 1e6 anchors/s | speed-up | peak extra MiB |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in (Row(**fields) for fields in report["rows"]):
        figures = row.p20_ms, row.p50_ms, row.p80_ms, row.anchors_per_s / 1e6, row.speedup, row.peak_extra_mib
        cells = f"{row.anchors:,}", f"{row.positives:,}", row.contender, *map(_number, figures)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
