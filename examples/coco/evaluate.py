"""COCO average precision of a detector on a list of scenes."""

from collections.abc import Sequence

import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.ops import box_convert

from .scenes import NUM_CLASSES, Scene

_BATCH = 25
_METRICS = {"AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75"}

Detections = dict[str, Tensor]
"""torchvision's detections: `boxes` (K, 4), `labels` (K,) and `scores` (K,), best first."""


@torch.inference_mode()
def detect(model: RetinaNet, scenes: Sequence[Scene]) -> list[Detections]:
    """Runs the model on the scenes in evaluation mode and puts it back in its former mode."""
    was_training = model.training
    model.eval()
    detections: list[Detections] = []
    for start in range(0, len(scenes), _BATCH):
        detections += model([scene.image for scene in scenes[start : start + _BATCH]])
    model.train(was_training)
    return detections


def average_precision(scenes: Sequence[Scene], detections: Sequence[Detections]) -> dict[str, float]:
    """Computes COCO's AP (mean over IoU .50 to .95), AP50 and AP75, each in 0..1."""
    truth = COCO(
        {
            "images": [{"id": index} for index in range(len(scenes))],
            "categories": [{"id": label, "name": str(label)} for label in range(NUM_CLASSES)],
            "annotations": _annotations([scene.target for scene in scenes]),
        }
    )
    evaluation = COCOeval_faster(truth, truth.loadRes(_annotations(detections)), iouType="bbox")
    evaluation.run()
    return {name: float(evaluation.stats_as_dict[key]) for name, key in _METRICS.items()}


def _annotations(images: Sequence[dict[str, Tensor]]) -> list[dict[str, object]]:
    """Lists boxes in COCO's form: one dict a box, corner and size, ids from 1."""
    annotations: list[dict[str, object]] = []
    for image_id, image in enumerate(images):
        boxes = box_convert(image["boxes"], "xyxy", "xywh").tolist()
        scores = image["scores"].tolist() if "scores" in image else [1.0] * len(boxes)
        for box, label, score in zip(boxes, image["labels"].tolist(), scores, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "score": score,
                    "iscrowd": 0,
                }
            )
    return annotations
