"""The two products of the comparison matrix on a CPU by numba: the algorithm of ``torch_binned`` in two loops.

Knots, grid and half-cells are those of :mod:`.torch_binned`; here a column's numbers stay in the first-level cache from
one step to the next. Columns are cut into blocks by their number alone, and each block is summed by itself, so results
do not depend on the number of threads, which is torch's. Functions are compiled at first use, some seconds for each
kind of input, and cached on disk by numba.
"""

# numba has no types, and what it compiles is not called as Python.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportCallIssue=false

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from . import threads, torch_binned
from .knots import as_array, make_knots, working_dtype
from .numba_dense import jit
from .torch_binned import Grid, make_grid

# A block is long against the start of a thread, and where there are some, long against the moving of its sums; each has
# a table of O(P).
_SHORT, _SOME_BLOCKS = 1 << 16, 8
_LONG, _MOST_BLOCKS = 1 << 18, 32
_STRIP = 1024  # columns that take a step together: their numbers fit the first-level cache


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


@jit
def _count(columns, weights, size, scale, first, knot, base, ladder, low, by_bin):
    """Number of columns in each bin, and sum of their positions: by_bin (blocks, 2P + 1, 2).

    Each block of ``size`` columns by itself. NaN in bin 0 if a column that counts is NaN.
    """
    by_half = np.zeros((2 * len(knot), 2))
    cell, picked, position = np.empty(_STRIP, np.uint32), np.empty(_STRIP, np.uint32), np.empty(_STRIP, columns.dtype)
    for block in range(len(by_bin)):
        sums = by_bin[block]
        for begin in range(block * size, min((block + 1) * size, len(columns)), _STRIP):
            end = min(begin + _STRIP, (block + 1) * size)
            x, v = columns[begin:end], weights[begin:end]
            _locate(x, scale, first, len(knot), cell, position)
            nan = False
            for j in range(len(x)):
                nan |= (x[j] != x[j]) & (v[j] != 0)
            if nan:
                sums[0, 0] = np.nan
            crowded = np.uint32(0)  # signed numbers would be tested for being negative wherever they are an index
            for j in range(len(x)):
                c, y, w = cell[j], position[j], np.float64(v[j])
                k = knot[c]
                half = np.uint32(2) * c + np.uint32(y >= k)
                by_half[half, 0] += w
                by_half[half, 1] += w * y
                picked[crowded] = np.uint32(j)
                crowded += np.uint32(k != k)
            for j in picked[:crowded]:
                if v[j] != 0:
                    bin = _search(x[j], cell[j], base, ladder)
                    sums[bin, 0] += v[j]
                    sums[bin, 1] += v[j] * np.float64(x[j] - low[bin])
        _fold(by_half, scale, first, knot, base, low, sums)


@jit
def _fold(by_half, scale, first, knot, base, low, sums):
    """Move sums of half-cells to their bins, as Grid.fold does; by_half is 0 afterwards."""
    for cell in range(len(knot)):
        if knot[cell] == knot[cell]:  # not crowded
            begin = (np.float64(first) + cell) / scale
            for side in range(1 + (knot[cell] < 1)):
                bin, half = base[cell] + side, 2 * cell + side
                sums[bin, 0] += by_half[half, 0]
                sums[bin, 1] += by_half[half, 1] / scale + by_half[half, 0] * (begin - low[bin])
    by_half[:] = 0


@jit
def _spread(by_bin, scale, first, knot, base, low, by_half):
    """Lines of the bins (value, slope) to by_half, the lines of half-cells, as Grid.lines does."""
    for cell in range(len(knot)):
        begin = (np.float64(first) + cell) / scale
        for side in range(2):
            bin = base[cell] + (side & (knot[cell] < 1))
            by_half[2 * cell + side, 0] = by_bin[bin, 0] + by_bin[bin, 1] * (begin - low[bin])
            by_half[2 * cell + side, 1] = by_bin[bin, 1] / scale


@jit
def _evaluate(columns, mask, scale, first, knot, base, ladder, low, by_half, by_bin, out):
    """Fill out with value + slope * position, from by_half or, in crowded cells, from by_bin; 0 where masked."""
    cell, picked, position = np.empty(_STRIP, np.uint32), np.empty(_STRIP, np.uint32), np.empty(_STRIP, columns.dtype)
    for begin in range(0, len(columns), _STRIP):
        x, g = columns[begin : begin + _STRIP], out[begin : begin + _STRIP]
        _locate(x, scale, first, len(knot), cell, position)
        crowded = np.uint32(0)
        for j in range(len(x)):
            c, y = cell[j], position[j]
            k = knot[c]
            half = np.uint32(2) * c + np.uint32(y >= k)
            g[j] = by_half[half, 0] + by_half[half, 1] * y
            picked[crowded] = np.uint32(j)
            crowded += np.uint32(k != k)
        for j in picked[:crowded]:
            bin = _search(x[j], cell[j], base, ladder)
            y = by_bin[bin, 0]
            if by_bin[bin, 1] != 0:  # 0 * inf is not what is meant
                y += by_bin[bin, 1] * (x[j] - low[bin])
            g[j] = y
        for j in range(len(x)):
            g[j] = g[j] if x[j] == x[j] else x[j]
        if mask is not None:
            keep = mask[begin : begin + _STRIP]
            for j in range(len(x)):
                g[j] = g[j] if keep[j] else columns.dtype.type(0)


def _block_size(columns: int) -> int:
    short, long = (math.ceil(columns / size) for size in (_SHORT, _LONG))
    return math.ceil(columns / min(max(min(short, _SOME_BLOCKS), long), _MOST_BLOCKS))


def _share(task: Callable[[slice], None], columns: int, size: int, step: int) -> None:
    """Call the task for all columns, ``step`` at a time, each thread on a run of whole blocks."""
    blocks = math.ceil(columns / size)
    inference = torch.is_inference_mode_enabled()  # of this thread alone

    def call(run: slice) -> None:
        stop = min(run.stop * size, columns)
        with torch.inference_mode(inference):
            for begin in range(run.start * size, stop, step):
                task(slice(begin, min(begin + step, stop)))

    threads.run([partial(call, run) for run in threads.cut(blocks, blocks)])


def _search_arguments(grid: Grid) -> tuple[object, ...]:
    number = grid.knot.numpy().dtype.type
    return number(grid.scale), number(grid.first), grid.knot.numpy(), grid.base.numpy(), grid.ladder.numpy()


@np.errstate(over="ignore", invalid="ignore")
def matvec(rows: Tensor, columns: Tensor, weights: Tensor | None, delta: float) -> Tensor:
    """y_i = sum_j h(x_j - s_i) v_j; contract in :mod:`alrp_triton.operators`."""
    size = _block_size(columns.numel())
    working = working_dtype(columns)
    knots = make_knots(as_array(rows), delta, working)
    # Each block folds all cells, of which make_grid takes a fraction of the columns: one or less for each of the block.
    grid = make_grid(knots, min(columns.numel(), 4 * size), rows.device)
    if grid is None:
        return torch_binned.matvec(rows, columns, weights, delta)
    search = _search_arguments(grid)
    columns, weights = columns.reshape(-1), None if weights is None else weights.reshape(-1)
    by_bin = np.zeros((math.ceil(len(columns) / size), len(knots.low), 2))
    step = size if working != columns.dtype or (weights is not None and weights.dtype != torch.bool) else len(columns)
    ones = torch.ones(1, dtype=torch.bool).expand(len(columns))

    def count(part: slice) -> None:
        x, v = columns[part].to(working), (ones if weights is None else weights)[part]
        v = v if v.dtype == torch.bool else v.double()
        blocks = slice(part.start // size, math.ceil(part.stop / size))
        _count(x.numpy(), v.numpy(), size, *search, knots.low, by_bin[blocks])

    _share(count, len(columns), size, step)
    return torch.from_numpy(knots.sums(*by_bin.sum(0).T))


@np.errstate(over="ignore", invalid="ignore")
def rmatvec(rows: Tensor, weights: Tensor, columns: Tensor, mask: Tensor | None, delta: float) -> Tensor:
    """g_j = sum_i h(x_j - s_i) w_i; contract in :mod:`alrp_triton.operators`."""
    size = _block_size(columns.numel())
    working = working_dtype(columns)
    knots = make_knots(as_array(rows), delta, working)
    grid = make_grid(knots, columns.numel(), rows.device)
    if grid is None:
        return torch_binned.rmatvec(rows, weights, columns, mask, delta)
    search = _search_arguments(grid)
    by_bin = np.stack(knots.lines(as_array(weights)), 1)
    by_half = np.empty((2 * grid.cells, 2), knots.values.dtype)
    scale, first, knot, base, _ = search
    _spread(by_bin, scale, first, knot, base, knots.low, by_half)
    tables = knots.low, by_half, by_bin
    flat, keep = columns.reshape(-1), None if mask is None else mask.reshape(-1)
    result = torch.empty(len(flat), dtype=columns.dtype)

    def evaluate(part: slice) -> None:
        x = flat[part].to(working)
        out = result[part] if result.dtype == working else torch.empty_like(x)
        mine = None if keep is None else keep[part].numpy()
        _evaluate(x.numpy(), mine, *search, *tables, out.numpy())
        if result.dtype != working:
            result[part] = out

    _share(evaluate, len(flat), size, size if working != columns.dtype else len(flat))
    return result.reshape(columns.shape)
