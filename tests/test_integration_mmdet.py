# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportIncompatibleMethodOverride=false
"""Ranking heads in MMDetection: real heads of mmdet, against the oracle, with anchors taken one by one.

mmdet asks for the compiled operators of mmcv at import, which these heads do not need to train. Where they are not built
(mmcv-lite), they are stood in for by empty classes.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.boxes_by_hand import differentiable
from tests.compare import assert_gradient, assert_near

for _needed in ("mmengine", "mmcv"):
    pytest.importorskip(
        _needed, reason="mmdet, mmengine and mmcv are a user's, not the package's", exc_type=ImportError
    )
pytest.importorskip("torchvision.ops", reason="the integrations need torchvision", exc_type=ImportError)


class EmptyOperators(types.ModuleType):
    """Test only: ``mmcv.ops`` of mmcv-lite, every operator a class that does nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})


class EmptyOperatorsFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if f"{fullname}.".startswith("mmcv.ops."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return EmptyOperators(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of mmengine, mmcv and mmdet, which are older than what they import
    if importlib.util.find_spec("mmcv._ext") is None:
        sys.meta_path.insert(0, EmptyOperatorsFinder())
    pytest.importorskip("mmdet", reason="mmdet is a user's, not the package's", exc_type=ImportError)
    from mmdet.models.dense_heads import AnchorHead, GFLHead
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import ConfigDict
    from mmengine.structures import InstanceData
    from torchvision.ops import generalized_box_iou_loss

    from alrp_triton.integrations.mmdet import RankingATSSHead, RankingHeadMixin, RankingRetinaHead

pytestmark = [
    pytest.mark.filterwarnings("ignore:DeprecationWarning. `num_anchors`:UserWarning"),  # of mmdet's own
    pytest.mark.usefixtures("one_thread"),
]
CLASSES, WIDTH, SIZES = 3, 8, [(8, 10), (4, 5)]
STDS = {"RankingRetinaHead": (1.0, 1.0, 1.0, 1.0), "RankingATSSHead": (0.1, 0.1, 0.2, 0.2)}


def build(name: str, sigmoid: bool = True, /, **ranking_loss: Any) -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {"type": name, "num_classes": CLASSES, "in_channels": WIDTH, "feat_channels": WIDTH}
    config |= {"stacked_convs": 1, "ranking_loss": {"backend": "torch", **ranking_loss}}
    config["loss_cls"] = {"type": "CrossEntropyLoss", "use_sigmoid": sigmoid}
    config["bbox_coder"] = {"type": "DeltaXYWHBBoxCoder", "target_means": (0.0,) * 4, "target_stds": STDS[name]}
    anchors: dict[str, Any] = {"type": "AnchorGenerator", "strides": [8, 16]}
    train: dict[str, Any] = {"allowed_border": -1, "pos_weight": -1, "debug": False}
    if name == "RankingATSSHead":
        anchors |= {"ratios": [1.0], "octave_base_scale": 4, "scales_per_octave": 1}
        train["assigner"] = {"type": "ATSSAssigner", "topk": 9}
        config["norm_cfg"] = {"type": "GN", "num_groups": 2}
        config["loss_bbox"] = {"type": "GIoULoss"}
    else:
        anchors |= {"ratios": [0.5, 1.0, 2.0], "scales": [4, 6]}
        train["assigner"] = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0}
        train["assigner"]["ignore_iof_thr"] = 0.5
    return MODELS.build(ConfigDict(**config, anchor_generator=anchors, train_cfg=train, test_cfg={})).train()


def batch() -> tuple[list[Any], list[dict[str, Any]], list[Any]]:
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
    return [InstanceData(bboxes=b, labels=c) for b, c in zip(boxes, labels, strict=True)], metas, ignored


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


def by_hand(head: Any, scores: list[Tensor], deltas: list[Tensor]) -> dict[str, Any]:
    """Every anchor by itself: image, level, row, column, anchor at the place."""
    truth, metas, ignored = batch()
    anchors, valid = head.get_anchors(SIZES, metas, device="cpu")
    at = [[level.clone() for level in levels] for levels in anchors]
    targets = head.get_targets(anchors, valid, truth, metas, batch_gt_instances_ignore=ignored)
    labels, weights, boxes = targets[1:4] if isinstance(head, RankingATSSHead) else targets[:3]
    per = head.num_base_priors
    logits: list[Tensor] = []
    found: dict[str, Any] = {"dense": [], "losses": [], "deltas": [], "targets": [], "iou": []}
    for image in range(3):
        for level, (rows, columns) in enumerate(SIZES):
            for number in range(rows * columns * per):
                row, column, a = number // per // columns, number // per % columns, number % per
                logits.append(scores[level][image, a * CLASSES : (a + 1) * CLASSES, row, column])
                label, dense = int(labels[level][image, number]), np.zeros(CLASSES, np.int64)
                if weights[level][image, number] == 0:
                    dense[:] = -1
                elif label < CLASSES:
                    dense[label] = 1
                    anchor, delta = at[image][level][number], deltas[level][image, a * 4 : (a + 1) * 4, row, column]
                    box, target = head.bbox_coder.decode(anchor[None], delta[None]), boxes[level][image, number][None]
                    assert any(torch.equal(target[0], each) for each in truth[image].bboxes)
                    found["losses"].append(generalized_box_iou_loss(box, target)[0])
                    found["deltas"].append(
                        delta * torch.tensor(head.bbox_coder.stds) / torch.tensor([0.1, 0.1, 0.2, 0.2])
                    )
                    centre, size = (anchor[:2] + anchor[2:]) / 2, anchor[2:] - anchor[:2]
                    encoded = torch.cat(
                        [
                            ((target[0, :2] + target[0, 2:]) / 2 - centre) / size,
                            ((target[0, 2:] - target[0, :2]) / size).log(),
                        ]
                    )
                    found["targets"].append(encoded / torch.tensor([0.1, 0.1, 0.2, 0.2]))
                    low, high = torch.maximum(box[0, :2], target[0, :2]), torch.minimum(box[0, 2:], target[0, 2:])
                    common = (high - low).clamp(min=0).prod()
                    areas = [(each[0, 2:] - each[0, :2]).prod() for each in (box, target)]
                    found["iou"].append(float((common / (areas[0] + areas[1] - common)).detach()))
                found["dense"].append(dense)
    found["logits"] = torch.stack(logits)
    return found


@pytest.mark.parametrize("name", ["RankingRetinaHead", "RankingATSSHead"])
@pytest.mark.parametrize("loss", ["alrp", "ap", "rank_sort"])
def test_head_is_the_loss_of_the_whole_batch(name: str, loss: str) -> None:
    head = build(name, loss=loss, **({"period": 10} if loss == "alrp" else {}))
    scores, deltas = outputs(head)
    truth, metas, ignored = batch()
    losses = head.loss_by_feat(scores, deltas, truth, metas, ignored)
    assert set(losses) == {"loss_cls", "loss_bbox"}
    (losses["loss_cls"] + losses["loss_bbox"]).backward()
    ours = [each.grad.clone() for each in (*scores, *deltas) if each.grad is not None]
    assert len(ours) == 4

    hand = by_hand(head, scores, deltas)
    logits, dense = hand["logits"], np.stack(hand["dense"])
    counts = {mark: (dense == mark).sum() for mark in (1, 0, -1)}
    assert counts[1] > 5
    assert counts[0] > 100
    assert counts[-1] > 50
    off = torch.stack(hand["deltas"]) - torch.stack(hand["targets"])
    scores_of = logits.detach()[(dense == 1).any(-1)].amax(-1).sigmoid()
    classification, grad, box = differentiable(
        loss, logits, dense, torch.stack(hand["losses"]), off, hand["iou"], scores_of
    )
    assert_near(losses["loss_cls"], classification, 1e-5, "classification")
    assert_near(losses["loss_bbox"], box, 1e-5, "box")
    for each in (*scores, *deltas):
        each.grad = None
    ((logits.flatten() * torch.from_numpy(grad)).sum() + box).backward()
    expected = [each.grad for each in (*scores, *deltas)]
    for gradient, by_oracle in zip(ours, expected, strict=True):
        assert by_oracle is not None
        assert_near(gradient, by_oracle, 1e-5, "gradient")
    assert_gradient(
        torch.cat([g.flatten() for g in ours[:2]]),
        torch.cat([g.flatten() for g in expected[:2] if g is not None]),
        1e-5,
    )


@pytest.mark.parametrize("name", ["RankingRetinaHead", "RankingATSSHead"])
def test_training_detection_and_checkpoint(name: str) -> None:
    head = build(name, loss="alrp", period=1)
    truth, metas, ignored = batch()
    samples = [DetDataSample(metainfo=meta) for meta in metas]
    for sample, objects, regions in zip(samples, truth, ignored, strict=True):
        sample.gt_instances, sample.ignored_instances = objects, regions
    losses = head.loss(features(), samples)  # as a detector calls it
    sum(losses.values(), torch.zeros(())).backward()
    trained = {key for key, p in head.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert trained == {key for key, p in head.named_parameters() if p.requires_grad}
    assert {key for key, p in head.named_parameters() if not p.requires_grad} == (
        {"atss_centerness.weight", "atss_centerness.bias"} if name == "RankingATSSHead" else set()
    )
    again = build(name, loss="alrp", period=1)
    again.load_state_dict(head.state_dict())
    assert float(again.ranking_loss.balance.weight) == float(head.ranking_loss.balance.weight) != 50
    assert "ranking_loss.balance.weight" in head.state_dict()
    # Detections are scored by the sigmoid of the class alone.
    test = ConfigDict(nms_pre=50, min_bbox_size=0, score_thr=0.0, max_per_img=50)
    scores, deltas = head(features())
    shapes = [{**meta, "scale_factor": (1.0, 1.0), "ori_shape": meta["img_shape"]} for meta in metas]
    found = head.predict_by_feat(scores, deltas, batch_img_metas=shapes, cfg=test, rescale=False, with_nms=False)
    best = torch.cat([each[0].flatten() for each in scores]).max().sigmoid()
    assert_near(found[0].scores.max(), best, 1e-6)


@pytest.mark.parametrize("name", ["RankingRetinaHead", "RankingATSSHead"])
def test_nothing_in_any_image(name: str) -> None:
    head = build(name, loss="rank_sort")
    empty = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    losses = head.loss_by_feat(*head(features()), [empty] * 3, batch()[1])
    assert losses["loss_cls"] == losses["loss_bbox"] == 0
    sum(losses.values(), torch.zeros(())).backward()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="use_sigmoid=True"):
        build("RankingRetinaHead", False, loss="ap")
    with pytest.raises(ValueError, match="period must be given"):
        build("RankingRetinaHead", loss="alrp")

    class Distributions(RankingHeadMixin, GFLHead): ...

    class Plain(RankingHeadMixin, AnchorHead): ...

    one = {"type": "AnchorGenerator", "strides": [8, 16], "ratios": [1.0], "scales": [8]}
    with pytest.raises(TypeError, match="Distributions must take its targets"):
        Distributions(CLASSES, WIDTH, feat_channels=32, anchor_generator=one, ranking_loss={"loss": "ap"})
    with pytest.raises(TypeError, match="ranking_loss must be a dict"):
        Plain(CLASSES, WIDTH, ranking_loss="alrp")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"smooth_l1.*TBLRBBoxCoder"):
        Plain(CLASSES, WIDTH, bbox_coder={"type": "TBLRBBoxCoder"}, ranking_loss={"loss": "ap"})
    head = Plain(CLASSES, WIDTH, ranking_loss={"loss": "rank_sort"})
    assert isinstance(head, AnchorHead)
    assert issubclass(RankingRetinaHead, RankingHeadMixin)
