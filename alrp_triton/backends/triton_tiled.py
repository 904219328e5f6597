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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import ALL, NONE, Columns
from .knots import working_dtype

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
LANES = 128  # anchors looked at together: one a thread
# The forward product cuts the columns into splits, one partial sum each: enough programs to fill the largest GPU (about
# 1000 at a time on an H100) several times over, few enough that the partial sums stay O(P).
_SPLITS = 4096
FEW: tl.constexpr = tl.constexpr(8)  # classes
_TIGHT: tl.constexpr = tl.constexpr(2.0)
_NONE: tl.constexpr = tl.constexpr(NONE)
_ALL: tl.constexpr = tl.constexpr(ALL)

# How a tile evaluates the step.
_ANCHORED: tl.constexpr = tl.constexpr(0)  # delta > 0, rows of the block close together: row holds the offset
_DIRECT: tl.constexpr = tl.constexpr(1)  # delta > 0: row holds the score
_HARD: tl.constexpr = tl.constexpr(2)  # delta = 0: row holds the score


@triton.jit
def counted(marks_ptr, start, column, inside, CLASSES: tl.constexpr, dtype: tl.constexpr):
    """How often the columns at start + column count (:class:`.columns.Columns`): 0 if not inside, which None all are.

    CLASSES: the number of classes, if marks are of anchors; else 0.
    """
    if CLASSES > 0:
        anchor = start // CLASSES
        of_class = column.to(tl.uint32) + (start - anchor * CLASSES).to(tl.uint32)
        after = of_class // CLASSES  # by a multiplication, for the divisor is known when compiling
        of_class = (of_class - after * CLASSES).to(tl.int32)
        at = marks_ptr + anchor + after.to(tl.int32)
        if inside is None:
            mark = tl.load(at)
        else:
            mark = tl.load(at, mask=inside, other=_ALL)
        weight = ((mark != _ALL) & (mark != of_class)).to(dtype)
    elif marks_ptr is None:
        if inside is None:
            weight = tl.full(column.shape, 1.0, dtype)
        else:
            weight = inside.to(dtype)
    else:
        OF_BYTES: tl.constexpr = marks_ptr.dtype.element_ty == tl.uint8
        if inside is None:
            mark = tl.load(marks_ptr + start + column)
        else:
            mark = tl.load(marks_ptr + start + column, mask=inside, other=1 if OF_BYTES else 0)
        if OF_BYTES:
            weight = (mark == 0).to(dtype)
        else:
            weight = mark.to(dtype)
    return weight


@triton.jit
def clear(out_ptr, marks_ptr, start, end, CLASSES: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """0 at those of the columns [start, end), at most BLOCK, that do not count by marks of anchors.

    Once all are stored, the few anchors of a block say which these are: to know it of each column takes a division.
    With few classes there are many anchors: from FEW on this is the way.
    """
    zero = tl.zeros([LANES], out_ptr.dtype.element_ty)
    for begin in range(0, BLOCK // CLASSES + 2, LANES):
        anchor = start // CLASSES + begin + tl.arange(0, LANES)
        column = anchor * CLASSES
        mark = tl.load(marks_ptr + anchor, mask=column < end, other=_NONE)
        if tl.min((mark == _NONE).to(tl.int32), axis=0) == 0:
            tl.debug_barrier()  # behind what other threads have stored
            of_class = column + mark
            tl.store(out_ptr + of_class, zero, mask=(mark >= 0) & (of_class >= start) & (of_class < end))
            if tl.min(mark, axis=0) == _ALL:
                for _ in range(CLASSES):
                    tl.store(out_ptr + column, zero, mask=(mark == _ALL) & (column >= start) & (column < end))
                    column += 1


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


@triton.jit
def _store(array_ptr, index, x, inside):
    """A float64 in the dtype of the array; to half precision by way of float32, as torch does it."""
    dtype: tl.constexpr = array_ptr.dtype.element_ty
    if dtype != tl.float64:
        x = x.to(tl.float32)
    tl.store(array_ptr + index, x.to(dtype), mask=inside)


@triton.jit
def scale_own(
    own_ptr, first_ptr, second_ptr, of_values_ptr, pulls_ptr, grad_values_ptr, positives, BLOCK: tl.constexpr
):
    """Own gradients of the positives, times what comes in: pulls of their logits, and those of their values."""
    if own_ptr is not None:
        for begin in range(0, positives, BLOCK):
            index = begin + tl.arange(0, BLOCK)
            inside = index < positives
            pull = tl.zeros([BLOCK], tl.float64)
            if first_ptr is not None:
                pull += tl.load(own_ptr + index, mask=inside, other=0.0) * tl.load(first_ptr).to(tl.float64)
            if second_ptr is not None:
                of_second = tl.load(own_ptr + positives + index, mask=inside, other=0.0)
                pull += of_second * tl.load(second_ptr).to(tl.float64)
            _store(pulls_ptr, index, pull, inside)
            if of_values_ptr is not None:
                grad = tl.load(own_ptr + 2 * positives + index, mask=inside, other=0.0)
                _store(grad_values_ptr, index, grad * tl.load(of_values_ptr).to(tl.float64), inside)


@triton.jit(do_not_specialize=["P", "positives"])
def prepare_kernel(
    rows_ptr, weights_ptr, scores_ptr, offsets_ptr, shares_ptr, own_ptr, first_ptr, second_ptr, of_values_ptr,
    pulls_ptr, grad_values_ptr, P, positives, delta: tl.float64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """What rmatvec_kernel reads: rows, offsets, weights in its dtype, and shares[P], 0 if all are finite, else NaN.

    Weights are times ``first``, if that is given; own gradients as :func:`scale_own` says.
    """
    scale_own(own_ptr, first_ptr, second_ptr, of_values_ptr, pulls_ptr, grad_values_ptr, positives, BLOCK)
    dtype = scores_ptr.dtype.element_ty
    poison = tl.load(rows_ptr) * 0.0 + tl.load(rows_ptr + P - 1) * 0.0 + tl.zeros([BLOCK], tl.float64)
    for begin in range(0, P, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < P
        row = tl.load(rows_ptr + index, mask=inside, other=0.0)
        weight = tl.load(weights_ptr + index, mask=inside, other=0.0)
        if first_ptr is not None:
            weight = weight * tl.load(first_ptr).to(tl.float64)
        tl.store(scores_ptr + index, row.to(dtype), mask=inside)
        tl.store(shares_ptr + index, weight.to(dtype), mask=inside)
        if not HARD:
            anchor = tl.load(rows_ptr + index // ROWS * ROWS, mask=inside, other=0.0)
            tl.store(offsets_ptr + index, (0.5 - (row - anchor) * (0.5 / delta)).to(dtype), mask=inside)
        poison += weight * 0.0
    tl.store(shares_ptr + P, tl.sum(poison, axis=0).to(dtype))


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
    if CLASSES < FEW:
        g = tl.where(counted(marks_ptr, start, column, inside, CLASSES, dtype) != 0, g, 0.0)
    tl.store(out_ptr + start + column, g.to(out_ptr.dtype.element_ty), mask=inside)
    if CLASSES >= FEW:
        clear(out_ptr, marks_ptr, start, tl.minimum(start + COLUMNS, N), CLASSES, COLUMNS, LANES)


def runs_on(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device: a CUDA or ROCm GPU, or any under Triton's interpreter."""
    return device.type == "cuda" or not isinstance(matvec_kernel, triton.JITFunction)


def blocks(size: int, block: int) -> int:
    """How many blocks it takes. (Triton's own ``cdiv`` takes a hundred times as long.)"""
    return -(-size // block)


def parts(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Empty vectors in one allocation, each at an address that 16 bytes divide.

    Triton compiles a kernel again where an address is no longer, or not yet, divisible so: sizes change with P.
    """
    step = 16 // dtype.itemsize
    lengths = [-(-size // step) * step for size in sizes]
    whole = torch.empty(sum(lengths), dtype=dtype, device=device)
    return [part[:size] for part, size in zip(whole.split(lengths), sizes, strict=True)]


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


class Own(NamedTuple):
    """What :func:`scale_own` reads and writes."""

    gradients: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None
    of_values: Tensor | None = None
    pulls: Tensor | None = None
    grad_values: Tensor | None = None

    @property
    def positives(self) -> int:
        """How many."""
        return 0 if self.pulls is None else self.pulls.numel()


def own_of(
    own: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    of_values: Tensor | None,
    dtype: torch.dtype,
    logits: Tensor,
) -> Own:
    """That of arguments of ``spread`` (:mod:`alrp_triton.operators`), with room for what becomes of them."""
    p = own.shape[1]
    grad_values = own.new_empty(0 if of_values is None else p, dtype=dtype)
    return Own(own, first, second, of_values, logits.new_empty(p), grad_values)


def rmatvec(
    rows: Tensor,
    row_groups: Tensor | None,
    weights: Tensor,
    columns: Columns,
    delta: float,
    tables: list[Tensor],
    own: Own | None = None,
) -> Tensor:
    """g_j = sum_i H_ij w_i, in the dtype of the columns ``(N,)``; 0 where a column does not count.

    With ``own`` weights are times its ``first``, and :func:`scale_own` is done beside.
    """
    own, values = own or Own(), columns.values
    p, n, working, hard = rows.numel(), values.numel(), working_dtype(values), delta == 0
    tile = TRANSPOSE_TILE[working]
    scores, offsets, shares = parts((p + 1,) * 3, working, rows.device)
    out = torch.empty_like(values)
    with torch.cuda.device_of(rows):
        # In the loop over rows every instruction counts, so what belongs to a row is made here, once.
        prepare_kernel[(1,)](
            rows, weights, scores, offsets, shares, *own, p, own.positives, delta, ROWS=tile["ROWS"],
            BLOCK=PREPARE_BLOCK, HARD=hard, num_warps=WARPS,
        )  # fmt: skip
        rmatvec_kernel[(blocks(n, tile["COLUMNS"]),)](
            scores, offsets, shares, values, columns.marks, out, p, n, delta, CLASSES=columns.num_classes or 0,
            LANES=LANES, HARD=hard, num_warps=WARPS, **tile,
        )  # fmt: skip
    return out
