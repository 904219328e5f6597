"""COCO's average precision and oLRP of detections, over all categories and by category."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_convert

from ..metrics import Calibration, OptimalLRP, coco_calibration, coco_olrp

_AP = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}
_SIZES = {f"AP_{size}": f"map_{size}" for size in ("small", "medium", "large")}
_OLRP = {"oLRP": "lrp", "oLRP_loc": "localisation", "oLRP_FP": "false_positive", "oLRP_FN": "false_negative"}


class Found(NamedTuple):
    """The detections of an image, best first: ``boxes`` (K, 4) as corners, ``labels`` (K,) from 0, ``scores`` (K,)."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    detections: dict[str, Tensor]
    target: dict[str, Tensor]


class Evaluation(NamedTuple):
    """AP, oLRP and their components in 0..1, NaN where there is nothing to find."""

    overall: dict[str, float]
    by_category: dict[str, dict[str, float]]
    """By name: ``AP``, ``oLRP``, and ``threshold``, the score from which on detections give the least LRP."""
    calibration: Calibration
    """From scores and labels to the share of detections that are right."""


def evaluate(found: Sequence[Found], categories: Mapping[int, str]) -> Evaluation:
    """Evaluates the detections of all images, each once.

    Args:
        found: with targets as :class:`alrp_triton.trainer.Batch` has them.
        categories: names by id, in the order of the labels.
    """
    local: dict[str, Any] = {
        "sync_on_compute": False,
        "box_format": "xywh",
    }  # what other processes found is here already
    # COCO's thresholds in float64: torchmetrics' own are float32's, and a recall of 3 / 5 misses its own of them.
    ious, recalls = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
    thresholds: dict[str, Any] = {"iou_thresholds": ious, "rec_thresholds": recalls}
    precision = MeanAveragePrecision(backend="faster_coco_eval", extended_summary=True, **thresholds, **local)
    precision.warn_on_many_detections = False
    olrp = OptimalLRP(**local)
    for one in found:
        detections = one.detections | {"boxes": box_convert(one.detections["boxes"], "xyxy", "xywh")}
        truth = {"boxes": one.target["truth"], "labels": one.target["truth_labels"]}
        truth |= {"iscrowd": one.target["iscrowd"].long(), "area": one.target["area"]}
        for metric in (precision, olrp):
            metric.update([detections], [truth])
    of_ap, evaluation = precision.compute(), olrp.evaluation()
    of_lrp = coco_olrp(evaluation)
    overall = {name: _value(of_ap[key]) for name, key in (_AP | _SIZES).items()}
    overall |= {name: getattr(of_lrp, component) for name, component in _OLRP.items()}
    curves = of_ap["precision"][:, :, :, 0, -1]  # IoU, recall, class
    aps = {int(label): _value(curves[:, :, k].mean()) for k, label in enumerate(of_ap["classes"].reshape(-1))}
    columns = (of_lrp.classes, of_lrp.per_class.lrp, of_lrp.per_class.threshold)
    lrps = {int(label): (float(lrp), float(threshold)) for label, lrp, threshold in zip(*columns, strict=True)}
    nan = float("nan")
    by_category: dict[str, dict[str, float]] = {}
    for label, name in enumerate(categories.values()):
        lrp, threshold = lrps.get(label, (nan, nan))
        by_category[name] = {"AP": aps.get(label, nan), "oLRP": lrp, "threshold": threshold}
    return Evaluation(overall, by_category, coco_calibration(evaluation))


def _value(ap: Tensor) -> float:
    return float(ap) if ap >= 0 else float("nan")  # -1: nothing to find


def as_results(found: Sequence[Found], image_ids: Sequence[Any], categories: Mapping[int, str]) -> list[dict[str, Any]]:
    """Detections in COCO's format of results, with the ids of the data set."""
    ids = list(categories)
    return [
        {"image_id": image_ids[one.index], "category_id": ids[label], "bbox": box, "score": score}
        for one in found
        for box, label, score in zip(
            box_convert(one.detections["boxes"], "xyxy", "xywh").tolist(),
            *(one.detections[key].tolist() for key in ("labels", "scores")),
            strict=True,
        )
    ]
