"""Each loss of the family as the package computes it, and as the oracle does, under the same names; how they differ."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss, rank_sort_loss
from alrp_triton.functional import EPS
from reference import dense

ALRP, AP, AP_PLAIN, RANK_SORT = "aLRP", "AP", "AP, not interpolated", "Rank & Sort"
LOSSES = (ALRP, AP, AP_PLAIN, RANK_SORT)

# Half a unit in the last place of a gradient, doubled for the float32 sums of the tiled kernels. Losses and ranks are
# float32 where logits are narrower.
GRADIENT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
VALUE = 1e-6
# In float64 the Triton kernels for the rows among themselves are good to so much where 1/(2 delta) is no short number.
AMONG = 1e-7
# Where all of FP is one small h, float32 resolves it to an absolute 1e-7 only, in the published formula too.
SMALL_FP = {"below_eps": 5e-2, "above_eps": 5e-3, "small_fp": 1e-3, "small_fp_wide_step": 1e-3}


def least_tolerance(name: str, backend: str, dtype: torch.dtype, delta: float) -> float:
    """What a named case is good to at best, with a backend."""
    if not backend.startswith("triton"):
        return 1e-9 if dtype == torch.float64 and name in SMALL_FP else 0.0
    inexact = dtype == torch.float64 and delta != 0 and math.frexp(delta)[0] != 0.5
    return max(SMALL_FP.get(name, 0.0), AMONG if inexact else 0.0)


class Sample(NamedTuple):
    """A problem as the oracle has it."""

    logits: NDArray[Any]  # any shape, as the package will see them
    targets: NDArray[Any]  # dense
    values: NDArray[np.float32]  # (P,), in [0, 2): box errors; IoUs are made of them
    delta: float = 1.0
    eps: float = EPS
    groups: NDArray[Any] | None = None


Values = dict[str, Any]


def ious_of(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """IoUs in (0, 1], half of them with ties."""
    ious = np.clip(1 - np.nan_to_num(values) / 2, 0.01, 1).astype(np.float32)
    ious[::2] = np.ceil(ious[::2] * 8) / 8
    return ious


def _expected_once(loss: str, sample: Sample) -> Values:
    logits, targets, values, delta, eps, _ = sample
    if loss == ALRP:
        return vars(dense.alrp_loss(logits, targets, values, delta, eps))
    if loss == RANK_SORT:
        return vars(dense.rank_sort_loss(logits, targets, ious_of(values), delta))
    return vars(dense.ap_loss(logits, targets, loss == AP, delta))


def expected(loss: str, sample: Sample) -> Values:
    """Losses and gradients by the oracle; with groups the mean of theirs, weighted by the numbers of their positives.

    With groups there are neither ranks nor their order.
    """
    if sample.groups is None:
        return _expected_once(loss, sample)
    shape, missing = sample.logits.shape, sample.logits.ndim - sample.groups.ndim
    groups = np.broadcast_to(sample.groups.reshape(sample.groups.shape + (1,) * missing), shape)
    positive, ious = sample.targets == 1, ious_of(sample.values)
    total: Values = {}
    for group in np.unique(groups):
        here, mine = groups == group, (groups == group)[positive]
        part = sample._replace(
            logits=sample.logits[here], targets=sample.targets[here], values=sample.values[mine], groups=None
        )
        # IoUs are made of all values together.
        of = (
            vars(dense.rank_sort_loss(part.logits, part.targets, ious[mine], sample.delta))
            if loss == RANK_SORT
            else _expected_once(loss, part)
        )
        weight = mine.sum() / max(len(sample.values), 1)
        for name, value in of.items():
            if name in ("rank", "order"):
                continue
            if np.ndim(value) == 0:
                total[name] = total.get(name, 0.0) + weight * value
            else:
                whole = total.setdefault(name, np.zeros(len(sample.values) if "box" in name else shape))
                whole[mine if "box" in name else here] = weight * np.asarray(value)
    return {name: np.ravel(value) if np.ndim(value) else value for name, value in total.items()}


def measured(
    loss: str, logits: Tensor, targets: Tensor, values: Tensor, delta: float, eps: float = EPS, **settings: Any
) -> Values:
    """The same by the package.

    Args:
        loss: one of ``LOSSES``.
        logits: a leaf that requires a gradient, or a view of one: the gradient is that of these logits.
        targets: in either form.
        values: box errors, or IoUs for ``RANK_SORT``; a leaf that requires a gradient for ``ALRP``.
        delta: of the step.
        eps: of aLRP Loss; the others have those that they are published with.
        settings: other arguments of the loss.
    """
    if loss == ALRP:
        out = alrp_loss(logits, targets, values, delta=delta, eps=eps, **settings)
        grad_logits, grad_errors = torch.autograd.grad(out.total, (logits, values))
        losses = {"classification": out.classification, "localisation": out.localisation}
        return {
            **losses,
            **out.positives._asdict(),
            "grad_logits": grad_logits.reshape(-1),
            "grad_box_errors": grad_errors,
        }
    if loss == RANK_SORT:
        out = rank_sort_loss(logits, targets, values, delta=delta, **settings)
        of_ranking, of_sorting = (torch.autograd.grad(part, logits, retain_graph=True)[0] for part in out)
        gradients = {"grad_ranking": of_ranking.reshape(-1), "grad_sorting": of_sorting.reshape(-1)}
        return out._asdict() | gradients
    value = ap_loss(logits, targets, interpolate=loss == AP, num_positives=values.numel(), delta=delta, **settings)
    return {"loss": value, "grad_logits": torch.autograd.grad(value, logits)[0].reshape(-1)}


class Comparison(NamedTuple):
    """The quantity that is closest to its tolerance, or beyond it."""

    quantity: str
    difference: float  # of the largest entry; infinite where shapes, NaN or orders differ
    tolerance: float

    @property
    def passed(self) -> bool:
        """False for NaN, too."""
        return bool(self.difference <= self.tolerance)  # no NumPy bool, which JSON does not know


def _array(value: Any) -> NDArray[np.float64]:
    return np.asarray(value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value, np.float64)


def difference(actual: Any, wanted: Any) -> float:
    """Largest |actual - wanted| over the largest |wanted|, infinite if that is 0; NaN have to be in the same places."""
    a, e = _array(actual), _array(wanted)
    if a.shape != e.shape or not np.array_equal(np.isnan(a), np.isnan(e)):
        return np.inf
    a, e = a[~np.isnan(a)], e[~np.isnan(e)]
    if e.size == 0:
        return 0.0
    # float32 has no digits below its normal numbers.
    off = max(float(np.abs(a - e).max()) - float(np.finfo(np.float32).tiny), 0.0)
    largest = float(np.abs(e).max())
    return off and (off / largest if largest else np.inf)


def imbalance(gradient: Any) -> float:
    """Theorem 2: gradients sum to zero. A few lost entries hide below the tolerance of each, but not in the sum."""
    g = _array(gradient)
    off = max(abs(float(g.sum())) - float(np.finfo(np.float32).tiny), 0.0)
    return off / float(np.abs(g).sum()) if off else off


def below_normal(gradient: Any, dtype: torch.dtype) -> float:
    """What a dtype may lose of a sum of wanted gradients where it has no digits: half of its smallest number an entry.

    Gradients of many negatives in float16 are below its normal numbers. Other dtypes reach far below any gradient.
    """
    if dtype != torch.float16:
        return 0.0
    g = np.abs(_array(gradient))
    smallest = float(np.finfo(np.float16).smallest_subnormal)
    return np.count_nonzero(g) * smallest / 2 / float(g.sum()) if g.any() else 0.0


def compare(actual: Values, wanted: Values, dtype: torch.dtype, least: float = 0.0) -> Comparison:
    """All quantities that are wanted, elementwise, and gradients of logits by their balance, too.

    Args:
        actual: of the package.
        wanted: of the oracle.
        dtype: of the logits.
        least: no tolerance but that of ``order`` is less.
    """
    found: list[Comparison] = []
    for name, value in wanted.items():
        tolerance = max(GRADIENT[dtype] if name.startswith("grad") and "box" not in name else VALUE, least)
        if name == "order":
            found.append(Comparison(name, 0.0 if np.array_equal(_array(actual[name]), value) else np.inf, 0.0))
            continue
        off = difference(actual[name], value)
        if name == "sorting" and np.isfinite(off):  # a difference of means of at most 1: its digits are those of 1
            off *= abs(float(value))
        if name == "grad_sorting":
            largest = float(np.nan_to_num(np.abs(value)).max(initial=0.0))
            tolerance = max(tolerance, 1e-13 / max(largest, 1e-30))
        found.append(Comparison(name, off, tolerance))
        if name.startswith("grad") and "box" not in name and np.isfinite(value).all():
            lost = below_normal(value, dtype)
            found.append(Comparison(f"balance of {name}", imbalance(actual[name]), tolerance + lost))
    return max(found, key=lambda one: one.difference / one.tolerance if one.tolerance else one.difference * 1e30)
