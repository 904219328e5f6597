"""LRP and oLRP of boxes, one detection after the other: COCO's greedy matching and the sums, in plain Python.

Written from the papers and from the description of COCO's matching. Shares nothing with the package or a COCO package.

Reference: Oksuz et al., ECCV 2018, arXiv:1807.01696; TPAMI 2021, arXiv:2011.10772.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Image = Mapping[str, Any]
SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}


class Errors(NamedTuple):
    """LRP of a class, its components, and the score from which on detections are kept."""

    lrp: float
    localisation: float
    false_positive: float
    false_negative: float
    threshold: float


class _Detection(NamedTuple):
    score: float
    iou: float | None  # None: a false positive


def lrp(
    preds: Sequence[Image],
    target: Sequence[Image],
    label: int,
    *,
    size: str = "all",
    tau: float = 0.5,
    max_dets: int = 100,
    score_threshold: float | None = None,
) -> Errors:
    """LRP of a class at a threshold, or the least LRP at any of its detections, the first if there are several.

    Args:
        preds: for each image ``boxes`` (N, 4) as corners, ``scores`` (N,), ``labels`` (N,).
        target: for each image ``boxes``, ``labels``, and optionally ``iscrowd`` and ``area``.
        label: the class.
        size: one of ``SIZES``.
        tau: IoU of a true positive.
        max_dets: detections an image.
        score_threshold: None for the optimum.

    Returns:
        Python floats; NaN where undefined.
    """
    detections: list[_Detection] = []
    count = 0
    for detected, truths in zip(preds, target, strict=True):
        found, missing = _match(detected, truths, label, SIZES[size], tau, max_dets)
        detections += found
        count += missing
    if count == 0:
        threshold = math.nan if score_threshold is None else score_threshold
        return Errors(math.nan, math.nan, math.nan, math.nan, threshold)
    detections.sort(key=lambda detection: -detection.score)  # stable
    points: list[Errors] = []
    error, true, false = 0.0, 0, 0
    for detection in detections:
        if score_threshold is not None and not detection.score >= score_threshold:
            break
        if detection.iou is None:
            false += 1
        else:
            true += 1
            error += 1 - detection.iou
        missed = count - true
        points.append(
            Errors(
                (error / (1 - tau) + false + missed) / (true + false + missed),
                error / true if true else math.nan,
                false / (true + false),
                missed / count,
                detection.score,
            )
        )
    if score_threshold is not None:
        last = points[-1] if points else Errors(1.0, math.nan, math.nan, 1.0, math.nan)
        return last._replace(threshold=score_threshold)
    if true == 0:
        return Errors(1.0, math.nan, math.nan, 1.0, math.nan)
    least = min(point.lrp for point in points)
    return next(point for point in points if point.lrp <= least + 1e-9)  # equal but for rounding


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are defined; NaN if none is."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _match(
    detected: Image, truths: Image, label: int, areas: tuple[float, float], tau: float, max_dets: int
) -> tuple[list[_Detection], int]:
    """The detections of one image that count, and the number of its ground truths that count.

    Best detection first, each takes the free ground truth that it overlaps most, by at least tau; only where there is
    none, one that is ignored: a crowd, which may be taken again, or one of another size. What takes an ignored one is
    ignored, and what takes none and is of another size, too.
    """
    members = [n for n, found in enumerate(truths["labels"]) if found == label]
    boxes = [[float(x) for x in truths["boxes"][n]] for n in members]
    crowd = [bool(truths["iscrowd"][n]) if "iscrowd" in truths else False for n in members]
    area = [float(truths["area"][n]) if "area" in truths else _area(box) for n, box in zip(members, boxes, strict=True)]
    ignored = [c or not areas[0] <= a <= areas[1] for c, a in zip(crowd, area, strict=True)]
    taken = [False] * len(members)

    ranked = sorted(
        (n for n, found in enumerate(detected["labels"]) if found == label), key=lambda n: -float(detected["scores"][n])
    )
    out: list[_Detection] = []
    for n in ranked[:max_dets]:
        box = [float(x) for x in detected["boxes"][n]]
        best = None
        for wanted in (False, True):
            for m, truth in enumerate(boxes):
                if best is not None and ignored[best] != wanted:
                    break
                overlap = _overlap(box, truth, crowd[m])
                free = not taken[m] or crowd[m]
                floor = tau if best is None else _overlap(box, boxes[best], crowd[best])
                if ignored[m] == wanted and free and overlap >= floor:
                    best = m
        score = float(detected["scores"][n])
        if best is not None:
            taken[best] = True
            if not ignored[best]:
                out.append(_Detection(score, _overlap(box, boxes[best], crowd[best])))
        elif areas[0] <= _area(box) <= areas[1]:
            out.append(_Detection(score, None))
    return out, ignored.count(False)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(box: Sequence[float], truth: Sequence[float], crowd: bool) -> float:
    """IoU; of a crowd, the part of the box that lies in it."""
    width = min(box[2], truth[2]) - max(box[0], truth[0])
    height = min(box[3], truth[3]) - max(box[1], truth[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(box) if crowd else _area(box) + _area(truth) - shared)
