"""Every kernel and dtype against the oracle, on the device: shards by backend and dtype, so that they compile at once.

Shards of :mod:`.compiling`, :mod:`.behaviour` and :mod:`.extremes` run beside them.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.support.cases import FINITE, NOT_FINITE, Case, draw

from ..speed.problems import Size, as_dense, draw_problem
from . import behaviour, compiling, extremes
from .oracles import (
    ALRP,
    LOSSES,
    RANK_SORT,
    Comparison,
    Sample,
    compare,
    expected,
    ious_of,
    least_tolerance,
    measured,
)
from .work import Context, Record, Unit

BACKENDS = ("triton_binned", "triton_tiled", "torch")
DTYPES = ("float32", "bfloat16", "float16", "float64")
_OTHERS = "what else there is"  # of a rehearsal, in one process: to start one takes longer than what it does there
LARGE = 1e-5  # float32 sums over 1e6 negatives and 1e3 positives stay well below
INTEGERS = ("int64", "uint8", "int8", "int16", "int32", "uint16", "uint32", "uint64")
DENSE_TARGETS = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint16",
    "float16",
    "bfloat16",
    "float32",
    "float64",
)
_AT_DELTA_0 = ("random", "ties", "more_than_a_block", "wide_scores")
_REHEARSED = ("ties_at_knots", "one_pair", "no_positives", "nan_negative")
# Around the blocks of all kernels: 256 and 2048 columns, 512 and 1024, 16 anchors by 64 classes.
_SIZES = (1, 2, 3, 31, 33, 127, 255, 256, 257, 511, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4097, 10_007, 40_961)
_LARGE = (
    Size("large", 100_000, 50),
    Size("large", 1_000_000, 1, 1.0, "mid-training"),
    Size("large", 1_000_000, 300, 1.0, "initialisation"),
    Size("large", 1_000_000, 301, 0.0, "late"),
    Size("large", 2_000_080, 1500, 1.0, "mid-training"),
    Size("large", 3_000_000, 4000, 0.3),
)


class Target(NamedTuple):
    """What is checked: which backend, on what."""

    backend: str
    dtype: torch.dtype
    context: Context

    def put(self, array: Any, dtype: torch.dtype | None = None) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array)).to(self.context.device, dtype)

    def record(self, name: str, of: Comparison) -> Record:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"check": name, "backend": self.backend, "dtype": dtype, "passed": of.passed, **of._asdict()}


def shards(rehearse: bool) -> list[str]:
    """What takes longest to compile, then what matters most: no shard waits long for want of a process."""
    if rehearse:
        return ["torch.compile", _OTHERS, "triton_binned float32", "triton_tiled bfloat16", "torch float64"]
    of_backends = [f"{backend} {dtype}" for dtype in DTYPES for backend in BACKENDS]
    return [*compiling.SHARDS, *behaviour.SHARDS, *of_backends, *extremes.SHARDS]


def units(shard: str, context: Context) -> list[Unit]:
    """The checks of a shard."""
    others = compiling.SHARDS | behaviour.SHARDS | extremes.SHARDS
    if shard in others:
        return others[shard](context)
    if shard == _OTHERS:
        names = [name for name in others if name not in ("torch.compile", compiling.RIVALS)]
        return [unit for name in names for unit in others[name](context)]
    backend, dtype = shard.split()
    target = Target(backend, getattr(torch, dtype), context)
    cases = {**FINITE, **NOT_FINITE}
    names = _REHEARSED if context.rehearse else cases
    found = [Unit(f"case {name}", partial(_case, target, name, cases[name])) for name in names]
    if not context.rehearse:
        found += [
            Unit(f"case {name}, delta 0", partial(_case, target, f"{name}, delta 0", cases[name]._replace(delta=0.0)))
            for name in _AT_DELTA_0
        ]
    found += [Unit(f"offset {k}", partial(_alignments, target, k)) for k in context.some((1, 3, 2, 0), 2)]
    found.append(Unit("strides", partial(_strides, target)))
    if backend != "triton_tiled":
        found.append(Unit("groups", partial(_groups, target)))
    if dtype == "float32":
        found += [Unit(f"class indices {name}", partial(_classes, target, name)) for name in context.some(INTEGERS, 2)]
        found += [
            Unit(f"dense targets {name}", partial(_dense, target, name)) for name in context.some(DENSE_TARGETS, 2)
        ]
    large = [Size("large", 1600, 10, 1.0, "mid-training")] if context.rehearse else _LARGE
    return found + [Unit(f"N {size.anchors}, P {size.positives}", partial(_large, target, size)) for size in large]


def _sample(case: Case, dtype: torch.dtype, groups: Any = None) -> tuple[Sample, Tensor]:
    """A case with logits rounded to the dtype, so that the oracle sees what the package sees; and those logits."""
    logits = torch.as_tensor(case.logits).to(dtype)
    sample = Sample(logits.double().numpy(), case.targets, case.box_errors, case.delta, case.eps, groups)
    return sample, logits


def _against_oracle(
    target: Target,
    name: str,
    sample: Sample,
    logits: Tensor,
    targets: Tensor,
    losses: Sequence[str] = LOSSES,
    least: float = 0.0,
    **settings: Any,
) -> Iterator[Record]:
    """All losses of a problem; ``logits`` and ``targets`` are on the device, in the form that is checked."""
    for loss in losses:
        values = target.put(ious_of(sample.values) if loss == RANK_SORT else sample.values)
        values.requires_grad_(loss == ALRP)
        x, settings["backend"] = logits.detach().requires_grad_(), target.backend
        found = measured(loss, x, targets, values, sample.delta, sample.eps, **settings)
        yield target.record(f"{loss}: {name}", compare(found, expected(loss, sample), target.dtype, least))


def _case(target: Target, name: str, case: Case) -> Iterator[Record]:
    sample, logits = _sample(case, target.dtype)
    least = least_tolerance(name, target.backend, target.dtype, case.delta)
    where = target.context.device
    losses = LOSSES if name == _REHEARSED[0] else target.context.some(LOSSES, 1)
    yield from _against_oracle(target, name, sample, logits.to(where), target.put(case.targets), losses, least)


def _alignments(target: Target, offset: int) -> Iterator[Record]:
    """Inputs that begin so many elements into their memory, with NaN and marks around them that nobody may look at."""
    sizes = (1, 257) if target.context.rehearse else _SIZES
    for n in sizes:
        case = draw(n + offset, n, max(min(n // 20, 150), 1))
        sample, logits = _sample(case, target.dtype)
        around = {
            "logits": torch.full((n + 8,), torch.nan, dtype=target.dtype, device=target.context.device),
            "targets": torch.ones(n + 8, dtype=torch.int32, device=target.context.device),
        }
        x, t = (buffer[offset : offset + n] for buffer in around.values())
        x.copy_(logits)
        t.copy_(torch.as_tensor(case.targets))
        before = {name: buffer.clone() for name, buffer in around.items()}
        losses = target.context.some(LOSSES, 1) if n in (257, 1025, 2049) else LOSSES[:1]
        yield from _against_oracle(target, f"N {n}, offset {offset}", sample, x, t, losses)
        same = all(torch.equal(a.nan_to_num(9), before[name].nan_to_num(9)) for name, a in around.items())
        untouched = Comparison("inputs are as before", 0.0 if same else np.inf, 0.0)
        yield target.record(f"N {n}, offset {offset}: inputs", untouched)


def _strides(target: Target) -> Iterator[Record]:
    """Logits and targets permuted, as a head's output (B, C, H, W) is."""
    sample, logits = _sample(draw(0, 200 if target.context.rehearse else 1000, 20), target.dtype)
    shape = (10, -1, 5)
    x, t = (a.to(target.context.device).reshape(shape).permute(2, 0, 1) for a in (logits, target.put(sample.targets)))
    seen, marks = (a.reshape(shape).transpose(2, 0, 1) for a in (sample.logits, sample.targets))
    assert not x.is_contiguous()
    turned = sample._replace(logits=seen, targets=marks)
    yield from _against_oracle(target, "permuted", turned, x, t, target.context.some(LOSSES, 1))


def _groups(target: Target) -> Iterator[Record]:
    rng = np.random.default_rng(1)
    shape = (4, 30, 3)
    logits = torch.as_tensor(np.round(rng.normal(size=shape) * 8) / 8).to(target.dtype)
    targets = rng.choice([-1, 0, 1], shape, p=[0.1, 0.7, 0.2])
    targets[1] = np.minimum(targets[1], 0)  # an image without positives, and one without negatives
    targets[2] = np.where(targets[2] == 0, -1, targets[2])
    values = rng.uniform(0, 2, int((targets == 1).sum())).astype(np.float32)
    forms = {"an image": np.array([7, 3, -(2**40), 4]), "an anchor": rng.integers(0, 5, shape[:2])}
    if target.context.rehearse:
        forms["an image"][1:3] = 7
    for form, groups in target.context.some(list(forms.items()), 1):
        for delta in target.context.some((0.5, 0.0), 1):
            sample = Sample(logits.double().numpy(), targets, values, delta, groups=groups)
            x, t = logits.to(target.context.device), target.put(targets)
            name = f"groups, one {form}, delta {delta:g}"
            losses = target.context.some(LOSSES, 1)
            yield from _against_oracle(target, name, sample, x, t, losses, 2e-6, groups=target.put(groups))


def _classes(target: Target, integers: str) -> Iterator[Record]:
    """Class indices of every integer dtype, with background and ignore_index as they are and as the caller has them."""
    dtype, rng = getattr(torch, integers), np.random.default_rng(3)
    signed = integers.startswith("int")
    for shape, classes in (((3, 4, 5), 7), ((3000,), 80), ((50,), 1), ((40,), 130)):
        if target.context.rehearse and shape != (3, 4, 5):
            continue
        settings = ((classes + 3, classes + 2), (None, -1), (0, classes + 1))
        for background, ignored in target.context.some(settings, 1):
            nothing = classes if background is None else background
            largest = max(nothing, ignored)
            if (not signed and ignored < 0) or largest > torch.iinfo(dtype).max:
                continue
            of = np.full(np.prod(shape), nothing)
            somewhere = rng.permutation(of.size)
            count = min(of.size // 2, 60)  # the oracle compares each with all
            of[somewhere[:count]] = rng.choice(
                [c for c in range(min(classes, 100)) if c != nothing] or [nothing], count
            )
            of[somewhere[count : count + 5]] = ignored
            of = of.reshape(shape)
            dense = np.where((of == ignored)[..., None], -1, np.zeros((*shape, classes), np.int64))
            positive = (of != ignored) & (of != nothing)
            dense[(*np.nonzero(positive), of[positive])] = 1
            values = rng.uniform(0, 2, int((dense == 1).sum())).astype(np.float32)
            logits = torch.as_tensor(rng.normal(size=dense.shape)).float()
            sample = Sample(logits.double().numpy(), dense, values)
            indices = torch.as_tensor(of).to(dtype).to(target.context.device)
            name = f"classes {integers}, {shape} of {classes}, background {background}, ignored {ignored}"
            losses = target.context.some(LOSSES, 1) if integers == "int64" else LOSSES[:1]
            x = logits.to(target.context.device)
            what: dict[str, Any] = {"background": background, "ignore_index": ignored}
            yield from _against_oracle(target, name, sample, x, indices, losses, **what)


def _dense(target: Target, kind: str) -> Iterator[Record]:
    dtype = getattr(torch, kind)
    case = draw(1, 300 if target.context.rehearse else 5003, 20, ignored=0.2 if dtype.is_signed else 0.0)
    sample, logits = _sample(case, target.dtype)
    targets = torch.as_tensor(case.targets).to(dtype).to(target.context.device)
    yield from _against_oracle(target, f"dense {kind}", sample, logits.to(targets.device), targets, LOSSES[:1])


def _large(target: Target, size: Size) -> Iterator[Record]:
    """Too large for the oracle's matrix: against the torch backend in float64, with class indices and dense targets."""
    problem = draw_problem(size, target.context.device, target.dtype, target.context.seed)
    dense = as_dense(problem, torch.int8)
    for loss in target.context.some(LOSSES, 1):
        values = problem.box_errors.detach()
        given = (1 - values).clamp(min=0.01) if loss == RANK_SORT else values.clone().requires_grad_()
        exact = problem.logits.detach().double().requires_grad_()
        wanted = measured(loss, exact, problem.targets, given, size.delta, backend="torch")
        wanted = {name: value.detach().cpu().numpy() for name, value in wanted.items()}
        for form, x, targets in (("classes", problem.logits, problem.targets), ("dense", dense.logits, dense.targets)):
            found = measured(loss, x, targets, given, size.delta, backend=target.backend)
            name = f"{loss}: N {size.anchors}, P {size.positives}, {size.scores}, delta {size.delta:g}, {form}"
            yield target.record(name, compare(found, wanted, target.dtype, LARGE))
