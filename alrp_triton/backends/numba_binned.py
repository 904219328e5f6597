"""The two products of the comparison matrix on a CPU by numba: the algorithm of ``torch_binned`` in a few loops.

Tables are made once for both products, and a column's numbers stay in the first-level cache from one step to the next.

Groups are segments of the rows (:mod:`.numba_tables`) and streams of columns (:mod:`.numba_streams`). Functions are
compiled at first use, some seconds for each kind of input, and cached on disk by numba.
"""

# numba has no types, and what it compiles is not called as Python.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportCallIssue=false

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..formulas import at_zero
from . import threads
from .columns import Columns
from .knots import Floats, Indices, working_dtype
from .numba_jit import jit
from .numba_streams import STRIP, block_size, hide, make_streams, put, take
from .numba_tables import ZERO, most_cells, number_of_cells, open_tables
from .numba_tables import empty_tables as empty_tables
from .numba_tables import fill_tables as fill_tables
from .segments import bounds_of

_NO_BYTES, _NO_INTEGERS, _NO_FLOATS = np.empty(0, np.uint8), np.empty(0, np.int32), np.empty(0)
_NO_GROUPS = np.empty(0, np.int64)


class _Call(NamedTuple):
    """What both products hand to their loops."""

    bounds: Indices
    marks: tuple[NDArray[np.uint8], int, NDArray[np.int32], Floats]
    """Bytes, number of classes and marks of anchors, weights; what there is not is empty."""
    run: int
    runs: Indices
    run_at: Indices
    segment: Indices
    begin: Indices
    end: Indices
    table: tuple[NDArray[np.uint8], int, NDArray[np.floating]]

    def blocks(self, here: slice) -> tuple[Any, ...]:
        return (
            *self.marks, self.run, self.runs, self.run_at, self.segment[here], self.begin[here], self.end[here],
            self.bounds, *self.table,
        )  # fmt: skip


def _call(rows: Tensor, row_groups: Tensor | None, columns: Columns, tables: list[Tensor]) -> _Call:
    n, p, grouped = columns.values.numel(), rows.numel(), row_groups is not None
    bounds = bounds_of(row_groups, p)
    groups = _NO_GROUPS, _NO_GROUPS
    if columns.groups is not None and row_groups is not None:
        groups = columns.groups.numpy(), row_groups.numpy()
    streams = make_streams(*groups, bounds, n, block_size(n, p))
    marks = _NO_BYTES, 0, _NO_INTEGERS, _NO_FLOATS
    if columns.marks is None:  # all count
        pass
    elif columns.marks.is_floating_point():
        marks = _NO_BYTES, 0, _NO_INTEGERS, columns.marks.double().numpy()
    elif columns.num_classes is not None:
        marks = _NO_BYTES, columns.num_classes, columns.marks.numpy(), _NO_FLOATS
    else:
        marks = columns.marks.numpy(), 0, _NO_INTEGERS, _NO_FLOATS
    table = tables[0].numpy(), int(most_cells(p, grouped)), ZERO[working_dtype(columns.values)]
    return _Call(bounds, marks, *streams, table)


@jit
def _locate(x, scale, first, cells, cell, position):
    """Cell and position in it of each column, as Grid.cell has them; NaN in cell 0."""
    last = x.dtype.type(first + cells - 2)
    for j in range(len(x)):  # without a branch, so that it becomes vector instructions
        y = x[j] * scale
        y = y if y > first else first  # NaN, too
        y = y if y < last else last
        floor = np.floor(y)
        position[j] = y - floor
        cell[j] = np.uint32(np.int32(floor - first))


@jit
def _halve(cell, position, knot, of_cell):
    """From cell to half-cell, and to the position in that; of_cell: the knots of the cells.

    Two loops, for in one with look-ups a condition becomes a branch, which nobody can predict.
    """
    for j in range(len(position)):
        of_cell[j] = knot[cell[j]]
    for j in range(len(position)):
        y, k = position[j], of_cell[j]
        above = y >= k
        position[j] = y - k if above else y
        cell[j] = np.uint32(2) * cell[j] + np.uint32(above)


@jit
def _search(x, cell, base, knots):
    """Bin of a column in a crowded cell."""
    low, high = base[cell], base[cell + 1]
    while low < high:
        middle = (low + high) >> 1
        if x >= knots[middle]:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def _count(
    values, shift, marks, classes, excluded, weights, run, runs, run_at, segment, begin, end, bounds, table, most_cells,
    zero, sums, sums_at,
):  # fmt: skip
    """Sum of the weights in each bin, and of weights x positions, block by block: sums (·, 2), from sums_at[b] on.

    NaN in bin 0 if a column that counts is NaN.
    """
    low, _, _, _, scale, first, knots, cell_knot, _, _, cells_at, base, sloped = open_tables(
        table, bounds[-1], len(bounds) - 1, most_cells, zero
    )
    number = values.dtype.type
    most = 0
    for s in segment:
        if scale[s] == scale[s]:
            most = max(most, number_of_cells(s, low, bounds, scale, first))
    by_half = np.zeros((2 * most, 2))
    halves_of, picked = np.empty(STRIP, np.uint32), np.empty(STRIP, np.uint32)
    of_cell = np.empty(STRIP, cell_knot.dtype)
    of_x, of_position, of_v = np.empty(STRIP, values.dtype), np.empty(STRIP, values.dtype), np.ones(STRIP)
    hidden, weighed = number(-np.inf), len(weights) > 0
    for b in range(len(segment)):
        s = segment[b]
        if scale[s] != scale[s]:
            continue
        a, n = bounds[s], bounds[s + 1] - bounds[s]
        cells = number_of_cells(s, low, bounds, scale, first)
        knot, held = cell_knot[cells_at[s] : cells_at[s] + cells], base[cells_at[s] + s :]
        ladder, lows, slopes = knots[2 * a : 2 * (a + n)], low[2 * a + s :], sloped[2 * a + s :]
        total = sums[sums_at[b] : sums_at[b] + 2 * n + 1]
        wide, origin = number(scale[s]), number(first[s])
        for strip in range(begin[b], end[b], STRIP):
            size = min(STRIP, end[b] - strip)
            x, v, position = of_x[:size], of_v[:size], of_position[:size]
            take(values, shift, run, runs, run_at[s], strip, x)
            hide(marks, classes, excluded, run, runs, run_at[s], strip, x, hidden)  # below all knots: in bin 0
            if weighed:
                take(weights, 0, run, runs, run_at[s], strip, v)
                for j in range(size):
                    x[j] = x[j] if v[j] != 0 else hidden
            _locate(x, wide, origin, cells, halves_of, position)
            _halve(halves_of, position, knot, of_cell)
            nan = False
            for j in range(size):
                nan |= x[j] != x[j]
            if nan:
                total[0, 0] = np.nan
            crowded = np.uint32(0)  # signed numbers would be tested for being negative wherever they are an index
            for j in range(size):
                half, k, w = halves_of[j], of_cell[j], v[j]
                by_half[half, 0] += w
                by_half[half, 1] += w * position[j]
                picked[crowded] = np.uint32(j)
                crowded += np.uint32(k != k)
            for j in picked[:crowded]:
                bin = _search(x[j], halves_of[j] >> 1, held, ladder)
                total[bin, 0] += v[j]
                if slopes[bin]:
                    total[bin, 1] += v[j] * np.float64(x[j] - lows[bin])
        _fold(by_half, scale[s], first[s], knot, held, lows, slopes, total)


@jit
def _fold(by_half, scale, first, knot, base, low, sloped, sums):
    """Move sums of half-cells to their bins, as Grid.fold does; by_half is 0 afterwards. Positions count on slopes."""
    for cell in range(len(knot)):
        if knot[cell] == knot[cell]:  # not crowded
            begin = (first + cell) / scale
            for side in range(1 + (knot[cell] < 1)):
                bin, half = base[cell] + side, 2 * cell + side
                sums[bin, 0] += by_half[half, 0]
                if sloped[bin]:
                    start = 0.0 if side else begin - low[bin]
                    sums[bin, 1] += by_half[half, 1] / scale + by_half[half, 0] * start
    by_half[: 2 * len(knot)] = 0


@jit
def _sum_up(sums, sums_at, segment, bounds, at_zero, table, most_cells, zero, out):
    """The sums of h v for each row, as Knots.sums makes them, of what is in the blocks of its segment."""
    _, offset, rate, local, scale, _, _, _, rise, done, _, _, sloped = open_tables(
        table, bounds[-1], len(bounds) - 1, most_cells, zero
    )
    block = 0
    for s in range(len(bounds) - 1):
        a, n = bounds[s], bounds[s + 1] - bounds[s]
        total = np.zeros((2 * n + 2, 2))  # of the bins from there on; beyond the last 0
        while block < len(segment) and segment[block] == s:
            total[: 2 * n + 1] += sums[sums_at[block] : sums_at[block] + 2 * n + 1]
            block += 1
        if scale[s] != scale[s]:  # and has no tables
            out[a : a + n] = np.nan
            continue
        poison = 0.0
        for t in range(2 * n + 1):
            poison += (total[t, 0] + total[t, 1]) * 0
        for t in range(2 * n, -1, -1):  # suffix sums: small sums above a row keep their digits
            bin = 2 * a + s + t
            moment = total[t, 1] + total[t, 0] * offset[bin] if sloped[bin] else 0.0
            total[t, 0] += total[t + 1, 0]
            total[t, 1] = moment + total[t + 1, 1]
        for i in range(a, a + n):
            above = total[done[i], 0]
            inside = total[rise[i], 0] - above
            moment = total[rise[i], 1] - total[done[i], 1]
            out[i] = above + at_zero * inside + rate[i] * (moment - local[i] * inside) + poison


@jit
def _draw_lines(weights, bounds, at_zero, table, most_cells, zero):
    """The function sum_i w_i h(x - s_i): value at the lower knot and slope by bin (Knots.lines), and by half-cell."""
    low, offset, rate, local, scale, first, _, cell_knot, rise, done, cells_at, base, sloped = open_tables(
        table, bounds[-1], len(bounds) - 1, most_cells, zero
    )
    last = len(bounds) - 2
    while last >= 0 and scale[last] != scale[last]:
        last -= 1
    used = 0 if last < 0 else cells_at[last] + number_of_cells(last, low, bounds, scale, first)
    by_bin, by_half = np.empty((len(low), 2)), np.empty((2 * used, 2), zero.dtype)
    for s in range(len(bounds) - 1):
        a, n = bounds[s], bounds[s + 1] - bounds[s]
        if scale[s] != scale[s]:
            continue
        lines = by_bin[2 * a + s : 2 * (a + n) + s + 1]
        lines[:] = 0
        poison = 0.0
        for i in range(a, a + n):
            tilt = weights[i] * rate[i]
            shift = tilt * local[i]
            lines[rise[i], 0] += at_zero * weights[i] - shift
            lines[rise[i], 1] += tilt
            lines[done[i], 0] += (1 - at_zero) * weights[i] + shift
            lines[done[i], 1] -= tilt
            poison += weights[i] * 0
        value = slope = 0.0
        for t in range(2 * n + 1):
            value += lines[t, 0]
            slope += lines[t, 1]
            slope = slope if sloped[2 * a + s + t] else 0.0
            lines[t, 0] = value + slope * offset[2 * a + s + t] + poison  # shows even below all knots
            lines[t, 1] = slope
        cells = number_of_cells(s, low, bounds, scale, first)
        for cell in range(cells_at[s], cells_at[s] + cells):
            begin = (first[s] + (cell - cells_at[s])) / scale[s]
            for side in range(2):
                above = side & (cell_knot[cell] < 1)
                bin = base[cell + s] + above
                start = 0.0 if above or lines[bin, 1] == 0 else begin - low[2 * a + s + bin]
                by_half[2 * cell + side, 0] = lines[bin, 0] + lines[bin, 1] * start
                by_half[2 * cell + side, 1] = lines[bin, 1] / scale[s]
    return by_bin, by_half


@jit
def _evaluate(
    values, shift, marks, classes, excluded, weights, run, runs, run_at, segment, begin, end, bounds, table, most_cells,
    zero, by_bin, by_half, out,
):  # fmt: skip
    """Fill out with value + slope * position, from by_half or, in crowded cells, from by_bin; 0 where none counts."""
    low, _, _, _, scale, first, knots, cell_knot, _, _, cells_at, base, _ = open_tables(
        table, bounds[-1], len(bounds) - 1, most_cells, zero
    )
    number = values.dtype.type
    halves_of, picked = np.empty(STRIP, np.uint32), np.empty(STRIP, np.uint32)
    of_cell = np.empty(STRIP, cell_knot.dtype)
    of_x, of_position, of_g = (
        np.empty(STRIP, values.dtype),
        np.empty(STRIP, values.dtype),
        np.empty(STRIP, values.dtype),
    )
    for b in range(len(segment)):
        s = segment[b]
        a, n = bounds[s], bounds[s + 1] - bounds[s]
        finite = scale[s] == scale[s]
        cells = number_of_cells(s, low, bounds, scale, first) if finite else 0
        knot, held = cell_knot[cells_at[s] : cells_at[s] + cells], base[cells_at[s] + s :]
        halves = by_half[2 * cells_at[s] :]
        ladder, lows, lines = knots[2 * a : 2 * (a + n)], low[2 * a + s :], by_bin[2 * a + s :]
        wide, origin = number(scale[s]), number(first[s])
        for strip in range(begin[b], end[b], STRIP):
            size = min(STRIP, end[b] - strip)
            position = of_position[:size]
            if len(runs) == 1:  # as they stand in memory
                x, g = values[strip - shift : strip - shift + size], out[strip - shift : strip - shift + size]
            else:
                x, g = of_x[:size], of_g[:size]
                take(values, shift, run, runs, run_at[s], strip, x)
            if finite:
                _locate(x, wide, origin, cells, halves_of, position)
                _halve(halves_of, position, knot, of_cell)
                crowded = np.uint32(0)
                for j in range(size):
                    half, k = halves_of[j], of_cell[j]
                    g[j] = halves[half, 0] + halves[half, 1] * position[j]
                    picked[crowded] = np.uint32(j)
                    crowded += np.uint32(k != k)
                for j in picked[:crowded]:
                    bin = _search(x[j], halves_of[j] >> 1, held, ladder)
                    y = lines[bin, 0]
                    if lines[bin, 1] != 0:  # 0 * inf is not what is meant
                        y += lines[bin, 1] * (x[j] - lows[bin])
                    g[j] = y
                for j in range(size):
                    g[j] = g[j] if x[j] == x[j] else x[j]
            else:
                g[:] = np.nan
            hide(marks, classes, excluded, run, runs, run_at[s], strip, g, number(0))
            if len(runs) > 1:
                put(out, shift, run, runs, run_at[s], strip, g)


def _share(task: Callable[[slice, Tensor, int], None], columns: Columns, call: _Call) -> None:
    """Call the task for all blocks, each thread on a run of them, with the columns that it reads and their first.

    Half precision, which numba does not compute with, is widened: block by block, where there is one stream.
    """
    inference = torch.is_inference_mode_enabled()  # of this thread alone
    values, working, count = columns.values, working_dtype(columns.values), len(call.segment)
    if values.dtype != working and columns.groups is not None:
        values = values.to(working)

    def of_thread(blocks: slice) -> None:
        with torch.inference_mode(inference):
            if values.dtype == working:
                task(blocks, values, 0)
                return
            for b in range(blocks.start, blocks.stop):
                begin, end = int(call.begin[b]), int(call.end[b])
                task(slice(b, b + 1), values[begin:end].to(working), begin)

    if count == 1 and values.dtype == working:
        task(slice(0, 1), values, 0)
    else:
        threads.run([partial(of_thread, blocks) for blocks in threads.cut(count, count)])


def matvec(rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float, tables: list[Tensor]) -> Tensor:
    """y_i = sum_j H_ij v_j, float64 ``(P,)``."""
    call = _call(rows, row_groups, columns, tables)
    bins = 2 * (call.bounds[1:] - call.bounds[:-1])[call.segment] + 1
    ends = bins.cumsum()
    sums, sums_at = np.zeros((int(ends[-1]) if len(ends) else 0, 2)), ends - bins

    def count(blocks: slice, values: Tensor, shift: int) -> None:
        _count(values.numpy(), shift, *call.blocks(blocks), sums, sums_at[blocks])

    _share(count, columns, call)
    out = torch.empty_like(rows)
    _sum_up(sums, sums_at, call.segment, call.bounds, at_zero(delta), *call.table, out.numpy())
    return out


def rmatvec(
    rows: Tensor, row_groups: Tensor | None, weights: Tensor, columns: Columns, delta: float, tables: list[Tensor]
) -> Tensor:
    """g_j = sum_i H_ij w_i, in the dtype of the columns ``(N,)``; 0 where a column does not count."""
    call = _call(rows, row_groups, columns, tables)
    lines = _draw_lines(weights.numpy(), call.bounds, at_zero(delta), *call.table)
    result = (torch.empty_like if row_groups is None else torch.zeros_like)(columns.values)
    working = working_dtype(result)
    wide = result if result.dtype == working else result.to(working) if row_groups is not None else None

    def evaluate(blocks: slice, values: Tensor, shift: int) -> None:
        out = torch.empty_like(values) if wide is None else wide
        _evaluate(values.numpy(), shift, *call.blocks(blocks), *lines, out.numpy())
        if wide is None:
            result[shift : shift + len(out)] = out

    _share(evaluate, columns, call)
    return result if wide is None or wide is result else wide.to(result.dtype)
