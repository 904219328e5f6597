"""What a loss does besides being right: it waits for nothing, is captured, compiled, repeatable, and asserts.

Shards of correctness.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..speed.problems import Problem, as_dense
from .clock import capture
from .losses import TRITON, losses_to_try, problem_of, record, step_of
from .oracles import ALRP, difference
from .work import Context, Record, Skipped, Unit, explain

_REPEATS = 20


def _equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@contextmanager
def _waiting_is_an_error(context: Context) -> Generator[None, None, None]:
    """An operation of torch that waits for the device raises, on any thread."""
    if context.rehearse:
        yield
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says of itself that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _waits(context: Context, backend: str) -> Iterator[Record]:
    """A step after the first two, with class indices, dense targets, and groups."""
    problem = problem_of(context)
    anchors = problem.logits.shape[0]
    images = torch.arange(anchors, device=context.device) * (2 if context.rehearse else 8) // anchors
    forms: dict[str, tuple[Problem, dict[str, Any]]] = {
        "class indices": (problem, {}),
        "dense targets": (as_dense(problem, torch.int64), {}),
    }
    if backend != "triton_tiled":
        forms["groups"] = problem, {"groups": images}
    for form, (given, more) in forms.items():
        for loss in losses_to_try(context):
            step = partial(step_of, loss, given, backend=backend, **more)
            for _ in range(1 if context.rehearse else 2):
                step()
            waited = ""
            try:
                with _waiting_is_an_error(context):
                    step()
            except RuntimeError as error:
                waited = explain(error)
            yield record(f"{loss}: waits for nothing, {form}", not waited, backend=backend, waited=waited)


def _repeats(context: Context, backend: str) -> Iterator[Record]:
    """The same bits in every run, while something else is computed on another stream."""
    problem = problem_of(context)
    times = 2 if context.rehearse else _REPEATS
    matrix = torch.rand(64 if context.rehearse else 4096, 64 if context.rehearse else 4096, device=context.device)
    other = None if context.rehearse else torch.cuda.Stream()
    for loss in losses_to_try(context):
        first, same = step_of(loss, problem, backend=backend), 1
        for _ in range(times - 1):
            if other is not None:
                with torch.cuda.stream(other):
                    torch.mm(matrix, matrix)
            same += _equal(step_of(loss, problem, backend=backend), first)
        yield record(f"{loss}: the same bits, {times} times", same == times, backend=backend, same=same)


def _steps(context: Context) -> list[Unit]:
    found: list[Unit] = []
    for backend in context.some(TRITON, 1):
        found.append(Unit(f"waits, {backend}", partial(_waits, context, backend)))
        found.append(Unit(f"repeats, {backend}", partial(_repeats, context, backend)))
    return found


def _graphs(context: Context, backend: str, loss: str) -> Iterator[Record]:
    """Captured with one batch, replayed with another of as many positives: the bits of eager mode."""
    static, others = problem_of(context), [problem_of(context, seed) for seed in (1, 2)]
    step = partial(step_of, loss, static, backend=backend)
    replay: Callable[[], Any] = step if context.rehearse else capture(step)
    same = 0
    for other in others:
        with torch.no_grad():
            for mine, theirs in zip(static[:3], other[:3], strict=True):
                mine.copy_(theirs)
        replayed = tuple(tensor.clone() for tensor in replay())
        same += _equal(replayed, step_of(loss, other, backend=backend))
    yield record(f"{loss}: captured in a graph, replayed on new data", same == len(others), backend=backend)


def _captures(context: Context) -> list[Unit]:
    return [
        Unit(f"graph of {loss}, {backend}", partial(_graphs, context, backend, loss))
        for backend in context.some(TRITON, 1)
        for loss in losses_to_try(context)
    ]


def _process_group(context: Context) -> Iterator[Record]:
    """A group of one, as every group begins: what it sends comes back, and nothing changes."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # there may be no other interface, and none is needed
    kind = "gloo" if context.rehearse else "nccl"
    if not context.rehearse:
        torch.cuda.set_device(0)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(kind, store=store, rank=0, world_size=1)
        problem = problem_of(context)
        for backend in context.some(TRITON, 1):
            for loss in losses_to_try(context):
                alone, joint = (
                    step_of(loss, problem, backend=backend, process_group=group) for group in (None, "world")
                )
                off = max(difference(a, b.cpu().double().numpy()) for a, b in zip(joint, alone, strict=True))
                name = f"{loss}: in a process group of one over {kind}"
                yield record(name, off <= 1e-6, backend=backend, difference=off, tolerance=1e-6)
        dist.destroy_process_group()


def _assertion(context: Context, what: str) -> Iterator[Record]:
    """Misuse that the host cannot see without waiting stops the device; nothing else runs in this process then."""
    problem = problem_of(context)
    if what == "one box error too many":
        errors = torch.cat([problem.box_errors.detach(), problem.box_errors.new_zeros(1)])
        problem = problem._replace(box_errors=errors.requires_grad_())
    else:
        problem.targets[7] = 1234
    seen = "no error"
    begin = time.perf_counter()
    try:
        step_of(ALRP, problem, backend="triton")
        enqueued = time.perf_counter() - begin
        context.wait()
    except (RuntimeError, ValueError) as error:
        seen, enqueued = explain(error), time.perf_counter() - begin
    wanted = ("ValueError",) if context.rehearse else ("device-side assert",)
    passed = any(text in seen for text in wanted)
    yield record(f"an assertion of the device: {what}", passed, seen=seen, seconds=enqueued)


def _assertions(context: Context) -> list[Unit]:
    of = ("one box error too many", "a target that means nothing")
    return [Unit(f"assertion: {what}", partial(_assertion, context, what)) for what in of]


def _group_of_one(context: Context) -> list[Unit]:
    if not dist.is_available():
        raise Skipped("this torch has no torch.distributed")
    return [Unit("process group of one", partial(_process_group, context))]


SHARDS = {"steps": _steps, "graphs": _captures, "process group": _group_of_one, "assertions": _assertions}
