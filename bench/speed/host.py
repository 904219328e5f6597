"""What a training step of the losses costs the host, beside sigmoid focal loss: the GPU path without its GPU; the CPU.

**The GPU path** runs on small tensors of the CPU, and every launch of a Triton kernel by a stub that does nothing: what
is left is what the host does to feed a GPU, but for the launches themselves, which are counted. What torch computes
between them is of size P, so small that it is the host's work, too; focal loss is computed whole, on as few logits.

**The CPU's path** is the whole loss, as it is.
"""

import os
import re
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from itertools import chain, product, repeat
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss, rank_sort_loss
from alrp_triton.dispatch import Backend

from ..run import ROOT, describe_run
from ..tables import commit, number, table
from .contenders import ALRP, AP, FOCAL, RANK_SORT, backends, ious_of
from .inside import Count, filled, stubs
from .problems import Problem, Size, as_dense, classes_of, draw_problem

SMALL = Size("host", 640, 16)  # so few that no operation's time is that of its numbers
SIZES = tuple(Size("host", *of) for of in ((1_000, 10), (10_000, 1_000), (100_000, 100), (100_000, 1_000)))
IMAGES = 16  # ranked apart
STUBBED, CPU = "GPU path, launches stubbed", "CPU"
CLASSES, DENSE, GROUPS = "class indices", "dense int64", f"class indices, {IMAGES} groups"
WARM_UP = 70  # steps; in its first 64 calls a loss still looks for what may be a mistake
TURNS, CALLS = 1000, 5
INSTRUCTIONS_OF = ("triton_binned", CLASSES)

Step = Callable[[], Any]
Name = tuple[str, str, str]  # loss, backend, form of the targets


@dataclass
class Row:
    """A step's time, or why there is none."""

    path: str
    logits: int
    positives: int
    classes: int
    loss: str
    backend: str
    targets: str
    launches: int | None = None  # of Triton kernels
    operations: int | None = None  # others, for which torch launches a kernel
    quartiles_us: list[float] | None = None
    per_focal: float | None = None  # median by the median of focal loss in the same turns
    filling_us: float = 0.0  # contained in the time, see filled()
    skipped: str = ""


@contextmanager
def _one_thread() -> Generator[None]:
    """On so few numbers others do nothing but wait, and a thread that waits disturbs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def price_of_filling(calls: int = 500) -> float:
    """Microseconds an allocation."""
    zeros, empty = (min(timeit.repeat(partial(of, SMALL.anchors), number=calls)) for of in (torch.zeros, torch.empty))
    return 1e6 * max(0.0, zeros - empty) / calls


def _draw(size: Size) -> Problem:
    return draw_problem(size, torch.device("cpu"), torch.float32, seed=0)


def losses(problem: Problem, backend: Backend, groups: Tensor | None = None) -> dict[str, Step]:
    """A training step of each loss: forward, and backward to all that wants a gradient."""
    logits, targets, errors, _ = problem
    ious, count, grad = ious_of(problem), errors.numel(), torch.autograd.grad
    return {
        ALRP: lambda: grad(
            alrp_loss(logits, targets, errors, groups=groups, backend=backend).total, (logits, errors)
        ),
        AP: lambda: grad(ap_loss(logits, targets, num_positives=count, groups=groups, backend=backend), logits),
        RANK_SORT: lambda: grad(rank_sort_loss(logits, targets, ious, groups=groups, backend=backend).total, logits),
    }  # fmt: skip


def focal(problem: Problem) -> Step:
    """The same of focal loss, of dense targets in the dtype that it takes."""
    from torchvision.ops import sigmoid_focal_loss

    logits, wanted, errors, _ = as_dense(problem, torch.float32)
    count = errors.numel()
    return lambda: torch.autograd.grad(sigmoid_focal_loss(logits, wanted, reduction="sum") / count, logits)


def stubbed_steps() -> dict[Name, Step]:
    """Focal loss, and all that is run on the GPU path."""
    problem = _draw(SMALL)
    steps: dict[Name, Step] = {(FOCAL, "", DENSE): focal(problem)}
    forms = {CLASSES: problem, DENSE: as_dense(problem, torch.int64)}
    names: tuple[Backend, ...] = ("triton_tiled", "triton_binned")
    for backend, (form, one) in product(names, forms.items()):
        steps |= {(loss, backend, form): step for loss, step in losses(one, backend).items()}
    apart = problem._replace(
        logits=problem.logits.detach().unflatten(0, (IMAGES, -1)).requires_grad_(),
        targets=problem.targets.unflatten(0, (IMAGES, -1)),
    )
    steps[ALRP, "triton_binned", GROUPS] = losses(apart, "triton_binned", torch.arange(IMAGES))[ALRP]
    return steps


def take_turns(steps: dict[Name, Step], turns: int, warm_up: int) -> dict[Name, list[float]]:
    """Quartiles of the time of each in microseconds, one step of each in a turn."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    times: dict[Name, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            start = time.perf_counter_ns()
            result = step()
            times[name].append(1e-3 * (time.perf_counter_ns() - start))
            del result  # not before the clock has stopped
    return {name: statistics.quantiles(of, n=4) for name, of in times.items()}


def _rows(path: str, size: Size, quartiles: dict[Name, list[float]]) -> dict[Name, Row]:
    of_focal = next(of for (loss, *_), of in quartiles.items() if loss == FOCAL)
    row = partial(Row, path, size.anchors, size.positives, classes_of(size))
    return {name: row(*name, quartiles_us=of, per_focal=of[1] / of_focal[1]) for name, of in quartiles.items()}


def stubbed(turns: int) -> list[Row]:
    """Rows of the GPU path."""
    steps, price = stubbed_steps(), price_of_filling()
    counts, launches, skipped = dict[Name, Count](), dict[Name, int](), list[Row]()
    with stubs() as stub, _one_thread():
        for name, step in list(steps.items()):
            before = stub.launches
            with Count() as counts[name]:
                step()
            launches[name] = stub.launches - before
            if waits := sorted(set(counts[name].waits)):  # and goes another way by values which no kernel has computed
                why = f"the host waits for values: {', '.join(waits)}"
                skipped.append(Row(STUBBED, SMALL.anchors, SMALL.positives, classes_of(SMALL), *name, skipped=why))
                del steps[name]
        with filled():
            rows = _rows(STUBBED, SMALL, take_turns(steps, turns, WARM_UP))
    for name, row in rows.items():
        row.launches, row.operations = launches[name], counts[name].operations
        row.filling_us = 0.0 if row.loss == FOCAL else price * counts[name].allocations
    return [*rows.values(), *skipped]


def on_cpu(size: Size, turns: int) -> list[Row]:
    """Rows of the CPU's path at a size."""
    problem = _draw(size)
    steps: dict[Name, Step] = {(FOCAL, "", DENSE): focal(problem)}
    for backend in backends():
        steps |= {(loss, backend, CLASSES): step for loss, step in losses(problem, backend).items()}
    return list(_rows(CPU, size, take_turns(steps, turns, 3)).values())


def _counted_steps() -> dict[str, Step]:
    return {loss: step for (loss, *of), step in stubbed_steps().items() if loss == FOCAL or (*of,) == INSTRUCTIONS_OF}


def under_callgrind() -> None:
    """What :func:`instructions` runs: a part of callgrind's output for each loss, of so many steps."""
    with ExitStack() as stack:
        for context in (stubs(), filled(), _one_thread()):
            stack.enter_context(context)
        steps = _counted_steps().values()
        for step in chain(*(repeat(step, WARM_UP) for step in steps)):
            step()
        subprocess.run(["callgrind_control", "--instr=on", str(os.getpid())], check=True)
        bindings: Any = import_module("torch._C")
        for step in steps:
            bindings._valgrind_toggle()
            for _ in range(CALLS):
                step()
            bindings._valgrind_toggle_and_dump_stats()
    os._exit(0)  # for to end in order, under valgrind, takes as long as all the steps


def instructions() -> dict[str, int]:
    """Instructions of a step on the GPU path, launches stubbed, by valgrind: what else a machine does is no matter.

    ``Timer.collect_callgrind`` of torch.utils.benchmark gives the same, but has valgrind instrument the imports, too,
    which takes five minutes in place of one.
    """
    with TemporaryDirectory() as folder:
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
        code = "from bench.host import under_callgrind; under_callgrind()"
        subprocess.run(
            [*valgrind, f"--callgrind-out-file={folder}/out", sys.executable, "-c", code],
            cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "0"}, capture_output=True, check=True,
        )  # fmt: skip
        names = list(_counted_steps())
        totals = [
            re.search(r"^totals: (\d+)", Path(folder, f"out.{1 + i}").read_text(), re.M) for i in range(len(names))
        ]
    return {name: int(total[1]) // CALLS for name, total in zip(names, totals, strict=True) if total}


def measure(turns: int, count_instructions: bool) -> dict[str, Any]:
    """All of it, to be stored."""
    run = describe_run(torch.device("cpu"))
    if run["load_average_before"] > 0.5 and run["omp_wait_policy"] != "PASSIVE":
        print(
            "Others are using this machine: with OMP_WAIT_POLICY=PASSIVE no thread spins for theirs.", file=sys.stderr
        )
    report: dict[str, Any] = {"run": run, "settings": {"turns": turns}}
    rows = stubbed(turns)
    for size in SIZES:
        rows += on_cpu(size, max(2, turns // 10))
    report["rows"] = [asdict(row) for row in rows]
    if count_instructions and not which("valgrind"):
        print("There is no valgrind, so no instructions are counted.", file=sys.stderr)
    elif count_instructions:
        report["instructions"] = instructions()
    return report


def _line(row: Row) -> list[str]:
    low, median, high = map(number, row.quartiles_us or [None] * 3)
    counts = [str(row.launches), str(row.operations)] if row.quartiles_us else ["", ""]
    sizes = [f"{row.logits:,}", f"{row.positives:,}", str(row.classes)]
    times = [row.skipped or f"{median} ({low} to {high})", number(row.per_focal)]
    return [row.loss, row.backend, row.targets, *(sizes if row.path == CPU else counts), *times]


def markdown(report: dict[str, Any]) -> str:
    """All tables."""
    run, rows = report["run"], [Row(**row) for row in report["rows"]]
    parts = [
        f"{run['device']}, {run['cores']} cores, torch threads: {run['threads']}, OMP_WAIT_POLICY "
        f"{run['omp_wait_policy']}, load average {run['load_average_before']} before the run, torch {run['torch']}, "
        f"triton {run['triton']}, numba {run['numba']}, Python {run['python']}, {commit(run)}. Forward + backward, "
        f"{report['settings']['turns']} turns on the GPU path (N = {SMALL.anchors}, P = {SMALL.positives}, one thread; "
        f"to fill what no kernel has written is up to {max(row.filling_us for row in rows):.1f} µs of it), a tenth on "
        "the CPU's."
    ]
    for path, what in ((STUBBED, ("launches", "other operations")), (CPU, ("N", "P", "classes"))):
        head = ["loss", "backend", "targets", *what, "µs (quartiles)", "/ focal"]
        parts.append(f"## {path}\n\n{table(head, [_line(row) for row in rows if row.path == path], left=3)}")
    if "instructions" in report:
        counts: dict[str, int] = report["instructions"]
        lines = [[name, f"{count:,}", number(count / counts[FOCAL])] for name, count in counts.items()]
        title = f"## Instructions of a step ({STUBBED}; {', '.join(INSTRUCTIONS_OF)})"
        parts.append(f"{title}\n\n{table(['loss', 'instructions', '/ focal'], lines)}")
    return "\n\n".join(parts)
