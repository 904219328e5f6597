"""aLRP Loss as its equations, with the whole P x N comparison matrix."""

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


def comparison_matrix(rows: ArrayLike, columns: ArrayLike, delta: float) -> Array:
    """H_ij = h(x_j - s_i), ``(P, N)``. One score s that is not finite leaves no ranks: all NaN. A NaN column is NaN."""
    s = np.asarray(rows, np.float64)
    x = np.asarray(columns, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = x[None, :] - (s if np.isfinite(s).all() else np.full_like(s, np.nan))[:, None]
        if delta == 0:
            return np.where(np.isnan(distance), np.nan, distance >= 0)
        return np.clip(distance / (2 * delta) + 0.5, 0, 1)


def alrp_loss(
    logits: ArrayLike, targets: ArrayLike, box_errors: ArrayLike, delta: float = 1.0, eps: float = 1e-5
) -> Result:
    """Equations 8 to 13 and Theorem 1 of Oksuz et al. (NeurIPS 2020); targets 1 positive, 0 negative, -1 ignored."""
    s = np.asarray(logits, np.float64).ravel()
    t = np.asarray(targets).ravel()
    errors = np.asarray(box_errors, np.float64)
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
    at_or_above = comparison_matrix(s[positives], s[positives], 0.0)

    false_positives = to_negatives.sum(axis=1)
    rank = 1 + others.sum(axis=1) + false_positives
    classification = np.mean(false_positives / rank)
    localisation = np.mean((at_or_above @ errors) / rank)

    active = ~(false_positives <= eps)
    error = np.where(active, (false_positives + others @ errors) / rank, 0.0)
    share = np.divide(error, false_positives, out=np.zeros(count), where=active)
    grad[positives] = -error / count
    grad[negatives] = share @ to_negatives / count
    grad_box_errors = (1 / rank) @ at_or_above / count
    order = np.argsort(s[positives], kind="stable")
    return Result(float(classification), float(localisation), rank, order, grad, grad_box_errors)
