"""Time of forward and backward, of the package's backends and of what else one could do, size by size.

At a size contenders take turns, sample by sample, so that ratios come from the same seconds of the same clocks. The
sizes that matter most come first: a short run has those.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrp_triton import alrp_loss
from alrp_triton.cost import prefer_binned

from ..speed import baselines
from ..speed.contenders import BUCKETED, DENSE, FLOOR, FOCAL, FOCAL_COMPILED, LOOP, Contender, copy, focal, take_step
from ..speed.problems import CASES, Problem, Size, as_dense, draw_problem
from ..speed.timing import peak_memory
from .clock import Clock, Step, Timer, Timing, quantiles
from .oracles import GRADIENT
from .work import Context, Record, Unit, explain

AUTO, TILED, BINNED, TORCH = "auto", "triton_tiled", "triton_binned", "torch"
OURS = (AUTO, TILED, BINNED)
WAITING = (TORCH, LOOP, DENSE, BUCKETED)
"""They wait for the device, most for how many entries a mask selects: neither a backlog nor a graph is possible."""
LOOP_PAIRS = 30_000_000_000  # the published loop is left out beyond: some seconds a step
_PAIR_BYTES = 20  # of the dense matrix and what is made of it, at its peak

_SAMPLES, _SECONDS, _MIN_SAMPLES = 30, 0.3, 3
"""Turns of a contender at a size, fewer where they used up so much time, but some."""


class Setup(NamedTuple):
    """What is timed at once."""

    size: Size
    contenders: tuple[str, ...]
    dtype: str = "float32"
    form: str = "classes"
    """Of the targets of our backends: class indices, or dense targets of a dtype."""

    @property
    def name(self) -> str:
        size = self.size
        what = f"{size.case or size.group}, N {size.anchors}, P {size.positives}, {size.scores}"
        return f"{what}, {self.dtype}, {self.form}"


_ALL = (*OURS, TORCH, FOCAL, FOCAL_COMPILED, LOOP, DENSE, BUCKETED, FLOOR)
_SOME = (*OURS, FOCAL, FLOOR)
_FIRST = ("ATSS", "RetinaNet", "DETR, a decoder layer", "Faster R-CNN, RPN", "Faster R-CNN, head")
_GRID_N, _GRID_P = (100_000, 400_000, 1_000_000, 4_000_000, 16_000_000), (10, 30, 60, 100, 150, 220, 400, 1000)


def _case(case: str, scores: str = "mid-training", group: str = "cases") -> Size:
    return Size(group, *CASES[case], 1.0, scores, case)


def setups(rehearse: bool) -> list[Setup]:
    """All that is timed, the most important first."""
    if rehearse:
        return [
            Setup(Size("cases", 800, 8, 1.0, "mid-training", "ATSS"), (*OURS, FOCAL, FOCAL_COMPILED, LOOP, FLOOR)),
            Setup(Size("distributions", 800, 8, 1.0, "late", "RetinaNet"), (TILED, FLOOR), "bfloat16", "int8"),
            *(Setup(Size("anchors", n, 8, 1.0, "mid-training"), (TILED, FLOOR)) for n in (400, 800)),
            Setup(Size("positives", 800, 12, 1.0, "mid-training"), (TILED, FLOOR)),
            *(Setup(Size("crossover", n, p, 1.0, "mid-training"), (TILED, BINNED)) for n, p in ((400, 4), (400, 8))),
        ]
    rest = [case for case in CASES if case not in (*_FIRST, "LVIS, ATSS")]
    found = [Setup(_case(case), _ALL) for case in (*_FIRST, *rest)]
    kinds = [
        ("initialisation", "classes"),
        ("late", "classes"),
        *(("mid-training", form) for form in ("int64", "int8")),
    ]
    found += [
        Setup(_case("RetinaNet", scores, "distributions"), _SOME, dtype, form)
        for dtype, more in (("float32", []), ("bfloat16", [("mid-training", "classes")]))
        for scores, form in (*more, *kinds)
    ]
    found.append(Setup(_case("ATSS", "mid-training", "distributions"), _SOME, "bfloat16"))
    sweep = partial(Size, delta=1.0, scores="mid-training")
    found += [Setup(sweep("anchors", n, 1000), (*_SOME, BUCKETED)) for n in (1_000_000, 10_000_000, 100_000, 10_000)]
    found += [Setup(sweep("positives", 10_000_000, p), _SOME) for p in (10, 100, 1000, 10_000, 100_000)]
    found += [Setup(sweep("crossover", n, p), (TILED, BINNED)) for n in _GRID_N for p in _GRID_P]
    found += [Setup(_case("LVIS, ATSS"), _SOME), Setup(sweep("anchors", 100_000_000, 1000), _SOME)]
    return [*found, Setup(sweep("anchors", 100_000_000, 1000), _SOME, "bfloat16")]


def shards(rehearse: bool) -> list[str]:
    """One: nothing else may run beside it."""
    return ["all"]


def units(shard: str, context: Context) -> list[Unit]:
    """A unit a size."""
    session = Session(context)
    return [Unit(setup.name, partial(session.measure, setup)) for setup in setups(context.rehearse)]


@dataclass
class Entry:
    """A contender at a size, and what was found of it."""

    step: Contender
    bytes: int
    timer: Timer | None = None
    graph: Timer | None = None
    samples: list[Timing] = field(default_factory=list[Timing])
    replays: list[Timing] = field(default_factory=list[Timing])
    peak_mib: float | None = None
    result: Any = None
    missing: str = ""
    """Why there is no time."""
    no_graph: str = ""


class Session:
    """What is kept from size to size."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.clock: Clock | None = None  # which takes memory on the device: not before it is needed
        self.compile_seconds = 0.0
        self.failed: list[Exception] = []
        """Of ours, at this size."""
        self.no_graphs = ""
        """Why no step is captured any more."""

    def measure(self, setup: Setup) -> Iterator[Record]:
        """A row for each contender; what ours raised is raised after them."""
        self.failed.clear()
        self.clock = self.clock or Clock(self.context.device)
        dtype = getattr(torch, setup.dtype)
        problem = draw_problem(setup.size, self.context.device, dtype, self.context.seed)
        entries = self._enter(setup, problem)
        for name, entry in entries.items():
            if not entry.missing:
                self._try(name, entry, partial(self._warm_up, self.clock, name, entry, problem))
        self._agree(entries, dtype, setup.size.positives)
        self._take_turns(entries, "timer", "samples")
        for name, entry in entries.items():
            if not entry.missing:
                self._capture(self.clock, name, entry)
        self._take_turns(entries, "graph", "replays")
        for name, entry in entries.items():
            yield self._row(setup, name, entry)
        entries.clear()
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.failed:
            raise self.failed[0]

    def _enter(self, setup: Setup, problem: Problem) -> dict[str, Entry]:
        own = problem if setup.form == "classes" else as_dense(problem, getattr(torch, setup.form))
        flat = own if setup.form == "int64" else as_dense(problem, torch.int64)
        n, p = setup.size.anchors, setup.size.positives
        moved = 3 * n * problem.logits.element_size()  # logits read twice, gradient written
        entries: dict[str, Entry] = {}
        ways = {LOOP: "loop", DENSE: "dense", BUCKETED: "bucketed"}
        for name in setup.contenders:
            step: Contender
            missing = ""
            if name in (*OURS, TORCH):
                step = partial(take_step, partial(alrp_loss, backend=name), own)
            elif name in ways:
                step = partial(take_step, partial(baselines.alrp_loss, how=ways[name]), flat)
                missing = self._left_out(name, n * p)
            elif name == FLOOR:
                step = copy(problem)
            else:
                step = focal(flat, self.context.compiler if name == FOCAL_COMPILED else "")
                if name == FOCAL_COMPILED and self.compile_seconds > 0.1 * max(self.context.left, 1.0):
                    missing = "no time to compile it"
            entries[name] = Entry(step, moved, missing=missing)
        return entries

    def _left_out(self, name: str, pairs: int) -> str:
        if name == LOOP and pairs > LOOP_PAIRS:
            return f"more than {LOOP_PAIRS:.0e} pairs"
        if name == DENSE and self.context.device.type == "cuda":
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            if pairs * _PAIR_BYTES > free:
                return f"does not fit: {pairs * _PAIR_BYTES >> 30} GiB"
        return ""

    def _try(self, name: str, entry: Entry, act: Callable[[], object]) -> None:
        """What one contender raises does not keep the others from being timed."""
        try:
            act()
        except torch.cuda.OutOfMemoryError:
            entry.missing = "out of memory"
            torch.cuda.empty_cache()
        except Exception as error:
            entry.missing = explain(error)
            if name in (*OURS, TORCH):
                self.failed.append(error)

    def _warm_up(self, clock: Clock, name: str, entry: Entry, problem: Problem) -> None:
        """Compiles, and keeps what came out for :meth:`_agree`."""
        begin = time.perf_counter()
        if name == FOCAL_COMPILED:
            torch.compiler.reset()
        try:
            entry.result = entry.step()
            self.context.wait()
        finally:
            if name == FOCAL_COMPILED:
                self.compile_seconds = time.perf_counter() - begin
        entry.peak_mib = peak_memory(entry.step, problem)
        entry.timer = clock.timer(entry.step, name in WAITING)

    def _agree(self, entries: dict[str, Entry], dtype: torch.dtype, positives: int) -> None:
        """Sets ``result`` to the largest difference of the gradient from that of the first of ours.

        Sums over positives are float32 in some, in any order: their errors grow as the root of the number of terms.
        """
        first: Tensor | None = None
        for name, entry in entries.items():
            step, entry.result = entry.result, None
            if step is None or name == BUCKETED:  # no loss of ours; an approximation
                continue
            gradient: Tensor = step.grad_logits.reshape(-1)
            if first is None:
                first = gradient
            entry.result = float((gradient - first).abs().max().double() / first.abs().max().double())
        self.tolerance = max(1e-5, GRADIENT[dtype], 1e-7 * positives**0.5)

    def _take_turns(self, entries: dict[str, Entry], timer: str, samples: str) -> None:
        for _ in range(1 if self.context.rehearse else _SAMPLES):
            for name, entry in entries.items():
                by: Timer | None = getattr(entry, timer)
                if by is None or entry.missing:
                    continue
                taken: list[Timing] = getattr(entry, samples)
                spent = sum(max(one.device_ms, one.host_ms) for one in taken) / 1e3
                if len(taken) < _MIN_SAMPLES or (spent < _SECONDS and self.context.left > 0):
                    self._try(name, entry, lambda by=by, taken=taken: taken.append(by.take()))

    def _capture(self, clock: Clock, name: str, entry: Entry) -> None:
        if name in WAITING:
            entry.no_graph = "the host waits for the device"
        elif name == FOCAL_COMPILED:
            entry.no_graph = "not tried"
        elif self.context.attempt > 1:
            entry.no_graph = "not tried, for processes had crashed"
        elif self.no_graphs:
            entry.no_graph = f"not tried, for a capture had failed: {self.no_graphs}"
        else:
            try:
                step: Step = clock.capture(entry.step)
                step()
                entry.graph = clock.timer(step)
            except torch.cuda.OutOfMemoryError:
                entry.no_graph = "out of memory"
                torch.cuda.empty_cache()
            except RuntimeError as error:
                entry.no_graph = self.no_graphs = explain(error)

    def _row(self, setup: Setup, name: str, entry: Entry) -> Record:
        size = setup.size._asdict()
        row: Record = {**size, "dtype": setup.dtype, "targets": setup.form, "contender": name}
        if entry.missing:
            return row | {"missing": entry.missing}
        device = quantiles([one.device_ms for one in entry.samples])
        row |= {
            "samples": len(entry.samples),
            "device_ms": device,
            "host_ms": quantiles([one.host_ms for one in entry.samples]),
            "backlog": all(one.backlog for one in entry.samples),
            "graph_ms": quantiles([one.device_ms for one in entry.replays]) if entry.replays else None,
            "no_graph": entry.no_graph,
            "peak_mib": entry.peak_mib,
            "gb_per_s": entry.bytes / device[1] / 1e6,
            "difference": entry.result,
        }
        if name in (TILED, BINNED):
            row["expected"] = BINNED if prefer_binned(setup.size.positives, setup.size.anchors) else TILED
        if entry.result is not None and not entry.result <= self.tolerance:
            row["disagrees"] = True
        return row
