"""What a loss makes of its positives' sums, in one launch: the formulas of :mod:`alrp_triton.formulas`, compiled."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

from types import FunctionType

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import formulas

BLOCK = 256  # in 512 AP Loss spills, by Triton 3.6
WARPS = 4


def _compile(formula):
    """As a function that kernels call. Triton's interpreter wants to see the language among what a function sees."""
    return triton.jit(FunctionType(formula.__code__, vars(formulas) | {"tl": tl}))


_alrp, _precision_error, _rank_sort = map(_compile, (formulas.alrp, formulas.precision_error, formulas.rank_sort))


@triton.jit
def _where(condition, this, that):
    return tl.where(condition, this, that)


@triton.jit(do_not_specialize=["P"])
def alrp_kernel(
    false_positives_ptr, among_ptr, box_errors_ptr, order_ptr, classification_ptr, localisation_ptr, rank_ptr,
    update_ptr, P, at_zero: tl.float64, eps: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the sums over the positives come in one order only."""
    dtype = rank_ptr.dtype.element_ty
    classification = tl.zeros([BLOCK], tl.float64)
    localisation = tl.zeros([BLOCK], tl.float64)
    count = tl.maximum(P, 1).to(tl.float64)
    for begin in range(0, P, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < P
        rank, precision_error, box, error, share = _alrp(
            tl.load(false_positives_ptr + index, mask=inside, other=0.0),
            tl.load(among_ptr + index, mask=inside, other=1.0),
            tl.load(among_ptr + P + index, mask=inside, other=0.0),
            tl.load(among_ptr + 2 * P + index, mask=inside, other=0.0),
            tl.load(box_errors_ptr + index, mask=inside, other=0.0),
            at_zero, eps, _where,
        )  # fmt: skip
        classification += precision_error  # 0 outside
        localisation += box
        tl.store(rank_ptr + tl.load(order_ptr + index, mask=inside, other=0), rank.to(dtype), mask=inside)
        tl.store(update_ptr + index, -error / count, mask=inside)
        tl.store(update_ptr + P + index, share / count, mask=inside)
        tl.store(update_ptr + 2 * P + index, 1 / rank / count, mask=inside)
    tl.store(classification_ptr, (tl.sum(classification, axis=0) / count).to(dtype))
    tl.store(localisation_ptr, (tl.sum(localisation, axis=0) / count).to(dtype))


@triton.jit
def _least(this, that):
    return tl.minimum(this, that)


@triton.jit(do_not_specialize=["P"])
def ap_kernel(
    false_positives_ptr, above_ptr, loss_ptr, update_ptr, P, at_zero: tl.float64,
    INTERPOLATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, for the running minimum goes from the lowest positive to the highest."""
    loss = tl.zeros([BLOCK], tl.float64)
    count = tl.maximum(P, 1).to(tl.float64)
    least = tl.full([], float("inf"), tl.float64)
    for begin in range(0, P, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < P
        negatives = tl.load(false_positives_ptr + index, mask=inside, other=0.0)
        error = _precision_error(negatives, tl.load(above_ptr + index, mask=inside, other=1.0), at_zero)
        if INTERPOLATE:  # 1 - the greatest precision so far is the least 1 - precision so far
            poison = error * 0.0  # a minimum may leave NaN out
            error = tl.minimum(tl.associative_scan(tl.where(inside, error, float("inf")), 0, _least), least)
            least = tl.min(error, axis=0)
            error = error + poison
        loss += tl.where(inside, error, 0.0)
        tl.store(update_ptr + index, -error / count, mask=inside)
        tl.store(update_ptr + P + index, tl.where(negatives == 0, 0.0, error / negatives) / count, mask=inside)
    tl.store(loss_ptr, (tl.sum(loss, axis=0) / count).to(loss_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["P"])
def rank_sort_kernel(
    false_positives_ptr, among_ptr, ranking_ptr, sorting_ptr, update_ptr, P, eps: tl.float64, BLOCK: tl.constexpr
):
    """One program: the sums over the positives come in one order only."""
    ranking_sum = tl.zeros([BLOCK], tl.float64)
    sorting_sum = tl.zeros([BLOCK], tl.float64)
    count = tl.maximum(P, 1).to(tl.float64)
    for begin in range(0, P, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < P
        ranking, sorting, pull, share, sort_pull, sort_share = _rank_sort(
            tl.load(false_positives_ptr + index, mask=inside, other=0.0),
            tl.load(among_ptr + index, mask=inside, other=1.0),
            tl.load(among_ptr + P + index, mask=inside, other=0.0),
            tl.load(among_ptr + 2 * P + index, mask=inside, other=0.0),
            tl.load(among_ptr + 3 * P + index, mask=inside, other=0.0),
            eps, _where,
        )  # fmt: skip
        ranking_sum += ranking  # 0 outside
        sorting_sum += sorting
        tl.store(update_ptr + index, -pull / count, mask=inside)
        tl.store(update_ptr + P + index, share / count, mask=inside)
        tl.store(update_ptr + 2 * P + index, sort_share / count, mask=inside)
        tl.store(update_ptr + 3 * P + index, -sort_pull / count, mask=inside)
    dtype = ranking_ptr.dtype.element_ty
    tl.store(ranking_ptr, (tl.sum(ranking_sum, axis=0) / count).to(dtype))
    tl.store(sorting_ptr, (tl.sum(sorting_sum, axis=0) / count).to(dtype))


def alrp_terms(
    false_positives: Tensor,
    among: Tensor,
    box_errors: Tensor,
    order: Tensor,
    at_zero: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, ranks and what the gradients are made of; contract in :mod:`alrp_triton.operators`."""
    classification, localisation, rank = (
        false_positives.new_empty(shape, dtype=dtype) for shape in ((), (), false_positives.shape)
    )
    update = torch.empty_like(among)
    with torch.cuda.device_of(false_positives):
        alrp_kernel[(1,)](
            false_positives, among, box_errors, order, classification, localisation, rank, update, rank.numel(),
            at_zero, eps, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return classification, localisation, rank, update


def ap_terms(
    false_positives: Tensor, positives_above: Tensor, at_zero: float, interpolate: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss and update; contract in :mod:`alrp_triton.operators`."""
    loss, update = false_positives.new_empty((), dtype=dtype), false_positives.new_empty(2, false_positives.numel())
    with torch.cuda.device_of(false_positives):
        ap_kernel[(1,)](
            false_positives, positives_above, loss, update, false_positives.numel(), at_zero, INTERPOLATE=interpolate,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return loss, update


def rank_sort_terms(
    false_positives: Tensor, among: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and update; contract in :mod:`alrp_triton.operators`."""
    ranking, sorting = (false_positives.new_empty((), dtype=dtype) for _ in range(2))
    update = torch.empty_like(among)
    with torch.cuda.device_of(false_positives):
        rank_sort_kernel[(1,)](
            false_positives, among, ranking, sorting, update, false_positives.numel(), eps, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    return ranking, sorting, update
