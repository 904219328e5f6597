"""The losses as the published implementations compute them: one positive after the other, in ascending order of score.

Written from its description. The published code first drops negatives that lie more than delta below the least
positive; that saves time and changes nothing, so it is left out here. It defines no result for scores that are not
finite.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .dense import APResult, RankSortResult, Result


def _step(distance: NDArray[np.float64], delta: float) -> NDArray[np.float64]:
    if delta > 0:
        return np.minimum(np.maximum(distance / (2 * delta) + 0.5, 0.0), 1.0)
    return (distance >= 0).astype(np.float64)


def alrp_loss(
    logits: ArrayLike, targets: ArrayLike, box_errors: ArrayLike, delta: float = 1.0, eps: float = 1e-5
) -> Result:
    """Same arguments and result as :func:`reference.dense.alrp_loss`."""
    scores = np.asarray(logits, np.float64).ravel()
    labels = np.asarray(targets).ravel()
    errors = np.asarray(box_errors, np.float64)
    is_positive, is_negative = labels == 1, labels == 0
    positive_scores, negative_scores = scores[is_positive], scores[is_negative]
    count = len(positive_scores)

    precision, rank = np.zeros(count), np.zeros(count)
    positive_grad, negative_grad = np.zeros(count), np.zeros(len(negative_scores))
    order = np.argsort(positive_scores, kind="stable")
    for i in order:
        above = _step(positive_scores - positive_scores[i], delta)
        above[i] = 0.0
        outranking = _step(negative_scores - positive_scores[i], delta)
        false_positives = outranking.sum()
        rank_among_positives = 1.0 + above.sum()
        rank[i] = rank_among_positives + false_positives
        precision[i] = rank_among_positives / rank[i]
        if false_positives > eps:
            error = (false_positives + (above * errors).sum()) / rank[i]
            positive_grad[i] = -error
            negative_grad += outranking * (error / false_positives)

    # The localisation part: sums along the order, so that of two equal scores one counts for the other, by chance of
    # the order; the mean over both orders of each pair has no chance in it. The hard step counts both, both ways.
    localisation, box_grad = 0.0, np.zeros(count)
    turned = order[::-1][np.argsort(positive_scores[order[::-1]], kind="stable")]
    for sequence in (order, turned):
        for place, i in enumerate(sequence):
            members = sequence[place:] if delta > 0 else positive_scores >= positive_scores[i]
            localisation += errors[members].sum() / rank[i] / 2
            box_grad[members] += 1.0 / rank[i] / 2

    grad = np.zeros_like(scores)
    divisor = max(count, 1)
    grad[is_positive] = positive_grad / divisor
    grad[is_negative] = negative_grad / divisor
    classification = 1.0 - precision.mean() if count else 0.0
    return Result(float(classification), localisation / divisor, rank, order, grad, box_grad / divisor)


def ap_loss(logits: ArrayLike, targets: ArrayLike, interpolate: bool = True, delta: float = 1.0) -> APResult:
    """Same arguments and result as :func:`reference.dense.ap_loss`."""
    scores, labels = np.asarray(logits, np.float64).ravel(), np.asarray(targets).ravel()
    is_positive, is_negative = labels == 1, labels == 0
    positive_scores, negative_scores = scores[is_positive], scores[is_negative]
    count = len(positive_scores)
    best, seen = 0.0, np.zeros(count)
    positive_grad, negative_grad = np.zeros(count), np.zeros(len(negative_scores))
    for i in np.argsort(positive_scores, kind="stable"):
        above = _step(positive_scores - positive_scores[i], delta)
        above[i] = 0.0
        outranking = _step(negative_scores - positive_scores[i], delta)
        rank_among_positives = 1.0 + above.sum()
        rank = rank_among_positives + outranking.sum()
        current = rank_among_positives / rank
        if not interpolate or best <= current:
            best = current
            negative_grad += outranking / rank
        else:
            negative_grad += outranking / rank * ((1 - best) / (1 - current))
        positive_grad[i] = -(1 - best)
        seen[i] = best
    grad = np.zeros_like(scores)
    grad[is_positive], grad[is_negative] = positive_grad / max(count, 1), negative_grad / max(count, 1)
    return APResult(float(1 - seen.mean()) if count else 0.0, grad)


def rank_sort_loss(
    logits: ArrayLike, targets: ArrayLike, ious: ArrayLike, delta: float = 0.5, eps: float = 1e-10
) -> RankSortResult:
    """Same arguments and result as :func:`reference.dense.rank_sort_loss`."""
    scores, labels = np.asarray(logits, np.float64).ravel(), np.asarray(targets).ravel()
    grades = np.asarray(ious, np.float64)
    is_positive, is_negative = labels == 1, labels == 0
    positive_scores, negative_scores = scores[is_positive], scores[is_negative]
    count = len(positive_scores)
    ranking, sorting = np.zeros(count), np.zeros(count)
    ranking_grad, sorting_grad, negative_grad = np.zeros(count), np.zeros(count), np.zeros(len(negative_scores))
    for i in np.argsort(positive_scores, kind="stable"):
        above = _step(positive_scores - positive_scores[i], delta)
        outranking = _step(negative_scores - positive_scores[i], delta)
        rank_among_positives, false_positives = above.sum(), outranking.sum()
        ranking[i] = false_positives / (rank_among_positives + false_positives)
        keeps = grades >= grades[i]
        in_order = above * keeps
        current = (above * (1 - grades)).sum() / rank_among_positives
        sorting[i] = current - (in_order * (1 - grades)).sum() / in_order.sum()
        if false_positives > eps:
            ranking_grad[i] -= ranking[i]
            negative_grad += outranking * (ranking[i] / false_positives)
        missorted = above * ~keeps
        if missorted.sum() > eps:
            sorting_grad[i] -= sorting[i]
            sorting_grad += missorted * (sorting[i] / missorted.sum())
    divisor = max(count, 1)
    grad_ranking, grad_sorting = np.zeros_like(scores), np.zeros_like(scores)
    grad_ranking[is_positive], grad_ranking[is_negative] = ranking_grad / divisor, negative_grad / divisor
    grad_sorting[is_positive] = sorting_grad / divisor
    return RankSortResult(float(ranking.sum() / divisor), float(sorting.sum() / divisor), grad_ranking, grad_sorting)
