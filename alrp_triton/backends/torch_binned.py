"""The two products of the comparison matrix in torch operations: exact, and linear in the number of columns.

The step h rises from 0 to 1 between two **knots**, s_i - delta and s_i + delta. Between neighbouring knots of all rows
together, every h is a straight line in the column's value x. Hence

* ``rmatvec``: g(x) = sum_i w_i h(x - s_i) is one piecewise-linear function; tabulate it once, by bin between knots, and
  a column costs one search and one multiply-add;
* ``matvec`` is its transpose: all that a row needs of the columns in a bin is their number and the sum of their values.

Everything is float64 and nothing is approximated: the result is that of the dense product up to rounding. Work and
memory: O((P + N) log P) and O(P + chunk).

The published losses compare every positive with every negative instead (Oksuz et al., NeurIPS 2020).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Columns are searched this many at a time, so that the temporaries stay in the cache and do not grow with N.
_CHUNK = 1 << 17


class _Knots(NamedTuple):
    """Sorted knots of P rows. Table index t in 0 … 2P stands for the bin from knot t-1 up to knot t."""

    values: Tensor  # (2P,) float64, ascending
    rise: Tensor  # (P,) table index from which row i takes part
    done: Tensor  # (P,) table index from which row i has h = 1
    at_rise: float  # a row's h at its own score: 1 for delta = 0, else 1/2
    rate: Tensor  # (P,) dh/dx between a row's knots; 0 where h jumps
    local: Tensor  # (P,) a row's score, relative to the origin of its bins
    origin: Tensor  # (2P + 1,) value in each bin that positions are relative to
    sloped: Tensor  # (2P + 1,) bool: some row has a slope in this bin

    def locate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Table index and position in the bin of each value, finite for infinities. NaN stays NaN, in the last bin."""
        # h is constant outside the knots: moving a value to their range changes nothing, and 0 * inf cannot arise.
        below = torch.nextafter(self.values[0], self.values.new_tensor(-torch.inf))
        x = x.clamp(below, self.values[-1])
        bins = torch.bucketize(x, self.values, right=True)
        return bins, x - self.origin.index_select(0, bins)


def _make_knots(rows: Tensor, delta: float) -> _Knots:
    """Knots of ascending float64 ``rows``."""
    # Where delta is below the resolution of float64 around s_i, no column but x = s_i itself falls inside the slope:
    # two jumps, at s_i and just above it, say the same. For delta = 0 the first jump is all there is.
    jumps = delta <= rows.abs() * 2.0**-53
    lower = torch.where(jumps, rows, rows - delta)
    upper = torch.where(jumps, torch.nextafter(rows, rows.new_tensor(torch.inf)), rows + delta)
    values, source = torch.cat([lower, upper]).sort(stable=True)
    index = torch.arange(len(source) + 1, device=rows.device)
    slot = torch.empty_like(source)
    slot[source] = index[1:]
    rise, done = slot[: len(rows)], slot[len(rows) :]
    rate = torch.full_like(rows, 0.5 / delta if delta > 0 else 0.0).masked_fill(jumps, 0.0)

    active = torch.zeros_like(index)
    active[rise] = (~jumps).long()
    active[done] = -(~jumps).long()
    sloped = active.cumsum(0) > 0
    # Slopes that overlap form a cluster; positions are relative to where it begins. Absolute ones would lose the digits
    # of |x| / delta in the difference of two ramps.
    begins = sloped & ~sloped.roll(1)  # bin 0 and the last are never sloped
    origin = values[torch.where(begins, index, 1).cummax(0).values - 1]
    return _Knots(values, rise, done, 0.5 if delta > 0 else 1.0, rate, rows - origin[rise], origin, sloped)


def _chunks(columns: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    columns = columns.reshape(-1)
    for start in range(0, columns.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield columns[part].double(), None if weights is None else weights.reshape(-1)[part]


def matvec(rows: Tensor, columns: Tensor, weights: Tensor | None, delta: float) -> Tensor:
    """y_i = sum_j h(x_j - s_i) v_j; contract in :mod:`alrp_triton.comparison`."""
    knots = _make_knots(rows, delta)
    count = rows.new_zeros(len(knots.values) + 1)
    total = torch.zeros_like(count)
    one = rows.new_ones(1)
    for x, v in _chunks(columns, weights):
        if v is not None:
            # The first bin lies below every knot and counts for no row: columns of weight 0 go there, NaN and all.
            x = torch.where(v != 0, x, -torch.inf)
        bins, position = knots.locate(x)
        v = one.expand_as(x) if v is None or v.dtype == torch.bool else v.double()
        count.scatter_add_(0, bins, v)
        total.scatter_add_(0, bins, position * v)
    poison = total.sum() * 0  # every value is finite by now unless it was NaN
    total = torch.where(knots.sloped, total, 0.0)
    # Suffix sums: a row's sums hold only what lies above its lower knot, so small counts keep their digits.
    count, total = (t.flip(0).cumsum(0).flip(0) for t in (count, total))
    above = count[knots.done]
    inside = count[knots.rise] - above
    inside_total = total[knots.rise] - total[knots.done]
    return above + knots.at_rise * inside + knots.rate * (inside_total - knots.local * inside) + poison


def rmatvec(rows: Tensor, weights: Tensor, columns: Tensor, mask: Tensor | None, delta: float) -> Tensor:
    """g_j = sum_i h(x_j - s_i) w_i; contract in :mod:`alrp_triton.comparison`."""
    knots = _make_knots(rows, delta)
    slope, intercept = rows.new_zeros(2, len(knots.values) + 1)
    intercept[0] = weights[0] * 0  # NaN weights must show even below all knots
    tilt = weights * knots.rate
    slope[knots.rise] = tilt
    slope[knots.done] = -tilt
    intercept[knots.rise] = knots.at_rise * weights - tilt * knots.local
    intercept[knots.done] = (1 - knots.at_rise) * weights + tilt * knots.local
    slope = torch.where(knots.sloped, slope.cumsum(0), 0.0)
    intercept = intercept.cumsum(0)

    result = torch.empty(columns.numel(), dtype=columns.dtype, device=columns.device)
    for (x, keep), out in zip(_chunks(columns, mask), result.split(_CHUNK), strict=True):
        bins, position = knots.locate(x)
        value = torch.addcmul(intercept.index_select(0, bins), slope.index_select(0, bins), position)
        out.copy_(value if keep is None else torch.where(keep, value, 0.0))
    return result.reshape(columns.shape)
