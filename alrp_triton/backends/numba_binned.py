"""The two products of the comparison matrix on a CPU by numba: the algorithm of ``torch_binned`` in two loops.

Knots, grid and half-cells are those of :mod:`.torch_binned`; here a column's numbers stay in the first-level cache from
one step to the next. Columns are cut into blocks by their number alone, and each block is summed by itself, so results
do not depend on the number of threads, which is torch's. Functions are compiled at first use, a second or two for each
kind of input, and cached on disk by numba.
"""

# numba has no types, and what it compiles is not called as Python.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from . import torch_binned
from .knots import as_array, make_knots, working_dtype
from .torch_binned import Grid, make_grid

# Long against the start of a thread and the clearing of a table, short enough to share evenly.
_BLOCK = 1 << 17
_MOST_BLOCKS = 64  # each has a table of O(P)
_STRIP = 1024  # columns that take a step together: their numbers fit the first-level cache

_compile = numba.njit(cache=True, nogil=True, error_model="numpy")


@_compile
def _locate(x, scale, first, knot, cell, position, half, picked):
    """Cell, position in it and half-cell of each column, as Grid.locate has them; number and indices of crowded ones."""
    last = x.dtype.type(first + len(knot) - 2)
    for j in range(len(x)):  # without a branch, so that it becomes vector instructions
        y = x[j] * scale
        y = y if y > first else first  # NaN, too
        y = y if y < last else last
        floor = np.floor(y)
        position[j] = y - floor
        cell[j] = np.int32(floor - first)
    crowded = 0
    for j in range(len(x)):
        k = knot[np.uint32(cell[j])]
        half[j] = 2 * cell[j] + (position[j] >= k)
        picked[crowded] = j
        crowded += k != k
    return crowded


@_compile
def _search(x, cell, base, ladder):
    """Bin of a column in a crowded cell."""
    low, high = base[cell], base[cell + 1]
    while low < high:
        middle = (low + high) >> 1
        if x >= ladder[middle]:
            low = middle + 1
        else:
            high = middle
    return low


@_compile
def _count(columns, weights, scale, first, knot, base, ladder, bins, start, low, by_bin):
    """Add to by_bin (2P + 1, 2) the number of columns in each bin, and the sum of their positions; NaN if one is NaN."""
    by_half = np.zeros((2 * len(knot), 2))
    cell, half, picked = np.empty((3, _STRIP), np.int32)
    position = np.empty(_STRIP, columns.dtype)
    for begin in range(0, len(columns), _STRIP):
        x = columns[begin : begin + _STRIP]
        crowded = _locate(x, scale, first, knot, cell, position, half, picked)
        v = weights[begin : begin + _STRIP]
        nan = False
        for j in range(len(x)):
            nan |= (x[j] != x[j]) & (v[j] != 0)
        for j in range(len(x)):
            w = np.float64(v[j])
            by_half[np.uint32(half[j]), 0] += w
            by_half[np.uint32(half[j]), 1] += w * position[j]
        if nan:
            by_bin[0, 0] = np.nan
        for j in picked[:crowded]:
            if v[j] != 0:
                bin = _search(x[j], cell[j], base, ladder)
                w = np.float64(v[j])
                by_bin[bin, 0] += w
                by_bin[bin, 1] += w * (x[j] - low[bin])
    for h in range(len(by_half)):
        if knot[h // 2] == knot[h // 2]:
            by_bin[bins[h], 0] += by_half[h, 0]
            by_bin[bins[h], 1] += by_half[h, 1] / scale + by_half[h, 0] * start[h]


@_compile
def _evaluate(columns, mask, scale, first, knot, base, ladder, by_half, by_bin, low, out):
    """out = value + slope * position, from by_half (value, slope), or from by_bin in crowded cells; 0 where masked."""
    cell, half, picked = np.empty((3, _STRIP), np.int32)
    position = np.empty(_STRIP, columns.dtype)
    for begin in range(0, len(columns), _STRIP):
        x = columns[begin : begin + _STRIP]
        g = out[begin : begin + _STRIP]
        crowded = _locate(x, scale, first, knot, cell, position, half, picked)
        for j in range(len(x)):
            h = np.uint32(half[j])
            y = by_half[h, 0] + by_half[h, 1] * position[j]
            g[j] = y if x[j] == x[j] else x[j]
        for j in picked[:crowded]:
            if x[j] == x[j]:
                bin = _search(x[j], cell[j], base, ladder)
                y = by_bin[bin, 0]
                if by_bin[bin, 1] != 0:  # 0 * inf is not what is meant
                    y += by_bin[bin, 1] * (x[j] - low[bin])
                g[j] = y
        if mask is not None:
            keep = mask[begin : begin + _STRIP]
            for j in range(len(x)):
                g[j] = g[j] if keep[j] else columns.dtype.type(0)


def _block_size(columns: int) -> int:
    return max(_BLOCK, math.ceil(columns / _MOST_BLOCKS))


def _search_arguments(grid: Grid) -> tuple[object, ...]:
    number = grid.knot.numpy().dtype.type
    return number(grid.scale), number(grid.first), grid.knot.numpy(), grid.base.numpy(), grid.ladder.numpy()


def _by_block(task: Callable[[slice], None], columns: int, size: int) -> None:
    """Call the task for every block of the columns, on as many threads as torch uses."""
    parts = [slice(start, start + size) for start in range(0, columns, size)]
    threads = min(torch.get_num_threads(), len(parts))
    if threads == 1:
        for part in parts:
            task(part)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(task, part) for part in parts]:
            done.result()


@np.errstate(over="ignore", invalid="ignore")
def matvec(rows: Tensor, columns: Tensor, weights: Tensor | None, delta: float) -> Tensor:
    """y_i = sum_j h(x_j - s_i) v_j; contract in :mod:`alrp_triton.operators`."""
    size = _block_size(columns.numel())
    working = working_dtype(columns)
    knots = make_knots(as_array(rows), delta, working)
    grid = make_grid(knots, min(columns.numel(), size), rows.device)
    if grid is None:
        return torch_binned.matvec(rows, columns, weights, delta)
    search = _search_arguments(grid)
    fold = *grid.halves(knots), knots.low
    columns, weights = columns.reshape(-1), None if weights is None else weights.reshape(-1)
    tables = np.zeros((math.ceil(len(columns) / size), len(knots.low), 2))
    ones = torch.ones(min(size, len(columns)), dtype=torch.bool)

    def count(part: slice) -> None:
        x = columns[part].to(working)
        v = ones[: len(x)] if weights is None else weights[part]
        v = v if v.dtype == torch.bool else v.double()
        _count(x.numpy(), v.numpy(), *search, *fold, tables[part.start // size])

    _by_block(count, len(columns), size)
    return torch.from_numpy(knots.sums(*tables.sum(0).T))


@np.errstate(over="ignore", invalid="ignore")
def rmatvec(rows: Tensor, weights: Tensor, columns: Tensor, mask: Tensor | None, delta: float) -> Tensor:
    """g_j = sum_i h(x_j - s_i) w_i; contract in :mod:`alrp_triton.operators`."""
    size = _block_size(columns.numel())
    working = working_dtype(columns)
    knots = make_knots(as_array(rows), delta, working)
    grid = make_grid(knots, min(columns.numel(), size), rows.device)
    if grid is None:
        return torch_binned.rmatvec(rows, weights, columns, mask, delta)
    search = _search_arguments(grid)
    by_bin = knots.lines(as_array(weights))
    by_half = np.ascontiguousarray(grid.lines(knots, *by_bin).T.astype(knots.values.dtype))
    tables = by_half, np.stack(by_bin, 1), knots.low
    flat, keep = columns.reshape(-1), None if mask is None else mask.reshape(-1)
    result = torch.empty(len(flat), dtype=columns.dtype)

    def evaluate(part: slice) -> None:
        out = result[part].to(working)
        mine = None if keep is None else keep[part].numpy()
        _evaluate(flat[part].to(out.dtype).numpy(), mine, *search, *tables, out.numpy())
        result[part] = out

    _by_block(evaluate, len(flat), size)
    return result.reshape(columns.shape)
