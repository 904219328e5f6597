"""aLRP Loss as the published implementation computes it: one positive after the other, in ascending order of score.

Written from its description. The published code first drops negatives that lie more than delta below the least
positive; that saves time and changes nothing, so it is left out here. It defines no result for scores that are not
finite.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .dense import Result


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

    # The localisation part, from the best positive down. Equal scores count for each other both ways.
    localisation, box_grad = 0.0, np.zeros(count)
    for i in order[::-1]:
        members = positive_scores >= positive_scores[i]
        localisation += errors[members].sum() / rank[i]
        box_grad[members] += 1.0 / rank[i]

    grad = np.zeros_like(scores)
    divisor = max(count, 1)
    grad[is_positive] = positive_grad / divisor
    grad[is_negative] = negative_grad / divisor
    classification = 1.0 - precision.mean() if count else 0.0
    return Result(float(classification), localisation / divisor, rank, order, grad, box_grad / divisor)
