"""The two products of the comparison matrix in Triton, linear in the number of columns: the twin of ``torch_binned``.

:mod:`.knots` has the idea. Here the bin of a column is found by a look-up table over equal cells and, within a cell, by
bisection between its knots, in one pass over the columns that reads them in place:

* ``evaluate_kernel`` (for ``rmatvec``) has each column's line at hand and writes its value: no atomics, no sums.
* ``count_kernel`` (for ``matvec``) adds to each bin the number of its columns and the sum of their positions, as 64-bit
  **integers in fixed point**: integer sums do not depend on their order, so results are bitwise repeatable. Blocks of
  columns below all knots add nothing; a block in a single bin, as when a detector is new and all logits are equal, adds
  its sum; the others add column by column, to one of several copies of the table.

What is of size P, tables for the bins and sums for the rows, are small dense products in float64, free of cancellation.
Columns are compared in float32 (float64 if that is what they are), exactly, with knots rounded up to it.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import Columns
from .knots import working_dtype
from .segments import spread_by_segment, sum_by_segment
from .triton_tiled import blocks, counted

# Columns a program, by the dtype of the arithmetic, as many as fit without spills; threads; and for the kernels over
# bins and rows, the tile of their dense product.
BLOCK = {torch.float32: 1024, torch.float64: 512}
WARPS = 4
TILE = {"OUT": 8, "IN": 128}
_CELLS_A_KNOT = 2
# Copies of the table of sums, so that programs rarely meet at an address: one for so many columns, within bounds.
_COLUMNS_A_COPY, _MOST_COPIES, _MOST_BINS = 1 << 15, 64, 1 << 18


@triton.jit
def _above(x, dtype: tl.constexpr):
    """The least number of the dtype that is above x, a finite float64 that it can represent."""
    if dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        bits = tl.where(x == 0, 1, tl.where(x > 0, bits + 1, bits - 1))
        y = bits.to(tl.float64, bitcast=True)
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = tl.where(x == 0, 1, tl.where(x > 0, bits + 1, bits - 1))
        y = bits.to(tl.float32, bitcast=True)
    return y


@triton.jit
def _is_jump(row, delta, dtype: tl.constexpr):
    """Whether delta is below the resolution around a row's score, so that its step is two jumps (knots.make_knots)."""
    return delta <= tl.abs(row) * (2.0**-53 if dtype == tl.float64 else 2.0**-24)


@triton.jit
def _knot(row, delta, UPPER: tl.constexpr, dtype: tl.constexpr):
    """Knot of a float64 row, rounded up to the dtype."""
    if UPPER:
        exact = row + delta
    else:
        exact = row - delta
    knot = exact.to(dtype)
    if dtype != tl.float64:
        knot = tl.where(knot.to(tl.float64) < exact, _above(knot.to(tl.float64), dtype), knot)
    if UPPER:
        jump = _above(row, dtype)
    else:
        jump = row.to(dtype)
    return tl.where(_is_jump(row, delta, dtype), jump, knot)


@triton.jit
def _rank(knot, rows_ptr, P, delta, UPPER: tl.constexpr, dtype: tl.constexpr):
    """How many upper knots are less than each lower one, or (UPPER) how many lower ones are at most each upper one."""
    low = tl.zeros(knot.shape, tl.int32)
    high = low + P
    while tl.max(high - low, axis=0) > 0:
        middle = (low + high) // 2
        open = low < high
        row = tl.load(rows_ptr + middle, mask=open, other=0.0).to(dtype).to(tl.float64)
        other = _knot(row, delta, not UPPER, dtype)
        if UPPER:
            before = open & (other <= knot)
        else:
            before = open & (other < knot)
        low = tl.where(before, middle + 1, low)
        high = tl.where(open & ~before, middle, high)
    return low


@triton.jit(do_not_specialize=["P"])
def knots_kernel(rows_ptr, knots_ptr, rise_ptr, done_ptr, most_ptr, P, delta: tl.float64, BLOCK: tl.constexpr):
    """Program b: knots of block b of the rows, at their places in the order of all; rise and done as in knots.Knots.

    Makes most_ptr 0, for lut_kernel to raise.
    """
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < P
    row = tl.load(rows_ptr + index, mask=inside, other=0.0).to(dtype).to(tl.float64)
    lower = _knot(row, delta, False, dtype)
    upper = _knot(row, delta, True, dtype)
    rise = index + _rank(lower, rows_ptr, P, delta, False, dtype)
    done = index + _rank(upper, rows_ptr, P, delta, True, dtype)
    tl.store(knots_ptr + rise, lower, mask=inside)
    tl.store(knots_ptr + done, upper, mask=inside)
    tl.store(rise_ptr + index, rise + 1, mask=inside)
    tl.store(done_ptr + index, done + 1, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(most_ptr, 0)


@triton.jit
def _cell(x, knots_ptr, P, M):
    """Cell of the look-up table, 0 … M - 1, a monotone function of x; NaN in cell 0."""
    low = tl.load(knots_ptr)
    infinity = float("inf")
    high = tl.load(knots_ptr + 2 * P - 1)
    width = tl.minimum(high * 0.5 - low * 0.5, 1.5e38)
    scale = tl.minimum(M * 0.5 / tl.maximum(width, 1e-37), 1e37).to(x.dtype)
    y = (tl.where(x < infinity, x, high) - low) * scale
    y = tl.minimum(tl.maximum(tl.where(y == y, y, 0.0), 0.0), M - 1.0)
    return y.to(tl.int32)


@triton.jit
def _find(x, inside, knots_ptr, lut_ptr, P, M):
    """Bin of each column: how many knots are not above it. Of columns not inside, anything."""
    cell = _cell(x, knots_ptr, P, M)
    low = tl.load(lut_ptr + cell, mask=inside, other=0)
    high = tl.load(lut_ptr + cell + 1, mask=inside, other=0)
    most = tl.load(lut_ptr + M + 1)
    while most > 0:  # knots between low and high, at most
        middle = (low + high) // 2
        open = low < high
        reached = open & (x >= tl.load(knots_ptr + middle, mask=open, other=0.0))
        low = tl.where(reached, middle + 1, low)
        high = tl.where(open & ~reached, middle, high)
        most = most // 2
    return low


@triton.jit
def _first_of_cell(cell, knots_ptr, P, M):
    """How many knots lie in the cells before each."""
    low = tl.zeros(cell.shape, tl.int32)
    high = low + 2 * P
    while tl.max(high - low, axis=0) > 0:
        middle = (low + high) // 2
        open = low < high
        knot = tl.load(knots_ptr + middle, mask=open, other=0.0)
        before = open & (_cell(knot, knots_ptr, P, M) < cell)
        low = tl.where(before, middle + 1, low)
        high = tl.where(open & ~before, middle, high)
    return low


@triton.jit(do_not_specialize=["P", "M"])
def lut_kernel(knots_ptr, lut_ptr, P, M, BLOCK: tl.constexpr):
    """Program b: for block b of the cells, 0 … M: how many knots lie in cells before; lut[M + 1]: most in a cell."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = _first_of_cell(cell, knots_ptr, P, M)
    tl.store(lut_ptr + cell, low, mask=cell <= M)
    held = tl.where(cell < M, _first_of_cell(cell + 1, knots_ptr, P, M) - low, 0)
    tl.atomic_max(lut_ptr + M + 1, tl.max(held, axis=0), sem="relaxed")


@triton.jit
def _position(x, bin, inside, knots_ptr, rate, HARD: tl.constexpr):
    """What h gains from the lower knot of a column's bin to the column, for a row with a slope there; cut at 2."""
    if HARD:
        position = tl.zeros(x.shape, x.dtype)
    else:
        low = tl.load(knots_ptr + bin - 1, mask=inside & (bin > 0), other=0.0)
        position = tl.minimum((x - low) * rate, 2.0)
    return position


@triton.jit
def _read(array_ptr, block, N, other, BLOCK: tl.constexpr):
    """Block of a long array. Where it is whole there is no mask, and a thread reads 16 bytes at once."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= N:
        values = tl.load(array_ptr + index)
    else:
        values = tl.load(array_ptr + index, mask=index < N, other=other)
    return values


@triton.jit(do_not_specialize=["P", "M", "N", "copies"])
def count_kernel(
    columns_ptr, marks_ptr, knots_ptr, lut_ptr, table_ptr, P, M, N: tl.int64, copies, delta: tl.float64,
    scale: tl.float64, BLOCK: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: block b of the columns -> table[b % copies, 0 and 1, bins]: sums of weights, of weights x positions.

    Both times ``scale``, as integers. Bin 0, which counts for no row, holds the number of NaN.
    """
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    x = _read(columns_ptr, block, N, float("-inf"), BLOCK).to(dtype)
    live = ~(x < tl.load(knots_ptr))  # which -inf is, if rows are finite, and else nothing counts
    one = tl.full([BLOCK], 1.0, dtype)
    if marks_ptr is not None:
        one = counted(_read(marks_ptr, block, N, 1, BLOCK), dtype)
        live = live & (one != 0)
    if tl.max(live.to(tl.int32), axis=0) > 0:
        counts_ptr = table_ptr + block % copies * (4 * P + 2)
        moments_ptr = counts_ptr + 2 * P + 1
        nan = tl.sum((live & (x != x)).to(tl.int64), axis=0)
        if nan > 0:
            tl.atomic_add(counts_ptr, nan, sem="relaxed")
        live = live & (x == x)
        bin = _find(x, live, knots_ptr, lut_ptr, P, M)
        rate = 0.0
        if not HARD:
            rate = tl.full([], 0.5 / delta, dtype)
        position = _position(x, bin, live, knots_ptr, rate, HARD)
        unit = tl.full([], scale, dtype)
        count = tl.where(live, one * unit, 0.0).to(tl.int64)
        moment = tl.where(live, one * position * unit, 0.0).to(tl.int64)
        first = tl.min(tl.where(live, bin, 2 * P + 1), axis=0)
        if first == tl.max(tl.where(live, bin, 0), axis=0):
            tl.atomic_add(counts_ptr + first, tl.sum(count, axis=0), sem="relaxed")
            tl.atomic_add(moments_ptr + first, tl.sum(moment, axis=0), sem="relaxed")
        else:
            tl.atomic_add(counts_ptr + bin, count, mask=live, sem="relaxed")
            tl.atomic_add(moments_ptr + bin, moment, mask=live, sem="relaxed")


@triton.jit
def _at_low(t, row, knots_ptr, P, delta, dtype: tl.constexpr, HARD: tl.constexpr):
    """The step h of rows at the lower knot of bins, float64, and dh/dposition there: 1, or 0 for a row that jumps."""
    knot = tl.load(knots_ptr + t - 1, mask=(t > 0) & (t <= 2 * P), other=0.0).to(tl.float64)
    knot = tl.minimum(knot, 1.7e308 if dtype == tl.float64 else 3.4e38)  # an infinite knot counts for no row's slope
    if HARD:
        h = (knot - row) * 0.0 + 1.0
        slope = h * 0.0
    else:
        jump = _is_jump(row, delta, dtype)
        # Exactly 0 at the row's own lower knot. (knot - row) / (2 delta) + 1/2 leaves a rounding error there on a GPU,
        # which fuses the two; and what a jump would make of it may overflow.
        h = tl.where(jump, 0.5, (knot - (row - delta)) * (0.5 / delta))
        slope = tl.where(jump, 0.0, 1.0).to(tl.float64)
    return h, slope


@triton.jit(do_not_specialize=["P"])
def rows_kernel(
    rows_ptr, knots_ptr, rise_ptr, done_ptr, table_ptr, out_ptr, P, delta: tl.float64, unit: tl.float64,
    OUT: tl.constexpr, IN: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: the sum of h over all columns for block b of the rows, from table[0 and 1, bins] times ``unit``."""
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    index = tl.program_id(0) * OUT + tl.arange(0, OUT)
    inside = index < P
    row = tl.load(rows_ptr + index, mask=inside, other=0.0).to(dtype).to(tl.float64)[:, None]
    rise = tl.load(rise_ptr + index, mask=inside, other=0)[:, None]
    done = tl.load(done_ptr + index, mask=inside, other=0)[:, None]
    acc = tl.zeros([OUT, IN], tl.float64)
    for begin in range(0, 2 * P + 1, IN):
        t = (begin + tl.arange(0, IN))[None, :]
        count = tl.load(table_ptr + t, mask=t <= 2 * P, other=0).to(tl.float64)
        moment = tl.load(table_ptr + 2 * P + 1 + t, mask=t <= 2 * P, other=0).to(tl.float64)
        h, slope = _at_low(t, row, knots_ptr, P, delta, dtype, HARD)
        acc += tl.where(t >= done, count, tl.where(t >= rise, count * h + moment * slope, 0.0))
    y = tl.sum(acc, axis=1) * unit + (tl.load(rows_ptr) + tl.load(rows_ptr + P - 1)) * 0.0
    tl.store(out_ptr + index, tl.where(tl.load(table_ptr) != 0, float("nan"), y), mask=inside)


@triton.jit(do_not_specialize=["P"])
def lines_kernel(
    rows_ptr, weights_ptr, knots_ptr, rise_ptr, done_ptr, lines_ptr, P, delta: tl.float64,
    OUT: tl.constexpr, IN: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: sum of w h over all rows at block b of the bins -> lines[bins, 0 and 1]: value at the knot, slope."""
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    bin = tl.program_id(0) * OUT + tl.arange(0, OUT)
    t = bin[:, None]
    value = tl.zeros([OUT, IN], tl.float64) + (tl.load(rows_ptr) + tl.load(rows_ptr + P - 1)) * 0.0
    change = tl.zeros([OUT, IN], tl.float64)
    for begin in range(0, P, IN):
        index = begin + tl.arange(0, IN)
        inside = index < P
        row = tl.load(rows_ptr + index, mask=inside, other=0.0).to(dtype).to(tl.float64)[None, :]
        weight = tl.load(weights_ptr + index, mask=inside, other=0.0)[None, :]
        rise = tl.load(rise_ptr + index, mask=inside, other=0)[None, :]
        done = tl.load(done_ptr + index, mask=inside, other=0)[None, :]
        h, slope = _at_low(t, row, knots_ptr, P, delta, dtype, HARD)
        active = (t >= rise) & (t < done)
        value += tl.where(t >= done, weight, tl.where(active, weight * h, weight * 0.0))  # a NaN weight shows anywhere
        change += tl.where(active, weight * slope, 0.0)
    tl.store(lines_ptr + 2 * bin, tl.sum(value, axis=1).to(dtype), mask=bin <= 2 * P)
    tl.store(lines_ptr + 2 * bin + 1, tl.sum(change, axis=1).to(dtype), mask=bin <= 2 * P)


@triton.jit(do_not_specialize=["P", "M", "N"])
def evaluate_kernel(
    columns_ptr, marks_ptr, knots_ptr, lut_ptr, lines_ptr, out_ptr, P, M, N: tl.int64, delta: tl.float64,
    BLOCK: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: out = value + slope * position for block b of the columns, 0 where a column does not count."""
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    x = _read(columns_ptr, block, N, float("-inf"), BLOCK).to(dtype)
    g = tl.zeros([BLOCK], dtype) + tl.load(lines_ptr)  # below all knots: 0, or NaN if a weight is
    reached = x >= tl.load(knots_ptr)
    live = reached
    if marks_ptr is not None:
        live = counted(_read(marks_ptr, block, N, 1, BLOCK), dtype) != 0
        reached = reached & live
    if tl.max(reached.to(tl.int32), axis=0) > 0:
        bin = _find(x, reached, knots_ptr, lut_ptr, P, M)
        rate = 0.0
        if not HARD:
            rate = tl.full([], 0.5 / delta, dtype)
        position = _position(x, bin, reached, knots_ptr, rate, HARD)
        value = tl.load(lines_ptr + 2 * bin, mask=reached, other=0.0)
        slope = tl.load(lines_ptr + 2 * bin + 1, mask=reached, other=0.0)
        g = tl.where(reached, tl.fma(slope, position, value), g)
    g = tl.where(x == x, g, float("nan"))
    if marks_ptr is not None:
        g = tl.where(live, g, 0.0)
    g = g.to(out_ptr.dtype.element_ty)
    column = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= N:  # as in _read
        tl.store(out_ptr + column, g)
    else:
        tl.store(out_ptr + column, g, mask=column < N)


def _cells(rows: int) -> int:
    """Cells of the look-up table."""
    return 1 << (2 * rows * _CELLS_A_KNOT - 1).bit_length()


def empty_tables(rows: Tensor, grouped: bool, columns: Columns) -> list[Tensor]:
    """Knots ``(2P,)``, the bins from which and behind which each row has a slope ``(P,)``, and the look-up table.

    Uninitialised. A power of two is no expression that a compiler can trace, so the last may be longer than it is.
    """
    p = rows.numel()
    lengths = (p, p, 4 * _CELLS_A_KNOT * p + 2)
    knots = rows.new_empty(2 * p, dtype=working_dtype(columns.values))
    return [knots, *(rows.new_empty(length, dtype=torch.int32) for length in lengths)]


def fill_tables(tables: list[Tensor], rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float) -> None:
    """Make the tables of both products in what :func:`empty_tables` allocated; with groups each product makes them."""
    if row_groups is None:
        _fill_tables(tables, rows, delta)


def _fill_tables(tables: list[Tensor], rows: Tensor, delta: float) -> None:
    knots, rise, done, lut = tables
    p, cells = rows.numel(), _cells(rows.numel())
    with torch.cuda.device_of(rows):
        knots_kernel[(blocks(p, 128),)](rows, knots, rise, done, lut[cells + 1 :], p, delta, BLOCK=128, num_warps=WARPS)
        lut_kernel[(blocks(cells + 1, 256),)](knots, lut, p, cells, BLOCK=256, num_warps=WARPS)


def matvec(rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float, tables: list[Tensor]) -> Tensor:
    """y_i = sum_j H_ij v_j, float64 ``(P,)``."""
    if row_groups is None:
        return _matvec(rows, columns, delta, tables)

    def of_segment(s: Tensor, those: Columns) -> Tensor:
        return _matvec(s, those, delta, _tables(s, those, delta))

    return sum_by_segment(of_segment, rows, row_groups, columns)


def rmatvec(
    rows: Tensor, row_groups: Tensor | None, weights: Tensor, columns: Columns, delta: float, tables: list[Tensor]
) -> Tensor:
    """g_j = sum_i H_ij w_i, in the dtype of the columns ``(N,)``; 0 where a column does not count."""
    if row_groups is None:
        return _rmatvec(rows, weights, columns, delta, tables)

    def of_segment(s: Tensor, w: Tensor, those: Columns) -> Tensor:
        return _rmatvec(s, w, those, delta, _tables(s, those, delta))

    return spread_by_segment(of_segment, rows, row_groups, weights, columns)


def _tables(rows: Tensor, columns: Columns, delta: float) -> list[Tensor]:
    tables = empty_tables(rows, False, columns)
    _fill_tables(tables, rows, delta)
    return tables


def _matvec(rows: Tensor, columns: Columns, delta: float, tables: list[Tensor]) -> Tensor:
    p, n, hard = rows.numel(), columns.values.numel(), delta == 0
    knots, rise, done, lut = tables
    marks, largest = columns.marks, None
    if columns.weights is not None:
        # Weights in [-1, 1], for the fixed point; divided by a power of two, so that none is rounded.
        largest = torch.linalg.vector_norm(columns.weights, math.inf).double().frexp().exponent
        marks = torch.ldexp(columns.weights.double(), -largest)
    out, block = torch.empty_like(rows), BLOCK[working_dtype(columns.values)]
    copies = max(1, min(n // _COLUMNS_A_COPY, _MOST_COPIES, _MOST_BINS // (2 * p + 1)))
    table = torch.zeros(copies, 2, 2 * p + 1, dtype=torch.int64, device=rows.device)
    # A sum of n positions of at most 2 stays below 2**62.
    scale = 2.0 ** (61 - max(n - 1, 1).bit_length())
    with torch.cuda.device_of(rows):
        count_kernel[(blocks(n, block),)](
            columns.values, marks, knots, lut, table, p, _cells(p), n, copies, delta, scale, BLOCK=block, HARD=hard,
            num_warps=WARPS,
        )  # fmt: skip
        rows_kernel[(blocks(p, TILE["OUT"]),)](
            rows, knots, rise, done, table.sum(0), out, p, delta, 1 / scale, HARD=hard, num_warps=WARPS, **TILE
        )
    return out if largest is None else torch.ldexp(out, largest)


def _rmatvec(rows: Tensor, weights: Tensor, columns: Columns, delta: float, tables: list[Tensor]) -> Tensor:
    p, n, hard = rows.numel(), columns.values.numel(), delta == 0
    knots, rise, done, lut = tables
    out, block = torch.empty_like(columns.values), BLOCK[working_dtype(columns.values)]
    lines = knots.new_empty(2 * p + 1, 2)
    with torch.cuda.device_of(rows):
        lines_kernel[(blocks(2 * p + 1, TILE["OUT"]),)](
            rows, weights, knots, rise, done, lines, p, delta, HARD=hard, num_warps=WARPS, **TILE
        )
        evaluate_kernel[(blocks(n, block),)](
            columns.values, columns.marks, knots, lut, lines, out, p, _cells(p), n, delta, BLOCK=block, HARD=hard,
            num_warps=WARPS,
        )  # fmt: skip
    return out
