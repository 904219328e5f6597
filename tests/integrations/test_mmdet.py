# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportIncompatibleMethodOverride=false
"""Heads at anchors in MMDetection: real heads of mmdet, against the oracle, with anchors taken one by one."""

from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import tests.support.mmdet_operators  # noqa: F401  # pyright: ignore[reportUnusedImport]
from tests.support.boxes_by_hand import differentiable, encode, iou_and_giou
from tests.support.compare import assert_gradient, assert_near

# mmdet asks for operators at import.
# isort: split
from mmdet.models.dense_heads import AnchorHead, GFLHead, PAAHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torchvision.ops import generalized_box_iou_loss

from alrp_triton.integrations.mmdet import RankingATSSHead, RankingHeadMixin, RankingRetinaHead, RankingRPNHead

pytestmark = [
    pytest.mark.filterwarnings("ignore:DeprecationWarning. `num_anchors`:UserWarning"),  # of mmdet's own
    pytest.mark.usefixtures("one_thread"),
]
CLASSES, WIDTH, SIZES = 3, 8, [(8, 10), (4, 5)]
STDS = {"RankingRetinaHead": (1.0, 1.0, 1.0, 1.0)}
STANDARD = (0.1, 0.1, 0.2, 0.2)
NEEDS_SKLEARN = pytest.mark.skipif(find_spec("sklearn") is None, reason="PAA of mmdet needs scikit-learn")
HEADS = ["RankingRetinaHead", "RankingATSSHead", pytest.param("RankingPAAHead", marks=NEEDS_SKLEARN), "RankingRPNHead"]
LOSSES = [{"loss": "alrp", "period": 10}, {"loss": "ap"}, {"loss": "rank_sort"}]


def build(name: str, sigmoid: bool = True, /, sampler: str = "PseudoSampler", **ranking_loss: Any) -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {"type": name, "in_channels": WIDTH, "feat_channels": WIDTH}
    if name != "RankingRPNHead":
        config |= {"num_classes": CLASSES, "stacked_convs": 1}
    config["ranking_loss"] = {"backend": "torch", **ranking_loss}
    config["loss_cls"] = {"type": "CrossEntropyLoss", "use_sigmoid": sigmoid}
    config["bbox_coder"] = {
        "type": "DeltaXYWHBBoxCoder",
        "target_means": (0.0,) * 4,
        "target_stds": STDS.get(name, STANDARD),
    }
    anchors: dict[str, Any] = {"type": "AnchorGenerator", "strides": [8, 16]}
    train: dict[str, Any] = {"allowed_border": -1, "pos_weight": -1, "debug": False}
    if name == "RankingATSSHead":
        anchors |= {"ratios": [1.0], "octave_base_scale": 4, "scales_per_octave": 1}
        train["assigner"] = {"type": "ATSSAssigner", "topk": 9}
        config["norm_cfg"] = {"type": "GN", "num_groups": 2}
        config["loss_bbox"] = {"type": "GIoULoss"}
    elif name == "RankingPAAHead":
        anchors |= {"ratios": [1.0], "octave_base_scale": 4, "scales_per_octave": 3}
        train["assigner"] = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.1, "neg_iou_thr": 0.1, "min_pos_iou": 0}
        train["assigner"]["ignore_iof_thr"] = 0.5
        config["norm_cfg"] = {"type": "GN", "num_groups": 2}
        config["loss_cls"] = {"type": "FocalLoss", "use_sigmoid": sigmoid}
        config["loss_bbox"] = {"type": "GIoULoss", "loss_weight": 1.3}
    else:
        anchors |= {"ratios": [0.5, 1.0, 2.0], "scales": [4, 6]}
        train["assigner"] = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0}
        train["assigner"]["ignore_iof_thr"] = 0.5
        if name == "RankingRPNHead":
            train["sampler"] = {"type": sampler, "num": 64, "pos_fraction": 0.5}
    return MODELS.build(ConfigDict(**config, anchor_generator=anchors, train_cfg=train, test_cfg={})).train()


def batch(classes: int = CLASSES) -> tuple[list[Any], list[dict[str, Any]], list[Any]]:
    """Three images, the second empty, the third padded: anchors in its right part are no anchors."""
    boxes = [
        torch.tensor([[4.0, 6.0, 44.0, 40.0], [8.0, 2.0, 76.0, 62.0]]),
        torch.zeros(0, 4),
        torch.tensor([[5.0, 5.0, 30.0, 50.0]]),
    ]
    labels = [torch.tensor([2, 0]), torch.zeros(0, dtype=torch.int64), torch.tensor([1])]
    metas = [{"img_shape": (64, each), "pad_shape": (64, each)} for each in (80, 80, 56)]
    ignored = [InstanceData(bboxes=torch.tensor([[0.0, 40.0, 30.0, 64.0]]))] + [
        InstanceData(bboxes=torch.zeros(0, 4))
    ] * 2
    return [InstanceData(bboxes=b, labels=c % classes) for b, c in zip(boxes, labels, strict=True)], metas, ignored


def features() -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(3, WIDTH, *size) for size in SIZES)


def outputs(head: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What the head would predict, scaled so that scores and boxes differ; leaves that collect gradients."""
    scores, deltas = head(features())
    torch.manual_seed(2)
    return [torch.randn_like(s).requires_grad_() for s in scores], [
        (0.3 * torch.randn_like(d)).requires_grad_() for d in deltas
    ]


def targets_of(head: Any, scores: list[Tensor], deltas: list[Tensor]) -> list[Tensor]:
    """Labels, their weights and boxes ``(B, N, ...)``, as mmdet's own head has them."""
    truth, metas, ignored = batch(head.num_classes)
    anchors, valid = head.get_anchors(SIZES, metas, device="cpu")
    if not isinstance(head, PAAHead):
        targets = head.get_targets(anchors, valid, truth, metas, batch_gt_instances_ignore=ignored)
        first = 1 if isinstance(head, RankingATSSHead) else 0
        return [torch.cat(levels, 1) for levels in targets[first : first + 3]]
    boxes = head.get_targets(anchors, valid, truth, metas, batch_gt_instances_ignore=ignored)[2]
    reassigned: list[tuple[Tensor, ...]] = []

    def spy(*arguments: Any) -> Any:
        reassigned.append(PAAHead.paa_reassign(head, *arguments))
        return reassigned[-1]

    with mock.patch.object(head, "paa_reassign", spy), torch.no_grad():
        overlaps = [each[:, : head.num_base_priors] for each in scores]
        PAAHead.loss_by_feat(head, scores, deltas, overlaps, truth, metas, ignored)
    labels, weights = (torch.stack([each[which] for each in reassigned]) for which in (0, 1))
    return [labels, weights, torch.stack(boxes)]


def by_hand(head: Any, scores: list[Tensor], deltas: list[Tensor]) -> dict[str, Any]:
    """Every anchor by itself: image, level, row, column, anchor at the place. In float64."""
    truth, metas, _ = batch(head.num_classes)
    at = [[level.double() for level in levels] for levels in head.get_anchors(SIZES, metas, device="cpu")[0]]
    labels, weights, boxes = targets_of(head, scores, deltas)
    per, classes = head.num_base_priors, head.num_classes
    logits: list[Tensor] = []
    found: dict[str, Any] = {"dense": [], "losses": [], "off": [], "iou": []}
    for image in range(3):
        flat = 0
        for level, (rows, columns) in enumerate(SIZES):
            for number in range(rows * columns * per):
                row, column, a = number // per // columns, number // per % columns, number % per
                logits.append(scores[level][image, a * classes : (a + 1) * classes, row, column].double())
                label, dense = int(labels[image, flat]), np.zeros(classes, np.int64)
                if weights[image, flat] == 0:
                    dense[:] = -1
                elif label < classes:
                    dense[label] = 1
                    anchor, target = at[image][level][number], boxes[image, flat]
                    assert any(torch.equal(target, each) for each in truth[image].bboxes)
                    delta = deltas[level][image, a * 4 : (a + 1) * 4, row, column].double()
                    stds = torch.tensor(head.bbox_coder.stds, dtype=torch.float64)
                    box = decoded(anchor, delta * stds)
                    off = delta * stds - torch.tensor(encode(target.tolist(), anchor.tolist(), [1.0] * 4))
                    found["losses"].append(generalized_box_iou_loss(box, target.double(), eps=0))
                    found["off"].append(off / torch.tensor(STANDARD))
                    found["iou"].append(iou_and_giou(box.tolist(), target.tolist())[0])
                found["dense"].append(dense)
                flat += 1
    found["logits"] = torch.stack(logits)
    return found


def decoded(anchor: Tensor, deltas: Tensor) -> Tensor:
    centre, size = (anchor[:2] + anchor[2:]) / 2, anchor[2:] - anchor[:2]
    middle, half = centre + deltas[:2] * size, size * deltas[2:].exp() / 2
    return torch.cat([middle - half, middle + half])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss["loss"])
def test_head_is_the_loss_of_the_whole_batch(name: str, loss: dict[str, Any]) -> None:
    head = build(name, **loss)
    scores, deltas = outputs(head)
    truth, metas, ignored = batch(head.num_classes)
    losses = head.loss_by_feat(scores, deltas, truth, metas, ignored)
    rpn = name == "RankingRPNHead"
    assert list(losses) == (["loss_rpn_cls", "loss_rpn_bbox"] if rpn else ["loss_cls", "loss_bbox"])
    sum(losses.values(), torch.zeros(())).backward()
    ours = [each.grad.clone() for each in (*scores, *deltas) if each.grad is not None]
    assert len(ours) == 4

    hand = by_hand(head, scores, deltas)
    logits, dense = hand["logits"], np.stack(hand["dense"])
    counts = {mark: (dense == mark).sum() for mark in (1, 0, -1)}
    assert counts[1] > 5
    assert counts[0] > 100
    assert counts[-1] > 50
    classification, grad, box = differentiable(
        loss["loss"],
        logits,
        dense,
        torch.stack(hand["losses"]),
        torch.stack(hand["off"]),
        hand["iou"],
        logits.detach()[(dense == 1).any(-1)].amax(-1).sigmoid(),
        tau=0.7 if rpn else 0.5,
    )
    weight = 0.2 if rpn else 1.0
    for loss_of_head, expected in zip(losses.values(), (classification, box), strict=True):
        assert_near(loss_of_head, weight * expected, 1e-6)
    for each in (*scores, *deltas):
        each.grad = None
    (weight * ((logits.flatten() * torch.from_numpy(grad)).sum() + box)).backward()
    expected_gradients = [each.grad for each in (*scores, *deltas)]
    for gradient, by_oracle in zip(ours, expected_gradients, strict=True):
        assert by_oracle is not None
        assert_near(gradient, by_oracle, 1e-5, "gradient")
    assert_gradient(
        torch.cat([g.flatten() for g in ours[:2]]),
        torch.cat([g.flatten() for g in expected_gradients[:2] if g is not None]),
        1e-5,
    )


@pytest.mark.parametrize("name", HEADS)
def test_training_detection_and_checkpoint(name: str) -> None:
    head = build(name, loss="alrp", period=1)
    truth, metas, ignored = batch(head.num_classes)
    samples = [DetDataSample(metainfo=meta) for meta in metas]
    for sample, objects, regions in zip(samples, truth, ignored, strict=True):
        sample.gt_instances, sample.ignored_instances = objects, regions
    losses = head.loss(features(), samples)  # as a detector calls it
    sum(losses.values(), torch.zeros(())).backward()
    trained = {key for key, p in head.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert trained == {key for key, p in head.named_parameters() if p.requires_grad}
    assert {key for key, p in head.named_parameters() if not p.requires_grad} == (
        {"atss_centerness.weight", "atss_centerness.bias"} if name in ("RankingATSSHead", "RankingPAAHead") else set()
    )
    again = build(name, loss="alrp", period=1)
    again.load_state_dict(head.state_dict())
    assert float(again.ranking_loss.balance.weight) == float(head.ranking_loss.balance.weight) != 50
    assert "ranking_loss.balance.weight" in head.state_dict()
    # Detections are scored by the sigmoid of the class alone.
    nms = {"type": "nms", "iou_threshold": 1.0}
    test = ConfigDict(nms_pre=50, min_bbox_size=-1, score_thr=0.0, max_per_img=500, nms=nms)
    scores, deltas = head(features())
    shapes = [{**meta, "scale_factor": (1.0, 1.0), "ori_shape": meta["img_shape"]} for meta in metas]
    found: Any = head.predict_by_feat(scores, deltas, batch_img_metas=shapes, cfg=test, rescale=False)
    best = torch.cat([each[0].flatten() for each in scores]).sort(descending=True).values.sigmoid()
    assert_near(found[0].scores.sort(descending=True).values[:10], best[:10], 1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_half_precision(name: str) -> None:
    """Under autocast a head predicts in half precision: anchors and boxes are not rounded to it."""
    head = build(name, loss="alrp", box_weight=1.0)
    truth, metas, ignored = batch(head.num_classes)
    scores, deltas = ([each.detach().half() for each in of_head] for of_head in outputs(head))
    half = list(head.loss_by_feat(scores, deltas, truth, metas, ignored).values())
    single = list(
        head.loss_by_feat([s.float() for s in scores], [d.float() for d in deltas], truth, metas, ignored).values()
    )
    assert_near(half[0], single[0], 2**-10)
    assert_near(half[1], single[1], 1e-6)
    assert half[1].dtype == torch.float32


@pytest.mark.parametrize("name", HEADS)
def test_nothing_in_any_image(name: str) -> None:
    head = build(name, loss="rank_sort")
    empty = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    losses = head.loss_by_feat(*head(features()), [empty] * 3, batch()[1])
    assert [loss.item() for loss in losses.values()] == [0, 0]
    sum(losses.values(), torch.zeros(())).backward()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="use_sigmoid=True"):
        build("RankingRetinaHead", False, loss="ap")
    with pytest.raises(ValueError, match="period must be given"):
        build("RankingRetinaHead", loss="alrp")

    class Distributions(RankingHeadMixin, GFLHead): ...

    class Plain(RankingHeadMixin, AnchorHead): ...

    class Probabilistic(RankingHeadMixin, PAAHead): ...

    one = {"type": "AnchorGenerator", "strides": [8, 16], "ratios": [1.0], "scales": [8]}
    with pytest.raises(TypeError, match="Distributions must take its targets"):
        Distributions(CLASSES, WIDTH, feat_channels=32, anchor_generator=one, ranking_loss={"loss": "ap"})
    with pytest.raises(TypeError, match="Probabilistic must take its targets"):
        Probabilistic(CLASSES, WIDTH, anchor_generator=one, ranking_loss={"loss": "ap"})
    with pytest.raises(ValueError, match=r"RankingRPNHead must be dict\(type='PseudoSampler'\).*got RandomSampler"):
        build("RankingRPNHead", sampler="RandomSampler", loss="ap")
    with pytest.raises(ValueError, match="weight must be"):
        RankingRPNHead(WIDTH, ranking_loss={"loss": "ap"}, weight=-1.0)
    with pytest.raises(TypeError, match="ranking_loss must be a dict"):
        RankingRPNHead(WIDTH, ranking_loss="ap")  # pyright: ignore[reportArgumentType]
    assert RankingRPNHead(WIDTH, ranking_loss={"loss": "ap", "tau": 0.5}).ranking_loss.tau == 0.5
    with pytest.raises(TypeError, match="ranking_loss must be a dict"):
        Plain(CLASSES, WIDTH, ranking_loss="alrp")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"smooth_l1.*TBLRBBoxCoder"):
        Plain(CLASSES, WIDTH, bbox_coder={"type": "TBLRBBoxCoder"}, ranking_loss={"loss": "ap"})
    head = Plain(CLASSES, WIDTH, ranking_loss={"loss": "rank_sort"})
    assert isinstance(head, AnchorHead)
    assert issubclass(RankingRetinaHead, RankingHeadMixin)
