"""What is compiled: losses and their rival by torch.compile, and Triton's kernels while sizes change.

Shards of correctness.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..speed.contenders import focal_step
from ..speed.problems import CASES, Problem, Size, as_dense, draw_problem
from .losses import TRITON, losses_of, losses_to_try, problem_of, record, step_of
from .oracles import ALRP, AP_PLAIN, RANK_SORT, difference
from .work import Context, Record, Unit

RIVALS = "focal loss"


def _compiled(context: Context, loss: str) -> Iterator[Record]:
    torch.compiler.reset()
    problem = problem_of(context)

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
    units = [Unit(f"torch.compile of {loss}", partial(_compiled, context, loss)) for loss in losses]
    # A rehearsal does what else is compiled in the same process: to make one ready for it takes longest.
    return units + (_compiled_rivals(context) if context.rehearse else [])


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
        self._holder, self._hooks = holder, {name: getattr(holder, name) for name in (before, after)}
        setattr(holder, before, self._before)
        setattr(holder, after, self._after)
        return self

    def __exit__(self, *_: object) -> None:
        for name, hook in self._hooks.items():
            setattr(self._holder, name, hook)

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
    for loss in losses_to_try(context):
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
    return [
        Unit(f"compilations, {backend}", partial(_compilations, context, backend))
        for backend in context.some(TRITON, 1)
    ]


SHARDS = {"torch.compile": _compiled_losses, "compilations": _all_compilations, RIVALS: _compiled_rivals}
"""What takes longest; to be begun first."""
