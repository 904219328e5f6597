"""The rows compared among themselves by score and by grade, in NumPy.

A step is linear in the score, but whether one grade is below another cuts through that. Small segments are compared
pair by pair. The rows of a large one, in order of score, are parted again and again by a bit of the place that their
grade has among all grades, highest bit first (a wavelet matrix). Rows that share their higher bits stand side by side,
still in order of score: a node. At the bit that tells two rows apart one is in a node, the other in the node beside it,
whose rows all have a higher, or all a lower grade. So for each bit a row looks at one node, and there at two runs of
rows, those inside its slope and those above it: differences of prefix sums. Where the runs begin and end is counted
along from bit to bit. O(P log P) work, O(P) memory, no sort but that of the grades.

**Accuracy.** Prefix sums are of integers, whose differences are exact, and right even where the sums themselves wrap
around; so a run without rows is exactly 0. Values are rounded to multiples of at most P 2^-60 of the greatest, and so
are positions within a slope: with m rows inside it or above, an entry is off by at most m P 2^-59 max|v|, and as
roundings cancel by some 1e-15 of the largest entry for P = 1,000 and 1e-13 for 100,000. Positions are counted in widths
of a slope from where a chain of overlapping slopes begins, as in :mod:`.knots`; that costs h another 2^-52 for each
width. Pair by pair nothing is lost but what h itself is rounded by.
"""

from collections.abc import Iterator

import numpy as np

from .knots import Floats, Indices

_DENSE = 400  # rows of the largest segment that is compared pair by pair
_PAIRS = 1 << 16  # compared at once: temporaries stay in the cache


def _pairs(rows: Floats, grades: Floats, values: Floats, delta: float) -> Floats:
    """For segments of one length, the sums of h v over the rows of no lower, and of lower grade.

    Rows and grades ``(S, n)``, values ``(S, n, c)`` -> ``(2, S, n, c)``.
    """
    h = np.empty((2, *rows.shape, rows.shape[1]))
    kept, lower = h
    np.subtract(rows[:, None], rows[:, :, None], out=kept)
    if delta > 0:
        kept *= 0.5 / delta
        kept += 0.5
        np.maximum(kept, 0.0, out=kept)
        np.minimum(kept, 1.0, out=kept)
    else:
        np.greater_equal(kept, 0.0, out=kept)
    np.multiply(kept, grades[:, None] < grades[:, :, None], out=lower)
    kept -= lower
    return h @ values


def _slopes(rows: Floats, delta: float) -> Indices:
    """For each row the first row inside its slope, the first above it, and the end ``(3, n)``."""
    edges = np.empty((3, len(rows)), np.int64)
    for slot, step in enumerate((-delta, delta)):
        edge = rows + step
        # What rounding took from the edge, exactly. A row compares with the exact edge as it does with the rounded one,
        # or with the number after that. So no slope is too narrow: the least has the rows inside that tie.
        back = edge - rows
        lost = (rows - (edge - back)) + (step - back)
        beyond = lost > 0 if slot else lost >= 0
        edges[slot] = rows.searchsorted(np.where(beyond, np.nextafter(edge, np.inf), edge))
    if delta == 0:
        edges[0] = edges[1]  # nothing is inside a jump
    edges[2] = len(rows)
    return edges


def _positions(rows: Floats, above: Indices, delta: float) -> Floats:
    """Rows relative to the first of those that overlapping slopes chain to them, in widths of a slope."""
    if delta == 0:
        return np.zeros_like(rows)
    origin = np.arange(len(rows))
    origin[1:][above[:-1] > origin[1:]] = 0  # the row before has it inside its slope
    return (rows - rows[np.maximum.accumulate(origin)]) / (2 * delta)


def _places(grades: Floats) -> Indices:
    """How many different grades are lower."""
    order = grades.argsort(kind="stable")
    ascending = grades[order]
    places = np.zeros(len(grades), np.int64)
    places[order[1:]] = (ascending[1:] != ascending[:-1]).cumsum()
    return places


def _look(sums: Indices, runs: Indices, whole: Indices, part: Floats) -> Floats:
    """The sums of h v over two runs of rows, inside a slope and above it ``(c, n)``.

    ``sums`` are prefix sums of values and of values times position; a row's own position is ``whole + part``.
    """
    first, above, end = runs
    at = sums.take(above, -1)
    inside = at - sums.take(first, -1)
    inside[1] -= whole * inside[0]  # before it is a float: many digits cancel
    return (0.5 - part) * inside[0] + (inside[1] + (sums[0].take(end, -1) - at[0]))


def _tree(rows: Floats, grades: Floats, values: Floats, delta: float, sides: int) -> Floats:
    """The sums of :func:`_pairs` for one segment: ``(n,)``, ``(n,)``, ``(c, n)`` -> the last sides ``(·, c, n)``."""
    places, runs = _places(grades), _slopes(rows, delta)
    position = _positions(rows, runs[1], delta)
    bits = 62 - len(rows).bit_length()  # so many that no sum of values times position relative to a row overflows
    exponent = bits - np.frexp(np.abs(values).max(-1, keepdims=True))[1]
    fixed = np.rint(np.ldexp(values, exponent)).astype(np.int64)
    floor = np.floor(position)
    whole = floor.astype(np.int64)
    part = np.ldexp(np.rint(np.ldexp(position - floor, bits - 1)), 1 - bits)
    terms = np.stack([fixed, fixed * whole + np.rint(fixed * part).astype(np.int64)])
    sums = np.zeros((*terms.shape[:-1], len(rows) + 1), np.int64)
    zeros = np.zeros(len(rows) + 1, np.int64)
    out = np.zeros((sides, *values.shape))
    source = np.arange(len(rows))
    for bit in reversed(range(int(places.max()).bit_length())):
        zero = places >> bit & 1 == 0
        np.cumsum(zero, out=zeros[1:])
        cut = int(zeros[-1])
        order = np.concatenate([np.flatnonzero(zero), np.flatnonzero(~zero)])
        places, source, whole, part = places[order], source[order], whole[order], part[order]
        terms, runs, out = terms.take(order, -1), runs.take(order, -1), out.take(order, -1)
        np.cumsum(terms, -1, out=sums[..., 1:])
        left = zeros.take(runs)
        right = runs - left + cut
        out[-1, :, cut:] += _look(sums, left[:, cut:], whole[cut:], part[cut:])
        if sides == 2:
            out[0, :, :cut] += _look(sums, right[:, :cut], whole[:cut], part[:cut])
        runs = np.concatenate([left[:, :cut], right[:, cut:]], 1)
    if sides == 2:  # a node is now the rows of one grade
        np.cumsum(terms, -1, out=sums[..., 1:])
        out[0] += _look(sums, runs, whole, part)
    result = np.empty_like(out)
    result[..., source] = np.ldexp(out, -exponent)
    return result


def _blocks(bounds: Indices) -> Iterator[Indices]:
    """The numbers of the rows of segments of one length ``(S, n)``; one segment, where it is large."""
    if len(bounds) == 2:  # most often; nothing to sort out
        yield np.arange(bounds[1])[None]
        return
    sizes = bounds[1:] - bounds[:-1]
    for size in sorted(set(sizes.tolist())):
        starts = bounds[:-1][sizes == size]
        count = max(_PAIRS // size**2, 1)
        for first in range(0, len(starts), count):
            yield starts[first : first + count, None] + np.arange(size)


@np.errstate(over="ignore", invalid="ignore")
def _sums(rows: Floats, grades: Floats, values: Floats, bounds: Indices, delta: float, sides: int) -> Floats:
    """Values ``(P, c)`` -> the last sides of :func:`_pairs`, ``(·, c, P)``."""
    out = np.empty((sides, values.shape[1], len(rows)))
    zero = rows * 0 + grades * 0 + values[:, -1] * 0  # or NaN; the first of two values is 1
    for block in _blocks(bounds):
        s, t, v, poison = rows[block], grades[block], values[block], zero[block].sum(1)
        if block.shape[1] <= _DENSE:
            sums = _pairs(s, t, v, delta)[-sides:]
            sums += poison[:, None, None]
            out[:, :, block] = sums.transpose(0, 3, 1, 2)
        else:
            finite = poison[0] == 0
            out[:, :, block[0]] = _tree(s[0], t[0], v[0].T, delta, sides) if finite else np.nan
    return out


def among_grades(rows: Floats, grades: Floats, bounds: Indices, delta: float) -> Floats:
    """Sums over the rows of no lower, and of lower grade.

    Args:
        rows: float64 ``(P,)``, ascending, NaN last, within each segment.
        grades: float64 ``(P,)``.
        bounds: int64 ``(S + 1,)``, ascending from 0 to P: where segments begin and end. Rows of different segments do
            not see each other, and what is not finite makes the results of its own segment NaN.
        delta: half the width of a slope.

    Returns:
        float64 ``(4, P)``.
    """
    values = np.empty((len(rows), 2))
    values[:, 0] = 1
    np.subtract(1, grades, out=values[:, 1])
    return _sums(rows, grades, values, bounds, delta, 2).reshape(4, -1)


def below_grades(rows: Floats, grades: Floats, weights: Floats, bounds: Indices, delta: float) -> Floats:
    """Sums of the weights of the rows of higher grade ``(P,)``."""
    # The same, turned round: lower scores and higher grades are now higher, and lower ones.
    rows, grades, weights, bounds = -rows[::-1], -grades[::-1], weights[::-1], bounds[-1] - bounds[::-1]
    return _sums(rows, grades, weights[:, None], bounds, delta, 1)[0, 0, ::-1].copy()
