"""LRP and oLRP of a finished COCO evaluation. The evaluation has matched; nothing is matched here."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..boxes import TAU
from ..checks import check_integer, check_number
from .lrp import FloatArray, LRPErrors, lrp_at, optimal_lrp

_MAX_ID = 2**53
_NUMBERS = (int, float, np.integer, np.floating)


class COCOEvaluation(Protocol):
    """pycocotools' ``COCOeval`` or faster-coco-eval's ``COCOeval_faster``, whatever their ``iouType``."""

    params: Any
    cocoGt: Any  # noqa: N815
    cocoDt: Any  # noqa: N815

    def evaluate(self) -> None: ...


@dataclass(frozen=True, eq=False)  # arrays have no truth value
class LRPResult:
    """Means over classes, and the classes themselves. Lower is better; NaN where undefined.

    A mean is that of the classes where the quantity is defined. Classes without ground truths have NaN everywhere;
    classes without a true positive have LRP and false negative component 1 and no others.
    """

    lrp: float
    """Mean LRP, or mean oLRP, in 0..1."""
    localisation: float
    """Mean of 1 - IoU over true positives, mean of classes."""
    false_positive: float
    """1 - precision, mean of classes."""
    false_negative: float
    """1 - recall, mean of classes."""
    classes: NDArray[np.int64]
    """Category ids (C,), ascending; -1 if the evaluation does not use categories."""
    per_class: LRPErrors
    """The same by class, arrays (C,), and ``per_class.threshold``, the scores from which on detections are kept."""
    by_size: "dict[str, LRPResult]" = field(default_factory=dict["str", "LRPResult"])
    """For each area range of the evaluation, by its label: ``all`` is this result, ``small``, ``medium``, ``large``."""


def coco_olrp(evaluation: COCOEvaluation, *, tau: float = TAU, max_dets: int | None = None) -> LRPResult:
    """Optimal LRP: LRP of each class at the score where it is least, averaged over classes.

    Args:
        evaluation: after ``evaluate()``; ``accumulate()`` is not needed. A ``COCOeval_faster`` that was not made with
            ``separate_eval=True`` keeps no matches: a copy of it is evaluated once more, at ``tau`` alone.
        tau: IoU from which on a detection is true; one of ``params.iouThrs``, less than 1.
        max_dets: detections counted for an image and class, the best first; all that were evaluated if None.

    Returns:
        For all objects, and in ``by_size`` for each area range. The ``threshold`` of a class is its best score
        threshold, NaN if there is none.

    Raises:
        TypeError: ``evaluation`` is none, ``tau`` or ``max_dets`` no number.
        ValueError: not evaluated yet, ``tau`` not among its thresholds or out of [0, 1), ``max_dets`` more than was
            evaluated, no area range that is labelled ``all``, parts of the evaluation that are missing or of other
            images, as where batches were merged; ids that it cannot carry: of annotations 1 to 2**53, of images from 0
            on, and each once.

    Reference: Oksuz et al., ECCV 2018, arXiv:1807.01696; TPAMI 2021, arXiv:2011.10772.
    """
    return _evaluate(evaluation, tau, max_dets, lambda _: optimal_lrp)


def coco_lrp(
    evaluation: COCOEvaluation, score_threshold: ArrayLike, *, tau: float = TAU, max_dets: int | None = None
) -> LRPResult:
    """LRP at given score thresholds: detections with at least that score are kept. Else as :func:`coco_olrp`.

    Args:
        evaluation: as for :func:`coco_olrp`.
        score_threshold: one for all classes, or one a class (C,), in the order of the category ids, such as
            ``coco_olrp(validation).per_class.threshold``; of a class with NaN nothing is kept.
        tau: as for :func:`coco_olrp`.
        max_dets: as for :func:`coco_olrp`.

    Returns:
        As :func:`coco_olrp`. A class of which nothing is kept has LRP and false negative component 1 and no others.

    Raises:
        TypeError, ValueError: as :func:`coco_olrp`, and ValueError for a ``score_threshold`` of another shape, or one
            NaN for all classes.
    """
    thresholds = np.asarray(score_threshold, np.float64)
    if thresholds.ndim == 0 and np.isnan(thresholds):
        raise ValueError(f"score_threshold must be a number or one for each class, got {score_threshold}")

    def error(index: int) -> Callable[..., LRPErrors]:
        value = thresholds if thresholds.ndim == 0 else thresholds[index]
        return partial(lrp_at, score_threshold=float(value))

    return _evaluate(evaluation, tau, max_dets, error, thresholds)


class _Matches(NamedTuple):
    """What the evaluation found in one image, for one class and area range. Lists: most are short or empty."""

    scores: list[float]  # [D], best first
    is_matched: list[bool]  # [D]
    is_ignored: list[bool]  # [D]
    ious: list[float]  # [D], 0 where not matched
    num_truths: int


class Detections(NamedTuple):
    """All of one class and area range that count, best first within an image."""

    scores: FloatArray  # (D,)
    is_tp: NDArray[np.bool_]  # (D,)
    ious: FloatArray  # (D,), 0 where false
    num_truths: int


def _evaluate(
    evaluation: COCOEvaluation,
    tau: float,
    max_dets: int | None,
    error_of: Callable[[int], Callable[..., LRPErrors]],
    thresholds: FloatArray | None = None,
) -> LRPResult:
    """Applies ``error_of(index of the class)`` to the detections of every class, for every area range."""
    classes, labels, tau, detections = read_detections(evaluation, tau, max_dets)
    if thresholds is not None and thresholds.shape not in ((), classes.shape):
        raise ValueError(
            f"score_threshold must be a number or one for each of {len(classes)} classes, got shape {thresholds.shape}"
        )
    errors = {
        label: [error_of(index)(*detections(index, label), tau=tau) for index in range(len(classes))]
        for label in labels
    }
    by_size = {label: _result(classes, points, {}) for label, points in errors.items()}
    return _result(classes, errors["all"], by_size)


def read_detections(
    evaluation: COCOEvaluation, tau: float, max_dets: int | None
) -> tuple[NDArray[np.int64], list[str], float, Callable[[int, str], Detections]]:
    """Classes, area ranges and IoU threshold of an evaluation; and what reads the detections of a class and a range.

    Args and errors: :func:`coco_olrp`. Classes are asked for by their index.
    """
    params = _params(evaluation)
    tau = check_number("tau", tau, 0.0, 1.0, high_open=True)
    close = np.flatnonzero(np.isclose(params.iouThrs, tau, rtol=0, atol=1e-9))
    if close.size == 0:
        raise ValueError(
            f"tau must be among params.iouThrs of the evaluation, {np.asarray(params.iouThrs).tolist()}, got {tau}"
        )
    most = params.maxDets[-1]
    kept = most if max_dets is None else check_integer("max_dets", max_dets, 1, most)
    categories = params.catIds if params.useCats else [-1]
    for one in categories:
        if not isinstance(one, _NUMBERS) or one != int(one) or not -(2**63) <= one < 2**63:
            raise ValueError(f"params.catIds of the evaluation must be whole numbers of 64 bits, got {one!r:.40}")
    classes = np.array(categories, np.int64)
    if len(set(params.areaRngLbl)) != len(params.areaRng):
        raise ValueError(
            f"params.areaRngLbl of the evaluation must label each of {len(params.areaRng)} areaRng, "
            f"got {params.areaRngLbl}"
        )
    if "all" not in params.areaRngLbl:
        raise ValueError(f"params.areaRngLbl of the evaluation must have 'all', got {params.areaRngLbl}")

    read = _from_faster if hasattr(evaluation, "gt_dataset") else _from_pycocotools
    matches, labels, images = read(evaluation, params, int(close[0])), list(params.areaRngLbl), len(params.imgIds)

    def detections(index: int, label: str) -> Detections:
        first = (index * len(labels) + labels.index(label)) * images
        return _of_images(map(matches, range(first, first + images)), kept)

    return classes, labels, float(params.iouThrs[close[0]]), detections


def _params(evaluation: COCOEvaluation) -> Any:
    """The parameters that it was evaluated with; later changes of ``evaluation.params`` change no result."""
    if not (hasattr(evaluation, "_paramsEval") and hasattr(evaluation, "cocoGt")):
        raise TypeError(f"evaluation must be a COCOeval or a COCOeval_faster, got {type(evaluation).__name__}")
    params = getattr(evaluation, "_paramsEval", None)
    if not params:
        raise ValueError("evaluation has no results: call its evaluate() first")
    for name in ("cocoGt", "cocoDt"):
        _check_ids(name, getattr(evaluation, name))
    return params


def _check_ids(name: str, coco: Any) -> None:
    """The packages take an id of 0 for no match, and carry ids in doubles; of what shares an id they see the last."""
    content = getattr(coco, "dataset", {})
    for what, key, index, least in (("an annotation", "annotations", "anns", 1), ("an image", "images", "imgs", 0)):
        known = getattr(coco, index, {})
        if len(content.get(key, known)) > len(known):
            raise ValueError(f"{name} of the evaluation has {what} whose id another has: number {key} from 1")
        for wrong in known:
            if (isinstance(wrong, str) and index == "imgs") or (
                isinstance(wrong, _NUMBERS) and least <= wrong <= _MAX_ID
            ):
                continue
            wanted = f"{least} to 2**53, for the evaluation loses others: number {key} from 1"
            raise ValueError(f"{name} of the evaluation has {what} with id {wrong!r:.40}; ids have to be {wanted}")


def _of_images(images: Iterable[_Matches], max_dets: int) -> Detections:
    """What is ignored counts as neither true nor false."""
    scores: list[float] = []
    matched: list[bool] = []
    ignored: list[bool] = []
    ious: list[float] = []
    num_truths = 0
    for image in images:
        scores += image.scores[:max_dets]
        matched += image.is_matched[:max_dets]
        ignored += image.is_ignored[:max_dets]
        ious += image.ious[:max_dets]
        num_truths += image.num_truths
    counts = ~np.array(ignored, np.bool_)
    score, is_tp, iou = np.array(scores, np.float64), np.array(matched, np.bool_), np.array(ious, np.float64)
    return Detections(score[counts], is_tp[counts], iou[counts], num_truths)


def _result(classes: NDArray[np.int64], points: Sequence[LRPErrors], by_size: dict[str, LRPResult]) -> LRPResult:
    per_class = LRPErrors(*np.array(points, np.float64).reshape(len(points), 5).T)
    defined = [values[~np.isnan(values)] for values in per_class[:4]]
    means = [float(values.mean()) if values.size else float("nan") for values in defined]
    return LRPResult(*means, classes=classes, per_class=per_class, by_size=by_size)


def _check_length(name: str, records: Sequence[Any], params: Any) -> None:
    wanted = (len(params.catIds) if params.useCats else 1) * len(params.areaRng) * len(params.imgIds)
    if len(records) != wanted:
        raise ValueError(
            f"{name} of the evaluation must have an entry for each category, area range and image, {wanted}, "
            f"got {len(records)}: evaluate once as a whole"
        )


def _from_pycocotools(evaluation: Any, params: Any, tau_index: int) -> Callable[[int], _Matches]:
    """By number of the record, which is by class, area range, image. IoUs have columns in the order of the dataset."""
    columns: dict[tuple[int, int], dict[int, int]] = {}
    _check_length("evalImgs", evaluation.evalImgs, params)

    def read(position: int) -> _Matches:
        record, number = evaluation.evalImgs[position], params.imgIds[position % len(params.imgIds)]
        if record is not None and record["image_id"] != number:
            raise ValueError(
                f"evalImgs of the evaluation has image {record['image_id']} where params.imgIds has {number}: order it "
                "by category, area range and image, or evaluate once as a whole"
            )
        if record is None:  # neither ground truth nor detection
            return _Matches([], [], [], [], 0)
        matches = record["dtMatches"][tau_index].tolist()
        ious = [0.0] * len(matches)
        if any(matches):
            key = image, category = record["image_id"], record["category_id"]
            if key not in columns:
                truths = evaluation.cocoGt.imgToAnns[image]
                categories = [category] if params.useCats else params.catIds
                ids = [truth["id"] for c in categories for truth in truths if truth["category_id"] == c]
                columns[key] = {truth: column for column, truth in enumerate(ids)}
            found = evaluation.ious.get(key)
            if np.ndim(found) != 2:
                raise ValueError(
                    f"evaluation has no IoUs of image {image} and category {category}: what was evaluated batch by "
                    "batch has to be merged with its ious, or evaluated once as a whole"
                )
            ious = [float(found[row, columns[key][int(truth)]]) if truth else 0.0 for row, truth in enumerate(matches)]
        return _Matches(
            record["dtScores"],
            [truth != 0 for truth in matches],
            record["dtIgnore"][tau_index].tolist(),
            ious,
            list(record["gtIgnore"]).count(0),
        )

    return read


def _from_faster(evaluation: Any, params: Any, tau_index: int) -> Callable[[int], _Matches]:
    """By number of the record, as above. C++ records open up to pickle, which is how they travel between processes."""
    if not evaluation.separate_eval:
        evaluation, tau_index = _evaluated_separately(evaluation, params, tau_index), 0
    records = evaluation._evalImgs_cpp
    _check_length("_evalImgs_cpp", records, params)

    def read(position: int) -> _Matches:
        all_matches, _, scores, truth_ignores, all_ignores, pairs = records[position].__getstate__()
        start = tau_index * len(scores)  # flat [T, D]
        matches = all_matches[start : start + len(scores)]
        # (detection, ground truth, IoU) of every match, in the order of the matches
        following = iter(pairs[start - all_matches[:start].count(0) :])
        return _Matches(
            scores,
            [truth != 0 for truth in matches],
            all_ignores[start : start + len(scores)],
            [next(following)[2] if truth else 0.0 for truth in matches],
            truth_ignores.count(False),
        )

    return read


def _evaluated_separately(evaluation: Any, params: Any, tau_index: int) -> Any:
    """A copy that keeps its matches. It has datasets of its own, so that the original stays as it is."""
    twin = copy.copy(evaluation)
    twin.params = copy.deepcopy(params)
    twin.params.iouThrs = np.array([params.iouThrs[tau_index]])
    twin.separate_eval = True
    twin.print_function = _silent
    twin.gt_dataset, twin.dt_dataset = type(evaluation.gt_dataset)(), type(evaluation.dt_dataset)()
    twin.evaluate()
    return twin


def _silent(*_: object) -> None:
    """Prints nothing."""
