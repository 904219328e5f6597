"""On what a run was: card, driver, versions, clocks as they were found; what a copy and a launch cost there."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..run import describe_run
from .clock import Clock
from .work import Context, Record, Unit

_COPY_BYTES = 1 << 30
_LAUNCHES = 400  # fewer than a device queues, so that the host never waits for it
_ASKED = (
    "name", "driver_version", "vbios_version", "compute_mode", "persistence_mode", "pstate", "clocks.sm", "clocks.mem",
    "clocks.max.sm", "clocks.max.mem", "clocks_event_reasons.active", "power.draw", "power.limit", "temperature.gpu",
    "utilization.gpu", "memory.used", "memory.total", "ecc.mode.current",
)  # fmt: skip


def shards(rehearse: bool) -> list[str]:
    """One: nothing else is to run beside it."""
    return ["all"]


def units(shard: str, context: Context) -> list[Unit]:
    """What is asked, and what is measured."""
    return [
        Unit("run", partial(_run, context)),
        Unit("machine", _machine),
        Unit("device", partial(_device, context)),
        Unit("nvidia-smi, idle", partial(_ask, "idle", context)),
        Unit("copy", partial(_copy, context)),
        Unit("nvidia-smi, at work", partial(_ask, "just after the copies", context)),
        Unit("launches", partial(_launches, context)),
    ]


def _run(context: Context) -> Iterator[Record]:
    yield {"what": "run", **describe_run(context.device)}


def _machine() -> Iterator[Record]:
    memory = Path("/proc/meminfo").read_text()
    found = {key: int(kib) >> 10 for key, kib in re.findall(r"(MemTotal|MemAvailable): +(\d+) kB", memory)}
    yield {"what": "machine", "cores": len(os.sched_getaffinity(0)), "mib": found, "kernel": os.uname().release}


def _device(context: Context) -> Iterator[Record]:
    if context.rehearse:
        yield {"what": "device", "missing": "a rehearsal has none"}
        return
    of = torch.cuda.get_device_properties(context.device)
    wanted = (
        "name", "total_memory", "multi_processor_count", "L2_cache_size", "max_threads_per_multi_processor",
        "regs_per_multiprocessor", "shared_memory_per_multiprocessor", "clock_rate", "memory_clock_rate",
        "memory_bus_width",
    )  # fmt: skip
    free, total = torch.cuda.mem_get_info()
    yield {
        "what": "device",
        "capability": list(torch.cuda.get_device_capability(context.device)),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "free_mib": free >> 20,
        "total_mib": total >> 20,
        **{name: getattr(of, name) for name in wanted if hasattr(of, name)},
    }


def parse_answer(text: str) -> dict[str, str]:
    """What nvidia-smi answers to a query of one card, with a header: by name, with its unit."""
    head, *rows = [[cell.strip() for cell in line.split(",")] for line in text.strip().splitlines()]
    return dict(zip(head, rows[0], strict=True))


def _ask(when: str, context: Context) -> Iterator[Record]:
    """What nvidia-smi says; it is asked only, never told."""
    tool = shutil.which("nvidia-smi")
    if tool is None or context.rehearse:
        yield {"what": "nvidia-smi", "when": when, "missing": "a rehearsal asks none" if tool else "not found"}
        return
    known: dict[str, Any] = {}
    wrong: list[str] = []
    done = _query(tool, _ASKED)
    if done.returncode == 0:
        known = parse_answer(done.stdout)
    else:  # a driver does not know one of the names, and says so for all
        for name in _ASKED:
            one = _query(tool, (name,))
            known |= parse_answer(one.stdout) if one.returncode == 0 else {}
            wrong += [] if one.returncode == 0 else [name]
    yield {"what": "nvidia-smi", "when": when, **known, "not_known": wrong}


def _query(tool: str, names: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = [tool, f"--query-gpu={','.join(names)}", "--format=csv", f"--id={first}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


def _copy(context: Context) -> Iterator[Record]:
    """Bytes read and written in a second by a copy from device to device; of zeros none, for they may be faster."""
    count = (1 << 20) if context.rehearse else _COPY_BYTES
    source = torch.randint(-128, 128, (count,), dtype=torch.int8, device=context.device)
    target = torch.empty_like(source)
    clock = Clock(context.device)
    timing = clock.median(partial(target.copy_, source), 3 if context.rehearse else 50)
    speed = 2 * count / (1e-3 * timing.device_ms)
    yield {"what": "copy", "bytes": 2 * count, "bytes_per_s": speed, **timing._asdict()}


def _launches(context: Context) -> Iterator[Record]:
    """Microseconds of a launch: of the host; of the device, from one empty kernel to the next; and in a graph."""
    from .empty import empty_kernel  # where Triton's interpreter is on, it has to be so before

    x = torch.zeros(16, device=context.device)
    count = 3 if context.rehearse else _LAUNCHES
    clock = Clock(context.device)

    def kernels() -> None:
        for _ in range(count):
            empty_kernel[(1,)](x, 16, BLOCK=16)  # pyright: ignore[reportArgumentType]

    def operations() -> None:
        for _ in range(count):
            x.add_(1)

    for name, step in (("empty Triton kernel", kernels), ("torch operation, x.add_(1)", operations)):
        timing = clock.median(step, 3 if context.rehearse else 15)
        replay = clock.median(clock.capture(step), 3 if context.rehearse else 15)
        yield {
            "what": "launch",
            "of": name,
            "launches": count,
            "host_us": 1e3 * timing.host_ms / count,
            "device_us": 1e3 * timing.device_ms / count,
            "graph_us": 1e3 * replay.device_ms / count,
            "backlog": timing.backlog,
        }
    begin = time.perf_counter()
    for _ in range(10):
        context.wait()
    yield {"what": "wait", "of": "an idle device", "host_us": 1e5 * (time.perf_counter() - begin)}
