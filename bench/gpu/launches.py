"""Where the time of a step goes: what each launch takes on the device, from graph replays, by torch's profiler.

Without the host, and with an empty L2 cache at the beginning of a step. Counters are of the long kernels alone; here
are the small ones, too.
"""

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from alrp_triton import alrp_loss

from ..speed.contenders import take_step
from ..speed.problems import CASES, Size, draw_problem
from .clock import Clock
from .work import Context, Record, Skipped, Unit

_REPLAYS = 12


class Launch(NamedTuple):
    """On the device, in microseconds."""

    name: str
    begin: float
    end: float


def shards(rehearse: bool) -> list[str]:
    """One: what is timed is to be alone."""
    return ["all"]


def units(shard: str, context: Context) -> list[Unit]:
    """A unit a detector, with its scores in mid-training; and the largest in other forms."""
    if context.rehearse:
        raise Skipped("a rehearsal has no device whose launches could be traced")
    kinds = [(case, "mid-training", "float32") for case in CASES if case != "LVIS, ATSS"]
    kinds[1:1] = [("RetinaNet", "late", "float32"), ("RetinaNet", "initialisation", "float32")]
    kinds.append(("RetinaNet", "mid-training", "bfloat16"))
    return [Unit(", ".join(kind), partial(_trace, context, *kind)) for kind in kinds]


def _trace(context: Context, case: str, scores: str, dtype: str) -> Iterator[Record]:
    size = Size("launches", *CASES[case], 1.0, scores, case)
    problem = draw_problem(size, context.device, getattr(torch, dtype), context.seed)
    clock = Clock(context.device)
    step = clock.capture(partial(take_step, alrp_loss, problem))
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(_REPLAYS):
            clock.device.flush()
            step()
        context.wait()
    found = [
        Launch(event.name, event.time_range.start, event.time_range.end)
        for event in trace.events() or []
        if "CUDA" in str(event.device_type)
    ]
    of = {"setting": f"{case}, {scores}, {dtype}", "anchors": size.anchors, "positives": size.positives}
    yield from (of | record for record in read(found))


def read(launches: list[Launch], replays: int = _REPLAYS) -> Iterator[Record]:
    """A record for each launch of a step, in their order, and one of the step, of launches that begin with a flush.

    Raises:
        RuntimeError: replays that differ in how many launches they have.
    """
    each, rest = divmod(len(launches), replays)
    if rest or each < 2:
        raise RuntimeError(f"{len(launches)} launches were traced, which are no {replays} replays of a step")
    ordered = sorted(launches, key=lambda launch: launch.begin)
    steps = [ordered[at + 1 : at + each] for at in range(0, len(ordered), each)]
    for index, same in enumerate(zip(*steps, strict=True)):
        us = median(launch.end - launch.begin for launch in same)
        yield {"what": "launch", "index": index, "kernel": same[0].name, "us": round(us, 2)}
    span = median(step[-1].end - step[0].begin for step in steps)
    yield {"what": "step", "launches": each - 1, "us": round(span, 2)}
