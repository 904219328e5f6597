"""The positives among themselves, and what a loss makes of its sums, in Triton.

Rows are compared pair by pair, in float64 tiles, all sums in one pass. The formulas of :mod:`alrp_triton.formulas` are
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
from .triton_tiled import blocks, parts

AMONG_TILE = {"ROWS": 16, "COLUMNS": 64}
GRADED_TILE = {"ROWS": 8, "COLUMNS": 64}  # 16 rows spill, by Triton 3.6
BLOCK = 256  # in 512 AP Loss spills, by Triton 3.6
WARPS = 4


@triton.jit
def step(distance, scale, HARD: tl.constexpr):
    """The step h in float64; scale is 1 / (2 delta)."""
    if HARD:
        h = tl.where(distance >= 0.0, 1.0, 0.0).to(tl.float64)
    else:
        h = tl.minimum(tl.maximum(tl.fma(distance, scale, 0.5), 0.0), 1.0)
    return h


@triton.jit
def place(distance, itself, HARD: tl.constexpr):
    """What a row counts in the ranking of another: 1 above it, h(0) where it ties, 1 as itself."""
    if HARD:
        counted = tl.where(distance >= 0.0, 1.0, 0.0).to(tl.float64)
    else:
        counted = tl.where((distance > 0.0) | itself, 1.0, tl.where(distance == 0.0, 0.5, 0.0)).to(tl.float64)
    return counted


@triton.jit
def _same(groups_ptr, index, column, P):
    """Which of the columns are rows, of the group of each of the rows at index."""
    live = (column < P)[None, :] & (index >= 0)[:, None]
    if groups_ptr is not None:
        mine = tl.load(groups_ptr + tl.minimum(index, P - 1))
        theirs = tl.load(groups_ptr + tl.minimum(column, P - 1))
        live = live & (mine[:, None] == theirs[None, :])
    return live


@triton.jit(do_not_specialize=["P"])
def among_rows_kernel(
    rows_ptr, groups_ptr, values_ptr, out_ptr, P, delta: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: block b of the rows against all rows -> out[0 … 2, rows of b]: sums of h, of h v, of v ranked."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows_ptr + tl.minimum(index, P - 1))
    count = tl.zeros([ROWS, COLUMNS], tl.float64)
    soft = tl.zeros([ROWS, COLUMNS], tl.float64)
    ranked = tl.zeros([ROWS, COLUMNS], tl.float64)
    scale = 0.0 if HARD else 0.5 / delta
    for begin in range(0, P, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        x = tl.load(rows_ptr + column, mask=column < P, other=0.0)
        value = tl.load(values_ptr + column, mask=column < P, other=0.0)
        live = _same(groups_ptr, index, column, P)
        one = 1 + x * 0.0  # NaN if it is not finite
        value = (value + value * 0.0) * one
        distance = x[None, :] - row[:, None]
        h = step(distance, scale, HARD)
        count += tl.where(live, h * one[None, :], 0.0)
        soft += tl.where(live, h * value[None, :], 0.0)
        here = place(distance, column[None, :] == index[:, None], HARD)
        ranked += tl.where(live, here * value[None, :], 0.0)
    tl.store(out_ptr + index, tl.sum(count, axis=1), mask=index < P)
    tl.store(out_ptr + P + index, tl.sum(soft, axis=1), mask=index < P)
    tl.store(out_ptr + 2 * P + index, tl.sum(ranked, axis=1), mask=index < P)


@triton.jit(do_not_specialize=["P"])
def below_rows_kernel(
    rows_ptr, groups_ptr, weights_ptr, order_ptr, out_ptr, P,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: for block b of the rows the sum of the weights of those in whose ranking they count -> out[order]."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = tl.load(rows_ptr + tl.minimum(index, P - 1))
    acc = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(0, P, COLUMNS):
        other = begin + tl.arange(0, COLUMNS)
        row = tl.load(rows_ptr + other, mask=other < P, other=0.0)
        weight = tl.load(weights_ptr + other, mask=other < P, other=0.0)
        weight = weight + weight * 0.0 + row * 0.0  # NaN if one of both is not finite
        counted = place(x[:, None] - row[None, :], other[None, :] == index[:, None], HARD)
        acc += tl.where(_same(groups_ptr, index, other, P), counted * weight[None, :], 0.0)
    where = tl.load(order_ptr + index, mask=index < P, other=0)
    tl.store(out_ptr + where, tl.sum(acc, axis=1), mask=index < P)


@triton.jit(do_not_specialize=["P"])
def among_grades_kernel(
    rows_ptr, groups_ptr, grades_ptr, out_ptr, P, delta: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: block b of the rows against all -> out[0 … 3, rows of b]: h and h (1 - t), not lower and lower."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows_ptr + tl.minimum(index, P - 1))
    grade = tl.load(grades_ptr + tl.minimum(index, P - 1))
    kept = tl.zeros([ROWS, COLUMNS], tl.float64)
    kept_error = tl.zeros([ROWS, COLUMNS], tl.float64)
    lower = tl.zeros([ROWS, COLUMNS], tl.float64)
    lower_error = tl.zeros([ROWS, COLUMNS], tl.float64)
    scale = 0.0 if HARD else 0.5 / delta
    for begin in range(0, P, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        x = tl.load(rows_ptr + column, mask=column < P, other=0.0)
        t = tl.load(grades_ptr + column, mask=column < P, other=0.0)
        live = _same(groups_ptr, index, column, P)
        h = step(x[None, :] - row[:, None], scale, HARD)
        bad = (x * 0.0 + t * 0.0)[None, :]
        low = tl.where(t[None, :] < grade[:, None], h, 0.0)
        kept += tl.where(live, h - low + bad, 0.0)
        kept_error += tl.where(live, (h - low) * (1 - t)[None, :] + bad, 0.0)
        lower += tl.where(live, low + bad, 0.0)
        lower_error += tl.where(live, low * (1 - t)[None, :] + bad, 0.0)
    tl.store(out_ptr + index, tl.sum(kept, axis=1), mask=index < P)
    tl.store(out_ptr + P + index, tl.sum(kept_error, axis=1), mask=index < P)
    tl.store(out_ptr + 2 * P + index, tl.sum(lower, axis=1), mask=index < P)
    tl.store(out_ptr + 3 * P + index, tl.sum(lower_error, axis=1), mask=index < P)


@triton.jit(do_not_specialize=["P"])
def below_grades_kernel(
    rows_ptr, groups_ptr, grades_ptr, weights_ptr, pulls_ptr, order_ptr, own_ptr, P, delta: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: block b of the rows as columns, summed over all rows of higher grade, less pulls -> own[1, order]."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = tl.load(rows_ptr + tl.minimum(index, P - 1))
    grade = tl.load(grades_ptr + tl.minimum(index, P - 1))
    acc = tl.zeros([ROWS, COLUMNS], tl.float64)
    scale = 0.0 if HARD else 0.5 / delta
    for begin in range(0, P, COLUMNS):
        other = begin + tl.arange(0, COLUMNS)
        row = tl.load(rows_ptr + other, mask=other < P, other=0.0)
        t = tl.load(grades_ptr + other, mask=other < P, other=0.0)
        weight = tl.load(weights_ptr + other, mask=other < P, other=0.0)
        h = step(x[:, None] - row[None, :], scale, HARD)
        bad = (row * 0.0 + t * 0.0 + weight * 0.0)[None, :]
        received = h * tl.where(t[None, :] > grade[:, None], weight[None, :], 0.0) + bad
        acc += tl.where(_same(groups_ptr, index, other, P), received, 0.0)
    total = tl.sum(acc, axis=1)
    if pulls_ptr is not None:
        total -= tl.load(pulls_ptr + index, mask=index < P, other=0.0)
    where = tl.load(order_ptr + index, mask=index < P, other=0)
    tl.store(own_ptr + P + where, total, mask=index < P)


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


# What the kernel makes of its sums.
_ALRP: tl.constexpr = tl.constexpr(0)
_RANK_SORT: tl.constexpr = tl.constexpr(1)
_AP: tl.constexpr = tl.constexpr(2)
_INTERPOLATED_AP: tl.constexpr = tl.constexpr(3)
LOSSES = {"alrp": 0, "rank_sort": 1, "ap": 2, "interpolated_ap": 3}


@triton.jit(do_not_specialize=["P"])
def terms_kernel(
    groups_ptr, values_ptr, order_ptr, false_positives_ptr, among_ptr, first_ptr, second_ptr, rank_ptr, own_ptr,
    share_ptr, weights_ptr, pulls_ptr, P, at_zero: tl.float64, eps: tl.float64,
    LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the sums over the positives come in one order only.

    weights: what the transpose among the positives weighs them by; pulls: their own pull of the second loss.
    """
    dtype = first_ptr.dtype.element_ty
    first_sum = tl.zeros([BLOCK], tl.float64)
    second_sum = tl.zeros([BLOCK], tl.float64)
    count = P.to(tl.float64)
    least = tl.full([], float("inf"), tl.float64)
    for begin in range(0, P, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < P
        negatives = tl.load(false_positives_ptr + index, mask=inside, other=0.0)
        above = tl.load(among_ptr + index, mask=inside, other=1.0)
        second = tl.zeros([BLOCK], tl.float64)
        second_pull = second
        weight = second
        if LOSS == _ALRP:
            rank, first, second, pull, share = _alrp(
                negatives, above, tl.load(among_ptr + P + index, mask=inside, other=0.0),
                tl.load(among_ptr + 2 * P + index, mask=inside, other=0.0),
                tl.load(values_ptr + index, mask=inside, other=0.0), at_zero, eps, _where,
            )  # fmt: skip
            weight = 1 / rank
        elif LOSS == _RANK_SORT:
            missorted = tl.load(among_ptr + 2 * P + index, mask=inside, other=0.0)
            first, second, pull, share, second_pull, weight = _rank_sort(
                negatives, above, tl.load(among_ptr + P + index, mask=inside, other=0.0), missorted,
                tl.load(among_ptr + 3 * P + index, mask=inside, other=0.0), eps, _where,
            )  # fmt: skip
            rank = above + missorted + (1 - at_zero) + negatives
        else:
            first = _precision_error(negatives, above, at_zero)
            rank = above + (1 - at_zero) + negatives
            if LOSS == _INTERPOLATED_AP:  # 1 - the greatest precision so far is the least 1 - precision so far
                poison = first * 0.0  # a minimum may leave NaN out
                first = tl.where(inside, first, float("inf"))
                begins = (index < 0).to(tl.int32)
                if groups_ptr is not None:
                    group = tl.load(groups_ptr + index, mask=inside, other=0)
                    before = tl.load(groups_ptr + index - 1, mask=inside & (index > 0), other=0)
                    begins = ((index > 0) & (group != before)).to(tl.int32)
                first, begins = tl.associative_scan((first, begins), 0, _least)
                first = tl.where(begins != 0, first, tl.minimum(first, least))
                least = tl.sum(tl.where(index == begin + BLOCK - 1, first, 0.0), axis=0)
                first = first + poison
            pull = first
            share = tl.where(negatives == 0, 0.0, first / negatives)
        first_sum += tl.where(inside, first, 0.0)
        second_sum += tl.where(inside, second, 0.0)
        where = tl.load(order_ptr + index, mask=inside, other=0)
        tl.store(rank_ptr + where, rank.to(dtype), mask=inside)
        tl.store(own_ptr + where, -pull / count, mask=inside)
        tl.store(share_ptr + index, share / count, mask=inside)
        if LOSS <= _RANK_SORT:
            tl.store(weights_ptr + index, weight / count, mask=inside)
            tl.store(pulls_ptr + index, second_pull / count, mask=inside)
    tl.store(first_ptr, (tl.sum(first_sum, axis=0) / count).to(dtype))
    tl.store(second_ptr, (tl.sum(second_sum, axis=0) / count).to(dtype))


def _grid(rows: Tensor, tile: dict[str, int]) -> tuple[int]:
    return (blocks(rows.numel(), tile["ROWS"]),)


def _in_order(rows: Tensor) -> Tensor:
    return torch.arange(rows.numel(), device=rows.device)


def among_rows(rows: Tensor, row_groups: Tensor | None, values: Tensor, delta: float) -> Tensor:
    """Products ``(3, P)`` of the rows' own matrix H with 1 and with v, and v ranked, R v."""
    out = rows.new_empty(3, rows.numel())
    with torch.cuda.device_of(rows):
        among_rows_kernel[_grid(rows, AMONG_TILE)](
            rows, row_groups, values, out, rows.numel(), delta, HARD=delta == 0, num_warps=WARPS, **AMONG_TILE
        )
    return out


def among_grades(rows: Tensor, row_groups: Tensor | None, grades: Tensor, delta: float) -> Tensor:
    """Sums ``(4, P)`` of H and of H (1 - t) over the rows of no lower, and of lower grade."""
    out = rows.new_empty(4, rows.numel())
    with torch.cuda.device_of(rows):
        among_grades_kernel[_grid(rows, GRADED_TILE)](
            rows, row_groups, grades, out, rows.numel(), delta, HARD=delta == 0, num_warps=WARPS, **GRADED_TILE
        )
    return out


def below_rows(
    rows: Tensor, row_groups: Tensor | None, weights: Tensor, delta: float, order: Tensor | None = None
) -> Tensor:
    """The transpose of the last of :func:`among_rows`, R^T w; to the places that ``order`` tells."""
    out, order = torch.empty_like(rows), _in_order(rows) if order is None else order
    with torch.cuda.device_of(rows):
        below_rows_kernel[_grid(rows, AMONG_TILE)](
            rows, row_groups, weights, order, out, rows.numel(), HARD=delta == 0, num_warps=WARPS, **AMONG_TILE
        )
    return out


def below_grades(
    rows: Tensor,
    row_groups: Tensor | None,
    grades: Tensor,
    weights: Tensor,
    delta: float,
    order: Tensor | None = None,
    pulls: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """The transpose of the third of :func:`among_grades`, less pulls; to the places that ``order`` tells, of own[1]."""
    own, order = rows.new_empty(2, rows.numel()) if own is None else own, _in_order(rows) if order is None else order
    with torch.cuda.device_of(rows):
        below_grades_kernel[_grid(rows, GRADED_TILE)](
            rows, row_groups, grades, weights, pulls, order, own, rows.numel(), delta, HARD=delta == 0,
            num_warps=WARPS, **GRADED_TILE,
        )  # fmt: skip
    return own[1]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both losses, ranks, own gradients, shares, gradients of the values; contract in :mod:`alrp_triton.operators`."""
    p = rows.numel()
    compare = among_grades if loss == "rank_sort" else among_rows
    among = compare(rows, row_groups, values, delta)
    first, second, rank = (rows.new_empty(shape, dtype=dtype) for shape in ((), (), p))
    own, share, of_values = rows.new_zeros(2, p), torch.empty_like(rows), rows.new_empty(0)
    weights, pulls = parts((p, p), torch.float64, rows.device)
    with torch.cuda.device_of(rows):
        terms_kernel[(1,)](
            row_groups, values, order, false_positives, among, first, second, rank, own, share, weights, pulls, p,
            formulas.at_zero(delta), eps, LOSS=LOSSES[loss], BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    if loss == "alrp":
        of_values = below_rows(rows, row_groups, weights, delta, order)
    elif loss == "rank_sort":
        below_grades(rows, row_groups, values, weights, delta, order, pulls, own)
    return first, second, rank, own, share, of_values
