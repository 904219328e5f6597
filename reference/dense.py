"""The losses as their equations, with the whole P x N comparison matrix."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """Losses, ranks and gradients; each gradient is for an incoming gradient of 1."""

    classification: float
    localisation: float
    rank: Array  # (P,)
    order: NDArray[np.int64]  # (P,)
    grad_logits: Array  # (N,) of classification
    grad_box_errors: Array  # (P,) of localisation


@dataclass(frozen=True)
class APResult:
    """AP Loss and its gradient for an incoming gradient of 1."""

    loss: float
    grad_logits: Array  # (N,)


@dataclass(frozen=True)
class RankSortResult:
    """Both parts of Rank & Sort Loss, and the gradient of each for an incoming gradient of 1."""

    ranking: float
    sorting: float
    grad_ranking: Array  # (N,)
    grad_sorting: Array  # (N,)


def comparison_matrix(rows: ArrayLike, columns: ArrayLike, delta: float) -> Array:
    """H_ij = h(x_j - s_i), ``(P, N)``. One score s that is not finite leaves no ranks: all NaN. A NaN column is NaN."""
    s = np.asarray(rows, np.float64)
    x = np.asarray(columns, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = x[None, :] - (s if np.isfinite(s).all() else np.full_like(s, np.nan))[:, None]
        if delta == 0:
            return np.where(np.isnan(distance), np.nan, distance >= 0)
        return np.clip(distance / (2 * delta) + 0.5, 0, 1)


def _false_positives(to_negatives: Array, to_positives: Array) -> Array:
    """How many negatives outrank each positive; NaN where there are no ranks, even if there are no negatives."""
    return to_negatives.sum(axis=1) + 0 * np.diag(to_positives)


def alrp_loss(
    logits: ArrayLike, targets: ArrayLike, box_errors: ArrayLike, delta: float = 1.0, eps: float = 1e-5
) -> Result:
    """Equations 8 to 13 and Theorem 1 of Oksuz et al. (NeurIPS 2020); targets 1 positive, 0 negative, -1 ignored."""
    s = np.asarray(logits, np.float64).ravel()
    t = np.asarray(targets).ravel()
    errors = np.asarray(box_errors, np.float64)
    if not np.isfinite(errors).all():  # one leaves no sum of them
        errors = np.full_like(errors, np.nan)
    (positives,), (negatives,) = np.nonzero(t == 1), np.nonzero(t == 0)
    count = len(positives)
    assert errors.shape == (count,)
    grad = np.zeros_like(s)
    if count == 0:
        return Result(0.0, 0.0, np.zeros(0), np.zeros(0, np.int64), grad, np.zeros(0))

    to_negatives = comparison_matrix(s[positives], s[negatives], delta)
    to_positives = comparison_matrix(s[positives], s[positives], delta)
    others = to_positives.copy()
    np.fill_diagonal(others, 0 * np.diag(to_positives))
    # The step without a width, which counts a tie as the step with one does; and each positive itself.
    below = comparison_matrix(s[positives], s[positives], 0.0).T
    ranked = 1 - below + (0.5 if delta > 0 else 1.0) * below * below.T
    np.fill_diagonal(ranked, 1 + 0 * np.diag(below))

    false_positives = _false_positives(to_negatives, to_positives)
    rank = 1 + others.sum(axis=1) + false_positives
    classification = np.mean(false_positives / rank)
    localisation = np.mean((ranked @ errors) / rank)

    active = ~(false_positives <= eps)
    error = np.where(active, (false_positives + others @ errors) / rank, 0.0)
    share = np.divide(error, false_positives, out=np.zeros(count), where=active)
    grad[positives] = -error / count
    grad[negatives] = share @ to_negatives / count
    grad_box_errors = (1 / rank) @ ranked / count
    order = np.argsort(s[positives], kind="stable")
    return Result(float(classification), float(localisation), rank, order, grad, grad_box_errors)


def _divide(numerator: Array, denominator: Array, where: NDArray[np.bool_]) -> Array:
    """0 where the condition is False."""
    return np.divide(numerator, denominator, out=np.zeros(np.broadcast(numerator, denominator).shape), where=where)


def ap_loss(logits: ArrayLike, targets: ArrayLike, interpolate: bool = True, delta: float = 1.0) -> APResult:
    """Section 3 of Chen et al. (CVPR 2019), with the weights of interpolation as published."""
    s, t = np.asarray(logits, np.float64).ravel(), np.asarray(targets).ravel()
    (positives,), (negatives,) = np.nonzero(t == 1), np.nonzero(t == 0)
    count, grad = len(positives), np.zeros_like(s)
    if count == 0:
        return APResult(0.0, grad)
    to_negatives = comparison_matrix(s[positives], s[negatives], delta)
    others = comparison_matrix(s[positives], s[positives], delta)
    np.fill_diagonal(others, 0 * np.diag(others))
    true = 1 + others.sum(axis=1)
    rank = true + to_negatives.sum(axis=1)
    precision = true / rank
    best = precision
    if interpolate:  # the greatest of all positives that do not score higher
        not_higher = s[positives][None, :] <= s[positives][:, None]
        best = np.where(not_higher, precision[None, :], -np.inf).max(axis=1) if np.isfinite(rank).all() else precision
    # A share of each pair, L_ij = H_ij / rank_i.
    weight = np.where(precision == 1, 1.0, _divide(1 - best, 1 - precision, precision != 1))
    grad[positives] = -(1 - best) / count
    grad[negatives] = (weight / rank) @ to_negatives / count
    return APResult(float(np.mean(1 - best)), grad)


def rank_sort_loss(
    logits: ArrayLike, targets: ArrayLike, ious: ArrayLike, delta: float = 0.5, eps: float = 1e-10
) -> RankSortResult:
    """Section 4 of Oksuz et al. (ICCV 2021); targets 1 positive, 0 negative, -1 ignored."""
    s, t = np.asarray(logits, np.float64).ravel(), np.asarray(targets).ravel()
    grades = np.asarray(ious, np.float64)
    (positives,), (negatives,) = np.nonzero(t == 1), np.nonzero(t == 0)
    count, grad_ranking, grad_sorting = len(positives), np.zeros_like(s), np.zeros_like(s)
    assert grades.shape == (count,)
    if count == 0:
        return RankSortResult(0.0, 0.0, grad_ranking, grad_sorting)
    to_negatives = comparison_matrix(s[positives], s[negatives], delta)
    to_positives = comparison_matrix(s[positives], s[positives], delta)  # with itself, by h(0)
    false_positives = _false_positives(to_negatives, to_positives)
    if not np.isfinite(grades).all():  # one leaves no order
        grades, to_positives = np.full(count, np.nan), np.full_like(to_positives, np.nan)

    above = to_positives.sum(axis=1)
    ranking = false_positives / (above + false_positives)
    active = ~(false_positives <= eps)
    pull = np.where(active, ranking, 0.0)
    grad_ranking[positives] = -pull / count
    grad_ranking[negatives] = _divide(pull, false_positives, active) @ to_negatives / count

    errors = 1 - grades
    lower = np.where(np.isnan(grades).any(), np.nan, grades[None, :] < grades[:, None])
    target = to_positives * (1 - lower)
    missorted = to_positives * lower
    sorting = to_positives @ errors / above - target @ errors / target.sum(axis=1)
    wrong = missorted.sum(axis=1)
    active = ~(wrong <= eps)
    pull = np.where(active, sorting, 0.0)
    grad_sorting[positives] = (_divide(pull, wrong, active) @ missorted - pull) / count
    return RankSortResult(float(np.mean(ranking)), float(np.mean(sorting)), grad_ranking, grad_sorting)
