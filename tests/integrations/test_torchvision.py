"""Ranking losses in torchvision's real detectors, against a computation by hand; put in, taken out, copied, resumed."""

# pyright: reportPrivateUsage=false
import copy
import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, get_args
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision.ops", reason="torchvision is an extra", exc_type=ImportError)

from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image

from alrp_triton.integrations.atss import atss_match
from alrp_triton.integrations.head_loss import Boxes, DetectorLoss, HeadLoss, Loss
from alrp_triton.integrations.torchvision import (
    plain_copy,
    ranking_loss_of,
    remove_ranking_loss,
    use_ranking_loss,
)
from alrp_triton.integrations.torchvision_heads import _decoded
from tests.support import boxes_by_hand
from tests.support.boxes_by_hand import Head, Positive, decode, encode
from tests.support.compare import assert_balanced, assert_near

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


@pytest.mark.parametrize("coder", ["model", "published"])
@pytest.mark.parametrize("loss", LOSSES)
def test_retinanet(loss: Loss, coder: str) -> None:
    """Over all images and levels at once, ignored anchors left out; losses, and the gradient of the scores."""
    model, parts = make("retinanet", loss, box_coder=coder)
    spread(model)
    data = batch()
    losses, (_, outputs, of_images, matched) = seen_by(model, model.head, "compute_loss", data)
    assert any((match == -2).any() for match in matched)

    def code(deltas: list[float], anchor: list[float], true: list[float]) -> Corners:
        if coder == "published":
            return decode(deltas, anchor, STD), true, deltas, encode(true, anchor, STD)
        own = [delta * weight for delta, weight in zip(deltas, STD, strict=True)]
        return decode(deltas, anchor, (1, 1, 1, 1)), true, own, encode(true, anchor, STD)

    expected = boxes_by_hand.losses(loss, dense_head(outputs, of_images, matched, data, code), 0.5)
    assert set(losses) == {"classification", "bbox_regression"}
    assert_losses((losses["classification"], losses["bbox_regression"]), expected, parts["head"])
    assert_near(parts["head"].box_error, expected.box_error, 2e-5)
    (gradient,) = torch.autograd.grad(losses["classification"], outputs["cls_logits"], retain_graph=True)
    assert_near(gradient.flatten(), expected.gradient, 2e-5)
    assert_balanced(gradient, 1e-5)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("loss", LOSSES)
def test_fcos(loss: Loss) -> None:
    """The same with points and distances to sides; no centre-ness in training nor in scores."""
    model, parts = make("fcos", loss)
    spread(model)
    model.head.regression_head.bbox_reg.bias.data += 1.0
    data = batch()
    losses, (_, outputs, of_images, matched) = seen_by(model, model.head, "compute_loss", data)

    def code(deltas: list[float], anchor: list[float], true: list[float]) -> Corners:
        x, y, side = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2, anchor[2] - anchor[0]
        box = [x - deltas[0] * side, y - deltas[1] * side, x + deltas[2] * side, y + deltas[3] * side]
        distances = [(x - true[0]) / side, (y - true[1]) / side, (true[2] - x) / side, (true[3] - y) / side]
        return box, true, deltas, distances

    expected = boxes_by_hand.losses(loss, dense_head(outputs, of_images, matched, data, code), 0.5)
    assert set(losses) == {"classification", "bbox_regression"}
    assert_losses((losses["classification"], losses["bbox_regression"]), expected, parts["head"])
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["head.regression_head.bbox_ctrness.weight", "head.regression_head.bbox_ctrness.bias"]

    model.eval()
    model.score_thresh, model.nms_thresh, model.detections_per_img, model.topk_candidates = 0.0, 1.1, 10**6, 10**6
    (found, *_) = model(data[0])
    scores = model.head(list(model.backbone(model.transform(data[0])[0].tensors).values()))["cls_logits"][0].sigmoid()
    assert_near(found["scores"], scores.sqrt().flatten().sort(descending=True).values, 1e-6)


@pytest.mark.parametrize("coder", ["model", "published"])
@pytest.mark.parametrize("loss", LOSSES)
def test_region_proposals(loss: Loss, coder: str) -> None:
    """The RPN: tau 0.7, all anchors but the ignored, with the real anchors where the integration needs none."""
    model, parts = make("faster_rcnn", loss, box_coder=coder)
    spread(model)
    data = batch()
    found: list[list[Tensor]] = []
    keep_output(model.rpn.anchor_generator, found)
    with mock.patch.object(model.rpn, "assign_targets_to_anchors", wraps=model.rpn.assign_targets_to_anchors) as spy:
        losses, (objectness, deltas, labels, _) = seen_by(model, model.rpn, "compute_loss", data)
    of_images, targets = spy.call_args.args
    _, true = model.rpn.assign_targets_to_anchors(of_images, targets)
    marks, boxes, where = torch.cat(labels).long().numpy(), torch.cat(true), torch.cat(found[0])
    assert {-1, 0, 1} == set(marks.tolist())
    used = STD if coder == "published" else (1, 1, 1, 1)
    positives: list[Positive] = []
    for index in np.flatnonzero(marks == 1):
        anchor, box, delta = where[index].tolist(), boxes[index].tolist(), deltas[index].tolist()
        own = [value * weight / by for value, weight, by in zip(delta, STD, used, strict=True)]
        boxes_of = decode(delta, anchor, used), box, own, encode(box, anchor, STD)
        positives.append(Positive(*boxes_of, objectness[index].sigmoid().item()))
    head = Head(objectness.detach().double().numpy().ravel(), marks, positives)
    expected = boxes_by_hand.losses(loss, head, 0.7)
    assert_losses((losses["loss_objectness"], losses["loss_rpn_box_reg"]), expected, parts["rpn"], 0.2)


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_published_deviations_are_for_detection_too(name: str) -> None:
    """What a model predicts with them is what it predicts with the deltas divided by 10, 10, 5, 5; then its own again."""
    model, _ = make(name, box_coder="published")
    spread(model)
    model.eval()
    (model if name == "retinanet" else model.roi_heads).score_thresh = 0.0
    images, _ = batch()
    with torch.no_grad():
        found = copy.deepcopy(model)(images)
        remove_ranking_loss(model)
        layer = model.head.regression_head.bbox_reg if name == "retinanet" else model.rpn.head.bbox_pred
        divide = layer.weight.new_tensor(STD).repeat(layer.out_channels // 4)
        layer.weight /= divide.reshape(-1, 1, 1, 1)
        layer.bias /= divide
        if name == "faster_rcnn":  # whose box head has another score without the loss
            use_ranking_loss(model, period=1)
        expected = model(images)
    for one, other in zip(found, expected, strict=True):
        assert len(one["boxes"])
        assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in ("boxes", "scores"))


def test_the_period_may_be_told_later() -> None:
    model, parts = make("faster_rcnn", period="later")
    with pytest.raises(RuntimeError, match="period is 'later': set it before the first step"):
        model(*batch())
    keys = parts.state_dict().keys()
    parts.set_period(2)
    assert parts.state_dict().keys() == keys
    assert [part.period for part in parts.values()] == [2, 2]
    for _ in range(2):
        model(*batch())
    assert all(part.balance is not None and part.balance.weight != 50 for part in parts.values())
    with pytest.raises(
        TypeError, match=r"period must be an int, an epoch in your steps, len\(loader\), or 'later', got float"
    ):
        parts.set_period(100 / 8)  # pyright: ignore[reportArgumentType]
    _, parts = make("faster_rcnn", "rank_sort", period=None)
    parts.set_period(2)
    assert [part.period for part in parts.values()] == [None, None]


@pytest.mark.parametrize(("weight", "first"), [(7.0, 7.0), ("auto", None)])
def test_the_first_weight(weight: Any, first: float | None) -> None:
    """Of all heads; an automatic one is that of the losses themselves, in the first step."""
    model, parts = make("faster_rcnn", initial_weight=weight)
    spread(model)
    losses = model(*batch())
    for head, keys in (
        ("rpn", ("loss_objectness", "loss_rpn_box_reg")),
        ("roi_heads", ("loss_classifier", "loss_box_reg")),
    ):
        classification, box = (losses[key].item() for key in keys)
        used = float(parts[head].box_weight)
        assert used == pytest.approx((classification + box / used) / (box / used) if first is None else first, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_box_head(loss: Loss) -> None:
    """The box head: tau 0.5, all proposals, ground truth among them for Rank & Sort Loss alone, no background."""
    model, parts = make("faster_rcnn", loss)
    spread(model)
    data = batch()
    predicted: list[tuple[Tensor, Tensor]] = []
    keep_output(model.roi_heads.box_predictor, predicted)
    add_gt_proposals, given = model.roi_heads.add_gt_proposals, list[tuple[list[Tensor], list[Tensor]]]()

    def spy(proposals: list[Tensor], truths: list[Tensor]) -> list[Tensor]:
        given.append((list(proposals), list(truths)))  # torchvision writes what it has sampled into the list
        return add_gt_proposals(proposals, truths)

    with mock.patch.object(model.roi_heads, "add_gt_proposals", spy):
        losses = model(*data)
    ((proposals, truths),) = given
    if loss == "rank_sort":
        proposals = [torch.cat(pair) for pair in zip(proposals, truths, strict=True)]
    logits, deltas = predicted[0]
    assert len(logits) == sum(map(len, proposals))
    matches, labels = model.roi_heads.assign_targets_to_proposals(proposals, truths, [t["labels"] for t in data[1]])
    marks = np.zeros((len(logits), CLASSES), np.int64)
    positives: list[Positive] = []
    row = 0
    weights = (10, 10, 5, 5)
    for image, of_image in enumerate(proposals):
        for proposal, match, label in zip(
            of_image.tolist(), matches[image].tolist(), labels[image].tolist(), strict=True
        ):
            if label > 0:
                marks[row, label - 1] = 1
                own, true = deltas[row, 4 * label : 4 * label + 4].tolist(), truths[image][match].tolist()
                boxes = decode(own, proposal, weights), true, own, encode(true, proposal, weights)
                positives.append(Positive(*boxes, logits[row, 1:].max().sigmoid().item()))
            row += 1
    assert len(positives) > 3
    head = Head(logits[:, 1:].detach().double().numpy().ravel(), marks.ravel(), positives)
    expected = boxes_by_hand.losses(loss, head, 0.5)
    assert_losses((losses["loss_classifier"], losses["loss_box_reg"]), expected, parts["roi_heads"])
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_box_head_detects_by_sigmoid() -> None:
    """Scores are sigmoids of the classes, the column of the background does not matter; the rest is torchvision's."""
    model, _ = make("faster_rcnn")
    heads, generator = model.roi_heads, torch.Generator().manual_seed(0)
    heads.score_thresh, heads.detections_per_img = 0.3, 1000
    logits = torch.randn(40, CLASSES + 1, generator=generator) * 4
    corner = torch.rand(40, 2, generator=generator) * 30
    proposals = [torch.cat([corner, corner + 20], 1)]
    deltas = torch.randn(40, 4 * (CLASSES + 1), generator=generator)
    found = heads.postprocess_detections(logits, deltas, proposals, [(SIZE, SIZE)])
    logits[:, 0] += 100
    again = heads.postprocess_detections(logits, deltas, proposals, [(SIZE, SIZE)])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, again, strict=True))
    assert heads.score_thresh == 0.3

    boxes = clip_boxes_to_image(heads.box_coder.decode(deltas, proposals), (SIZE, SIZE))[:, 1:]
    scores, labels = logits[:, 1:].sigmoid(), torch.arange(1, CLASSES + 1).expand(40, -1)
    kept = scores > 0.3
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    order = batched_nms(boxes, scores, labels, heads.nms_thresh)
    assert 20 < len(order) < kept.sum()
    assert_near(found[1][0], scores[order], 1e-5)
    assert torch.equal(found[0][0], boxes[order])
    assert torch.equal(found[2][0], labels[order])
    half = logits.bfloat16()  # as under autocast
    rounded = half.float()[:, 1:].sigmoid().flatten()
    scores = heads.postprocess_detections(half, deltas, proposals, [(SIZE, SIZE)])[1][0]
    assert len(scores) > 20
    assert all((rounded - score).abs().min() < 1e-6 for score in scores)


@pytest.mark.parametrize(("settings", "candidates"), [({}, 9), ({"candidates": 27}, 27)])
def test_atss_assignment(settings: dict[str, Any], candidates: int) -> None:
    """RetinaNet with ATSS: matches are those of the algorithm, image by image; nothing is ignored."""
    model, parts = make("retinanet", assignment="atss", **settings)
    data = batch()
    matched: list[Tensor] = []

    def spy(*arguments: Any) -> Tensor:
        matched.append(atss_match(*arguments))
        return matched[-1]

    with mock.patch("alrp_triton.integrations.torchvision_heads.atss_match", spy):
        losses, (_, outputs, of_images, _) = seen_by(model, model.head, "compute_loss", data)
    for target, of_image, match in zip(data[1], of_images, matched, strict=True):
        levels = [16 * 16 * 3, 8 * 8 * 3]
        assert torch.equal(match, brute_force_atss(target["boxes"], of_image, levels, candidates))

    def code(deltas: list[float], anchor: list[float], true: list[float]) -> Corners:
        return decode(deltas, anchor, (1, 1, 1, 1)), true, deltas, deltas

    expected = boxes_by_hand.losses("alrp", dense_head(outputs, of_images, matched, data, code), 0.5)
    assert_losses((losses["classification"], losses["bbox_regression"]), expected, parts["head"])


def brute_force_atss(boxes: Tensor, anchors: Tensor, levels: list[int], candidates: int) -> Tensor:
    owner = torch.full((len(anchors),), -1)
    best = [0.0] * len(anchors)
    for index, box in enumerate(boxes.tolist()):
        chosen: list[int] = []
        first = 0
        for count in levels:
            numbers = range(first, first + count)

            def distance(number: int, box: list[float] = box) -> float:
                a = anchors[number].tolist()
                return math.dist(((a[0] + a[2]) / 2, (a[1] + a[3]) / 2), ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))

            chosen += sorted(numbers, key=distance)[:candidates]
            first += count
        overlaps = [boxes_by_hand.iou_and_giou(anchors[number].tolist(), box)[0] for number in chosen]
        threshold = np.mean(overlaps) + np.std(overlaps, ddof=1)
        for number, overlap in zip(chosen, overlaps, strict=True):
            a = anchors[number].tolist()
            x, y = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            if overlap >= threshold and inside and overlap > best[number]:
                owner[number], best[number] = index, overlap
    return owner


def test_atss_of_nothing_and_errors() -> None:
    boxes, some = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([[0.0, 0.0, 4.0, 4.0], [50.0, 50.0, 60.0, 60.0]])
    assert atss_match(boxes[:0], some, [2]).tolist() == [-1, -1]
    assert atss_match(boxes, some[:0], []).tolist() == []
    assert atss_match(boxes, some[:1], [1]).tolist() == [0]  # one candidate has no spread
    with pytest.raises(ValueError, match=r"anchors_per_level must add up to 2 anchors, got \[1\]"):
        atss_match(boxes, some, [1])
    with pytest.raises(ValueError, match="candidates must be at least 1"):
        atss_match(boxes, some, [2], 0)


@pytest.mark.parametrize("name", MODELS)
def test_put_in_and_taken_out(name: str) -> None:
    """Weights fit with and without the loss; without it again, the model is torchvision's; twice is once."""
    torch.manual_seed(0)
    model, plain = MODELS[name](), MODELS[name]()
    before = set(model.state_dict())
    for loss in ("ap", "alrp"):
        parts = use_ranking_loss(model, loss, period=3)
    assert set(model.state_dict()) == before
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    torch.stack(list(model(*batch()).values())).sum().backward()
    assert all(steps(part) == 1 for part in parts.values())  # the second loss, once
    remove_ranking_loss(model)
    remove_ranking_loss(model)
    results: list[dict[str, Tensor]] = []
    for one in (model, plain):
        torch.manual_seed(3)  # torchvision samples anchors
        results.append(one(*batch()))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_copied_and_pickled(name: str) -> None:
    """A copy has a loss of its own, with the same state."""
    model, parts = make(name)
    plain = model(*batch())
    torch.stack(list(plain.values())).sum().backward()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        losses = copied(*batch())
        assert all(steps(part) == 1 for part in parts.values())
        for key, value in plain.items():
            assert_near(losses[key], value, 1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.* always returns a .* in scripting")
@pytest.mark.parametrize("name", MODELS)
def test_scripted_and_plain(name: str) -> None:
    """They detect as the model does, which trains as before; a plain FCOS takes the weights."""
    model, _ = make(name, box_coder="model" if name == "fcos" else "published")
    spread(model)
    (model if hasattr(model, "score_thresh") else model.roi_heads).score_thresh = 0.01
    images, losses = batch()[0], model(*batch())
    plain = plain_copy(model.train(False))
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    scripted = torch.jit.load(io.BytesIO(file.getvalue()))
    with torch.no_grad():
        found = model(images)
        for other in (scripted(images)[1], plain(images)):
            for ours, theirs in zip(found, other, strict=True):
                assert len(ours["scores"]) > 0
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        if name == "fcos":
            other = fcos().train(False)
            other.score_thresh = 0.01
            other.load_state_dict(plain.state_dict())
            assert torch.equal(other(images)[0]["scores"], found[0]["scores"])
    assert not ranking_loss_of(plain)
    once_more = copy.deepcopy(plain)
    use_ranking_loss(once_more, "rank_sort")  # to train it on
    with torch.no_grad():
        for put in range(2):
            for ours, theirs in zip(found, once_more(images), strict=True):
                assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), put
            remove_ranking_loss(once_more)
    again = model.train()(*batch())
    assert all(torch.equal(value, again[key]) for key, value in losses.items())
    own = dict(model.named_parameters())
    shared = [key for key, value in plain.named_parameters() if value is own[key]]
    assert len(own) - len(shared) == (2 if name == "fcos" else 0)


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_warm_start(name: str) -> None:
    """Two steps of torchvision's losses, two of a blend, then the ranking; a copy goes on from the state."""
    model, parts = make(name, "rank_sort", period=None, warm_start=2)
    ranked, own = make(name, "rank_sort", period=None)[0], MODELS[name]()
    for other in (ranked, own):
        other.load_state_dict(model.state_dict())
    first, second = own(*batch()), ranked(*batch())
    for share in (0, 0, 1 / 3, 2 / 3, 1):
        with torch.no_grad():
            model(*batch())  # not counted
        if share == 2 / 3:
            state = copy.deepcopy(parts.state_dict())
            parts = use_ranking_loss(model, "rank_sort", warm_start=2)
            parts.load_state_dict(state)
        losses = model(*batch())
        assert set(losses) == {"classification", "bbox_regression"}
        for key, loss in losses.items():
            assert_near(loss, (1 - share) * first[key] + share * second[key], 1e-6)
    torch.stack(list(losses.values())).sum().backward()
    assert parts.state_dict()["head.warm_start.steps"] == 5
    other = make(name, "rank_sort", period=None, warm_start=2)[0]
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        for key, loss in copied(*batch()).items():
            assert_near(loss, first[key], 1e-6)
        assert ranking_loss_of(copied).state_dict()["head.warm_start.steps"] == 1
    assert "warm_start.steps" not in make(name)[1].state_dict()


def test_a_part_of_ones_own_has_no_plain_copy() -> None:
    model, _ = make("faster_rcnn")
    remove_ranking_loss(model)

    class Mine(RoIHeads):
        pass

    model.roi_heads.__class__ = Mine
    use_ranking_loss(model, "rank_sort")
    with pytest.raises(TypeError, match="model must detect by torchvision's own RoIHeads for a plain copy, got Mine"):
        plain_copy(model)


def test_self_balancing_is_resumed() -> None:
    """Without the state the weight would begin at 50 again."""
    model, parts = make("retinanet", period=2)
    for _ in range(3):
        model(*batch())
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "losses": parts.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, others = make("retinanet", period=2)
    again.load_state_dict(saved["model"])
    others.load_state_dict(saved["losses"])
    for _ in range(4):
        one, other = model(*batch()), again(*batch())
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert parts["head"].box_weight != 50
    with torch.no_grad():  # a validation loss leaves no trace
        before = steps(parts["head"])
        model(*batch())
    assert steps(parts["head"]) == before


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_no_objects(name: str, loss: Loss) -> None:
    """A batch without any: losses of 0 (but for masks, which there are none of), gradients of 0."""
    model, _ = make(name, loss)
    images, targets = batch()
    nothing = [{key: value[:0] for key, value in target.items()} for target in targets]
    losses = model(images, nothing)
    assert all(value == 0 for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in model.parameters())


def test_a_constant_weight_and_another_box_loss() -> None:
    data = batch()
    model, parts = make("retinanet", "ap", box_loss="giou", box_weight=2.5)
    giou, constant = model(*data), parts["head"].box_weight
    model, parts = make("retinanet", "ap", box_loss="giou")
    once = model(*data)
    assert constant == 2.5
    assert parts["head"].box_weight == 1
    assert torch.equal(giou["bbox_regression"], 2.5 * once["bbox_regression"])
    assert 0 < once["bbox_regression"] < 2
    model, parts = make("retinanet", "alrp", box_weight=1.0, period=None, delta=0.5)
    assert parts["head"].balance is None
    assert parts["head"].criterion.delta == 0.5


def test_autocast() -> None:
    """Half-precision outputs; boxes are decoded in float32."""
    for name in ("retinanet", "fcos", "faster_rcnn"):
        model, parts = make(name)
        seen: list[Any] = []
        for part in parts.values():
            part.register_forward_pre_hook(partial(keep_boxes, seen))
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(*batch())
        for predicted in seen:
            assert predicted.dtype == torch.float32
            assert not torch.equal(predicted, predicted.bfloat16().float())  # nor was it rounded before
        assert all(value.dtype == torch.float32 for value in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_true_boxes_are_not_rounded_to_the_dtype_of_proposals() -> None:
    """Which is half precision under autocast, where torchvision makes its targets of true boxes in it."""
    model, _ = make("faster_rcnn")
    images, targets = batch()
    spied = mock.patch.object(model.roi_heads, "forward", wraps=model.roi_heads.forward)
    with torch.autocast("cpu", torch.bfloat16), spied as spy:
        model(images, targets)
    assert all(of_image.dtype == torch.bfloat16 for of_image in spy.call_args.args[1])
    proposals = [target["boxes"].bfloat16() for target in targets]
    selected = model.roi_heads.select_training_samples(proposals, targets)
    for boxes, target, labels, deltas in zip(selected[0], targets, *selected[2:], strict=True):
        assert (labels > 0).all()
        assert_near(model.roi_heads.box_coder.decode_single(deltas, boxes), target["boxes"], 1e-5)


@pytest.mark.parametrize("assignment", ["iou", "atss"])
def test_targets_of_other_dtypes(assignment: Any) -> None:
    """float64 boxes, as NumPy makes them, and int32 labels."""
    images, targets = batch()
    others = [{**t, "boxes": t["boxes"].double(), "labels": t["labels"].int()} for t in targets]
    for name in ("retinanet", "faster_rcnn")[: 2 if assignment == "iou" else 1]:
        model, _ = make(name, assignment=assignment)
        plain = model(images, targets)
        if name == "faster_rcnn":  # torchvision wants int64 there
            others = [{**t, "labels": t["labels"].long()} for t in others]
        for key, value in make(name, assignment=assignment)[0](images, others).items():
            assert_near(value, plain[key], 1e-5)


@pytest.mark.parametrize(
    ("name", "first", "last"), [("retinanet", 0, 4), ("fcos", 0, 4), ("faster_rcnn", 1, 5), ("mask_rcnn", 1, 5)]
)
def test_labels_that_are_no_classes(name: str, first: int, last: int) -> None:
    for wrong in (first - 1, last + 1):
        images, targets = batch()
        targets[0]["labels"][0] = wrong
        words = rf"labels of targets must be in {first}..{last}, the classes of the head, got \[{wrong}\]"
        with pytest.raises(ValueError, match=words):
            make(name)[0](images, targets)


def test_labels_are_as_many_as_boxes() -> None:
    for wrong in (torch.ones(2), torch.ones(6), torch.ones(3, 1)):
        images, targets = batch()
        targets[2]["labels"] = wrong.long()
        for name in ("retinanet", "fcos"):
            with pytest.raises(ValueError, match=r"must have one entry a box, got \(.*\) for 3 in image 2"):
                make(name)[0](images, targets)


def test_true_boxes_of_any_size() -> None:
    """torchvision's coder limits what it decodes, which holds for predictions; a true box may be 100 times an anchor."""
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    anchor, box = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[-50.0, -50.0, 51.0, 51.0]])
    deltas = coder.encode_single(box, anchor)
    boxes = _decoded(coder, torch.zeros(1, 4), deltas)
    assert_near(boxes.target, box, 1e-5)
    assert_near(_decoded(coder, deltas * 2, deltas).predicted[0, 2], 50.5 * 2 + 0.5 + 62.5 / 2 - 50, 1)


@pytest.mark.parametrize("loss", ["alrp", "rank_sort"])
def test_the_unit_of_boxes_does_not_matter(loss: Loss) -> None:
    """Pixels, or shares of an image of 4096 pixels, where the area of an object of 4 is a millionth."""
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(60, CLASSES, generator=generator), torch.arange(60) % 7
    corner = 4000 * torch.rand(int((targets < CLASSES).sum()), 2, generator=generator)
    true = torch.cat([corner, corner + 4], 1)
    found = true + torch.randn(true.shape, generator=generator)
    of = [
        HeadLoss(loss, period=5)(logits, targets.clamp(max=CLASSES), Boxes(found / unit, true / unit))
        for unit in (1, 4096)
    ]
    assert_near(of[1].classification, of[0].classification, 1e-6)
    assert_near(of[1].box, of[0].box, 1e-6)


def test_frozen_parts_stay_frozen() -> None:
    torch.manual_seed(0)
    model = fcos().requires_grad_(False)
    use_ranking_loss(model, period=5)
    remove_ranking_loss(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_methods_that_were_set_before() -> None:
    """They are called, and come back."""
    model, calls = retinanet(), [0]
    own = model.head.forward

    def counted(x: list[Tensor]) -> dict[str, Tensor]:
        calls[0] += 1
        return own(x)

    model.head.forward = counted
    for loss in ("alrp", "ap"):
        use_ranking_loss(model, loss, period=5)
        model(*batch())
    assert calls == [2]
    remove_ranking_loss(model)
    assert model.head.forward is counted


def test_losses_of_a_copy() -> None:
    model, parts = make("faster_rcnn")
    assert dict(ranking_loss_of(model).items()) == dict(parts.items())
    copied = copy.deepcopy(model)
    copied(*batch())
    assert {name: steps(part) for name, part in ranking_loss_of(copied).items()} == {"rpn": 1, "roi_heads": 1}
    assert all(steps(part) == 0 for part in parts.values())
    assert len(ranking_loss_of(retinanet())) == 0
    parts.eval()
    model(*batch())
    assert all(steps(part) == 0 for part in parts.values())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a RetinaNet, FCOS or FasterRCNN of torchvision, got Linear"),
        ({"loss": "focal"}, ValueError, "loss must be 'alrp', 'ap' or 'rank_sort', got 'focal'"),
        ({"period": None}, ValueError, "period must be given for loss 'alrp'"),
        ({"period": 0}, ValueError, "period must be at least 1"),
        ({"assignment": "max"}, ValueError, "assignment must be 'iou' or 'atss', got 'max'"),
        ({"model": fcos(), "assignment": "atss"}, ValueError, "'atss' is for RetinaNet; FCOS has one of its own"),
        ({"candidates": 9}, ValueError, "candidates are those of assignment 'atss'; got candidates=9 with 'iou'"),
        ({"assignment": "atss", "candidates": 0}, ValueError, "candidates must be at least 1"),
        ({"box_loss": "l1"}, ValueError, "box_loss must be 'giou', 'smooth_l1' or None, got 'l1'"),
        ({"box_loss": "smooth_l1"}, ValueError, "box_loss must be 'giou' for loss 'alrp'"),
        ({"box_coder": "papers"}, ValueError, "box_coder must be 'model' or 'published', got 'papers'"),
        ({"model": fcos(), "box_coder": "published"}, ValueError, "box_coder 'published' is for models with deviations"),
        ({"loss": "ap", "initial_weight": -1.0}, ValueError, "initial_weight must be at least 0"),
        ({"loss": "rank_sort", "initial_weight": "auo"}, ValueError, "initial_weight must be a number or 'auto', got 'auo'"),
        ({"box_weight": -1.0}, ValueError, "box_weight must be at least 0"),
        ({"rpn_weight": math.nan}, ValueError, "rpn_weight must be at least 0"),
        ({"model": faster_rcnn(), "warm_start": 3}, ValueError, "warm_start is for RetinaNet and FCOS; the box head of FasterRCNN has a softmax"),
        ({"gradient_reduction": "max"}, ValueError, "gradient_reduction must be 'mean' or 'sum'"),
        ({"delta": -1.0}, ValueError, "delta must be"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
)  # fmt: skip
def test_errors(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    """Before anything is changed."""
    settings = {"model": retinanet(), "loss": "alrp", "period": 5} | settings
    model = settings["model"]
    attributes = {id(module): set(vars(module)) for module in model.modules()}
    with pytest.raises(error, match=words):
        use_ranking_loss(**settings)
    assert attributes == {id(module): set(vars(module)) for module in model.modules()}
    assert all(p.requires_grad for p in model.parameters())


def test_a_head_of_ones_own() -> None:
    """A subclass keeps what it does; the method that is called in the end is its own."""

    class Loud(RetinaNetHead):
        def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
            return {key: value * 2 for key, value in super().forward(x).items()}

    torch.manual_seed(0)
    model = RetinaNet(
        Backbone(), CLASSES, min_size=SIZE, max_size=SIZE, anchor_generator=anchors(16, 32), head=Loud(32, 3, CLASSES)
    )
    use_ranking_loss(model, period=5)
    features = [torch.rand(1, 32, 16, 16), torch.rand(1, 32, 8, 8)]
    twice = model.head(features)["cls_logits"]
    assert torch.equal(twice, 2 * RetinaNetHead.forward(model.head, features)["cls_logits"])
