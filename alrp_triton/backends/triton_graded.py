"""The positives among themselves by grade, for Rank & Sort, in Triton.

Pair by pair, in float64 tiles, all sums in one pass: which rows are of lower grade is no matter of their order.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_layout import blocks

TILE = {"ROWS": 8, "COLUMNS": 64}  # 16 rows spill, by Triton 3.6
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
def _same(groups_ptr, index, column, P):
    """Which of the columns are rows, of the group of each of the rows at index."""
    live = (column < P)[None, :] & (index >= 0)[:, None]
    if groups_ptr is not None:
        mine = tl.load(groups_ptr + tl.minimum(index, P - 1))
        theirs = tl.load(groups_ptr + tl.minimum(column, P - 1))
        live = live & (mine[:, None] == theirs[None, :])
    return live


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
    scale = tl.full([], 0.0 if HARD else 0.5 / delta, tl.float64)
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
    rows_ptr, groups_ptr, grades_ptr, weights_ptr, errors_ptr, order_ptr, out_ptr, P, delta: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: block b of the rows as columns, summed over all rows of higher grade, less errors -> out[1, order]."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = tl.load(rows_ptr + tl.minimum(index, P - 1))
    grade = tl.load(grades_ptr + tl.minimum(index, P - 1))
    acc = tl.zeros([ROWS, COLUMNS], tl.float64)
    scale = tl.full([], 0.0 if HARD else 0.5 / delta, tl.float64)
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
    if errors_ptr is not None:
        total -= tl.load(errors_ptr + index, mask=index < P, other=0.0)
    where = tl.load(order_ptr + index, mask=index < P, other=0)
    tl.store(out_ptr + P + where, total, mask=index < P)


def _grid(rows: Tensor, tile: dict[str, int]) -> tuple[int]:
    return (blocks(rows.numel(), tile["ROWS"]),)


def _in_order(rows: Tensor) -> Tensor:
    return torch.arange(rows.numel(), device=rows.device)


def among_grades(rows: Tensor, row_groups: Tensor | None, grades: Tensor, delta: float) -> Tensor:
    """Sums ``(4, P)`` of H and of H (1 - t) over the rows of no lower, and of lower grade."""
    out = rows.new_empty(4, rows.numel())
    with torch.cuda.device_of(rows):
        among_grades_kernel[_grid(rows, TILE)](
            rows, row_groups, grades, out, rows.numel(), delta, HARD=delta == 0, num_warps=WARPS, **TILE
        )
    return out


def below_grades(
    rows: Tensor,
    row_groups: Tensor | None,
    grades: Tensor,
    weights: Tensor,
    delta: float,
    order: Tensor | None = None,
    errors: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Transpose of the third of :func:`among_grades`, less errors; to the places that ``order`` tells, in out[1]."""
    out, order = rows.new_empty(2, rows.numel()) if out is None else out, _in_order(rows) if order is None else order
    with torch.cuda.device_of(rows):
        below_grades_kernel[_grid(rows, TILE)](
            rows, row_groups, grades, weights, errors, order, out, rows.numel(), delta, HARD=delta == 0,
            num_warps=WARPS, **TILE,
        )  # fmt: skip
    return out[1]
