"""COCO average precision and oLRP of a detector on one part of a data set."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor, nn
from torchvision.ops import box_convert

from alrp_triton.metrics import coco_olrp

from .data import CocoDetection, make_loader, rank_and_processes

Detections = dict[str, Any]
"""Of one image: ``image_id``, ``boxes`` (K, 4), ``labels`` (K,) from 0, ``scores`` (K,), best first."""

_AVERAGE_PRECISION = {"AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75"}


@torch.inference_mode()
def detect(
    model: nn.Module, data: CocoDetection, first_label: int, device: torch.device, batch: int, workers: int
) -> list[Detections]:
    """Runs the model in evaluation mode, and puts it back in its former mode; of several processes each has a share.

    Returns:
        The detections of all images, in the order of the data set; on the first process, the others get none.
    """
    rank, processes = rank_and_processes()
    was_training = model.training
    model.eval()
    own: list[Detections] = []
    share = list(range(rank, len(data), processes))
    batches = [share[first : first + batch] for first in range(0, len(share), batch)]
    for images, _, image_ids in make_loader(data, batches, workers):
        found: list[dict[str, Tensor]] = model([image.to(device) for image in images])
        for image_id, one in zip(image_ids, found, strict=True):
            labels = one["labels"].cpu() - first_label
            own.append(
                {"image_id": image_id, "boxes": one["boxes"].cpu(), "scores": one["scores"].cpu(), "labels": labels}
            )
    model.train(was_training)
    if processes == 1:
        return own
    gathered: list[list[Detections]] | None = [[] for _ in range(processes)] if rank == 0 else None
    dist.gather_object(own, gathered)
    return sorted((one for part in gathered or [] for one in part), key=lambda one: one["image_id"])


def as_results(detections: Sequence[Detections], data: CocoDetection) -> list[dict[str, Any]]:
    """Detections in COCO's format of results, for a file or an evaluation."""
    return [
        {"image_id": one["image_id"], "category_id": data.category_ids[label], "bbox": box, "score": score}
        for one in detections
        for box, label, score in zip(
            box_convert(one["boxes"], "xyxy", "xywh").tolist(),
            one["labels"].tolist(),
            one["scores"].tolist(),
            strict=True,
        )
    ]


def evaluate(results: Sequence[dict[str, Any]], data: CocoDetection) -> dict[str, float]:
    """COCO's AP (mean over IoU .50 to .95), AP50 and AP75, oLRP and its components: each in 0..1, or NaN."""
    with redirect_stdout(StringIO()):  # the package reports how it builds its index
        truth = COCO(data.truth)
        evaluation = COCOeval_faster(truth, truth.loadRes(list(results)), iouType="bbox") if results else None
        if evaluation is not None:
            evaluation.run()
    if evaluation is None:  # nothing was found: nothing is true, if there was something to find
        nan = float("nan")
        none, all_of_it = (0.0, 1.0) if any(not one["iscrowd"] for one in data.annotations) else (nan, nan)
        missed = {"oLRP": all_of_it, "oLRP_loc": nan, "oLRP_FP": nan, "oLRP_FN": all_of_it}
        return dict.fromkeys(_AVERAGE_PRECISION, none) | missed
    stats = {name: float(evaluation.stats_as_dict[key]) for name, key in _AVERAGE_PRECISION.items()}
    precision = {name: value if value >= 0 else float("nan") for name, value in stats.items()}  # -1: nothing to find
    olrp = coco_olrp(evaluation)
    components = {"": olrp.lrp, "_loc": olrp.localisation, "_FP": olrp.false_positive, "_FN": olrp.false_negative}
    return precision | {f"oLRP{name}": float(value) for name, value in components.items()}
