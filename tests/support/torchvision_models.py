"""torchvision's detectors made small, a batch for them, and what they hand to their losses."""

# pyright: reportPrivateUsage=false
from collections.abc import Callable
from typing import Any, get_args
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision.ops", reason="torchvision is an extra", exc_type=ImportError)

from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from alrp_triton.integrations.head_loss import DetectorLoss, HeadLoss, Loss
from alrp_triton.integrations.torchvision import (
    use_ranking_loss,
)
from tests.support import boxes_by_hand
from tests.support.boxes_by_hand import Head, Positive
from tests.support.compare import assert_near

CLASSES, SIZE = 5, 64
LOSSES = get_args(Loss)
Corners = tuple[list[float], list[float], list[float], list[float]]
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class Backbone(nn.Module):
    """Two levels of stride 4 and 8."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse, self.out_channels = nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, 32, 2, 2), 32

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.fine(images).relu()
        return {"0": fine, "1": self.coarse(fine).relu()}


def anchors(*sizes: int, ratios: tuple[float, ...] = (0.5, 1.0, 2.0)) -> AnchorGenerator:
    return AnchorGenerator(tuple((size,) for size in sizes), (ratios,) * len(sizes))


def retinanet() -> RetinaNet:
    return RetinaNet(Backbone(), CLASSES, min_size=SIZE, max_size=SIZE, anchor_generator=anchors(16, 32))


def fcos() -> FCOS:
    return FCOS(Backbone(), CLASSES, min_size=SIZE, max_size=SIZE, anchor_generator=anchors(4, 8, ratios=(1.0,)))


RCNN: dict[str, Any] = {
    "min_size": SIZE, "max_size": SIZE, "rpn_post_nms_top_n_train": 60, "rpn_fg_iou_thresh": 0.6,
    "box_fg_iou_thresh": 0.3, "box_bg_iou_thresh": 0.3,
    "box_roi_pool": MultiScaleRoIAlign(["0", "1"], 3, 2),
}  # fmt: skip


def box_head(classes: int) -> dict[str, Any]:
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    return {"box_head": TwoMLPHead(32 * 9, 16), "box_predictor": FastRCNNPredictor(16, classes)}


def faster_rcnn() -> FasterRCNN:
    return FasterRCNN(Backbone(), rpn_anchor_generator=anchors(16, 32), **RCNN, **box_head(CLASSES + 1))


def mask_rcnn() -> MaskRCNN:
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    masks: dict[str, Any] = {
        "mask_roi_pool": MultiScaleRoIAlign(["0", "1"], 4, 2),
        "mask_head": MaskRCNNHeads(32, (8,), 1),
        "mask_predictor": MaskRCNNPredictor(8, 8, CLASSES + 1),
    }
    return MaskRCNN(Backbone(), rpn_anchor_generator=anchors(16, 32), **RCNN, **box_head(CLASSES + 1), **masks)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "retinanet": retinanet, "fcos": fcos, "faster_rcnn": faster_rcnn, "mask_rcnn": mask_rcnn,
}  # fmt: skip


def batch(seed: int = 0) -> Batch:
    """Three images, one of them without objects. Labels fit heads with and without a background."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, SIZE, SIZE, generator=generator) for _ in range(3)]
    targets: list[dict[str, Tensor]] = []
    for count in (4, 0, 3):
        corner = torch.rand(count, 2, generator=generator) * 30
        boxes = torch.cat([corner, corner + 8 + 24 * torch.rand(count, 2, generator=generator)], 1)
        masks = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
        targets.append(
            {"boxes": boxes, "labels": torch.randint(1, CLASSES, (count,), generator=generator), "masks": masks}
        )
    return images, targets


def make(name: str, loss: Loss = "alrp", **settings: Any) -> tuple[Any, DetectorLoss]:
    torch.manual_seed(0)
    model = MODELS[name]()
    settings.setdefault("period", 10)
    return model, use_ranking_loss(model, loss, **settings)


def spread(model: nn.Module) -> None:
    """Weights far from their first values, so that scores and boxes differ much."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("cls_logits", "bbox_reg.", "cls_score", "bbox_pred")):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise * (0.3 if "weight" in name and parameter.ndim == 2 else 0.05)


def seen_by(model: Any, part: Any, method: str, data: Batch) -> tuple[dict[str, Tensor], Any]:
    """The losses of a step, and what that method was called with."""
    with mock.patch.object(part, method, wraps=getattr(part, method)) as spy:
        losses = model(*data)
    return losses, spy.call_args.args


def keep_boxes(into: list[Any], part: nn.Module, arguments: Any) -> None:
    into.append(arguments[2].predicted)


def steps(part: HeadLoss) -> int:
    assert part.balance is not None
    return int(part.balance.steps)


def keep_output(module: nn.Module, into: list[Any]) -> None:
    def keep(module: nn.Module, inputs: Any, outputs: Any) -> None:
        into.append(outputs)

    module.register_forward_hook(keep)


def dense_head(
    outputs: dict[str, Tensor], anchors: list[Tensor], matched: list[Tensor], data: Batch, code: Any
) -> Head:
    """Of RetinaNet and FCOS, anchor by anchor; ``code`` gives predicted and true box and deltas."""
    marks = np.zeros(tuple(outputs["cls_logits"].shape), np.int64)
    positives: list[Positive] = []
    for image, target in enumerate(data[1]):
        for anchor, match in enumerate(matched[image].tolist()):
            if match == -2:
                marks[image, anchor] = -1
            elif match >= 0:
                marks[image, anchor, int(target["labels"][match])] = 1
                deltas = outputs["bbox_regression"][image, anchor].tolist()
                score = outputs["cls_logits"][image, anchor].max().sigmoid().item()
                corners: Corners = code(deltas, anchors[image][anchor].tolist(), target["boxes"][match].tolist())
                positives.append(Positive(*corners, score))
    assert len(positives) > 10
    return Head(outputs["cls_logits"].detach().double().numpy().ravel(), marks.ravel(), positives)


def assert_losses(
    found: tuple[Tensor, Tensor], expected: boxes_by_hand.Losses, part: HeadLoss, weight: float = 1
) -> None:
    assert_near(found[0], weight * expected.classification, 2e-6)
    assert_near(found[1], weight * expected.box, 2e-5)
    assert_near(part.box_weight, expected.box / expected.unweighted, 2e-5)


STD = (10, 10, 5, 5)  # published
