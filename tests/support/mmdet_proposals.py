# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportIncompatibleMethodOverride=false
"""Proposals for box heads of MMDetection, and the losses of such a head by hand."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

import tests.support.mmdet_operators  # noqa: F401  # pyright: ignore[reportUnusedImport]
from tests.support.boxes_by_hand import decode, differentiable, encode, iou_and_giou
from tests.support.compare import assert_gradient, assert_near

# mmdet asks for operators at import.
# isort: split
from mmdet.registry import TASK_UTILS
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torchvision.ops import generalized_box_iou_loss

import alrp_triton.integrations.mmdet  # noqa: F401  # pyright: ignore[reportUnusedImport]

CLASSES, WIDTH, SIDE = 3, 8, 3
STANDARD = [0.1, 0.1, 0.2, 0.2]
LOSSES: list[dict[str, Any]] = [{"loss": "alrp", "period": 10}, {"loss": "ap"}, {"loss": "rank_sort"}]
BOXES = [[[4.0, 6.0, 44.0, 40.0], [8.0, 2.0, 76.0, 62.0]], [], [[5.0, 5.0, 30.0, 50.0]]]
LABELS = [[2, 0], [], [1]]
IGNORED = [[[50.0, 0.0, 78.0, 24.0]], [], []]
ALL = {"type": "RandomSampler", "num": 1e10, "pos_fraction": 0.25}


def box_head(type_of_head: Any = "RankingShared2FCBBoxHead", **settings: Any) -> Any:
    config: dict[str, Any] = {"type": type_of_head, "in_channels": WIDTH, "roi_feat_size": SIDE, "fc_out_channels": 16}
    config |= {"num_classes": CLASSES, "reg_class_agnostic": False, "ranking_loss": {"loss": "rank_sort"}}
    config["bbox_coder"] = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": STANDARD}
    return {**config, **settings}


def train_cfg(loss: str, threshold: float = 0.5) -> Any:
    """As published: all proposals, and the ground truths among them for Rank & Sort Loss alone."""
    assigner: dict[str, Any] = {"type": "MaxIoUAssigner", "pos_iou_thr": threshold, "neg_iou_thr": threshold}
    assigner |= {"min_pos_iou": threshold, "match_low_quality": False, "ignore_iof_thr": 0.5}
    sampler = dict(ALL) if loss == "rank_sort" else {"type": "PseudoSampler"}
    return ConfigDict(assigner=assigner, sampler=sampler, pos_weight=-1, debug=False, mask_size=6)


def truth(boxes: Any = BOXES) -> list[Any]:
    return [
        InstanceData(
            bboxes=torch.tensor(of_image).reshape(-1, 4),
            labels=torch.tensor(labels[: len(of_image)], dtype=torch.int64),
        )
        for of_image, labels in zip(boxes, LABELS, strict=True)
    ]


def proposals() -> list[Tensor]:
    """Of each image: some close to its objects, one in the region to be ignored, and others."""
    generator = torch.Generator().manual_seed(3)
    found: list[Tensor] = []
    for of_image, ignored in zip(BOXES, IGNORED, strict=True):
        near = torch.tensor(of_image).reshape(-1, 4).repeat(8, 1)
        near = near + 8 * torch.randn(near.shape, generator=generator)
        corners = torch.rand(15, 2, generator=generator) * 50
        others = torch.cat([corners, corners + 5 + 20 * torch.rand(15, 2, generator=generator)], 1)
        found.append(torch.cat([near, torch.tensor(ignored).reshape(-1, 4) + 2, others]))
    return found


def samples(config: Any, objects: list[Any], regions: Any = IGNORED) -> list[Any]:
    assigner, sampler = TASK_UTILS.build(config.assigner), TASK_UTILS.build(config.sampler)
    found: list[Any] = []
    for priors, of_image, ignored in zip(proposals(), objects, regions, strict=True):
        given = InstanceData(priors=priors)
        ignored = InstanceData(bboxes=torch.tensor(ignored).reshape(-1, 4))
        found.append(sampler.sample(assigner.assign(given, of_image, ignored), given, of_image, feats=[]))
    return found


def outputs(count: int, agnostic: bool, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    deltas = 0.8 * torch.randn(count, 4 if agnostic else 4 * CLASSES)
    return torch.randn(count, classes).requires_grad_(), deltas.requires_grad_()


def owner(roi: list[float], boxes: list[list[float]]) -> int | None:
    overlaps = [iou_and_giou(roi, box)[0] for box in boxes]
    return int(np.argmax(overlaps)) if overlaps and max(overlaps) >= 0.5 else None


def inside(box: list[float], regions: list[list[float]]) -> bool:
    """More than half of it is in one of the regions."""
    return any(
        max(min(box[2], of[2]) - max(box[0], of[0]), 0) * max(min(box[3], of[3]) - max(box[1], of[1]), 0)
        > (box[2] - box[0]) * (box[3] - box[1]) / 2
        for of in regions
    )


def by_hand(loss: str, scores: Tensor, deltas: Tensor, rois: Tensor) -> tuple[float, Any, Tensor]:
    """Every proposal by itself, in float64; its object is found here again."""
    marks, giou, off, ious, best = (list[Any]() for _ in range(5))
    logits = scores[:, :CLASSES].double()
    for number, roi in enumerate(rois.tolist()):
        image, corners = int(roi[0]), roi[1:]
        marks.append([0] * CLASSES)
        which = owner(corners, BOXES[image])
        if which is None:
            continue
        label, true = LABELS[image][which], BOXES[image][which]
        marks[-1][label] = 1
        own = deltas[number, :4] if deltas.shape[1] == 4 else deltas[number, 4 * label : 4 * label + 4]
        own = own.double() * torch.tensor(STANDARD, dtype=torch.float64)
        at = torch.tensor(corners, dtype=torch.float64)
        middle = (at[:2] + at[2:]) / 2 + own[:2] * (at[2:] - at[:2])
        half = (at[2:] - at[:2]) * own[2:].exp() / 2
        box = torch.cat([middle - half, middle + half])
        assert_near(box, decode(own.tolist(), corners, [1.0] * 4), 1e-12)
        giou.append(generalized_box_iou_loss(box, torch.tensor(true, dtype=torch.float64), eps=0))
        ious.append(iou_and_giou(box.tolist(), true)[0])
        off.append((own - torch.tensor(encode(true, corners, [1.0] * 4))) / torch.tensor(STANDARD))
        best.append(logits[number].detach().max().sigmoid())
    assert len(marks) > 50
    assert len(best) >= 3
    return differentiable(loss, logits, marks, torch.stack(giou), torch.stack(off), ious, torch.stack(best))


def assert_by_hand(loss: str, losses: dict[str, Tensor], scores: Tensor, deltas: Tensor, rois: Tensor) -> None:
    assert list(losses) == ["loss_cls", "loss_bbox"]
    ours = torch.autograd.grad(losses["loss_cls"] + losses["loss_bbox"], [scores, deltas], retain_graph=True)
    classification, grad, box = by_hand(loss, scores, deltas, rois)
    assert_near(losses["loss_cls"], classification, 1e-6)
    assert_near(losses["loss_bbox"], box, 1e-6)
    total = (scores[:, :CLASSES].flatten() * torch.from_numpy(grad)).sum() + box
    expected = torch.autograd.grad(total, [scores, deltas], retain_graph=True)
    assert_gradient(ours[0], expected[0], 1e-5)
    assert_near(ours[1], expected[1], 1e-5)
