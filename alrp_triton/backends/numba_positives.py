"""The positives among themselves, and what a loss makes of its sums, by numba: one sweep over the sorted rows.

Among the rows whose scores are within delta of row i, h is a straight line in the score; above them it is 1. Both parts
are differences of running sums, which are restarted with each **cluster** of rows less than delta apart from the next,
and whose scores are relative to the least of it: no digits are lost that the differences need.
"""

# numba has no types, and what it compiles is not called as Python.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false

from functools import partial

import numpy as np

from .. import formulas
from . import graded
from .knots import Floats, Indices
from .numba_jit import jit

_RESOLUTION = 2.0**-53


@jit
def _where(condition, this, that):
    return this if condition else that


_alrp, _precision_error, _rank_sort = map(jit, (formulas.alrp, formulas.precision_error, formulas.rank_sort))
_at_zero = jit(formulas.at_zero)


@jit
def _finite(rows, values):
    """Two times 0, or NaN: if a row, of ascending ones, or if a value is not finite."""
    poison = (rows[0] + rows[-1]) * 0
    of_values = 0.0
    for value in values:
        of_values += value * 0
    return poison, of_values


@jit
def _among(s, v, delta, out):
    """Ascending rows of one segment: sums of h, of h v, and of v ranked -> out (3, n)."""
    n = len(s)
    poison, of_values = _finite(s, v)
    if poison != poison:
        out[:] = np.nan
        return
    # Suffix sums, from the last row of a cluster down: of v, of the score, of both multiplied.
    inner = np.zeros((n, 3))
    above = np.zeros(n + 1)  # sum of v of all rows from there on
    begin = np.empty(n, np.int64)
    for k in range(n):
        begin[k] = k if k == 0 or s[k] - s[k - 1] >= delta else begin[k - 1]
    for k in range(n - 1, -1, -1):
        above[k] = above[k + 1] + v[k]
        last = k + 1 == n or begin[k + 1] == k + 1
        distance = s[k] - s[begin[k]]
        inner[k, 0] = v[k] + (0.0 if last else inner[k + 1, 0])
        inner[k, 1] = distance + (0.0 if last else inner[k + 1, 1])
        inner[k, 2] = distance * v[k] + (0.0 if last else inner[k + 1, 2])
    first = stop = tie = after = end = 0
    for i in range(n):
        row, origin = s[i], s[begin[i]]
        while end < n and begin[end] <= i:
            end += 1
        while after < n and s[after] <= row:
            after += 1
        while s[tie] < row:
            tie += 1
        ties = above[tie] - above[after] if after - tie > 1 else v[i]
        if delta == 0:
            out[0, i], out[1, i], out[2, i] = n - tie, above[tie], above[tie]
            continue
        out[2, i] = above[after] + 0.5 * (ties - v[i]) + v[i]
        if delta <= abs(row) * _RESOLUTION:  # nothing but what ties is within delta
            out[0, i], out[1, i] = n - after + 0.5 * (after - tie), above[after] + 0.5 * ties
            continue
        while s[first] <= row - delta:
            first += 1
        while stop < n and s[stop] < row + delta:
            stop += 1
        low, high = max(first, begin[i]), min(stop, end)  # of one cluster, whatever was rounded
        weight = inner[low, 0] - (inner[high, 0] if high < end else 0.0)
        score = inner[low, 1] - (inner[high, 1] if high < end else 0.0)
        weighed = inner[low, 2] - (inner[high, 2] if high < end else 0.0)
        rate = 0.5 / delta
        at = (row - origin) * rate - 0.5  # less h of the origin
        out[0, i] = n - high + (score * rate - at * (high - low))
        out[1, i] = above[high] + (weighed * rate - at * weight)
    for i in range(n):
        out[1, i] += of_values
        out[2, i] += of_values


@jit
def _below(s, w, delta, out):
    """The transpose of the last of :func:`_among`: rows below, by h(0) what ties, and itself."""
    n = len(s)
    poison, of_weights = _finite(s, w)
    at_zero = _at_zero(delta)
    total = 0.0
    k = 0
    while k < n:
        stop, ties = k, 0.0
        while stop < n and (s[stop] == s[k] or stop == k):
            ties += w[stop]
            stop += 1
        for i in range(k, stop):
            others = ties - w[i] if stop - k > 1 else 0.0
            out[i] = total + at_zero * others + w[i] + poison + of_weights
        total += ties
        k = stop


@jit
def _by_segment(rows, values, bounds, delta, out):
    for s in range(len(bounds) - 1):
        here = slice(bounds[s], bounds[s + 1])
        _among(rows[here], values[here], delta, out[:, here])


@jit
def _below_by_segment(rows, weights, bounds, delta, out):
    for s in range(len(bounds) - 1):
        here = slice(bounds[s], bounds[s + 1])
        _below(rows[here], weights[here], delta, out[here])


def among_rows(rows: Floats, values: Floats, bounds: Indices, delta: float) -> Floats:
    """Products of the rows' own matrix with 1 and v, and v ranked; as :func:`.positives.among_rows`."""
    out = np.empty((3, len(rows)))
    _by_segment(rows, values, bounds, delta, out)
    return out


def below_rows(rows: Floats, weights: Floats, bounds: Indices, delta: float) -> Floats:
    """The transpose of the last of :func:`among_rows`."""
    out = np.empty(len(rows))
    _below_by_segment(rows, weights, bounds, delta, out)
    return out


@jit
def _alrp_terms(
    rows, values, order, false_positives, bounds, delta, at_zero, eps, losses, rank, grad_positives, grad_per_fp
):
    n = len(rows)
    among, inverse, below = np.empty((3, n)), np.empty(n), np.empty(n)
    _by_segment(rows, values, bounds, delta, among)
    losses[:] = 0
    for i in range(n):
        rank_i, precision_error, box, error, per_fp = _alrp(
            false_positives[i], among[0, i], among[1, i], among[2, i], values[i], at_zero, eps, _where
        )
        losses[0] += precision_error / n
        losses[1] += box / n
        rank[order[i]], grad_positives[0, order[i]], grad_positives[1, order[i]] = rank_i, -error / n, 0.0
        grad_per_fp[i], inverse[i] = per_fp / n, 1 / rank_i / n
    _below_by_segment(rows, inverse, bounds, delta, below)
    for i in range(n):
        grad_positives[2, order[i]] = below[i]


@jit
def _ap_terms(
    rows, values, order, false_positives, bounds, delta, at_zero, interpolate, losses, rank, grad_positives, grad_per_fp
):  # fmt: skip
    n = len(rows)
    among = np.empty((3, n))
    _by_segment(rows, values, bounds, delta, among)
    losses[:] = 0
    grad_positives[1:] = 0
    for s in range(len(bounds) - 1):
        least = np.inf
        for i in range(bounds[s], bounds[s + 1]):
            negatives = false_positives[i]
            error = _precision_error(negatives, among[0, i], at_zero)
            if interpolate:  # 1 - the greatest precision so far is the least 1 - precision so far; NaN stays
                least = error if error < least or error != error else least
                error = least
            losses[0] += error / n
            rank[order[i]] = among[0, i] + (1 - at_zero) + negatives
            grad_positives[0, order[i]] = -error / n
            grad_per_fp[i] = 0.0 if negatives == 0 else error / negatives / n


# Rows of the largest segment that is compared pair by pair by grade; beyond, :mod:`.graded` is faster.
_MAX_PAIRWISE = 2048


@jit
def _step(d, scale):
    """The step h of a difference; scale is 1 / (2 delta), or 0 for delta = 0. 0 for NaN."""
    h = d * scale + 0.5 if scale > 0 else (1.0 if d >= 0 else 0.0)
    h = h if h > 0 else 0.0
    return h if h < 1 else 1.0


@partial(jit, fastmath={"reassoc"})  # so that a sum has many lanes
def _compare(s, t, i, scale):
    """Row i of a segment against all: h and h (1 - t), not lower and lower."""
    kept = kept_error = missorted = missorted_error = 0.0
    for k in range(len(s)):
        h = _step(s[k] - s[i], scale)
        low = h if t[k] < t[i] else 0.0
        kept += h - low
        kept_error += (h - low) * (1 - t[k])
        missorted += low
        missorted_error += low * (1 - t[k])
    return kept, kept_error, missorted, missorted_error


@partial(jit, fastmath={"reassoc"})
def _receive(s, t, w, k, scale):
    total = 0.0
    for i in range(len(s)):
        total += _step(s[k] - s[i], scale) * (w[i] if t[i] > t[k] else 0.0)
    return total


@jit
def _pairs(rows, grades, bounds, scale, out):
    for segment in range(len(bounds) - 1):
        a, b = bounds[segment], bounds[segment + 1]
        poison, of_grades = _finite(rows[a:b], grades[a:b])
        for i in range(a, b):
            sums = _compare(rows[a:b], grades[a:b], i - a, scale)
            for k in range(4):
                out[k, i] = sums[k] + poison + of_grades


@jit
def _pairs_below(rows, grades, weights, bounds, scale, out):
    for segment in range(len(bounds) - 1):
        a, b = bounds[segment], bounds[segment + 1]
        poison, of_grades = _finite(rows[a:b], grades[a:b])
        poison += of_grades + _finite(rows[a:b], weights[a:b])[1]
        for k in range(a, b):
            out[k] = _receive(rows[a:b], grades[a:b], weights[a:b], k - a, scale) + poison


def among_grades(rows: Floats, grades: Floats, bounds: Indices, delta: float) -> Floats:
    """Sums ``(4, P)`` of H and of H (1 - t) over the rows of no lower, and of lower grade."""
    if np.diff(bounds).max() > _MAX_PAIRWISE:
        return graded.among_grades(rows, grades, bounds, delta)
    out = np.empty((4, len(rows)))
    _pairs(rows, grades, bounds, _scale(delta), out)
    return out


def below_grades(rows: Floats, grades: Floats, weights: Floats, bounds: Indices, delta: float) -> Floats:
    """The transpose of the third of :func:`among_grades`."""
    if np.diff(bounds).max() > _MAX_PAIRWISE:
        return graded.below_grades(rows, grades, weights, bounds, delta)
    out = np.empty(len(rows))
    _pairs_below(rows, grades, weights, bounds, _scale(delta), out)
    return out


def _scale(delta: float) -> float:
    return 0.5 / delta if delta > 0 else 0.0


@jit
def _rank_sort_terms(
    order, false_positives, among, at_zero, eps, losses, rank, grad_positives, grad_per_fp, weights, auxiliary_errors
):
    n = len(order)
    losses[:] = 0
    for i in range(n):
        ranking, auxiliary, error, per_fp, auxiliary_errors[i], weights[i] = _rank_sort(
            false_positives[i], among[0, i], among[1, i], among[2, i], among[3, i], eps, _where
        )
        losses[0] += ranking / n
        losses[1] += auxiliary / n
        rank[order[i]] = among[0, i] + among[2, i] + (1 - at_zero) + false_positives[i]
        grad_positives[0, order[i]] = -error / n
        grad_per_fp[i] = per_fp / n


def terms(
    loss: str,
    rows: Floats,
    values: Floats,
    order: Indices,
    false_positives: Floats,
    bounds: Indices,
    delta: float,
    eps: float,
) -> tuple[Floats, Floats, Floats, Floats]:
    """Losses, ranks, gradients of the positives, and per false positive; as :func:`.positives.terms`."""
    n, at_zero = len(rows), formulas.at_zero(delta)
    results = np.empty(2), np.empty(n), np.empty((3, n)), np.empty(n)
    given = rows, values, order, false_positives, bounds, delta, at_zero
    if loss == "alrp":
        _alrp_terms(*given, eps, *results)
    elif loss == "rank_sort":
        among, weights, auxiliary_errors = among_grades(rows, values, bounds, delta), np.empty(n), np.empty(n)
        _rank_sort_terms(order, false_positives, among, at_zero, eps, *results, weights, auxiliary_errors)
        results[2][1, order] = (below_grades(rows, values, weights, bounds, delta) - auxiliary_errors) / n
        results[2][2] = 0
    else:
        _ap_terms(*given, loss == "interpolated_ap", *results)
    return results
