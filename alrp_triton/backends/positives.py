"""The positives among themselves, and what a loss makes of its sums, by NumPy.

All arrays are float64 ``(P,)`` in the order of the rows, which ascend within each **segment**, NaN last: segment s are
the rows ``bounds[s] … bounds[s + 1]``, and rows of two segments do not see each other.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from .. import formulas
from .graded import among_grades, below_grades
from .knots import Floats, Indices, make_knots

__all__ = ["among_grades", "among_rows", "below_grades", "below_rows", "terms"]

_quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")


def _by_segment(kernel: Callable[..., Floats], bounds: Indices, *of_rows: Floats) -> Floats:
    """What a kernel makes of vectors of the rows, ``(..., P)``, of those of each segment by themselves."""
    if len(bounds) == 2:
        return kernel(*of_rows)
    return np.concatenate([kernel(*(v[a:b] for v in of_rows)) for a, b in pairwise(bounds.tolist())], -1)


def _ranked(s: Floats, v: Floats, at_zero: float) -> Floats:
    """For each of ascending rows the sum of v over the rows above, of others that tie by h(0), and of itself."""
    total = np.append(v[::-1].cumsum()[::-1], 0.0)  # of all rows from there on
    ties, above = total[s.searchsorted(s)], total[s.searchsorted(s, "right")]
    return at_zero * ties + (1 - at_zero) * (above + v) + (s[0] + s[-1]) * 0 + (v * 0).sum()


@_quiet
def among_rows(rows: Floats, values: Floats, bounds: Indices, delta: float) -> Floats:
    """Products ``(3, P)`` of the rows' own matrix H with 1 and with v, and v ranked, R v."""

    def of_segment(s: Floats, v: Floats) -> Floats:
        knots = make_knots(s, delta, torch.float64)
        bins = knots.values.searchsorted(s, "right")
        position = knots.positions(torch.from_numpy(s), torch.from_numpy(bins)).numpy()
        sums = [knots.sums(*(knots.by_bin(bins, u) for u in (w, w * position))) for w in (np.ones_like(v), v)]
        return np.stack([*sums, _ranked(s, v, knots.at_zero)])

    return _by_segment(of_segment, bounds, rows, values)


@_quiet
def below_rows(rows: Floats, weights: Floats, bounds: Indices, delta: float) -> Floats:
    """The transpose of the last of :func:`among_rows`, R^T w."""

    def of_segment(s: Floats, w: Floats) -> Floats:
        return _ranked(-s[::-1], w[::-1], formulas.at_zero(delta))[::-1].copy()

    return _by_segment(of_segment, bounds, rows, weights)


@_quiet
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
    """Losses, ranks, gradients of the positives, and per false positive; contract in :mod:`alrp_triton.operators`."""
    fp, p, at_zero = false_positives, len(rows), formulas.at_zero(delta)
    grad_auxiliary = grad_values = auxiliary = np.zeros(p)
    if loss == "rank_sort":
        among = among_grades(rows, values, bounds, delta)
        ranking, auxiliary, error, per_fp, auxiliary_error, per_missorted = formulas.rank_sort(
            fp, among[0], among[1], among[2], among[3], eps, np.where
        )
        rank = among[0] + among[2] + (1 - at_zero) + fp
        grad_auxiliary = below_grades(rows, values, per_missorted, bounds, delta) - auxiliary_error
    else:
        above, box_above, ranked = among_rows(rows, values, bounds, delta)
        if loss == "alrp":
            rank, ranking, auxiliary, error, per_fp = formulas.alrp(
                fp, above, box_above, ranked, values, at_zero, eps, np.where
            )
            grad_values = below_rows(rows, 1 / rank, bounds, delta)
        else:
            ranking = formulas.precision_error(fp, above, at_zero)
            if loss == "interpolated_ap":  # 1 - the greatest precision so far is the least 1 - precision so far
                ranking = _by_segment(np.minimum.accumulate, bounds, ranking)
            rank, error, per_fp = above + (1 - at_zero) + fp, ranking, np.where(fp == 0, 0.0, ranking / fp)

    def as_given(*vectors: Floats) -> Floats:
        out = np.empty((len(vectors), p))
        out[:, order] = vectors
        return out

    losses = np.array([ranking.sum(), auxiliary.sum()]) / p
    return losses, as_given(rank)[0], as_given(-error / p, grad_auxiliary / p, grad_values / p), per_fp / p
