"""From a score to the share of detections that are right: a ranking loss orders scores and leaves their level free.

Curves rise everywhere, so the order of the detections of a class is kept, and with it AP and LRP, up to rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..boxes import TAU
from ..checks import check_bool, check_integer, check_tensor
from .coco import COCOEvaluation, read_detections
from .lrp import FloatArray

Method = Literal["isotonic", "logistic"]

_RISE = 1e-3  # of an isotonic curve where it would be flat, over all scores that were seen
_SEEN = 0.98  # of that rise; the rest is for scores below and above
_EPS = 1e-12  # the logit of 0 is that of so much


@dataclass(frozen=True)
class Curve:
    """A function of scores that rises everywhere, from 0..1 to 0..1.

    Isotonic: linear between points (x, y), constant beyond, and a little of the position among the scores that were
    seen, so that it rises there, too. Logistic: the sigmoid of ``slope * logit(score) + offset``.
    """

    method: Method
    values: tuple[Sequence[float], Sequence[float]]
    """Isotonic: x and y. Logistic: slope and offset, one number each."""

    def __call__(self, scores: FloatArray) -> FloatArray:
        if self.method == "isotonic":
            x, y = self.values
            edge = (1 - _SEEN) / 2
            position = np.interp(scores, [0.0, x[0], x[-1], 1.0], [0.0, edge, 1 - edge, 1.0])
            return (1 - _RISE) * np.interp(scores, x, y) + _RISE * position
        (slope,), (offset,) = self.values
        return 1 / (1 + np.exp(np.clip(-(slope * _logit(scores) + offset), -700, 700)))


@dataclass(frozen=True)
class Calibration:
    """What :func:`coco_calibration` returns: a curve for each class.

    ``state_dict()`` is made of numbers, strings, lists and dicts, for a checkpoint or JSON.
    """

    of_all: Curve
    """Of all classes together, for those that have none of their own."""
    curves: Mapping[int, Curve]
    """By category id, or label."""

    def __call__(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The share of detections of this score and class that are right, as on the data that the curves are of.

        Args:
            scores: ``(D,)``, floating, in 0..1.
            labels: ``(D,)``, integer.

        Returns:
            ``(D,)``, on the device of the scores and of their dtype, float32 at least. Within a class in the order of
            the scores; some that are neighbours in their dtype may be rounded to one.

        Raises:
            TypeError, ValueError: other shapes or dtypes, scores out of 0..1.
        """
        check_tensor("scores", scores, "floating")
        check_tensor("labels", labels, "integer")
        if scores.ndim != 1 or labels.shape != scores.shape:
            shapes = f"{tuple(scores.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"scores and labels must have one shape (D,), got {shapes}")
        given, classes = scores.detach().double().cpu().numpy(), labels.cpu().numpy()
        wrong = given[~((given >= 0) & (given <= 1))]
        if wrong.size:
            raise ValueError(f"scores must be in 0..1, got {wrong[0]}")
        out = np.empty_like(given)
        for label in np.unique(classes).tolist():
            here = classes == label
            out[here] = self.curves.get(label, self.of_all)(given[here])
        return torch.from_numpy(out).to(scores.device, torch.promote_types(scores.dtype, torch.float32))

    def state_dict(self) -> dict[str, Any]:
        curves = [(None, self.of_all), *self.curves.items()]
        return {"curves": [[label, one.method, *map(list, one.values)] for label, one in curves]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Calibration":
        curves = {label: Curve(method, (first, second)) for label, method, first, second in state["curves"]}
        return cls(curves.pop(None), curves)


def coco_calibration(
    evaluation: COCOEvaluation,
    method: Method = "isotonic",
    *,
    by_class: bool = True,
    least: int = 20,
    tau: float = TAU,
    max_dets: int | None = None,
) -> Calibration:
    """Curves from scores to precision at that score, from the evaluation of a validation set.

    Args:
        evaluation: as for :func:`coco_olrp`.
        method: ``"isotonic"``, any shape, for a few hundred detections a class and more; ``"logistic"``, two numbers,
            for fewer (Platt's scaling, on the logit of the score).
        by_class: a curve for each class; else one for all, which also keeps the order of scores between classes.
        least: a class with fewer right, or fewer wrong detections takes the curve of all classes; with ``"logistic"``
            so does one whose scores do not rise with precision.
        tau: as for :func:`coco_olrp`; a detection is right from this IoU on.
        max_dets: as for :func:`coco_olrp`.

    Raises:
        TypeError, ValueError: as :func:`coco_olrp`, and ValueError for an unknown ``method``, scores out of 0..1, and
            ``"logistic"`` where the scores of all classes together do not rise with precision, or all detections are
            right, or none is.
        ImportError: scikit-learn is not installed.

    Reference: Zadrozny and Elkan, KDD 2002 (isotonic); Platt, 1999 (logistic).
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    check_bool("by_class", by_class)
    least = check_integer("least", least, 1, 2**31)
    classes, _, _, detections = read_detections(evaluation, tau, max_dets)
    found = {int(number): detections(index, "all")[:2] for index, number in enumerate(classes)}
    pooled = (
        np.concatenate([np.zeros(0), *(scores for scores, _ in found.values())]),
        np.concatenate([np.zeros(0, np.bool_), *(is_tp for _, is_tp in found.values())]),
    )
    outside = pooled[0][~((pooled[0] >= 0) & (pooled[0] <= 1))]
    if outside.size:
        raise ValueError(f"scores of the evaluation must be in 0..1, got {outside[0]}")
    enough = (k for k, (_, right) in found.items() if by_class and min(right.sum(), (~right).sum()) >= least)
    of_all = _fitted(method, *pooled)
    if of_all is None:
        raise ValueError("scores of the evaluation must rise with precision, those of all classes together fall")
    fitted = {k: _fitted(method, *found[k]) for k in enough}
    return Calibration(of_all, {k: curve for k, curve in fitted.items() if curve is not None})


def _fitted(method: Method, scores: FloatArray, is_tp: NDArray[np.bool_]) -> Curve | None:
    """None: a logistic curve would fall."""
    try:
        from sklearn.isotonic import IsotonicRegression
        from sklearn.linear_model import LogisticRegression
    except ImportError as missing:
        raise ImportError("calibration needs scikit-learn: pip install scikit-learn") from missing
    if method == "isotonic":
        if not scores.size:
            return Curve(method, ([0.0, 1.0], [0.0, 1.0]))
        fit: Any = IsotonicRegression(y_min=0, y_max=1).fit(scores, is_tp.astype(np.float64))
        return Curve(method, (fit.X_thresholds_.tolist(), fit.y_thresholds_.tolist()))
    if is_tp.all() or not is_tp.any():
        raise ValueError(f"evaluation must have right and wrong detections, got {is_tp.sum()} right of {is_tp.size}")
    fit = LogisticRegression(C=1e6, max_iter=1000).fit(_logit(scores)[:, None], is_tp)
    slope, offset = float(fit.coef_[0, 0]), float(fit.intercept_[0])
    return Curve(method, ([slope], [offset])) if slope > 0 else None


def _logit(scores: FloatArray) -> FloatArray:
    clipped = np.clip(scores, _EPS, 1 - _EPS)
    return np.log(clipped) - np.log1p(-clipped)
