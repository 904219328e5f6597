# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportIncompatibleMethodOverride=false
"""Whole two-stage detectors in MMDetection: their parts are mmdet's own, pooling and suppression are torchvision's."""

import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.boxes_by_hand import iou_and_giou
from tests.support.compare import assert_near
from tests.support.mmdet_proposals import (
    BOXES,
    CLASSES,
    IGNORED,
    LABELS,
    LOSSES,
    SIDE,
    STANDARD,
    WIDTH,
    assert_by_hand,
    box_head,
    train_cfg,
    truth,
)
from tests.support.processes import ROOT

# mmdet asks for operators at import.
# isort: split
import mmdet
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData

pytestmark = pytest.mark.usefixtures("one_thread")


def detector(kind: str, loss: dict[str, Any], threshold: float = 0.001, roi_head: str = "StandardRoIHead") -> Any:
    torch.manual_seed(0)
    coder = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": STANDARD}
    anchors = {"type": "AnchorGenerator", "scales": [4], "ratios": [0.5, 1.0, 2.0], "strides": [4, 8, 16, 32, 64]}
    assigner: dict[str, Any] = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.7, "neg_iou_thr": 0.3}
    proposed = {"nms_pre": 100, "max_per_img": 60, "nms": {"type": "nms", "iou_threshold": 0.7}, "min_bbox_size": 0}
    config: dict[str, Any] = {
        "type": kind,
        "data_preprocessor": {"type": "mmdet.DetDataPreprocessor"},
        "backbone": {"type": "ResNet", "depth": 18, "base_channels": 4, "norm_cfg": {"type": "GN", "num_groups": 2}},
        "neck": {"type": "FPN", "in_channels": [4, 8, 16, 32], "out_channels": WIDTH, "num_outs": 5},
        "rpn_head": {
            "type": "RankingRPNHead",
            "in_channels": WIDTH,
            "feat_channels": WIDTH,
            "anchor_generator": anchors,
            "bbox_coder": coder,
            "ranking_loss": loss,
        },
        "train_cfg": {
            "rpn": {
                "assigner": {**assigner, "min_pos_iou": 0.3, "ignore_iof_thr": -1},
                "sampler": {"type": "PseudoSampler"},
                "allowed_border": -1,
                "pos_weight": -1,
            },
            "rpn_proposal": proposed,
        },
        # No box is suppressed, so that scores can be told.
        "test_cfg": {
            "rpn": proposed,
            "rcnn": {
                "score_thr": threshold,
                "nms": {"type": "nms", "iou_threshold": 1.0},
                "max_per_img": 1000,
                "mask_thr_binary": 0.5,
            },
        },
    }
    extractor: dict[str, Any] = {"type": "SingleRoIExtractor", "out_channels": WIDTH, "featmap_strides": [4, 8, 16, 32]}
    extractor["roi_layer"] = {"type": "RoIAlign", "output_size": SIDE, "sampling_ratio": 0}
    heads: dict[str, Any] = {"type": roi_head, "bbox_roi_extractor": extractor}
    head = box_head(reg_class_agnostic=kind == "CascadeRCNN", ranking_loss=loss)
    head["loss_cls"] = {"type": "CrossEntropyLoss", "use_sigmoid": False}  # as in the config that this is put upon
    if kind == "CascadeRCNN":
        heads |= {"type": "CascadeRoIHead", "num_stages": 3, "stage_loss_weights": [1, 0.5, 0.25]}
        heads["bbox_head"] = [head] * 3
        config["train_cfg"]["rcnn"] = [train_cfg(loss["loss"], 0.5 + 0.1 * stage) for stage in range(3)]
    else:
        heads["bbox_head"] = head
        config["train_cfg"]["rcnn"] = train_cfg(loss["loss"])
    if kind == "MaskRCNN":
        heads["mask_roi_extractor"] = extractor
        heads["mask_head"] = {"type": "FCNMaskHead", "num_convs": 1, "in_channels": WIDTH, "num_classes": CLASSES}
        heads["mask_head"]["conv_out_channels"] = WIDTH
    model = MODELS.build(ConfigDict(**config, roi_head=heads))
    model.init_weights()
    return model.train()


def data() -> tuple[Tensor, list[Any]]:
    images = torch.randn(3, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    meta = {"img_shape": (64, 80), "pad_shape": (64, 80), "ori_shape": (64, 80), "scale_factor": (1.0, 1.0)}
    found: list[Any] = []
    for objects, ignored in zip(truth(), IGNORED, strict=True):
        objects.masks = BitmapMasks(np.ones((len(objects), 64, 80), np.uint8), 64, 80)
        found.append(DetDataSample(metainfo={**meta, "batch_input_shape": (64, 80)}, gt_instances=objects))
        found[-1].ignored_instances = InstanceData(bboxes=torch.tensor(ignored).reshape(-1, 4))
    return images, found


class Seen:
    """What a box head is given in training and what comes out, in the place of its method."""

    def __init__(self, head: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.method = head.loss_and_target
        self.patch = mock.patch.object(head, "loss_and_target", self)

    def __call__(self, cls_score: Tensor, bbox_pred: Tensor, rois: Tensor, **rest: Any) -> Any:
        out = self.method(cls_score, bbox_pred, rois, **rest)
        self.calls.append((out["loss_bbox"], cls_score, bbox_pred, rois))
        return out


@pytest.mark.parametrize("settings", LOSSES, ids=lambda settings: settings["loss"])
@pytest.mark.parametrize("kind", ["FasterRCNN", "MaskRCNN", "CascadeRCNN"])
def test_whole_detector(kind: str, settings: dict[str, Any]) -> None:
    model = detector(kind, settings)
    images, objects = data()
    heads = list(model.roi_head.bbox_head) if kind == "CascadeRCNN" else [model.roi_head.bbox_head]
    seen = [Seen(head) for head in heads]
    for each in seen:
        each.patch.start()
    try:
        losses = model.loss(images, objects)
    finally:
        for each in seen:
            each.patch.stop()
    names = {"loss_rpn_cls", "loss_rpn_bbox"} | ({"loss_mask"} if kind == "MaskRCNN" else set())
    for stage, (each, weight) in enumerate(zip(seen, [1, 0.5, 0.25], strict=False)):
        for name, value in each.calls[0][0].items():
            key = f"s{stage}.{name}" if kind == "CascadeRCNN" else name
            names.add(key)
            assert_near(losses[key], weight * value, 1e-7)
    assert set(losses) == names
    if settings["loss"] == "rank_sort":  # with the ground truths, so that there are positives
        assert_by_hand("rank_sort", *seen[0].calls[0])
    torch.stack([value.sum() for value in losses.values()]).sum().backward()  # mmdet's own of masks is no scalar
    trained = {key for key, value in model.named_parameters() if value.grad is not None}
    assert trained == {key for key, value in model.named_parameters() if value.requires_grad}
    assert len({id(head.ranking_loss) for head in [*heads, model.rpn_head]}) == len(heads) + 1
    state = {key for key in model.state_dict() if "ranking_loss.balance.weight" in key}
    assert len(state) == (len(heads) + 1 if settings["loss"] == "alrp" else 0)


@pytest.mark.parametrize("kind", ["FasterRCNN", "CascadeRCNN"])
def test_detections_are_scored_by_sigmoids(kind: str) -> None:
    """Of each class; of a cascade by the mean of the logits of its stages, as mmdet takes it."""
    model = detector(kind, {"loss": "rank_sort"}).eval()
    heads = list(model.roi_head.bbox_head) if kind == "CascadeRCNN" else [model.roi_head.bbox_head]
    logits: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        logits.append(output)

    for head in heads:
        torch.nn.init.normal_(head.fc_cls.weight, std=1.0)
        head.fc_cls.register_forward_hook(keep)
    images, objects = data()
    with torch.no_grad():
        found = model.predict(images[:1], objects[:1])[0].pred_instances
    expected = torch.stack(logits).mean(0).sigmoid().flatten()
    assert len(expected) > 100
    assert_near(found.scores.sort().values, expected[expected > 0.001].sort().values, 1e-6)
    assert set(found.labels.tolist()) == set(range(CLASSES))


def test_it_learns() -> None:
    """Three pictures by heart: what is found first of each class is what is there."""
    model = detector("FasterRCNN", {"loss": "rank_sort"})
    model.test_cfg.rcnn.nms.iou_threshold = 0.5
    images, objects = data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    totals: list[float] = []
    for _ in range(40):
        optimizer.zero_grad()
        total = torch.stack(list(model.loss(images, objects).values())).sum()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.3 * totals[0]
    with torch.no_grad():
        found = model.eval().predict(images, objects)
    for sample, boxes, labels in zip(found, BOXES, LABELS, strict=True):
        detected = sample.pred_instances
        for box, label in zip(boxes, labels, strict=True):
            first = detected.bboxes[detected.labels == label][0]
            assert iou_and_giou(first.tolist(), box)[0] > 0.6


def test_the_config_of_the_docs() -> None:
    """Put upon mmdet's own config of Faster R-CNN, as a user's config is."""
    base = Path(str(mmdet.__file__)).parent / ".mim/configs/_base_/models/faster-rcnn_r50_fpn.py"
    if not base.exists():
        pytest.skip("this build of mmdet has no configs")
    page = (ROOT / "docs/integrations.md").read_text()
    (code,) = (block for block in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "RankingRPNHead" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    config = Config.fromfile(base)
    config.merge_from_dict({"model": names["model"]})
    config.model.data_preprocessor.type = "mmdet.DetDataPreprocessor"
    config.model.roi_head.bbox_head.num_classes = CLASSES
    model = MODELS.build(config.model).train()
    losses = model.loss(*data())
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"}
    assert model.rpn_head.ranking_loss.tau == 0.7
    assert model.test_cfg.rcnn.score_thr == 0.4
    assert losses["loss_bbox"] > 0
