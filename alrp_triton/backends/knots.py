"""What the binned CPU backends share: the knots of the step, and what happens in a bin between two of them.

The step h rises from 0 to 1 between two **knots**, s_i - delta and s_i + delta. Between neighbouring knots of all rows
together, every h is a straight line in the column's value x. Hence

* ``rmatvec``: g(x) = sum_i w_i h(x - s_i) is one piecewise-linear function; tabulate it once, by bin between knots, and
  a column costs one search and one multiply-add;
* ``matvec`` is its transpose: all that a row needs of the columns in a bin is their number and the sum of their values.

Knots are rounded **up to the columns' own precision**, which changes no comparison with a column: x >= k is the same as
x >= the least such number that is not below k. So the search may compare in float32 and is exact. Positions in a bin
are taken relative to its lower knot. All that is of size P is float64, and is NumPy's, whose calls cost a fraction of
torch's: for small problems they are most of the time.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..formulas import at_zero

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class Knots(NamedTuple):
    """Sorted knots of P rows. Table index t in 0 … 2P stands for the bin from knot t-1 up to knot t."""

    values: NDArray[np.floating]  # (2P,) ascending, in the dtype in which columns are compared
    low: Floats  # (2P + 1,) finite; lower knot of a bin; in bin 0, which has none, the lowest of all
    rise: Indices  # (P,) table index from which row i takes part
    done: Indices  # (P,) table index from which row i has h = 1
    at_zero: float  # a row's h at its own score: 1 for delta = 0, else 1/2
    rate: Floats  # (P,) dh/dx between a row's knots; 0 where h jumps
    local: Floats  # (P,) a row's score relative to the origin of its bins
    offset: Floats  # (2P + 1,) lower knot relative to the origin of the bin; 0 where no row has a slope
    sloped: NDArray[np.bool_]  # (2P + 1,) some row has a slope in this bin
    poison: float  # 0 if all rows are finite, else NaN

    def positions(self, x: Tensor, bins: Tensor) -> Tensor:
        """Columns relative to the lower knot of their bin, float64; 0 where it does not matter, NaN for NaN."""
        low, sloped = (torch.from_numpy(table).to(x.device).index_select(0, bins) for table in (self.low, self.sloped))
        return torch.where(sloped | x.isnan(), x - low, 0.0)

    def by_bin(self, bins: Indices, weights: Floats) -> Floats:
        """The sum of the weights in each bin ``(2P + 1,)``."""
        return np.bincount(bins, weights, len(self.low)).astype(np.float64, copy=False)

    def lines(self, weights: Floats) -> tuple[Floats, Floats]:
        """The function sum_i w_i h(x - s_i) by bin: its value at the lower knot, and its slope."""
        value, slope = np.zeros((2, len(self.low)))
        tilt = weights * self.rate
        shift = tilt * self.local
        slope[self.rise] = tilt
        slope[self.done] = -tilt
        value[self.rise] = self.at_zero * weights - shift
        value[self.done] = (1 - self.at_zero) * weights + shift
        slope = np.where(self.sloped, slope.cumsum(), 0.0)
        poison = self.poison + (weights * 0).sum()  # shows even below all knots
        return value.cumsum() + slope * self.offset + poison, slope

    def sums(self, count: Floats, moment: Floats) -> Floats:
        """The sums of h v for each row ``(P,)``, from the sums of v and of v times position in each bin ``(2P + 1,)``.

        NaN in one bin is NaN in all rows.
        """
        poison = self.poison + (moment + count).sum() * 0
        moment = np.where(self.sloped, moment + count * self.offset, 0.0)
        # Suffix sums: a row's sums hold only what lies above its lower knot, so small counts keep their digits.
        count, moment = count[::-1].cumsum()[::-1], moment[::-1].cumsum()[::-1]
        above = count[self.done]
        inside = count[self.rise] - above
        total = moment[self.rise] - moment[self.done]
        return above + self.at_zero * inside + self.rate * (total - self.local * inside) + poison


def as_array(rows: Tensor) -> Floats:
    """A float64 tensor of size P as NumPy's; from another device the host waits for it."""
    return rows.cpu().numpy()


@np.errstate(over="ignore", invalid="ignore")
def make_knots(rows: Floats, delta: float, dtype: torch.dtype) -> Knots:
    """Knots of ascending ``rows``, for columns that are compared in ``dtype``, float32 or float64."""
    number = np.float64 if dtype == torch.float64 else np.float32
    info = np.finfo(number)
    # Where delta is below the resolution around s_i, no column but x = s_i itself falls inside the slope: two jumps, at
    # s_i and just above it, say the same. For delta = 0 the first jump is all there is.
    jumps = delta <= np.abs(rows) * float(info.eps / 2)
    above = np.nextafter(rows.astype(number), number(np.inf))
    exact = np.concatenate([np.where(jumps, rows, rows - delta), np.where(jumps, above, rows + delta)])
    knots = exact.astype(number)
    if number != np.float64:
        knots = np.where(knots < exact, np.nextafter(knots, number(np.inf)), knots)
    source = knots.argsort(kind="stable")  # linear, as these are two sorted runs
    values = knots[source]
    slot = np.empty_like(source)
    slot[source] = np.arange(1, len(source) + 1)
    rise, done = slot.reshape(2, -1)
    rate = np.where(jumps, 0.0, 0.5 / delta if delta > 0 else 0.0)

    change = np.zeros(len(slot) + 1, np.int64)
    change[slot] = np.concatenate([~jumps, -1 * ~jumps])
    sloped = change.cumsum() > 0
    # Slopes that overlap form a cluster; positions are relative to where it begins. Absolute ones would lose the digits
    # of |x| / delta in the difference of two ramps.
    begins = sloped.copy()
    begins[1:] &= ~sloped[:-1]  # bin 0 is never sloped
    begin = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 1)) - 1
    finite = np.clip(values.astype(np.float64), float(info.min), float(info.max))
    low = np.concatenate([finite[:1], finite])
    origin = finite[begin]
    offset = np.where(sloped, low - origin, 0.0)
    local = rows - origin[rise]
    poison = float((rows[0] + rows[-1]) * 0)  # rows ascend, NaN last
    return Knots(values, low, rise, done, at_zero(delta), rate, local, offset, sloped, poison)
