# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""FoveaBox in MMDetection: its real head against the oracle, with locations and boxes taken one by one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.support.mmdet_operators  # noqa: F401  # pyright: ignore[reportUnusedImport]
from tests.support.boxes_by_hand import differentiable, iou_and_giou
from tests.support.compare import assert_gradient, assert_near

# mmdet asks for operators at import.
# isort: split
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torchvision.ops import generalized_box_iou_loss

import alrp_triton.integrations.mmdet  # noqa: F401  # pyright: ignore[reportUnusedImport]

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),  # of mmdet's own
    pytest.mark.usefixtures("one_thread"),
]
CLASSES, WIDTH, SIZES, STRIDES, EDGES = 3, 8, [(8, 10), (4, 5)], [8, 16], [16, 32]
RANGES, SIGMA = ((1, 64), (24, 128)), 0.4
BOXES = [
    [[4.03, 6.0, 44.17, 40.0], [10.0, 2.0, 76.0, 62.0], [20.0, 20.0, 50.0, 50.0]],  # the last inside of the others
    [],
    [[5.0, 5.07, 30.0, 50.01], [48.0, 30.0, 79.0, 33.0]],
]
LABELS = [[2, 0, 1], [], [1, 1]]


def build(**ranking_loss: Any) -> Any:
    torch.manual_seed(0)
    config = ConfigDict(
        type="RankingFoveaHead",
        num_classes=CLASSES,
        in_channels=WIDTH,
        feat_channels=WIDTH,
        stacked_convs=1,
        strides=STRIDES,
        base_edge_list=EDGES,
        scale_ranges=RANGES,
        sigma=SIGMA,
        loss_cls={"type": "FocalLoss", "use_sigmoid": True},
        loss_bbox={"type": "SmoothL1Loss", "beta": 0.11},
        ranking_loss={"backend": "torch", **ranking_loss},
    )
    return MODELS.build(config).train()


def batch(boxes: Any = BOXES) -> tuple[list[Any], list[dict[str, Any]]]:
    truth = [
        InstanceData(
            bboxes=torch.tensor(of_image).reshape(-1, 4),
            labels=torch.tensor(labels[: len(of_image)], dtype=torch.int64),
        )
        for of_image, labels in zip(boxes, LABELS, strict=True)
    ]
    meta = {"img_shape": (64, 80), "pad_shape": (64, 80), "ori_shape": (64, 80), "scale_factor": (1.0, 1.0)}
    return truth, [meta] * 3


def outputs() -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(2)
    return (
        [torch.randn(3, CLASSES, *size).requires_grad_() for size in SIZES],
        [(0.5 * torch.randn(3, 4, *size)).requires_grad_() for size in SIZES],
    )


def fovea(box: list[float], stride: int, size: tuple[int, int]) -> tuple[range, range]:
    """Rows and columns of the locations in the middle of a box: where |location - centre| <= sigma * half a side."""
    found: list[range] = []
    for low, high, count in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        middle, half = (low + high) / 2 / stride, (high - low) / 2 / stride
        first, last = math.ceil(middle - SIGMA * half - 0.5), math.floor(middle + SIGMA * half - 0.5)
        found.append(range(min(max(first, 0), count - 1), min(max(last, 0), count - 1) + 1))
    return found[0], found[1]


def owner(image: int, level: int, row: int, column: int) -> int | None:
    """The smallest object that has this location of this level."""
    owners: list[tuple[float, int]] = []
    for number, box in enumerate(BOXES[image]):
        side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        rows, columns = fovea(box, STRIDES[level], SIZES[level])
        if RANGES[level][0] <= side <= RANGES[level][1] and row in rows and column in columns:
            owners.append((side, number))
    return min(owners)[1] if owners else None


@pytest.mark.parametrize("loss", ["alrp", "ap", "rank_sort"])
def test_head_is_the_loss_of_the_whole_batch(loss: str) -> None:
    head = build(loss=loss, **({"period": 10} if loss == "alrp" else {}))
    scores, deltas = outputs()
    losses = head.loss_by_feat(scores, deltas, *batch())
    assert set(losses) == {"loss_cls", "loss_bbox"}
    ours = torch.autograd.grad(sum(losses.values(), torch.zeros(())), [*scores, *deltas])

    logits, marks, giou, off, ious = (list[Any]() for _ in range(5))
    on_level = [0, 0]
    for level, (rows, columns) in enumerate(SIZES):
        for image in range(3):
            for row in range(rows):
                for column in range(columns):
                    logits.append(scores[level][image, :, row, column].double())
                    marks.append([0] * CLASSES)
                    number = owner(image, level, row, column)
                    if number is None:
                        continue
                    on_level[level] += 1
                    marks[-1][LABELS[image][number]] = 1
                    x, y, edge = (column + 0.5) * STRIDES[level], (row + 0.5) * STRIDES[level], EDGES[level]
                    x1, y1, x2, y2 = BOXES[image][number]
                    true = torch.tensor([x - x1, y - y1, x2 - x, y2 - y], dtype=torch.float64) / edge
                    true = true.clamp(1 / 16, 16)
                    own = deltas[level][image, :, row, column].double()
                    pair = [
                        torch.stack([x - edge * d[0], y - edge * d[1], x + edge * d[2], y + edge * d[3]])
                        for d in (own.exp(), true)
                    ]
                    giou.append(generalized_box_iou_loss(pair[0], pair[1], eps=0))
                    ious.append(iou_and_giou(pair[0].tolist(), pair[1].tolist())[0])
                    off.append((own - true.log()) / 0.11)
    assert min(on_level) > 3
    flat = torch.stack(logits)
    positives = torch.tensor(marks).any(-1)
    classification, grad, box = differentiable(
        loss,
        flat,
        marks,
        torch.stack(giou),
        torch.stack(off),
        ious,
        flat.detach()[positives].amax(-1).sigmoid(),
    )
    if loss == "ap":
        box = box * 0.11  # smooth L1 with beta = 0.11 is this, of what is divided by it
    assert_near(losses["loss_cls"], classification, 1e-6)
    assert_near(losses["loss_bbox"], box, 1e-6)
    expected = torch.autograd.grad((flat.flatten() * torch.from_numpy(grad)).sum() + box, [*scores, *deltas])
    for gradient, by_oracle in zip(ours, expected, strict=True):
        assert_near(gradient, by_oracle, 1e-5, "gradient")
    of_scores, by_oracle = (torch.cat([g.flatten() for g in each[:2]]) for each in (ours, expected))
    assert_gradient(of_scores, by_oracle, 1e-5)


def test_training_and_detection() -> None:
    head = build(loss="alrp", period=1)
    truth, metas = batch()
    samples = [DetDataSample(metainfo=meta, gt_instances=each) for meta, each in zip(metas, truth, strict=True)]
    features = tuple(torch.randn(3, WIDTH, *size) for size in SIZES)
    losses = head.loss(features, samples)  # as a detector calls it
    sum(losses.values(), torch.zeros(())).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert head.state_dict()["ranking_loss.balance.weight"] != 50
    test = ConfigDict(nms_pre=1000, score_thr=0.0, max_per_img=-1, nms={"type": "nms", "iou_threshold": 1.0})
    scores, deltas = head(features)
    found = head.predict_by_feat(scores, deltas, batch_img_metas=metas, cfg=test, with_nms=False)
    of_image = torch.cat([each[0].flatten() for each in scores]).sigmoid()
    assert_near(found[0].scores.sort().values, of_image.sort().values, 1e-6)


def test_half_precision_and_nothing_in_any_image() -> None:
    head = build(loss="alrp", box_weight=1.0)
    scores, deltas = ([each.detach().half() for each in of_head] for of_head in outputs())
    half = head.loss_by_feat(scores, deltas, *batch())
    single = head.loss_by_feat([s.float() for s in scores], [d.float() for d in deltas], *batch())
    assert_near(half["loss_bbox"], single["loss_bbox"], 1e-6)
    assert_near(half["loss_cls"], single["loss_cls"], 2**-10)
    scores, deltas = outputs()
    losses = head.loss_by_feat(scores, deltas, *batch([[], [], []]))
    assert losses["loss_cls"].item() == losses["loss_bbox"].item() == 0
    sum(losses.values(), torch.zeros(())).backward()
    assert not any(each.grad is not None and each.grad.any() for each in (*scores, *deltas))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="ranking_loss must be a dict"):
        MODELS.build({"type": "RankingFoveaHead", "num_classes": 3, "in_channels": 8, "ranking_loss": None})
    softmax = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    with pytest.raises(ValueError, match="RankingFoveaHead must have use_sigmoid=True"):
        MODELS.build(
            {"type": "RankingFoveaHead", "num_classes": 3, "in_channels": 8, "ranking_loss": {}, "loss_cls": softmax}
        )
