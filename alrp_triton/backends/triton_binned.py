"""The two products of the comparison matrix in Triton, linear in the number of columns: the twin of ``torch_binned``.

:mod:`.knots` has the idea. Here the bin of a column is found by a look-up table over equal cells and, within a cell, by
bisection between its knots, in one pass over the columns that reads them in place:

* ``evaluate_kernel`` (for ``rmatvec``) has each column's line at hand and writes its value: no atomics, no sums.
* ``count_kernel`` (for ``matvec``) adds to each bin the number of its columns and the sum of their positions, as 64-bit
  **integers in fixed point**: integer sums do not depend on their order, so results are bitwise repeatable. Blocks of
  columns below all knots add nothing; a block in a single bin, as when a detector is new and all logits are equal, adds
  its sum; the others add column by column, to one of several copies of the table.

What is of size P: tables by bisection among the rows, here, for all groups together, so that a program needs to know no
more than which rows are of the group of its columns; sums for the rows and lines of the bins in :mod:`.triton_sums`.
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
from .triton_prefix import MOST_REGISTERS, is_finite, is_jump, load_row, narrowed
from .triton_sums import lines_of, sum_bins
from .triton_tiled import FEW, LANES, Own, blocks, clear, counted

# Columns a program, by the dtype of the arithmetic, as many as fit without spills; threads; rows a program of tables.
BLOCK = {torch.float32: 1024, torch.float64: 256}
WARPS = 4
TABLE_ROWS = 16
CELLS = 8  # for each row
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
    return tl.where(is_jump(row, delta, dtype), jump, knot)


@triton.jit
def _cell(x, low, high, M):
    """Cell of the look-up table, 0 … M - 1, a monotone function of x between two knots; NaN in cell 0."""
    infinity = float("inf")
    width = tl.minimum(high * 0.5 - low * 0.5, 1.5e38)
    scale = tl.minimum(M * 0.5 / tl.maximum(width, 1e-37), 1e37).to(x.dtype)
    y = (tl.where(x < infinity, x, high) - low) * scale
    y = tl.minimum(tl.maximum(tl.where(y == y, y, 0.0), 0.0), M - 1.0)
    return tl.minimum(y.to(tl.int32), M - 1)  # M - 1.0 may have been rounded up


@triton.jit
def _first_row(groups_ptr, group, P, AFTER: tl.constexpr):
    """The first row of a group, or of those after it; P if there is none."""
    low = tl.zeros(group.shape, tl.int32)
    high = low + P
    width = P
    while width > 0:
        middle = (low + high) // 2
        open = low < high
        other = tl.load(groups_ptr + middle, mask=open, other=0)
        low, high = narrowed(low, high, middle, open & ((other <= group) if AFTER else (other < group)))
        width = width // 2
    return low


@triton.jit
def _rows_of(groups_ptr, group, P):
    """The rows [begin, stop) of each group."""
    return _first_row(groups_ptr, group, P, False), _first_row(groups_ptr, group, P, True)


@triton.jit
def _segment(groups_ptr, index, P):
    """The rows [begin, stop) of the group of each row."""
    if groups_ptr is None:
        begin = tl.zeros(index.shape, tl.int32)
        stop = begin + P
    else:
        begin, stop = _rows_of(groups_ptr, tl.load(groups_ptr + index), P)
    return begin, stop


@triton.jit
def _halve(low, high, knot, rows_ptr, delta, UPPER: tl.constexpr, dtype: tl.constexpr):
    """A step in search of the first row whose lower knot is above a knot, or (UPPER) whose upper is not below it."""
    middle = (low + high) // 2
    open = low < high
    other = _knot(load_row(rows_ptr, middle, open, dtype), delta, UPPER, dtype)
    return narrowed(low, high, middle, open & ((other < knot) if UPPER else (other <= knot)))


@triton.jit
def _halve_cells(low, high, cell, first, last, M, rows_ptr, delta, UPPER: tl.constexpr, dtype: tl.constexpr):
    """A step in search of the first row whose lower, or (UPPER) upper, knot is not in a cell before one."""
    middle = (low + high) // 2
    open = low < high
    knot = _knot(load_row(rows_ptr, middle, open, dtype), delta, UPPER, dtype)
    return narrowed(low, high, middle, open & (_cell(knot, first, last, M) < cell))


@triton.jit(do_not_specialize=["P", "runs"])
def tables_kernel(
    rows_ptr, groups_ptr, run_groups_ptr, knots_ptr, rise_ptr, done_ptr, lut_ptr, bounds_ptr, P, runs,
    delta: tl.float64, CELLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program b: all tables (:func:`empty_tables`) of block b of the rows, and of the runs of columns."""
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = index < P
    begin, stop = _segment(groups_ptr, tl.minimum(index, P - 1), P)
    row = load_row(rows_ptr, index, inside, dtype)
    lower = _knot(row, delta, False, dtype)
    upper = _knot(row, delta, True, dtype)
    # Among the knots of its group each comes after those of the rows before; of equal ones the lower are first.
    reached, reached_stop, passed, passed_stop = begin, stop, begin, stop
    width = P
    while width > 0:
        reached, reached_stop = _halve(reached, reached_stop, upper, rows_ptr, delta, False, dtype)
        passed, passed_stop = _halve(passed, passed_stop, lower, rows_ptr, delta, True, dtype)
        width = width // 2
    rise = index + passed
    done = index + reached
    tl.store(knots_ptr + rise, lower, mask=inside)
    tl.store(knots_ptr + done, upper, mask=inside)
    tl.store(rise_ptr + index, rise, mask=inside)
    tl.store(done_ptr + index, done, mask=inside)

    entry = tl.program_id(0) * (ROWS * CELLS) + tl.arange(0, ROWS * CELLS)
    begin, stop = _segment(groups_ptr, tl.minimum(entry // CELLS, P - 1), P)
    bottom = load_row(rows_ptr, begin, None, dtype)
    top = load_row(rows_ptr, stop - 1, None, dtype)
    first = _knot(bottom, delta, False, dtype)
    last = _knot(top, delta, True, dtype)
    # Rows ascend, NaN last. Where one is not finite knots are not in order, and all columns go to the first bin.
    sound = is_finite(bottom) & is_finite(top)
    cells = CELLS * (stop - begin) - 1
    cell = entry - CELLS * begin
    # Of this cell and the next one, of lower knots and of upper ones.
    low, low_stop, high, high_stop = begin, stop, begin, stop
    next_low, next_low_stop, next_high, next_high_stop = begin, stop, begin, stop
    width = P
    while width > 0:
        low, low_stop = _halve_cells(low, low_stop, cell, first, last, cells, rows_ptr, delta, False, dtype)
        high, high_stop = _halve_cells(high, high_stop, cell, first, last, cells, rows_ptr, delta, True, dtype)
        next_low, next_low_stop = _halve_cells(
            next_low, next_low_stop, cell + 1, first, last, cells, rows_ptr, delta, False, dtype
        )
        next_high, next_high_stop = _halve_cells(
            next_high, next_high_stop, cell + 1, first, last, cells, rows_ptr, delta, True, dtype
        )
        width = width // 2
    held = tl.where(sound & (cell < cells) & (entry < CELLS * P), next_low + next_high - low - high, 0)
    tl.store(lut_ptr + entry, tl.where(sound, low + high, 2 * begin + 1), mask=entry < CELLS * P)
    tl.atomic_max(lut_ptr + CELLS * P, tl.max(held, axis=0), sem="relaxed")

    if bounds_ptr is not None:
        inside = entry < runs
        group = tl.load(run_groups_ptr + entry, mask=inside, other=0)
        begin, stop = _rows_of(groups_ptr, group, P)
        tl.store(bounds_ptr + 2 * entry, begin, mask=inside)
        tl.store(bounds_ptr + 2 * entry + 1, stop, mask=inside)


@triton.jit
def _block(bounds_ptr, P, N, run, BLOCK: tl.constexpr):
    """Where this program's block of columns starts, where its run ends, and the rows [begin, stop) of its group."""
    program = tl.program_id(0).to(tl.int64)
    if bounds_ptr is None:
        start = program * BLOCK
        end = N
        begin = P * 0
        stop = P
    else:
        of_run = (run + BLOCK - 1) // BLOCK
        number = program // of_run
        start = number * run + program % of_run * BLOCK
        end = number * run + run
        begin = tl.load(bounds_ptr + 2 * number)
        stop = tl.load(bounds_ptr + 2 * number + 1)
    return start, end, begin, stop


@triton.jit
def _read(columns_ptr, marks_ptr, start, end, CLASSES: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """A block of columns, and how often they count. A whole one has no mask, and a thread reads 16 bytes at once."""
    column = tl.arange(0, BLOCK)
    if start + BLOCK <= end:
        x = tl.load(columns_ptr + start + column).to(dtype)
        weight = counted(marks_ptr, start, column, None, CLASSES, dtype)
    else:
        inside = column < end - start
        x = tl.load(columns_ptr + start + column, mask=inside, other=0.0).to(dtype)
        weight = counted(marks_ptr, start, column, inside, CLASSES, dtype)
    return x, weight


@triton.jit
def _find(x, inside, knots_ptr, lut_ptr, P, begin, stop, CELLS: tl.constexpr):
    """Bin of each column that is inside: the last knot of its group that is not above it."""
    cell = _cell(x, tl.load(knots_ptr + 2 * begin), tl.load(knots_ptr + 2 * stop - 1), CELLS * (stop - begin) - 1)
    cell += CELLS * begin
    low = tl.load(lut_ptr + cell, mask=inside, other=0)
    high = tl.load(lut_ptr + cell + 1, mask=inside, other=0)
    most = tl.load(lut_ptr + CELLS * P)
    while most > 0:  # knots between low and high, at most
        middle = (low + high) // 2
        open = low < high
        reached = open & (x >= tl.load(knots_ptr + middle, mask=open, other=0.0))
        low = tl.where(reached, middle + 1, low)
        high = tl.where(open & ~reached, middle, high)
        most = most // 2
    return low - 1


@triton.jit
def _position(x, bin, inside, knots_ptr, rate, HARD: tl.constexpr):
    """What h gains from the lower knot of a column's bin to the column, for a row with a slope there; cut at 2."""
    if HARD:
        position = tl.zeros(x.shape, x.dtype)
    else:
        position = tl.minimum((x - tl.load(knots_ptr + bin, mask=inside, other=0.0)) * rate, 2.0)
    return position


@triton.jit(do_not_specialize=["P", "N", "run", "copies"])
def count_kernel(
    columns_ptr, marks_ptr, knots_ptr, lut_ptr, bounds_ptr, table_ptr, nan_ptr, P, N: tl.int64, run: tl.int64, copies,
    delta: tl.float64, scale: tl.float64, CLASSES: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr,
    HARD: tl.constexpr,
):  # fmt: skip
    """Program b: block b of the columns -> table[b % copies, 0 and 1, bins]: sums of weights, of weights x positions.

    Both times ``scale``, as integers. At ``nan``, where the rows of a group begin, is added how many columns are NaN.
    """
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    start, end, begin, stop = _block(bounds_ptr, P, N, run, BLOCK)
    if begin < stop:
        x, weight = _read(columns_ptr, marks_ptr, start, end, CLASSES, BLOCK, dtype)
        live = (weight != 0) & ~(x < tl.load(knots_ptr + 2 * begin))
        if tl.max(live.to(tl.int32), axis=0) > 0:
            counts_ptr = table_ptr + tl.program_id(0) % copies * (4 * P)
            moments_ptr = counts_ptr + 2 * P
            nan = tl.sum((live & (x != x)).to(tl.int64), axis=0)
            if nan > 0:
                tl.atomic_add(nan_ptr + begin, nan, sem="relaxed")
            live = live & (x == x)
            bin = _find(x, live, knots_ptr, lut_ptr, P, begin, stop, CELLS)
            rate = 0.0
            if not HARD:
                rate = tl.full([], 0.5 / delta, dtype)
            position = _position(x, bin, live, knots_ptr, rate, HARD)
            unit = tl.full([], scale, dtype)
            count = tl.where(live, weight * unit, 0.0).to(tl.int64)
            moment = tl.where(live, weight * position * unit, 0.0).to(tl.int64)
            first = tl.min(tl.where(live, bin, 2 * P), axis=0)
            if first == tl.max(tl.where(live, bin, 0), axis=0):
                tl.atomic_add(counts_ptr + first, tl.sum(count, axis=0), sem="relaxed")
                tl.atomic_add(moments_ptr + first, tl.sum(moment, axis=0), sem="relaxed")
            else:
                tl.atomic_add(counts_ptr + bin, count, mask=live, sem="relaxed")
                tl.atomic_add(moments_ptr + bin, moment, mask=live, sem="relaxed")


@triton.jit(do_not_specialize=["P", "N", "run"])
def evaluate_kernel(
    columns_ptr, marks_ptr, knots_ptr, lut_ptr, bounds_ptr, lines_ptr, below_ptr, out_ptr, P, N: tl.int64,
    run: tl.int64, delta: tl.float64, CLASSES: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: out = value + slope * position for block b of the columns, 0 where a column does not count."""
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    start, end, begin, stop = _block(bounds_ptr, P, N, run, BLOCK)
    g = tl.zeros([BLOCK], dtype)
    if begin < stop:
        if CLASSES < FEW:
            x, weight = _read(columns_ptr, marks_ptr, start, end, CLASSES, BLOCK, dtype)
        else:  # what does not count is cleared afterwards
            x, weight = _read(columns_ptr, None, start, end, 0, BLOCK, dtype)
        g += tl.load(below_ptr + begin)  # below all knots: 0, or NaN if a weight is
        reached = (weight != 0) & (x >= tl.load(knots_ptr + 2 * begin))
        if tl.max(reached.to(tl.int32), axis=0) > 0:
            bin = _find(x, reached, knots_ptr, lut_ptr, P, begin, stop, CELLS)
            rate = 0.0
            if not HARD:
                rate = tl.full([], 0.5 / delta, dtype)
            position = _position(x, bin, reached, knots_ptr, rate, HARD)
            value = tl.load(lines_ptr + 2 * bin, mask=reached, other=0.0)
            slope = tl.load(lines_ptr + 2 * bin + 1, mask=reached, other=0.0)
            g = tl.where(reached, tl.fma(slope, position, value), g)
        g = tl.where(weight != 0, tl.where(x == x, g, float("nan")), 0.0)
    g = g.to(out_ptr.dtype.element_ty)
    column = tl.arange(0, BLOCK)
    if start + BLOCK <= end:  # as in _read
        tl.store(out_ptr + start + column, g)
    else:
        tl.store(out_ptr + start + column, g, mask=column < end - start)
    if CLASSES >= FEW:
        clear(out_ptr, marks_ptr, start, tl.minimum(start + BLOCK, end), CLASSES, BLOCK, LANES)


def empty_tables(rows: Tensor, grouped: bool, columns: Columns) -> list[Tensor]:
    """What both products read of the rows, all by group; uninitialised.

    * knots ``(2P,)``, of a group with the rows [begin, stop) at [2 begin, 2 stop);
    * the bins, numbered as the knots at which they begin, from which and behind which each row has a slope ``(P,)``;
    * the look-up table ``(8P + 1,)``, the first of its ``CELLS`` entries for a row of the group at 8 begin: how many
      knots lie before a cell; and at the end how many there are in a cell, at most;
    * with groups the rows [begin, stop) of the group of each run of columns ``(2 runs,)``.
    """
    p = rows.numel()
    runs = columns.groups.numel() if grouped and columns.groups is not None else 0
    knots = rows.new_empty(2 * p, dtype=working_dtype(columns.values))
    return [knots, *(rows.new_empty(length, dtype=torch.int32) for length in (p, p, CELLS * p + 1, 2 * runs))]


def fill_tables(tables: list[Tensor], rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float) -> None:
    """Make the tables of both products in what :func:`empty_tables` allocated."""
    knots, rise, done, lut, bounds = tables
    p, runs = rows.numel(), bounds.numel() // 2
    lut[CELLS * p :].zero_()
    with torch.cuda.device_of(rows):
        tables_kernel[(max(blocks(p, TABLE_ROWS), blocks(runs, CELLS * TABLE_ROWS)),)](
            rows, row_groups, columns.groups, knots, rise, done, lut, bounds if runs else None, p, runs, delta,
            CELLS=CELLS, ROWS=TABLE_ROWS, num_warps=WARPS,
            **({} if torch.version.hip else MOST_REGISTERS),
        )  # fmt: skip


def _runs(columns: Columns, bounds: Tensor, block: int) -> tuple[int, Tensor | None, int]:
    """The length of a run of columns, the rows of each, and how many programs it takes."""
    n, runs = columns.values.numel(), bounds.numel() // 2
    if runs == 0:
        return n, None, blocks(n, block)
    return n // runs, bounds, runs * blocks(n // runs, block)


def matvec(rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float, tables: list[Tensor]) -> Tensor:
    """y_i = sum_j H_ij v_j, float64 ``(P,)``."""
    p, n, hard = rows.numel(), columns.values.numel(), delta == 0
    knots, rise, done, lut, bounds = tables
    marks, largest = columns.marks, None
    if columns.weights is not None:
        # Weights in [-1, 1], for the fixed point; divided by a power of two, so that none is rounded.
        largest = torch.linalg.vector_norm(columns.weights, math.inf).double().frexp().exponent
        marks = torch.ldexp(columns.weights.double(), -largest)
    block = BLOCK[working_dtype(columns.values)]
    run, bounds, programs = _runs(columns, bounds, block)
    copies = max(1, min(n // _COLUMNS_A_COPY, _MOST_COPIES, _MOST_BINS // (2 * p)))
    sums = torch.zeros((4 * copies + 1) * p, dtype=torch.int64, device=rows.device)
    table, nan = sums[: 4 * copies * p].view(copies, 2, 2 * p), sums[4 * copies * p :]
    # With this unit, n columns at positions of at most 4 add up to less than 2**62.
    scale = 2.0 ** (60 - max(n - 1, 1).bit_length())
    with torch.cuda.device_of(rows):
        count_kernel[(programs,)](
            columns.values, marks, knots, lut, bounds, table, nan, p, n, run, copies, delta, scale,
            CLASSES=columns.num_classes or 0, CELLS=CELLS, BLOCK=block, HARD=hard, num_warps=WARPS,
        )  # fmt: skip
    out = sum_bins(rows, row_groups, knots, rise, done, table, nan, delta, 1 / scale)
    return out if largest is None else torch.ldexp(out, largest)


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

    With ``own`` weights are times its ``first``, and :func:`.scale_own` is done beside.
    """
    p, n = rows.numel(), columns.values.numel()
    knots, rise, done, lut, bounds = tables
    out, block = torch.empty_like(columns.values), BLOCK[working_dtype(columns.values)]
    run, bounds, programs = _runs(columns, bounds, block)
    lines, below = lines_of(rows, row_groups, knots, rise, done, weights, own or Own(), delta)
    with torch.cuda.device_of(rows):
        evaluate_kernel[(programs,)](
            columns.values, columns.marks, knots, lut, bounds, lines, below, out, p, n, run, delta,
            CLASSES=columns.num_classes or 0, CELLS=CELLS, BLOCK=block, LANES=LANES, HARD=delta == 0, num_warps=WARPS,
        )  # fmt: skip
    return out
