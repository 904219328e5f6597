"""The tables of the binned kernels: the knots of the rows, and where among them a column is found.

Made by bisection among the rows, in one launch for all groups, so that a program of the products needs to know no more
than which rows are of the group of its columns. Columns are compared in float32 (float64 if that is what they are),
exactly, with knots rounded up to it. What is near in value is found by a look-up table over equal **cells**, and then
by bisection between the knots of a cell.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import Columns, working_dtype
from .triton_layout import blocks
from .triton_prefix import MAX_REGISTERS, is_finite, is_jump, load_row, narrowed

WARPS = 4
ROWS = 8  # a program
CELLS = 16  # for each row


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
def cells_of(low, high, number, dtype: tl.constexpr):
    """So many cells between two knots, as :func:`cell_of` has them: their number in a unit, and the last of them."""
    width = tl.minimum(high * 0.5 - low * 0.5, 1.5e38)
    scale = tl.minimum(number * 0.5 / tl.maximum(width, 1e-37), 1e37)
    last = number - 1 - number // 16777216  # as float32 it may be rounded up, but not to ``number``
    return scale.to(dtype), last.to(dtype)


@triton.jit
def cell_of(x, low, scale, last):
    """Cell of the look-up table, a monotone function of x between two knots; NaN in cell 0."""
    y = (x - low) * scale
    return tl.minimum(tl.where(y > 0.0, y, 0.0), last).to(tl.int32)


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
def _halve_cells(
    low, high, cell, bottom, scale, last, rows_ptr, delta, UPPER: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """A step in search of the first row whose lower, or (UPPER) upper, knot is not in a cell before one."""
    middle = (low + high) // 2
    open = low < high
    knot = _knot(load_row(rows_ptr, middle, open, dtype), delta, UPPER, dtype)
    return narrowed(low, high, middle, open & (cell_of(knot, bottom, scale, last) < cell))


@triton.jit
def _power_of_two(x):
    """The greatest that is not above x; 0 for 0."""
    x = x | (x >> 1)
    x = x | (x >> 2)
    x = x | (x >> 4)
    x = x | (x >> 8)
    x = x | (x >> 16)
    return (x + 1) >> 1


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
    cells = CELLS * (stop - begin)
    scale, last_cell = cells_of(first, last, cells, dtype)
    cell = entry - CELLS * begin
    # Of this cell and the next one, of lower knots and of upper ones.
    low, low_stop, high, high_stop = begin, stop, begin, stop
    next_low, next_low_stop, next_high, next_high_stop = begin, stop, begin, stop
    width = P
    while width > 0:
        low, low_stop = _halve_cells(low, low_stop, cell, first, scale, last_cell, rows_ptr, delta, False, dtype)
        high, high_stop = _halve_cells(high, high_stop, cell, first, scale, last_cell, rows_ptr, delta, True, dtype)
        next_low, next_low_stop = _halve_cells(
            next_low, next_low_stop, cell + 1, first, scale, last_cell, rows_ptr, delta, False, dtype
        )
        next_high, next_high_stop = _halve_cells(
            next_high, next_high_stop, cell + 1, first, scale, last_cell, rows_ptr, delta, True, dtype
        )
        width = width // 2
    held = tl.where(sound & (entry < CELLS * P), next_low + next_high - low - high, 0)
    tl.store(lut_ptr + entry, tl.where(sound, low + high, 2 * begin + 1), mask=entry < CELLS * P)
    tl.atomic_max(lut_ptr + CELLS * P, _power_of_two(tl.max(held, axis=0)), sem="relaxed")

    if bounds_ptr is not None:
        inside = entry < runs
        group = tl.load(run_groups_ptr + entry, mask=inside, other=0)
        begin, stop = _rows_of(groups_ptr, group, P)
        tl.store(bounds_ptr + 2 * entry, begin, mask=inside)
        tl.store(bounds_ptr + 2 * entry + 1, stop, mask=inside)


@triton.jit
def group_cells(knots_ptr, lut_ptr, P, begin, stop, CELLS: tl.constexpr):
    """What :func:`find` wants to know of a group with the rows [begin, stop)."""
    low = tl.load(knots_ptr + 2 * begin)
    high = tl.load(knots_ptr + 2 * stop - 1)
    scale, last = cells_of(low, high, CELLS * (stop - begin), knots_ptr.dtype.element_ty)
    return low, scale, last, tl.load(lut_ptr + CELLS * P)


@triton.jit
def find(x, knots_ptr, lut_ptr, begin, stop, low, scale, last, step, CELLS: tl.constexpr):
    """How many knots are not above each column, those of the groups before counted: 2 begin … 2 stop; NaN has none."""
    knots = tl.load(lut_ptr + (CELLS * begin + cell_of(x, low, scale, last)))
    most = 2 * stop
    while step > 0:  # those of a later cell are above x; behind them all the last one is asked again
        knot = tl.load(knots_ptr + tl.minimum(knots + (step - 1), most - 1))
        knots = tl.where(x >= knot, knots + step, knots)
        step = step // 2
    return tl.minimum(knots, most)


def empty_tables(rows: Tensor, grouped: bool, columns: Columns) -> list[Tensor]:
    """What both products read of the rows, all by group; uninitialised.

    * knots ``(2P,)``, of a group with the rows [begin, stop) at [2 begin, 2 stop);
    * the bins, numbered as the knots at which they begin, from which and behind which each row has a slope ``(P,)``;
    * the look-up table ``(CELLS P + 1,)``, that of a group at CELLS begin: how many knots lie before a cell; and at the
      end the first step of a search in a cell: the greatest power of two that is not above the most knots in one;
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
        tables_kernel[(max(blocks(p, ROWS), blocks(runs, CELLS * ROWS)),)](
            rows, row_groups, columns.groups, knots, rise, done, lut, bounds if runs else None, p, runs, delta,
            CELLS=CELLS, ROWS=ROWS, num_warps=WARPS,
            **({} if torch.version.hip else MAX_REGISTERS),
        )  # fmt: skip
