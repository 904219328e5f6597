"""The loops of :mod:`.numba_binned`: columns are counted in the bins of a table, and evaluated by the lines of one.

A column's numbers stay in the first-level cache from one step to the next.
"""

# numba has no types, and what it compiles is not called as Python.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportCallIssue=false

import numpy as np

from .numba_jit import jit
from .numba_streams import STRIP, hide, put, take
from .numba_tables import number_of_cells, open_tables


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
def count_columns(
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
def sum_up(sums, sums_at, segment, bounds, at_zero, table, most_cells, zero, out):
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
def draw_lines(weights, bounds, at_zero, table, most_cells, zero):
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
def evaluate_columns(
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
