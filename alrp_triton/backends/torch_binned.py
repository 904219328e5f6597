"""The two products of the comparison matrix in torch operations: exact, and linear in the number of columns.

:mod:`.knots` has the idea. What remains is to find the bin of each column, fast, and a binary search a column is slow:
its branches cannot be predicted. So a **grid** of cells, each a power of two wide, lies over the knots. The cell of a
column takes a few streaming operations without rounding, one look-up and one comparison tell on which side of the
cell's knot it lies, and columns are counted and evaluated by half-cell. Only the columns in cells that hold several
knots, or NaN, are picked out and searched for; so are all where they are few.

Sums are float64 and nothing is approximated: the result is that of the dense product up to rounding. Work and memory:
O((P + N) log P) and O(P + chunk).

The published losses compare every positive with every negative instead (Oksuz et al., NeurIPS 2020).
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .columns import Columns, working_dtype
from .knots import Floats, Indices, Knots, as_array, make_knots
from .segments import spread_by_segment, sum_by_segment, widened

# Columns are processed this many at a time, so that the temporaries stay in the cache and do not grow with N.
_CHUNK = 1 << 17
# Cells a knot, so that few columns share a cell with two knots; and at most so many cells, for the tables' sake.
_CELLS_A_KNOT, _MAX_CELLS = 32, 1 << 16
# In a cell with more knots than this, a binary search is faster than a step from knot to knot.
_MAX_STEPS = 6
# For fewer columns than this a grid is not worth its making.
_MIN_COLUMNS = 1 << 12


class Grid(NamedTuple):
    """Cells of width ``1 / scale``. Cell 0 lies below all knots, the last but one above them; NaN has the last.

    Half-cell 2c is the part of cell c below its knot, 2c + 1 the rest. A position is relative to where its half begins.
    """

    scale: float  # a power of two: x * scale is exact
    first: float  # cell 0 begins at first / scale
    cells: int
    base: Tensor  # (cells,) int64; number of knots in the cells before
    knot: Tensor  # (cells,) position in the cell of its only knot; beyond the cell if it has none, NaN if it is crowded
    steps: int  # knots in the fullest cell
    ladder: Tensor  # (2P + 1,) the knots, and one that no column reaches

    def cell(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Number of the cell, in the dtype of x, and position in it, in widths: exact, but just below 0 a rounding.

        Infinities are moved next to the knots.
        """
        position = (x * self.scale).clamp_(self.first, self.first + self.cells - 2)
        position.nan_to_num_(nan=self.first + self.cells - 1)
        cell = position.floor()
        position -= cell
        cell -= self.first
        return cell, position

    def locate(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Half-cell (int32) and position in it of each column; indices and bins of those in crowded cells."""
        cell, position = self.cell(x)
        index = cell.int()
        knot = self.knot.index_select(0, index)
        half = torch.ge(position, knot, out=torch.empty_like(position))  # as a float: several times faster than as bool
        position.addcmul_(half, knot, value=-1)  # in a crowded cell NaN, which nobody reads
        half.add_(cell, alpha=2)
        knot -= knot  # NaN in crowded cells, else 0
        picked = knot.nonzero().view(-1)
        return half.int(), position, picked, self._search(x.index_select(0, picked), index.index_select(0, picked))

    def _search(self, x: Tensor, cell: Tensor) -> Tensor:
        """Bins of columns, int64."""
        if self.steps > _MAX_STEPS:
            return torch.bucketize(x, self.ladder[:-1], right=True)
        bins = self.base.index_select(0, cell)
        for _ in range(self.steps):
            bins += x >= self.ladder.index_select(0, bins)
        return bins

    def halves(self, knots: Knots) -> tuple[Indices, Floats]:
        """Bin of each half-cell, and where it begins relative to the lower knot of that bin."""
        bins, held = self.base.cpu().numpy().repeat(2), self.knot.cpu().numpy() < 1
        bins[1::2] += held
        start = ((np.arange(self.cells) + self.first) / self.scale).repeat(2) - knots.low[bins]
        start[1::2][held] = 0.0
        return bins, np.where(knots.sloped[bins], start, 0.0)

    def fold(self, knots: Knots, by_half: Floats, by_bin: Floats) -> Floats:
        """Number of columns and sum of their positions by bin ``(2, 2P + 1)``, from those of the half-cells.

        ``by_bin`` has the columns of crowded cells; what ``by_half`` has there is left out.
        """
        bins, start = self.halves(knots)
        count, moment = np.where(np.isnan(self.knot.cpu().numpy()).repeat(2), 0.0, by_half)
        moment = moment / self.scale + count * start
        return by_bin + np.stack([knots.by_bin(bins, weights) for weights in (count, moment)])

    def lines(self, knots: Knots, value: Floats, slope: Floats) -> Floats:
        """The lines of the bins (Knots.lines) by half-cell: value where it begins, and change over a cell."""
        bins, start = self.halves(knots)
        return np.stack([value[bins] + slope[bins] * start, slope[bins] / self.scale])


def make_grid(knots: Knots, columns: int, device: torch.device) -> Grid | None:
    """A grid for so many columns on a device; None where they are too few, or if a row is not finite."""
    if columns < _MIN_COLUMNS or math.isnan(knots.poison):
        return None
    info = np.finfo(knots.values.dtype)
    low, high = float(knots.low[0]), float(knots.low[-1])
    wanted = min(_CELLS_A_KNOT * len(knots.values), _MAX_CELLS, columns // 4)
    # As fine as wanted; but x * scale must not overflow, and whole numbers of that size must be exact.
    exponent = min(
        math.frexp(wanted)[1] - 2 - math.frexp(high / 2 - low / 2)[1],
        2 - math.frexp(info.eps)[1] - math.frexp(max(-low, high))[1],
        1 - math.frexp(info.tiny)[1],
    )
    scale = 2.0**exponent
    first = math.floor(low * scale) - 1.0
    cells = int(math.floor(high * scale) - first) + 3
    values = torch.from_numpy(knots.values)
    grid = Grid(scale, first, cells, values, values, 0, torch.cat([values, values.new_tensor([math.nan])]))
    cell, position = (tensor.numpy() for tensor in grid.cell(values))
    cell = cell.astype(np.int64)
    held = np.bincount(cell, minlength=cells)
    knot = np.full(cells, 2.0, knots.values.dtype)
    knot[cell] = position
    # In a cell so wide a position within a slope may be less than all numbers but 0: rate is 1 / (2 delta).
    most = 1 if knots.rate.max() / scale < 2.0**59 else 0
    knot[held > most] = math.nan
    knot[-1] = math.nan
    # Just below 0 a position is rounded, 1 - 1e-30 to 1: a comparison there must be of the columns themselves.
    below_zero = int(-1 - first)
    if 0 < below_zero < cells:
        knot[below_zero] = math.nan
    base, knot, ladder = (torch.as_tensor(table, device=device) for table in (held.cumsum() - held, knot, grid.ladder))
    return grid._replace(base=base, knot=knot, ladder=ladder, steps=int(held.max()))


def _chunks(columns: Columns) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Runs of the columns, as they are compared, and what each counts: bool, floats, or None."""
    values, marks, classes = columns.values, columns.marks, columns.num_classes
    size = _CHUNK if classes is None else max(_CHUNK // classes, 1) * classes
    for start in range(0, values.numel(), size):
        here = slice(start, min(start + size, values.numel()))
        counts = None
        if marks is not None and classes is not None:
            counts = widened(marks[here.start // classes : here.stop // classes], classes)
        elif marks is not None:
            counts = marks[here] if columns.weights is not None else marks[here] == 0
        yield here, values[here].to(working_dtype(values)), counts


def empty_tables(rows: Tensor, grouped: bool, columns: Columns) -> list[Tensor]:
    """None: NumPy makes them anew for each product, in less time than the torch operations take."""
    return []


def fill_tables(tables: list[Tensor], rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float) -> None:
    """There are none."""


def matvec(rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float, tables: list[Tensor]) -> Tensor:
    """y_i = sum_j H_ij v_j, float64 ``(P,)``."""
    return sum_by_segment(partial(_matvec, delta=delta), rows, row_groups, columns)


@np.errstate(over="ignore", invalid="ignore")
def _matvec(rows: Tensor, columns: Columns, delta: float) -> Tensor:
    knots = make_knots(as_array(rows), delta, working_dtype(columns.values))
    grid = make_grid(knots, columns.values.numel(), rows.device)
    values = torch.from_numpy(knots.values).to(rows.device)
    by_bin = rows.new_zeros(2, len(knots.low))  # number of columns, sum of their positions
    by_half = rows.new_zeros(2, 0 if grid is None else 2 * grid.cells)
    ones = rows.new_ones(1)
    for _, x, v in _chunks(columns):
        one, weighed = ones.expand(len(x)), v is not None and v.is_floating_point()
        if v is not None:
            # Below every knot a column counts for no row: columns of weight 0 go there, NaN and all.
            x = torch.where(v != 0 if weighed else v, x, -math.inf)
            one = v.double() if weighed else one
        if grid is None:
            bins = torch.bucketize(x, values, right=True)
        else:
            half, position, picked, bins = grid.locate(x)
            half, position = half.long(), position.double()
            by_half[0].scatter_add_(0, half, one)
            by_half[1].scatter_add_(0, half, position * one if weighed else position)
            x, one = x.index_select(0, picked), one.index_select(0, picked)
        by_bin[0].scatter_add_(0, bins, one)
        by_bin[1].scatter_add_(0, bins, knots.positions(x, bins) * one)
    sums = by_bin.cpu().numpy()
    if grid is not None:
        sums = grid.fold(knots, by_half.cpu().numpy(), sums)
    return torch.from_numpy(knots.sums(*sums)).to(rows.device)


def rmatvec(
    rows: Tensor, row_groups: Tensor | None, weights: Tensor, columns: Columns, delta: float, tables: list[Tensor]
) -> Tensor:
    """g_j = sum_i H_ij w_i, in the dtype of the columns ``(N,)``; 0 where a column does not count."""
    return spread_by_segment(partial(_rmatvec, delta=delta), rows, row_groups, weights, columns)


@np.errstate(over="ignore", invalid="ignore")
def _rmatvec(rows: Tensor, weights: Tensor, columns: Columns, delta: float) -> Tensor:
    knots = make_knots(as_array(rows), delta, working_dtype(columns.values))
    grid = make_grid(knots, columns.values.numel(), rows.device)
    lines = knots.lines(as_array(weights))
    values, value, slope = (torch.from_numpy(table).to(rows.device) for table in (knots.values, *lines))
    by_half = None if grid is None else torch.from_numpy(grid.lines(knots, *lines)).to(values)

    def search(x: Tensor, bins: Tensor) -> Tensor:
        return torch.addcmul(value.index_select(0, bins), slope.index_select(0, bins), knots.positions(x, bins))

    result = torch.empty_like(columns.values)
    for here, x, v in _chunks(columns):
        if grid is None or by_half is None:
            g = search(x, torch.bucketize(x, values, right=True))
        else:
            half, position, picked, bins = grid.locate(x)
            g = by_half[0].index_select(0, half).addcmul_(by_half[1].index_select(0, half), position)
            g.index_copy_(0, picked, search(x.index_select(0, picked), bins).to(g.dtype))
        result[here] = g if v is None else torch.where(v != 0, g, 0.0)
    return result
