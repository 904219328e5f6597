"""The tables of the linear algorithm on a CPU, made by numba: knots, bins and the grid over them, for all segments.

They are those of :mod:`.knots` and :mod:`.torch_binned`, which state the idea. Segments stand one behind the other in
the same arrays: with rows ``bounds[s] … bounds[s + 1]`` segment s has knots from ``2 bounds[s]`` on and bins from
``2 bounds[s] + s`` on. What an operator hands on is one array of bytes, which both products open.
"""

# numba has no types, and what it compiles is not called as Python.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportCallIssue=false

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .columns import Columns, working_dtype
from .numba_jit import jit
from .segments import bounds_of

# Cells a knot, so that few columns share a cell with two knots; and at most so many, for the tables' sake.
_CELLS_A_KNOT, _MAX_CELLS = 32, 1 << 16
_MORE_CELLS = 16  # than wanted: below and above all knots, and for rounding


ZERO = {torch.float32: np.zeros(1, np.float32), torch.float64: np.zeros(1)}
_LIMITS = {
    dtype: (float(info.max), float(info.eps) / 2, math.frexp(info.eps)[1], math.frexp(info.tiny)[1])
    for dtype, info in ((dtype, np.finfo(zero.dtype)) for dtype, zero in ZERO.items())
}


def most_cells(rows: Any, grouped: bool) -> Any:
    """Of all segments together; an expression that a compiler can trace."""
    most = torch.sym_min(2 * _CELLS_A_KNOT * rows, _MAX_CELLS * (4 if grouped else 1))
    return most + _MORE_CELLS * (rows if grouped else 1)


def empty_tables(rows: Tensor, grouped: bool, columns: Columns) -> list[Tensor]:
    """Uninitialised bytes, for as many segments and cells as there may be, which :func:`open_tables` opens."""
    p = rows.numel()
    segments, cells = p if grouped else 1, most_cells(p, grouped)
    bins = 2 * p + segments
    wide = 2 * bins + 2 * p + 2 * segments
    size = (
        8 * wide + working_dtype(columns.values).itemsize * (2 * p + cells) + 4 * (2 * p + 2 * segments + cells) + bins
    )
    return [rows.new_empty(size, dtype=torch.uint8)]


@jit
def open_tables(table, p, segments, cells, zero):
    """The tables in the bytes of :func:`empty_tables`; ``zero`` is of the dtype in which columns are compared.

    low, offset: by bin, its lower knot, and that relative to the origin of its cluster. rate, local: by row, dh/dx
    between its knots, and its score relative to the origin of its cluster. scale, first: by segment, cells have a width
    of 1 / scale, and cell 0 begins at first / scale; NaN if a row is not finite. knots: two for each row, ascending.
    cell_knot: by cell, the position in it of its only knot, as Grid.knot. rise, done: by row, the bin from which it
    takes part, and that from which h is 1. cells_at: by segment, where its cells begin. base: by cell, and one more a
    segment, knots in the cells before. sloped: by bin, whether some row has a slope there.
    """
    bins, size = 2 * p + segments, zero.itemsize
    ends = np.array(
        [0, bins, 2 * bins, 2 * bins + p, 2 * bins + 2 * p, 2 * bins + 2 * p + segments, 2 * (bins + p + segments)]
    )
    wide = table[: 8 * ends[6]].view(np.float64)
    at = 8 * ends[6]
    knots = table[at : at + size * 2 * p].view(zero.dtype)
    at += size * 2 * p
    cell_knot = table[at : at + size * cells].view(zero.dtype)
    at += size * cells
    narrow = table[at : at + 4 * (2 * p + 2 * segments + cells)].view(np.int32)
    at += 4 * (2 * p + 2 * segments + cells)
    return (
        wide[: ends[1]], wide[ends[1] : ends[2]], wide[ends[2] : ends[3]], wide[ends[3] : ends[4]],
        wide[ends[4] : ends[5]], wide[ends[5] :], knots, cell_knot, narrow[:p], narrow[p : 2 * p],
        narrow[2 * p : 2 * p + segments], narrow[2 * p + segments :], table[at : at + bins],
    )  # fmt: skip


@jit
def number_of_cells(s, low, bounds, scale, first):
    """How many cells a segment has."""
    top = low[2 * bounds[s + 1] + s]
    return int(np.floor(top * scale[s]) - first[s]) + 3


@jit
def _fill_tables(table, cells, zero, rows, bounds, delta, columns, most, limits):
    """Knots as knots.make_knots has them, grid as torch_binned.make_grid has it, for all segments."""
    p, segments = len(rows), len(bounds) - 1
    low, offset, rate, local, scale, first, knots, cell_knot, rise, done, cells_at, base, sloped = open_tables(
        table, p, segments, cells, zero
    )
    largest, resolution, eps_exponent, tiny_exponent = limits
    number = knots.dtype.type
    infinity = number(np.inf)
    cell_at = 0
    for s in range(len(bounds) - 1):
        a, n = bounds[s], bounds[s + 1] - bounds[s]
        own, k = rows[a : a + n], knots[2 * a : 2 * (a + n)]
        lows, offsets = low[2 * a + s : 2 * (a + n) + s + 1], offset[2 * a + s : 2 * (a + n) + s + 1]
        slopes = sloped[2 * a + s : 2 * (a + n) + s + 1]
        cells_at[s] = cell_at
        if not (np.isfinite(own[0]) and np.isfinite(own[n - 1])):  # rows ascend, NaN last
            scale[s] = np.nan
            continue
        # Both kinds of knots ascend: merged, of equal ones the lower kind first.
        lower, upper = np.empty(n, knots.dtype), np.empty(n, knots.dtype)
        for i in range(n):
            row = own[i]
            jump = delta <= abs(row) * resolution
            rate[a + i] = 0.0 if jump or delta == 0 else 0.5 / delta
            if jump:
                lower[i] = number(row)
                if np.float64(lower[i]) < row:
                    lower[i] = np.nextafter(lower[i], infinity)
                upper[i] = np.nextafter(number(row), infinity)
            else:
                lower[i], upper[i] = number(row - delta), number(row + delta)
                if np.float64(lower[i]) < row - delta:
                    lower[i] = np.nextafter(lower[i], infinity)
                if np.float64(upper[i]) < row + delta:
                    upper[i] = np.nextafter(upper[i], infinity)
        i = j = 0
        for t in range(2 * n):
            if i < n and (j >= n or lower[i] <= upper[j]):
                k[t] = lower[i]
                rise[a + i] = t + 1
                i += 1
            else:
                k[t] = upper[j]
                done[a + j] = t + 1
                j += 1
        # Slopes that overlap form a cluster; positions are relative to where it begins.
        slopes[:] = 0
        for i in range(n):
            if rate[a + i] > 0:
                slopes[rise[a + i]] += np.uint8(1)
                slopes[done[a + i]] += np.uint8(2)
        active = begin = i = 0
        lows[0], offsets[0] = min(max(np.float64(k[0]), -largest), largest), 0.0
        for t in range(1, 2 * n + 1):
            lows[t] = min(max(np.float64(k[t - 1]), -largest), largest)
            before = active
            active += np.int64(slopes[t] & 1) - np.int64(slopes[t] >> 1)
            if active > 0 and before == 0:
                begin = t
            origin = lows[max(begin, 1)]
            slopes[t] = active > 0
            offsets[t] = lows[t] - origin if active > 0 else 0.0
            if i < n and rise[a + i] == t:
                local[a + i] = own[i] - origin
                i += 1

        # As many as it is worth: a block folds all cells, which are a fraction of its columns.
        share = columns * n // p
        wanted = min(2 * _CELLS_A_KNOT * n, most, most * 4 * n // p + 1 if segments > 1 else most, max(share // 4, 8))
        bottom, top = lows[0], lows[2 * n]
        fine = math.frexp(np.float64(wanted))[1] - 2 - math.frexp(top / 2 - bottom / 2)[1]
        exact = 2 - eps_exponent - math.frexp(max(-bottom, top))[1]
        exponent = min(fine, exact, 1 - tiny_exponent)
        scale[s] = math.ldexp(1.0, exponent)
        first[s] = np.floor(bottom * scale[s]) - 1.0
        size = int(np.floor(top * scale[s]) - first[s]) + 3
        of_cell, held = cell_knot[cell_at : cell_at + size], base[cell_at + s : cell_at + s + size + 1]
        of_cell[:] = 2.0
        held[:] = 0
        # In a cell so wide a position within a slope may be less than all numbers but 0.
        fine_enough = delta == 0 or delta * scale[s] > 2.0**-60
        bounds_of_cells = number(first[s]), number(first[s] + size - 2)
        for t in range(2 * n):
            # In the arithmetic of _locate, which may underflow.
            y = min(max(k[t] * number(scale[s]), bounds_of_cells[0]), bounds_of_cells[1])
            c = int(np.floor(y) - bounds_of_cells[0])
            held[c + 1] += 1
            of_cell[c] = y - np.floor(y) if held[c + 1] == 1 and fine_enough else np.nan
        for c in range(size):
            held[c + 1] += held[c]
        of_cell[size - 1] = np.nan
        # Just below 0 a position is rounded, 1 - 1e-30 to 1: a comparison there must be of the columns themselves.
        if 0 < -1 - first[s] < size:
            of_cell[int(-1 - first[s])] = np.nan
        cell_at += size


def fill_tables(tables: list[Tensor], rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float) -> None:
    """Make the tables of both products in what :func:`empty_tables` allocated."""
    p, working = rows.numel(), working_dtype(columns.values)
    _fill_tables(
        tables[0].numpy(), int(most_cells(p, row_groups is not None)), ZERO[working], rows.numpy(),
        bounds_of(row_groups, p), delta, columns.values.numel(), _MAX_CELLS, _LIMITS[working],
    )  # fmt: skip
