"""LRP of one class: its error after every detection, the least of these, and the one at a given score. No matching.

Reference: Oksuz et al., *Localization Recall Precision (LRP): A New Performance Metric for Object Detection*, ECCV
2018, arXiv:1807.01696; and *One Metric to Measure Them All: Localisation Recall Precision (LRP) for Evaluating Visual
Detection Tasks*, TPAMI 2021, arXiv:2011.10772.
"""

import math
from numbers import Real
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..boxes import TAU
from ..checks import check_integer, check_number

FloatArray = NDArray[np.float64]
ROUNDING = 1e-9  # sums of a million terms in float64 are better than this


class LRPErrors(NamedTuple):
    """LRP and its components, lower is better, NaN where undefined. Arrays of one shape; 0-d for a single point."""

    lrp: FloatArray
    """(sum of (1 - IoU) / (1 - tau) over TPs + FP + FN) / (TP + FP + FN), in 0..1."""
    localisation: FloatArray
    """Mean of 1 - IoU over TPs, in 0..1 - tau."""
    false_positive: FloatArray
    """FP / (TP + FP): 1 - precision."""
    false_negative: FloatArray
    """FN / ground truths: 1 - recall."""
    threshold: FloatArray
    """Detections of this score or more are kept."""


def lrp_curve(scores: ArrayLike, is_tp: ArrayLike, ious: ArrayLike, num_truths: int, *, tau: float = TAU) -> LRPErrors:
    """LRP of a class after each of its detections, from the highest score down.

    Args:
        scores: confidences (D,), any order; equal scores stay in the order given.
        is_tp: whether a detection is matched to a ground truth (D,), bool. Leave out what is ignored.
        ious: overlap with the matched ground truth (D,); read at true positives only.
        num_truths: ground truths that count.
        tau: IoU threshold that the matching was made with, in [0, 1).

    Returns:
        Arrays (D,), float64. All NaN without ground truths.

    Raises:
        TypeError: ``is_tp`` is not bool, ``num_truths`` no integer, ``tau`` no number.
        ValueError: shapes that do not fit, scores that are NaN, overlaps of true positives out of [tau, 1], more true
            positives than ground truths, ``tau`` out of range.
    """
    score, tp, iou = np.asarray(scores, np.float64), np.asarray(is_tp), np.asarray(ious, np.float64)
    if tp.size and tp.dtype != np.bool_:
        raise TypeError(f"is_tp must be bool, got {tp.dtype}")
    tp = tp.astype(np.bool_)  # an empty list has no dtype of its own
    if not (score.ndim == 1 and score.shape == tp.shape == iou.shape):
        raise ValueError(
            f"scores, is_tp and ious must have one shape (D,), got {score.shape}, {tp.shape} and {iou.shape}"
        )
    if np.isnan(score).any():
        raise ValueError(f"scores must be numbers, got NaN for {int(np.isnan(score).sum())} of {len(score)}")
    num_truths = check_integer("num_truths", num_truths, 0, 2**63 - 1)
    if tp.sum() > num_truths:
        raise ValueError(f"num_truths must be at least the number of true positives, got {num_truths} and {tp.sum()}")
    tau = check_number("tau", tau, 0.0, 1.0, high_open=True)
    loose = tp & ~((iou >= tau - 1e-6) & (iou <= 1 + 1e-6))  # 1e-6: an IoU may be rounded
    if loose.any():
        raise ValueError(f"ious of true positives must be in [tau, 1] = [{tau}, 1], got {iou[loose][:5].tolist()}")
    order = np.argsort(-score, kind="stable")
    score, tp = score[order], tp[order]
    if num_truths == 0:
        undefined = np.full(len(score), np.nan)
        return LRPErrors(undefined, undefined, undefined, undefined, score)
    true = np.cumsum(tp)
    false = np.arange(1, len(tp) + 1) - true
    error = np.cumsum(np.where(tp, 1 - iou[order], 0.0))
    return LRPErrors(
        lrp=(error / (1 - tau) + false + num_truths - true) / (false + num_truths),
        localisation=np.divide(error, true, out=np.full(len(tp), np.nan), where=true > 0),
        false_positive=false / (true + false),
        false_negative=(num_truths - true) / num_truths,
        threshold=score,
    )


def optimal_lrp(
    scores: ArrayLike, is_tp: ArrayLike, ious: ArrayLike, num_truths: int, *, tau: float = TAU
) -> LRPErrors:
    """Optimal LRP of a class: the least of :func:`lrp_curve`. Same arguments, same errors.

    Of several scores with the least LRP, equal up to rounding (1e-9), the highest is its threshold.

    Returns:
        0-d arrays. Without a true positive LRP and the false negative component are 1 and the rest is NaN; without
        ground truths all is NaN.
    """
    curve = lrp_curve(scores, is_tp, ious, num_truths, tau=tau)
    if num_truths == 0 or not np.any(np.asarray(is_tp)):
        return _nothing_found(num_truths, math.nan)
    return _point(curve, int(np.argmax(curve.lrp <= curve.lrp.min() + ROUNDING)))


def lrp_at(
    scores: ArrayLike,
    is_tp: ArrayLike,
    ious: ArrayLike,
    num_truths: int,
    score_threshold: float | NDArray[np.float64],
    *,
    tau: float = TAU,
) -> LRPErrors:
    """LRP of a class when detections of a score of at least ``score_threshold`` are kept; else as :func:`lrp_curve`.

    ``score_threshold`` may be 0-d, as :func:`optimal_lrp` gives it.

    Returns:
        0-d arrays; ``threshold`` is ``score_threshold``. If nothing is kept, as with a threshold of NaN, LRP and the
        false negative component are 1, the others NaN. Without ground truths all is NaN but the threshold.
    """
    curve = lrp_curve(scores, is_tp, ious, num_truths, tau=tau)
    if isinstance(score_threshold, np.ndarray) and score_threshold.ndim == 0:
        score_threshold = score_threshold.item()
    if isinstance(score_threshold, bool) or not isinstance(score_threshold, Real):
        raise TypeError(f"score_threshold must be a real number, got {type(score_threshold).__name__}")
    least = float(score_threshold)
    kept = int(np.count_nonzero(curve.threshold >= least))
    if num_truths == 0 or kept == 0:
        return _nothing_found(num_truths, least)
    return _point(curve, kept - 1)._replace(threshold=np.array(least, np.float64))


def _point(curve: LRPErrors, index: int) -> LRPErrors:
    return LRPErrors(*(np.array(values[index]) for values in curve))


def _nothing_found(num_truths: int, threshold: float) -> LRPErrors:
    missed = 1.0 if num_truths else math.nan
    return LRPErrors(*(np.array(value, np.float64) for value in (missed, math.nan, math.nan, missed, threshold)))
