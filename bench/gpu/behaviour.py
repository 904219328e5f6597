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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss, rank_sort_loss

from ..contenders import focal_step
from ..problems import CASES, Problem, Size, as_dense, draw_problem
from .clock import capture
from .oracles import ALRP, AP, AP_PLAIN, LOSSES, RANK_SORT, difference
from .work import Context, Record, Skipped, Unit, explain

TRITON = ("triton_binned", "triton_tiled")
_REPEATS = 20


class Shard(NamedTuple):
    """Checks that one process does."""

    units: Callable[[Context], list[Unit]]
    slow: bool = False
    """Begins before others."""


def losses_of(loss: str, problem: Problem, **settings: Any) -> tuple[Tensor, ...]:
    """The parts of a loss of a problem."""
    logits, targets, errors, delta = problem
    settings["delta"] = delta
    if loss == ALRP:
        return alrp_loss(logits, targets, errors, **settings)[:2]
    if loss == RANK_SORT:
        return tuple(rank_sort_loss(logits, targets, 1 - errors.detach(), **settings))
    return (ap_loss(logits, targets, interpolate=loss == AP, num_positives=errors.numel(), **settings),)


def step_of(loss: str, problem: Problem, **settings: Any) -> tuple[Tensor, ...]:
    """Its parts and the gradients of their sum."""
    parts = losses_of(loss, problem, **settings)
    sources = [problem.logits, *([problem.box_errors] if loss == ALRP else [])]
    return *(part.detach() for part in parts), *torch.autograd.grad(sum(parts[1:], parts[0]), sources)


def record(name: str, passed: bool, **more: Any) -> Record:
    """A check that has no difference to tell."""
    return {"check": name, "passed": passed, **more}


def _problem(context: Context, seed: int = 0) -> Problem:
    size = Size("behaviour", 800, 8) if context.rehearse else Size("behaviour", 800_000, 300, 1.0, "mid-training")
    return draw_problem(size, context.device, torch.float32, seed)


def _losses(context: Context) -> tuple[str, ...]:
    return (ALRP, RANK_SORT) if context.rehearse else LOSSES


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
    """A step after the first two, with class indices, dense targets, and groups, which are known to wait."""
    problem = _problem(context)
    anchors = problem.logits.shape[0]
    images = torch.arange(anchors, device=context.device) * (2 if context.rehearse else 8) // anchors
    forms: dict[str, tuple[Problem, dict[str, Any]]] = {
        "class indices": (problem, {}),
        "dense targets": (as_dense(problem, torch.int64), {}),
        "groups": (problem, {"groups": images}),
    }
    for form, (given, more) in forms.items():
        for loss in _losses(context):
            step = partial(step_of, loss, given, backend=backend, **more)
            for _ in range(1 if context.rehearse else 2):
                step()
            waited = ""
            try:
                with _waiting_is_an_error(context):
                    step()
            except RuntimeError as error:
                waited = explain(error)
            known = {"known": "groups are read by the host"} if form == "groups" else {}
            passed = not waited or bool(known)
            yield record(f"{loss}: waits for nothing, {form}", passed, backend=backend, waited=waited, **known)


def _repeats(context: Context, backend: str) -> Iterator[Record]:
    """The same bits in every run, while something else is computed on another stream."""
    problem = _problem(context)
    times = 2 if context.rehearse else _REPEATS
    matrix = torch.rand(64 if context.rehearse else 4096, 64 if context.rehearse else 4096, device=context.device)
    other = None if context.rehearse else torch.cuda.Stream()
    for loss in _losses(context):
        first, same = step_of(loss, problem, backend=backend), 1
        for _ in range(times - 1):
            if other is not None:
                with torch.cuda.stream(other):
                    torch.mm(matrix, matrix)
            same += _equal(step_of(loss, problem, backend=backend), first)
        yield record(f"{loss}: the same bits, {times} times", same == times, backend=backend, same=same)


def _steps(context: Context) -> list[Unit]:
    of = {"waits": _waits, "repeats": _repeats}
    return [
        Unit(f"{name}, {backend}", partial(unit, context, backend)) for backend in TRITON for name, unit in of.items()
    ]


def _graphs(context: Context, backend: str, loss: str) -> Iterator[Record]:
    """Captured with one batch, replayed with another of as many positives: the bits of eager mode."""
    static, others = _problem(context), [_problem(context, seed) for seed in (1, 2)]
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
        for backend in TRITON
        for loss in _losses(context)
    ]


def _compiled(context: Context, loss: str) -> Iterator[Record]:
    torch.compiler.reset()
    problem = _problem(context)

    def total(logits: Tensor, targets: Tensor, errors: Tensor) -> Tensor:
        parts = losses_of(loss, Problem(logits, targets, errors, 1.0))
        return sum(parts[1:], parts[0])

    results: list[tuple[Tensor, ...]] = []
    begin = time.perf_counter()
    for function in (torch.compile(total, fullgraph=True, backend=context.compiler), total):
        value = function(*problem[:3])
        results.append((value.detach(), *torch.autograd.grad(value, problem.logits)))
        context.wait()
    off = max(difference(a, b.cpu().double().numpy()) for a, b in zip(*results, strict=True))
    seconds = time.perf_counter() - begin
    yield record(f"{loss}: torch.compile, one graph", off <= 1e-6, difference=off, tolerance=1e-6, seconds=seconds)


def _compiled_losses(context: Context) -> list[Unit]:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # there are others beside it
    losses = (ALRP,) if context.rehearse else (ALRP, RANK_SORT, AP_PLAIN)
    return [Unit(f"torch.compile of {loss}", partial(_compiled, context, loss)) for loss in losses]


def _compiled_focal(context: Context, case: str) -> Iterator[Record]:
    """The rival is what it is taken for, too; and compiled by now, for the step that takes its time."""
    torch.compiler.reset()
    size = Size("cases", 800, 8) if context.rehearse else Size("cases", *CASES[case], 1.0, "mid-training", case)
    problem = as_dense(draw_problem(size, context.device, torch.float32, context.seed), torch.int8)
    begin = time.perf_counter()
    compiled = focal_step(problem, context.compiler)()
    context.wait()
    seconds = time.perf_counter() - begin
    off = max(difference(a, b.cpu().double().numpy()) for a, b in zip(compiled, focal_step(problem)(), strict=True))
    yield record(f"focal loss compiled, {case}", off <= 1e-4, difference=off, tolerance=1e-4, seconds=seconds)


def _compiled_rivals(context: Context) -> list[Unit]:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    cases = ["ATSS"] if context.rehearse else CASES
    return [Unit(f"torch.compile of focal loss, {case}", partial(_compiled_focal, context, case)) for case in cases]


def _process_group(context: Context) -> Iterator[Record]:
    """A group of one, as every group begins: what it sends comes back, and nothing changes."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # there may be no other interface, and none is needed
    kind = "gloo" if context.rehearse else "nccl"
    if not context.rehearse:
        torch.cuda.set_device(0)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(kind, store=store, rank=0, world_size=1)
        problem = _problem(context)
        for backend in TRITON:
            for loss in _losses(context):
                alone, joint = (
                    step_of(loss, problem, backend=backend, process_group=group) for group in (None, "world")
                )
                off = max(difference(a, b.cpu().double().numpy()) for a, b in zip(joint, alone, strict=True))
                name = f"{loss}: in a process group of one over {kind}"
                yield record(name, off <= 1e-6, backend=backend, difference=off, tolerance=1e-6)
        dist.destroy_process_group()


def _assertion(context: Context, what: str) -> Iterator[Record]:
    """Misuse that the host cannot see without waiting stops the device; nothing else runs in this process then."""
    problem = _problem(context)
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


class Compilations:
    """Counts Triton's compilations by its own hooks, under which names they go in several versions, and their time."""

    def __init__(self) -> None:
        self.found: list[tuple[str, float]] = []
        self._begin = 0.0

    def __enter__(self) -> "Compilations":
        import triton

        knobs: Any = getattr(triton, "knobs", None)
        if knobs is not None:
            holder, before, after = knobs.runtime, "jit_cache_hook", "jit_post_compile_hook"
        else:  # until triton 3.3
            holder, before, after = triton.JITFunction, "cache_hook", "compiled_hook"
        self._holder, self._hooks = holder, (before, after)
        setattr(holder, before, self._before)
        setattr(holder, after, self._after)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            setattr(self._holder, hook, None)

    def _before(self, *_: Any, **__: Any) -> bool:
        self._begin = time.perf_counter()
        return False  # true would leave the compilation out

    def _after(self, *_: Any, fn: Any = None, **__: Any) -> bool:
        name = str(getattr(fn, "name", fn)).rpartition(".")[2]
        self.found.append((name, time.perf_counter() - self._begin))
        return False


def _compilations(context: Context, backend: str) -> Iterator[Record]:
    """Numbers of positives and of logits as they come in training: how many kernels are compiled on the way.

    It is known that some are, where the alignment of a buffer depends on P.
    """
    for loss in _losses(context):
        steps = 4 if context.rehearse else 60
        with Compilations() as all_of:
            first = 0
            slowest = 0.0
            for step in range(steps):
                positives = 8 + step if context.rehearse else 700 + 7 * step % 201
                anchors = 800 if context.rehearse else 200_000 + 80 * 37 * (step * 11 % 60)
                problem = draw_problem(Size("steps", anchors, positives), context.device, torch.float32, step)
                context.wait()
                begin = time.perf_counter()
                step_of(loss, problem, backend=backend)
                context.wait()
                if step == 2:
                    first = len(all_of.found)
                if step > 2:
                    slowest = max(slowest, time.perf_counter() - begin)
        late = all_of.found[first:]
        names = {name: sum(other == name for other, _ in late) for name, _ in late}
        yield {
            "what": "compilations",
            "loss": loss,
            "backend": backend,
            "interpreted": context.rehearse,
            "first_steps": first,
            "later": len(late),
            "seconds": sum(seconds for _, seconds in late),
            "slowest_step_s": slowest,
            "kernels": names,
        }


def _all_compilations(context: Context) -> list[Unit]:
    if context.attempt == 0:  # what other processes have compiled does not count as compiled
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="alrp-triton-compilations-")
    return [Unit(f"compilations, {backend}", partial(_compilations, context, backend)) for backend in TRITON]


def _group_of_one(context: Context) -> list[Unit]:
    if not dist.is_available():
        raise Skipped("this torch has no torch.distributed")
    return [Unit("process group of one", partial(_process_group, context))]


SHARDS = {
    "torch.compile": Shard(_compiled_losses, slow=True),
    "compilations": Shard(_all_compilations, slow=True),
    "focal loss": Shard(_compiled_rivals, slow=True),
    "steps": Shard(_steps),
    "graphs": Shard(_captures),
    "process group": Shard(_group_of_one),
    "assertions": Shard(_assertions),
}
