"""Ranking losses in torchvision's real detectors, against a computation by hand."""

# pyright: reportPrivateUsage=false
import copy
import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision.ops", reason="torchvision is an extra", exc_type=ImportError)

from torchvision.ops import batched_nms, clip_boxes_to_image

from alrp_triton.integrations.atss import atss_match
from alrp_triton.integrations.head_loss import Loss
from alrp_triton.integrations.torchvision import (
    remove_ranking_loss,
    use_ranking_loss,
)
from tests.support import boxes_by_hand
from tests.support.boxes_by_hand import Head, Positive, decode, encode
from tests.support.compare import assert_balanced, assert_near
from tests.support.torchvision_models import (
    CLASSES,
    LOSSES,
    SIZE,
    STD,
    Corners,
    assert_losses,
    batch,
    dense_head,
    keep_output,
    make,
    seen_by,
    spread,
)


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

    copied = copy.deepcopy(model)
    copied.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)  # other parameters in their place
    remove_ranking_loss(copied)
    assert all(parameter.requires_grad for parameter in copied.parameters())

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
