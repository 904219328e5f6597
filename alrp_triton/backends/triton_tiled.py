"""The two products of the comparison matrix in Triton: tiles of rows by columns, two fp32 instructions a pair.

Both kernels walk over tiles of the P x N matrix H, which is never stored. A tile's rows are neighbours in score, so the
step is evaluated relative to the least of them, the **anchor** a of their block:

    h(x - s) = clamp((x - a) * scale + offset, 0, 1),   offset = 1/2 - (s - a) * scale,   scale = 1/(2 delta)

which is one saturating fused multiply-add a pair (`FFMA.SAT`), and one more multiplies by the weight and accumulates.
Rounding the offset moves a score by at most half a unit in the last place of its distance from the anchor. Where a
block of rows is wider than ``_TIGHT`` times delta that would be too coarse, and x - s is formed first (three
instructions).

Columns are read in place, in their own dtype; all arithmetic is in the dtype of the rows. Results do not depend on the
order in which programs run: there are no atomics.
"""

# Kernels are written in Triton's language, not Python's: its types are not Python's either.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import Columns, working_dtype
from .triton_gradients import PositiveGradients, scale_positives
from .triton_layout import blocks, parts
from .triton_marks import FEW_CLASSES, LANES, clear, counted

# Tiles, by the dtype of the arithmetic; found by reading the machine code of six targets from two versions of Triton:
# 64 pairs a thread at 128 threads in float32, as much as fits without spills in float64 (which only float64 logits use;
# the rows among themselves have tiles of their own). On AMD the rows of a tile live in scalar registers; half the
# columns leave enough of them.
FORWARD_TILE = {torch.float32: {"ROWS": 32, "COLUMNS": 256}, torch.float64: {"ROWS": 16, "COLUMNS": 128}}
FORWARD_TILE_AMD = FORWARD_TILE | {torch.float32: {"ROWS": 32, "COLUMNS": 128}}
TRANSPOSE_TILE = {
    torch.float32: {"ROWS": 64, "CHUNK": 4, "COLUMNS": 2048},
    torch.float64: {"ROWS": 64, "CHUNK": 2, "COLUMNS": 1024},
}
PREPARE_BLOCK = 1024
WARPS = 4
# The forward product cuts the columns into splits, one partial sum each: enough programs to fill the largest GPU (about
# 1000 at a time on an H100) several times over, few enough that the partial sums stay O(P).
_SPLITS = 4096
_TIGHT: tl.constexpr = tl.constexpr(2.0)

# How a tile evaluates the step.
_ANCHORED: tl.constexpr = tl.constexpr(0)  # delta > 0, rows of the block close together: row holds the offset
_DIRECT: tl.constexpr = tl.constexpr(1)  # delta > 0: row holds the score
_HARD: tl.constexpr = tl.constexpr(2)  # delta = 0: row holds the score


@triton.jit
def _accumulate(acc, x, row, weight, anchor, scale, MODE: tl.constexpr):
    """Acc + h * weight on a tile; x [1, COLUMNS] and row [ROWS, 1], weight either of the two."""
    if MODE == _HARD:
        acc = tl.where(x >= row, acc + weight, acc)
    else:
        if MODE == _ANCHORED:
            h = tl.fma(x - anchor, scale, row)
        else:
            h = tl.fma(x - row, scale, 0.5)
        acc = tl.fma(tl.minimum(tl.maximum(h, 0.0), 1.0), weight, acc)
    return acc


@triton.jit
def _sum_columns(
    columns_ptr, marks_ptr, start, length, row, floor, anchor, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Sum of h * weight over ``length`` columns for one block of rows; NaN if a column that counts is NaN."""
    dtype = row.dtype
    acc = tl.zeros([ROWS, COLUMNS], dtype)
    nan = tl.zeros([COLUMNS], tl.int1)
    for begin in range(0, length, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        inside = column < length
        x = tl.load(columns_ptr + start + column, mask=inside, other=float("-inf")).to(dtype)
        weight = counted(marks_ptr, start, column, inside, CLASSES, dtype)
        # Saturation turns NaN into 0, so NaN is looked for here, once a column and not once a pair.
        live = (weight != 0) & ~(x < floor)
        if tl.max(live.to(tl.int32), axis=0) > 0:
            nan = nan | (live & (x != x))
            acc = _accumulate(acc, x[None, :], row[:, None], weight[None, :], anchor, scale, MODE)
    return tl.where(tl.max(nan.to(tl.int32), axis=0) > 0, float("nan"), tl.sum(acc, axis=1))


@triton.jit(do_not_specialize=["P", "N", "span"])
def matvec_kernel(
    rows_ptr, columns_ptr, marks_ptr, partial_ptr, P, N: tl.int64, span: tl.int64, delta: tl.float64,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program (b, k): the sum over split k of the columns, for block b of the rows -> partial[k, rows of b]."""
    dtype = partial_ptr.dtype.element_ty
    first = tl.program_id(0) * ROWS
    anchor = tl.load(rows_ptr + first).to(dtype)
    last = tl.load(rows_ptr + tl.minimum(first + ROWS, P) - 1).to(dtype)
    index = first + tl.arange(0, ROWS)
    row = tl.load(rows_ptr + tl.minimum(index, P - 1)).to(dtype)  # past the end: the last one, and not stored
    poison = (tl.load(rows_ptr) * 0.0 + tl.load(rows_ptr + P - 1) * 0.0).to(dtype)  # rows ascend, NaN last
    floor = anchor - tl.full([], delta, dtype)

    split = tl.program_id(1).to(tl.int64)
    start = split * span
    length = tl.minimum(N - start, span).to(tl.int32)
    if HARD:
        y = _sum_columns(columns_ptr, marks_ptr, start, length, row, floor, anchor, 0.0, ROWS, COLUMNS, CLASSES, _HARD)
    else:
        scale = tl.full([], 0.5 / delta, dtype)
        if last - anchor <= tl.full([], _TIGHT * delta, dtype):
            offset = 0.5 - (row - anchor) * scale
            y = _sum_columns(
                columns_ptr, marks_ptr, start, length, offset, floor, anchor, scale, ROWS, COLUMNS, CLASSES, _ANCHORED
            )
        else:
            y = _sum_columns(
                columns_ptr, marks_ptr, start, length, row, floor, anchor, scale, ROWS, COLUMNS, CLASSES, _DIRECT
            )
    tl.store(partial_ptr + split * P + index, y + poison, mask=index < P)


@triton.jit
def _sum_rows(
    acc, x, row_ptr, weights_ptr, first, P, anchor, scale, ROWS: tl.constexpr, CHUNK: tl.constexpr, MODE: tl.constexpr
):
    """Acc + h * weight for the rows from ``first`` on, CHUNK of them at a time."""
    for begin in range(first, tl.minimum(first + ROWS, P), CHUNK):
        index = begin + tl.arange(0, CHUNK)
        row = tl.load(row_ptr + index, mask=index < P, other=0.0)
        weight = tl.load(weights_ptr + index, mask=index < P, other=0.0)
        acc = _accumulate(acc, x[None, :], row[:, None], weight[:, None], anchor, scale, MODE)
    return acc


@triton.jit(do_not_specialize=["P", "positives"])
def prepare_kernel(
    rows_ptr, weights_ptr, scores_ptr, offsets_ptr, narrow_ptr, grad_positives_ptr, ranking_scale_ptr,
    auxiliary_scale_ptr, values_scale_ptr, grad_scores_ptr, grad_values_ptr, P, positives, delta: tl.float64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """What rmatvec_kernel reads: rows, offsets, weights in its dtype; behind these 0, or NaN if any is not finite.

    Weights are times the scale of the ranking loss, if there is one. Beside it :func:`.scale_positives`.
    """
    scale_positives(
        grad_positives_ptr, ranking_scale_ptr, auxiliary_scale_ptr, values_scale_ptr, grad_scores_ptr, grad_values_ptr,
        positives, BLOCK,
    )  # fmt: skip
    dtype = scores_ptr.dtype.element_ty
    poison = tl.load(rows_ptr) * 0.0 + tl.load(rows_ptr + P - 1) * 0.0 + tl.zeros([BLOCK], tl.float64)
    for begin in range(0, P, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < P
        row = tl.load(rows_ptr + index, mask=inside, other=0.0)
        weight = tl.load(weights_ptr + index, mask=inside, other=0.0)
        if ranking_scale_ptr is not None:
            weight = weight * tl.load(ranking_scale_ptr).to(tl.float64)
        tl.store(scores_ptr + index, row.to(dtype), mask=inside)
        tl.store(narrow_ptr + index, weight.to(dtype), mask=inside)
        if not HARD:
            anchor = tl.load(rows_ptr + index // ROWS * ROWS, mask=inside, other=0.0)
            tl.store(offsets_ptr + index, (0.5 - (row - anchor) * (0.5 / delta)).to(dtype), mask=inside)
        poison += weight * 0.0
    tl.store(narrow_ptr + P, tl.sum(poison, axis=0).to(dtype))


@triton.jit(do_not_specialize=["P", "N"])
def rmatvec_kernel(
    rows_ptr, offsets_ptr, weights_ptr, columns_ptr, marks_ptr, out_ptr, P, N: tl.int64, delta: tl.float64,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
    HARD: tl.constexpr,
):  # fmt: skip
    """Program b: block b of the columns, summed over all rows -> out[columns of b]. weights[P] is added to all."""
    dtype = rows_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * COLUMNS
    column = tl.arange(0, COLUMNS)
    inside = column < N - start
    x = tl.load(columns_ptr + start + column, mask=inside, other=float("-inf")).to(dtype)
    top = tl.max(x, axis=0)
    acc = tl.zeros([CHUNK, COLUMNS], dtype)
    scale = 0.0
    if not HARD:
        scale = tl.full([], 0.5 / delta, dtype)
    for first in range(0, P, ROWS):
        anchor = tl.load(rows_ptr + first)
        if not (top < anchor - tl.full([], delta, dtype)):
            if HARD:
                acc = _sum_rows(acc, x, rows_ptr, weights_ptr, first, P, anchor, scale, ROWS, CHUNK, _HARD)
            else:
                last = tl.load(rows_ptr + tl.minimum(first + ROWS, P) - 1)
                if last - anchor <= tl.full([], _TIGHT * delta, dtype):
                    acc = _sum_rows(acc, x, offsets_ptr, weights_ptr, first, P, anchor, scale, ROWS, CHUNK, _ANCHORED)
                else:
                    acc = _sum_rows(acc, x, rows_ptr, weights_ptr, first, P, anchor, scale, ROWS, CHUNK, _DIRECT)
    g = tl.sum(acc, axis=0) + tl.load(weights_ptr + P)
    g = tl.where(x != x, float("nan"), g)
    if CLASSES < FEW_CLASSES:
        g = tl.where(counted(marks_ptr, start, column, inside, CLASSES, dtype) != 0, g, 0.0)
    tl.store(out_ptr + start + column, g.to(out_ptr.dtype.element_ty), mask=inside)
    if CLASSES >= FEW_CLASSES:
        clear(out_ptr, marks_ptr, start, tl.minimum(start + COLUMNS, N), CLASSES, COLUMNS, LANES)


def runs_on(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device: a CUDA or ROCm GPU, or any under Triton's interpreter."""
    return device.type == "cuda" or not isinstance(matvec_kernel, triton.JITFunction)


def empty_tables(rows: Tensor, grouped: bool, columns: Columns) -> list[Tensor]:
    """There are none."""
    return []


def fill_tables(tables: list[Tensor], rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float) -> None:
    """There are none."""


def matvec(rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float, tables: list[Tensor]) -> Tensor:
    """y_i = sum_j H_ij v_j, float64 ``(P,)``."""
    p, n, working = rows.numel(), columns.values.numel(), working_dtype(columns.values)
    tile = (FORWARD_TILE_AMD if torch.version.hip else FORWARD_TILE)[working]
    of_rows, tiles = blocks(p, tile["ROWS"]), blocks(n, tile["COLUMNS"])
    most = max(_SPLITS // of_rows, 1 + n // 2**30)  # offsets within a split are 32-bit
    span = blocks(tiles, min(tiles, most)) * tile["COLUMNS"]
    splits = blocks(n, span)
    partial_sums = torch.empty(splits, p, dtype=working, device=rows.device)
    with torch.cuda.device_of(rows):
        matvec_kernel[(of_rows, splits)](
            rows, columns.values, columns.marks, partial_sums, p, n, span, delta, CLASSES=columns.num_classes or 0,
            HARD=delta == 0, num_warps=WARPS, **tile,
        )  # fmt: skip
    return partial_sums.sum(0, dtype=torch.float64)


def rmatvec(
    rows: Tensor,
    row_groups: Tensor | None,
    weights: Tensor,
    columns: Columns,
    delta: float,
    tables: list[Tensor],
    gradients: PositiveGradients | None = None,
) -> Tensor:
    """g_j = sum_i H_ij w_i, in the dtype of the columns ``(N,)``; 0 where a column does not count.

    With ``gradients`` weights are times their ``ranking_scale``, and :func:`.scale_positives` is done beside.
    """
    gradients, values = gradients or PositiveGradients(), columns.values
    p, n, working, hard = rows.numel(), values.numel(), working_dtype(values), delta == 0
    tile = TRANSPOSE_TILE[working]
    scores, offsets, narrow = parts((p + 1,) * 3, working, rows.device)
    out = torch.empty_like(values)
    with torch.cuda.device_of(rows):
        # In the loop over rows every instruction counts, so what belongs to a row is made here, once.
        prepare_kernel[(1,)](
            rows, weights, scores, offsets, narrow, *gradients, p, gradients.positives, delta, ROWS=tile["ROWS"],
            BLOCK=PREPARE_BLOCK, HARD=hard, num_warps=WARPS,
        )  # fmt: skip
        rmatvec_kernel[(blocks(n, tile["COLUMNS"]),)](
            scores, offsets, narrow, values, columns.marks, out, p, n, delta, CLASSES=columns.num_classes or 0,
            LANES=LANES, HARD=hard, num_warps=WARPS, **tile,
        )  # fmt: skip
    return out
