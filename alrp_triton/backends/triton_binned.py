"""The two products of the comparison matrix in Triton, linear in the number of columns: the twin of ``torch_binned``.

:mod:`.knots` has the idea; the bin of a column is found in the tables of :mod:`.triton_tables`, in one pass over the
columns that reads them in place:

* ``evaluate_kernel`` (for ``rmatvec``) has each column's line at hand and writes its value: no atomics, no sums.
* ``count_kernel`` (for ``matvec``) adds to each bin the number of its columns and the sum of their positions, as
  **integers in fixed point**: integer sums do not depend on their order, so results are bitwise repeatable. On NVIDIA
  a program adds up its columns in shared memory (:mod:`.triton_shared`); where there is none to be had, or columns are
  weighed or float64, all add to one of several copies of the table. A block of columns in a single bin, as when a
  detector is new and all logits are equal, adds its sum.

What is of size P are sums for the rows and lines of the bins, in :mod:`.triton_sums`.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_shared
from .columns import Columns, working_dtype
from .triton_gradients import PositiveGradients
from .triton_layout import blocks
from .triton_marks import FEW_CLASSES, LANES, clear, counted
from .triton_shared import UNIT_BITS, add_block, add_each, clear_sums, declare, read_sums
from .triton_sums import lines_of, sum_bins
from .triton_tables import CELLS, empty_tables, fill_tables, find, group_cells

__all__ = ["empty_tables", "fill_tables", "matvec", "rmatvec"]

# Columns a program, by the dtype of the arithmetic, as many as fit without spills; threads.
BLOCK = {torch.float32: 1024, torch.float64: 256}
WARPS = 4
# Copies of the table of sums, so that programs rarely meet at an address: one for so many columns, within bounds.
_COLUMNS_A_COPY, _MAX_COPIES, _MAX_BINS = 1 << 15, 64, 1 << 18


@triton.jit
def _span(bounds_ptr, P, N, run, each, BLOCK: tl.constexpr):
    """The columns [start, end) of this program, so many blocks of one run, and the rows [begin, stop) of its group."""
    program = tl.program_id(0).to(tl.int64)
    if bounds_ptr is None:
        start = program * each * BLOCK
        end = N
        begin = P * 0
        stop = P
    else:
        of_run = (run + each * BLOCK - 1) // (each * BLOCK)
        number = program // of_run
        start = number * run + program % of_run * each * BLOCK
        end = number * run + run
        begin = tl.load(bounds_ptr + 2 * number)
        stop = tl.load(bounds_ptr + 2 * number + 1)
    return start, tl.minimum(start + each * BLOCK, end), begin, stop


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
def _position(x, bin, knots_ptr, rate, HARD: tl.constexpr):
    """What h gains from the lower knot of a column's bin to the column, for a row with a slope there; cut at 2."""
    if HARD:
        position = tl.zeros(x.shape, x.dtype)
    else:
        position = tl.minimum((x - tl.load(knots_ptr + bin)) * rate, 2.0)
    return position


@triton.jit
def _ends(low, high, other_low, other_high):
    """Of the least and the greatest of columns; NaN if one is."""
    return (
        tl.minimum(low, other_low, propagate_nan=tl.PropagateNan.ALL),
        tl.maximum(high, other_high, propagate_nan=tl.PropagateNan.ALL),
    )


@triton.jit
def _find_all(x, knots_ptr, lut_ptr, begin, stop, low, scale, last, step, CELLS: tl.constexpr):
    """How many knots are not above the least column, and whether it is so for all, of which none is NaN."""
    least, greatest = tl.reduce((x, x), 0, _ends)
    knots = find(least, knots_ptr, lut_ptr, begin, stop, low, scale, last, step, CELLS)
    same = knots == find(greatest, knots_ptr, lut_ptr, begin, stop, low, scale, last, step, CELLS)
    return knots, same & (least == least)


@triton.jit
def _add(
    x, weight, knots, table_ptr, nan_ptr, sums, knots_ptr, P, begin, stop, rate, unit,
    HARD: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Columns to the bins that begin at the last of so many knots; those below all knots are left out."""
    first = 2 * begin
    bin = tl.maximum(knots - 1, first)
    position = _position(x, bin, knots_ptr, rate, HARD)
    nan = (weight != 0) & (x != x)
    live = (weight != 0) & (knots > first)
    if SHARED:  # NaN has a bin of its own, behind the others
        bin = tl.where(nan, 2 * stop, bin) - first
        add_each(sums, bin, tl.minimum(position, 1.0), live | nan)
    else:
        number = tl.sum(nan.to(tl.int64), axis=0)
        if number > 0:
            tl.atomic_add(nan_ptr + begin, number, sem="relaxed")
        tl.atomic_add(table_ptr + bin, (weight * unit).to(tl.int64), mask=live, sem="relaxed")
        tl.atomic_add(table_ptr + 2 * P + bin, (weight * position * unit).to(tl.int64), mask=live, sem="relaxed")


@triton.jit
def _add_all(
    x, weight, knots, table_ptr, sums, knots_ptr, P, begin, rate, unit,
    HARD: tl.constexpr, SHARED: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """As _add, of columns that are all in one bin, and none of them NaN."""
    bin = knots - 1
    if bin >= 2 * begin:
        position = _position(x, bin, knots_ptr, rate, HARD)
        if SHARED:
            add_block(sums, bin - 2 * begin, tl.minimum(position, 1.0), weight != 0, THREADS)
        else:
            count = tl.sum(tl.where(weight != 0, weight * unit, 0.0).to(tl.int64), axis=0)
            moment = tl.sum(tl.where(weight != 0, weight * position * unit, 0.0).to(tl.int64), axis=0)
            tl.atomic_add(table_ptr + bin, count, sem="relaxed")
            tl.atomic_add(table_ptr + 2 * P + bin, moment, sem="relaxed")


@triton.jit(do_not_specialize=["P", "N", "run", "each", "copies"])
def count_kernel(
    columns_ptr, marks_ptr, knots_ptr, lut_ptr, bounds_ptr, table_ptr, nan_ptr, P, N: tl.int64, run: tl.int64, each,
    copies, rate: tl.float64, scale: tl.float64, CLASSES: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr, HARD: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Program b: so many blocks -> table[b % copies, 0 and 1, bins]: sums of weights, of weights x positions.

    Both times ``scale``, as integers. At ``nan``, where the rows of a group begin, is added how many columns are NaN.
    """
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    rate = tl.full([], rate, dtype)
    start, end, begin, stop = _span(bounds_ptr, P, N, run, each, BLOCK)
    if begin < stop:
        table_ptr += tl.program_id(0) % copies * (4 * P)
        sums = P * 0
        bins = 2 * (stop - begin)
        if SHARED:
            sums = declare()
            clear_sums(sums, bins + 1, THREADS)
            tl.debug_barrier()
        unit = tl.full([], scale, dtype)
        low, of_cells, last, step = group_cells(knots_ptr, lut_ptr, P, begin, stop, CELLS)
        length = (end - start).to(tl.int32)
        # Whether its first block is in one bin tells a program what to expect of the others.
        alike = False
        for at in range(0, length, BLOCK):
            x, weight = _read(columns_ptr, marks_ptr, start + at, end, CLASSES, BLOCK, dtype)
            same = False
            of_all = sums
            if alike | (at == 0):
                of_all, same = _find_all(x, knots_ptr, lut_ptr, begin, stop, low, of_cells, last, step, CELLS)
                alike = same
            if same:
                _add_all(x, weight, of_all, table_ptr, sums, knots_ptr, P, begin, rate, unit, HARD, SHARED, THREADS)
            else:
                knots = find(x, knots_ptr, lut_ptr, begin, stop, low, of_cells, last, step, CELLS)
                _add(x, weight, knots, table_ptr, nan_ptr, sums, knots_ptr, P, begin, stop, rate, unit, HARD, SHARED)
        if SHARED:
            tl.debug_barrier()
            for first in range(0, bins + 1, THREADS):
                bin = first + tl.arange(0, THREADS)
                number, position = read_sums(sums, tl.minimum(bin, bins))
                some = (number > 0) & (bin < bins)
                at_bin = table_ptr + 2 * begin + bin
                tl.atomic_add(at_bin, number << UNIT_BITS, mask=some, sem="relaxed")
                tl.atomic_add(at_bin + 2 * P, position, mask=some, sem="relaxed")
                tl.atomic_add(nan_ptr + begin + bin * 0, number, mask=(number > 0) & (bin == bins), sem="relaxed")


@triton.jit
def _on_line(x, knots, knots_ptr, lines_ptr, below, begin, rate, HARD: tl.constexpr):
    """The value at each column of the line that begins at the last of so many knots."""
    first = 2 * begin
    bin = tl.maximum(knots - 1, first)
    position = _position(x, bin, knots_ptr, rate, HARD)
    if x.dtype == tl.float32:  # both with one instruction
        line = tl.load(lines_ptr.to(tl.pointer_type(tl.int64)) + bin)
        value = line.to(tl.int32).to(tl.float32, bitcast=True)
        slope = (line >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        value = tl.load(lines_ptr + 2 * bin)
        slope = tl.load(lines_ptr + 2 * bin + 1)
    return tl.where(knots > first, tl.fma(slope, position, value), below)


@triton.jit(do_not_specialize=["P", "N", "run"])
def evaluate_kernel(
    columns_ptr, marks_ptr, knots_ptr, lut_ptr, bounds_ptr, lines_ptr, below_ptr, out_ptr, P, N: tl.int64,
    run: tl.int64, rate: tl.float64, CLASSES: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: out = value + slope * position for block b of the columns, 0 where a column does not count."""
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    rate = tl.full([], rate, dtype)
    start, end, begin, stop = _span(bounds_ptr, P, N, run, 1, BLOCK)
    g = tl.zeros([BLOCK], dtype)
    if begin < stop:
        if CLASSES < FEW_CLASSES:
            x, weight = _read(columns_ptr, marks_ptr, start, end, CLASSES, BLOCK, dtype)
        else:  # what does not count is cleared afterwards
            x, weight = _read(columns_ptr, None, start, end, 0, BLOCK, dtype)
        low, scale, last, step = group_cells(knots_ptr, lut_ptr, P, begin, stop, CELLS)
        knots = find(x, knots_ptr, lut_ptr, begin, stop, low, scale, last, step, CELLS)
        below = tl.load(below_ptr + begin)  # 0, or NaN if a weight is
        g += _on_line(x, knots, knots_ptr, lines_ptr, below, begin, rate, HARD)
        g = tl.where(x == x, g, float("nan"))
        if CLASSES < FEW_CLASSES:
            g = tl.where(weight != 0, g, 0.0)
    g = g.to(out_ptr.dtype.element_ty)
    column = tl.arange(0, BLOCK)
    if start + BLOCK <= end:  # as in _read
        tl.store(out_ptr + start + column, g)
    else:
        tl.store(out_ptr + start + column, g, mask=column < end - start)
    if CLASSES >= FEW_CLASSES:
        clear(out_ptr, marks_ptr, start, end, CLASSES, BLOCK, LANES)


def _rate(delta: float) -> float:
    """Of h, in a column's value."""
    return 0.5 / delta if delta > 0 else 0.0


class _Launch(NamedTuple):
    """How ``count_kernel`` is launched."""

    block: int
    each: int
    """Blocks a program."""
    copies: int
    scale: float
    settings: dict[str, Any]


def _runs(columns: Columns, bounds: Tensor, span: int) -> tuple[int, Tensor | None, int]:
    """The length of a run of columns, the rows of each, and how many programs it takes."""
    n, runs = columns.values.numel(), bounds.numel() // 2
    if runs == 0:
        return n, None, blocks(n, span)
    return n // runs, bounds, runs * blocks(n // runs, span)


_INTERPRETED = not isinstance(count_kernel, triton.JITFunction)  # as imported: tests put others in its place


@cache
def _multiprocessors(device: torch.device) -> int:
    """Of an NVIDIA GPU; 0 where there is none, or none computes: nor is there its shared memory."""
    if device.type != "cuda" or torch.version.hip is not None or _INTERPRETED:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(columns: Columns, p: int, runs: int) -> _Launch:
    """For columns of so many runs; in shared memory where that can be."""
    n, dtype = columns.values.numel(), working_dtype(columns.values)
    fits = 2 * p < triton_shared.BINS and n <= triton_shared.MAX_OF_ALL
    programs = triton_shared.PROGRAMS * _multiprocessors(columns.values.device)
    if programs and fits and dtype == torch.float32 and columns.weights is None:
        block, of_run = triton_shared.BLOCK, max(programs // runs, 1)
        waves = blocks(n // runs, of_run * triton_shared.MAX_COLUMNS)  # lest a program have more than it can add up
        each = blocks(n // runs, of_run * waves * block)
        return _Launch(block, each, 1, 2.0**UNIT_BITS.value, triton_shared.SETTINGS)
    block = BLOCK[dtype]
    copies = max(1, min(n // _COLUMNS_A_COPY, _MAX_COPIES, _MAX_BINS // (2 * p)))
    # With this unit, n columns at positions of at most 2 add up to less than 2**62.
    scale = 2.0 ** (60 - max(n - 1, 1).bit_length())
    return _Launch(block, 1, copies, scale, {"SHARED": False, "THREADS": 0, "num_warps": WARPS})


def matvec(rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float, tables: list[Tensor]) -> Tensor:
    """y_i = sum_j H_ij v_j, float64 ``(P,)``."""
    p, n = rows.numel(), columns.values.numel()
    knots, rise, done, lut, bounds = tables
    marks, largest = columns.marks, None
    if columns.weights is not None:
        # Weights in [-1, 1], for the fixed point; divided by a power of two, so that none is rounded.
        largest = torch.linalg.vector_norm(columns.weights, math.inf).double().frexp().exponent
        marks = torch.ldexp(columns.weights.double(), -largest)
    block, each, copies, scale, settings = _launch(columns, p, max(bounds.numel() // 2, 1))
    run, bounds, programs = _runs(columns, bounds, block * each)
    sums = torch.zeros((4 * copies + 1) * p, dtype=torch.int64, device=rows.device)
    table, nan = sums[: 4 * copies * p].view(copies, 2, 2 * p), sums[4 * copies * p :]
    with torch.cuda.device_of(rows):
        count_kernel[(programs,)](
            columns.values, marks, knots, lut, bounds, table, nan, p, n, run, each, copies, _rate(delta), scale,
            CLASSES=columns.num_classes or 0, CELLS=CELLS, BLOCK=block, HARD=delta == 0, **settings,
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
    gradients: PositiveGradients | None = None,
) -> Tensor:
    """g_j = sum_i H_ij w_i, in the dtype of the columns ``(N,)``; 0 where a column does not count.

    With ``gradients`` weights are times their ``ranking_scale``, and :func:`.scale_positives` is done beside.
    """
    p, n = rows.numel(), columns.values.numel()
    knots, rise, done, lut, bounds = tables
    out, block = torch.empty_like(columns.values), BLOCK[working_dtype(columns.values)]
    run, bounds, programs = _runs(columns, bounds, block)
    lines, below = lines_of(rows, row_groups, knots, rise, done, weights, gradients or PositiveGradients(), delta)
    with torch.cuda.device_of(rows):
        evaluate_kernel[(programs,)](
            columns.values, columns.marks, knots, lut, bounds, lines, below, out, p, n, run, _rate(delta),
            CLASSES=columns.num_classes or 0, CELLS=CELLS, BLOCK=block, LANES=LANES, HARD=delta == 0, num_warps=WARPS,
        )  # fmt: skip
    return out
