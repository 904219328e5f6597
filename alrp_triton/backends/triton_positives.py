"""The positives among themselves, and what a loss makes of its sums, in Triton.

For aLRP and AP Loss all is one program, linear in P, by the prefix sums of :mod:`.triton_among`; for Rank & Sort one
more, of the sums that :mod:`.triton_graded` makes pair by pair. The formulas of :mod:`alrp_triton.formulas` are
compiled as they stand there.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

from types import FunctionType

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import formulas
from .triton_among import BAD_WEIGHTS, WEIGHTS, among_rows, below_rows, compare, sum_rows, work_of, write_below
from .triton_graded import among_grades, below_grades
from .triton_layout import parts
from .triton_prefix import add_up, begins_group, fixed, is_finite, launch, scale_for

__all__ = ["among_grades", "among_rows", "below_grades", "below_rows", "terms"]

RANK_SORT_BLOCK = 256
RANK_SORT_WARPS = 4


def _compile(formula):
    """As a function that kernels call. Triton's interpreter wants to see the language among what a function sees."""
    return triton.jit(FunctionType(formula.__code__, vars(formulas) | {"tl": tl}))


_alrp, _precision_error, _rank_sort = map(_compile, (formulas.alrp, formulas.precision_error, formulas.rank_sort))


@triton.jit
def _where(condition, this, that):
    return tl.where(condition, this, that)


@triton.jit
def _least(this, begins, that, begins_too):
    """The least so far of each segment; a segment begins where it says so."""
    return tl.where(begins_too != 0, that, tl.minimum(this, that)), begins | begins_too


# What terms_kernel makes of its sums.
_ALRP: tl.constexpr = tl.constexpr(0)
_AP: tl.constexpr = tl.constexpr(1)
_INTERPOLATED_AP: tl.constexpr = tl.constexpr(2)
LOSSES = {"alrp": 0, "ap": 1, "interpolated_ap": 2}


@triton.jit(do_not_specialize=["P"])
def terms_kernel(
    rows_ptr, groups_ptr, values_ptr, order_ptr, false_positives_ptr, ranking_loss_ptr, auxiliary_loss_ptr, rank_ptr,
    grad_positives_ptr, grad_per_fp_ptr, work_ptr, P, delta: tl.float64, at_zero: tl.float64, eps: tl.float64,
    LOSS: tl.constexpr, BLOCK: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """One program: rows among themselves, the formulas, and for aLRP the gradient of the values."""
    delta = tl.full([], delta, tl.float64)
    dtype = ranking_loss_ptr.dtype.element_ty
    VALUES: tl.constexpr = LOSS == _ALRP
    ranking_sum = tl.zeros([BLOCK], tl.float64)
    auxiliary_sum = tl.zeros([BLOCK], tl.float64)
    stride = P + 2
    each = 1 / P.to(tl.float64)
    least = tl.full([], float("inf"), tl.float64)
    unit = sum_rows(rows_ptr, groups_ptr, values_ptr, work_ptr, P, delta, VALUES, BLOCK, HARD)
    tl.debug_barrier()
    for begin in range(0, P, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < P
        negatives = tl.load(false_positives_ptr + index, mask=inside, other=0.0)
        above, box_above, ranked = compare(
            rows_ptr, groups_ptr, values_ptr, work_ptr, tl.minimum(index, P - 1), P, delta, unit, VALUES, HARD
        )
        auxiliary = tl.zeros([BLOCK], tl.float64)
        if VALUES:
            box_error = tl.load(values_ptr + index, mask=inside, other=0.0)
            rank, ranking, auxiliary, error, per_fp = _alrp(
                negatives, above, box_above, ranked, box_error, at_zero, eps, _where
            )
            weight = 1 / rank
            bad = (~is_finite(weight)).to(tl.int32)
            add_up(bad, work_ptr, BAD_WEIGHTS * stride, begin, index, inside)
            weight = fixed(weight, scale_for(tl.full([], 1.0, tl.float64), P, 61)[0])  # 1 / rank is at most 1
            add_up(weight, work_ptr, WEIGHTS * stride, begin, index, inside)
        else:
            ranking = _precision_error(negatives, above, at_zero)
            rank = above + (1 - at_zero) + negatives
            if LOSS == _INTERPOLATED_AP:  # 1 - the greatest precision so far is the least 1 - precision so far
                poison = ranking * 0.0  # a minimum may leave NaN out
                ranking = tl.where(inside, ranking, float("inf"))
                begins = (begins_group(groups_ptr, index, inside) & (index > 0)).to(tl.int32)
                ranking, begins = tl.associative_scan((ranking, begins), 0, _least)
                ranking = tl.where(begins != 0, ranking, tl.minimum(ranking, least))
                least = tl.sum(tl.where(index == begin + BLOCK - 1, ranking, 0.0), axis=0)
                ranking = ranking + poison
            error = ranking
            per_fp = tl.where(negatives == 0, 0.0, ranking / negatives)
        ranking_sum += tl.where(inside, ranking, 0.0)
        auxiliary_sum += tl.where(inside, auxiliary, 0.0)
        where = tl.load(order_ptr + index, mask=inside, other=0)
        tl.store(rank_ptr + where, rank.to(dtype), mask=inside)
        tl.store(grad_positives_ptr + where, -error * each, mask=inside)
        tl.store(grad_positives_ptr + (P + index), tl.zeros([BLOCK], tl.float64), mask=inside)
        if not VALUES:
            tl.store(grad_positives_ptr + (2 * P + index), tl.zeros([BLOCK], tl.float64), mask=inside)
        tl.store(grad_per_fp_ptr + index, per_fp * each, mask=inside)
    tl.store(ranking_loss_ptr, (tl.sum(ranking_sum, axis=0) * each).to(dtype))
    tl.store(auxiliary_loss_ptr, (tl.sum(auxiliary_sum, axis=0) * each).to(dtype))
    if VALUES:
        tl.debug_barrier()
        unit = scale_for(tl.full([], 1.0, tl.float64), P, 61)[1] * each
        write_below(
            rows_ptr, groups_ptr, order_ptr, grad_positives_ptr + 2 * P, work_ptr, P, unit, WEIGHTS, BAD_WEIGHTS, 0,
            BLOCK, HARD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["P"])
def rank_sort_kernel(
    order_ptr, false_positives_ptr, among_ptr, ranking_loss_ptr, auxiliary_loss_ptr, rank_ptr, grad_positives_ptr,
    grad_per_fp_ptr, weights_ptr, auxiliary_errors_ptr, P, at_zero: tl.float64, eps: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: what Rank & Sort makes of the sums of among_grades_kernel.

    weights: what below_grades_kernel weighs the rows by; auxiliary_errors: what they are pulled up by.
    """
    dtype = ranking_loss_ptr.dtype.element_ty
    ranking_sum = tl.zeros([BLOCK], tl.float64)
    auxiliary_sum = tl.zeros([BLOCK], tl.float64)
    count = P.to(tl.float64)
    for begin in range(0, P, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < P
        negatives = tl.load(false_positives_ptr + index, mask=inside, other=0.0)
        above = tl.load(among_ptr + index, mask=inside, other=1.0)
        missorted = tl.load(among_ptr + 2 * P + index, mask=inside, other=0.0)
        ranking, auxiliary, error, per_fp, auxiliary_error, weight = _rank_sort(
            negatives, above, tl.load(among_ptr + P + index, mask=inside, other=0.0), missorted,
            tl.load(among_ptr + 3 * P + index, mask=inside, other=0.0), eps, _where,
        )  # fmt: skip
        rank = above + missorted + (1 - at_zero) + negatives
        ranking_sum += tl.where(inside, ranking, 0.0)
        auxiliary_sum += tl.where(inside, auxiliary, 0.0)
        where = tl.load(order_ptr + index, mask=inside, other=0)
        tl.store(rank_ptr + where, rank.to(dtype), mask=inside)
        tl.store(grad_positives_ptr + where, -error / count, mask=inside)
        tl.store(grad_positives_ptr + (2 * P + index), tl.zeros([BLOCK], tl.float64), mask=inside)
        tl.store(grad_per_fp_ptr + index, per_fp / count, mask=inside)
        tl.store(weights_ptr + index, weight / count, mask=inside)
        tl.store(auxiliary_errors_ptr + index, auxiliary_error / count, mask=inside)
    tl.store(ranking_loss_ptr, (tl.sum(ranking_sum, axis=0) / count).to(dtype))
    tl.store(auxiliary_loss_ptr, (tl.sum(auxiliary_sum, axis=0) / count).to(dtype))


def terms(
    loss: str,
    rows: Tensor,
    row_groups: Tensor | None,
    values: Tensor,
    order: Tensor,
    false_positives: Tensor,
    delta: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, ranks, gradients of the positives, and per false positive; contract in :mod:`alrp_triton.operators`."""
    p, at_zero = rows.numel(), formulas.at_zero(delta)
    ranking, auxiliary, rank = (rows.new_empty(shape, dtype=dtype) for shape in ((), (), p))
    grad_positives, grad_per_fp = rows.new_empty(3, p), torch.empty_like(rows)
    if loss != "rank_sort":
        with torch.cuda.device_of(rows):
            terms_kernel[(1,)](
                rows, row_groups, values, order, false_positives, ranking, auxiliary, rank, grad_positives, grad_per_fp,
                work_of(rows), p, delta, at_zero, eps, LOSS=LOSSES[loss], HARD=delta == 0, **launch(p),
            )  # fmt: skip
        return ranking, auxiliary, rank, grad_positives, grad_per_fp
    among = among_grades(rows, row_groups, values, delta)
    weights, auxiliary_errors = parts((p, p), torch.float64, rows.device)
    with torch.cuda.device_of(rows):
        rank_sort_kernel[(1,)](
            order, false_positives, among, ranking, auxiliary, rank, grad_positives, grad_per_fp, weights,
            auxiliary_errors, p, at_zero, eps, BLOCK=RANK_SORT_BLOCK, num_warps=RANK_SORT_WARPS,
        )  # fmt: skip
    below_grades(rows, row_groups, values, weights, delta, order, auxiliary_errors, grad_positives)
    return ranking, auxiliary, rank, grad_positives, grad_per_fp
