"""The rows compared among themselves by score and by grade, in Triton: float64 tiles, all sums in one pass."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_tiled import step

TILE = {"ROWS": 8, "COLUMNS": 64}  # 16 rows spill, by Triton 3.6
WARPS = 4


@triton.jit(do_not_specialize=["P"])
def among_grades_kernel(
    rows_ptr, grades_ptr, out_ptr, P, delta: tl.float64, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARD: tl.constexpr
):
    """Program b: block b of the rows against all -> out[0 … 3, rows of b]: h and h (1 - t), not lower and lower."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows_ptr + tl.minimum(index, P - 1))
    grade = tl.load(grades_ptr + tl.minimum(index, P - 1))
    kept = tl.zeros([ROWS, COLUMNS], tl.float64)
    kept_error = tl.zeros([ROWS, COLUMNS], tl.float64)
    lower = tl.zeros([ROWS, COLUMNS], tl.float64)
    lower_error = tl.zeros([ROWS, COLUMNS], tl.float64)
    poison = tl.zeros([COLUMNS], tl.float64)
    scale = 0.0 if HARD else 0.5 / delta
    for begin in range(0, P, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        x = tl.load(rows_ptr + column, mask=column < P, other=float("-inf"))
        t = tl.load(grades_ptr + column, mask=column < P, other=0.0)
        poison += t * 0.0
        h = step(x[None, :] - row[:, None], scale, HARD)
        low = tl.where(t[None, :] < grade[:, None], h, 0.0)
        kept += h - low
        kept_error += (h - low) * (1 - t)[None, :]
        lower += low
        lower_error += low * (1 - t)[None, :]
    bad = (tl.load(rows_ptr) + tl.load(rows_ptr + P - 1)) * 0.0 + tl.sum(poison, axis=0)  # rows ascend, NaN last
    tl.store(out_ptr + index, tl.sum(kept, axis=1) + bad, mask=index < P)
    tl.store(out_ptr + P + index, tl.sum(kept_error, axis=1) + bad, mask=index < P)
    tl.store(out_ptr + 2 * P + index, tl.sum(lower, axis=1) + bad, mask=index < P)
    tl.store(out_ptr + 3 * P + index, tl.sum(lower_error, axis=1) + bad, mask=index < P)


@triton.jit(do_not_specialize=["P"])
def below_grades_kernel(
    rows_ptr, grades_ptr, weights_ptr, out_ptr, P, delta: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: block b of the rows as columns, summed over all rows of higher grade -> out[rows of b]."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = tl.load(rows_ptr + tl.minimum(index, P - 1))
    grade = tl.load(grades_ptr + tl.minimum(index, P - 1))
    acc = tl.zeros([ROWS, COLUMNS], tl.float64)
    poison = tl.zeros([COLUMNS], tl.float64)
    scale = 0.0 if HARD else 0.5 / delta
    for begin in range(0, P, COLUMNS):
        other = begin + tl.arange(0, COLUMNS)
        row = tl.load(rows_ptr + other, mask=other < P, other=float("inf"))
        t = tl.load(grades_ptr + other, mask=other < P, other=0.0)
        weight = tl.load(weights_ptr + other, mask=other < P, other=0.0)
        poison += (t + weight) * 0.0
        h = step(x[:, None] - row[None, :], scale, HARD)
        acc += h * tl.where(t[None, :] > grade[:, None], weight[None, :], 0.0)
    bad = (tl.load(rows_ptr) + tl.load(rows_ptr + P - 1)) * 0.0 + tl.sum(poison, axis=0)
    tl.store(out_ptr + index, tl.sum(acc, axis=1) + bad, mask=index < P)


def among_grades(rows: Tensor, grades: Tensor, delta: float) -> Tensor:
    """Sums over the rows of no lower, and of lower grade; contract in :mod:`alrp_triton.operators`."""
    p = rows.numel()
    out = rows.new_empty(4, p)
    with torch.cuda.device_of(rows):
        among_grades_kernel[(triton.cdiv(p, TILE["ROWS"]),)](
            rows, grades, out, p, delta, HARD=delta == 0, num_warps=WARPS, **TILE
        )
    return out


def below_grades(rows: Tensor, grades: Tensor, weights: Tensor, delta: float) -> Tensor:
    """Sums of the weights of the rows of higher grade; contract in :mod:`alrp_triton.operators`."""
    p = rows.numel()
    out = torch.empty_like(rows)
    with torch.cuda.device_of(rows):
        below_grades_kernel[(triton.cdiv(p, TILE["ROWS"]),)](
            rows, grades, weights, out, p, delta, HARD=delta == 0, num_warps=WARPS, **TILE
        )
    return out
