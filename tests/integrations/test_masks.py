"""The mask loss of Rank & Sort Loss in torchvision's real Mask R-CNN, against loops in NumPy; and what stays theirs."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision.ops", reason="torchvision is an extra", exc_type=ImportError)

from torchvision.models.detection import roi_heads

from alrp_triton.integrations.head_loss import HeadLoss
from alrp_triton.integrations.masks import MAX_MASKS, dice_error, draw_masks
from alrp_triton.integrations.torchvision import remove_ranking_loss, use_ranking_loss
from tests.support.compare import assert_near
from tests.support.masks_by_hand import Array, crop, gradient_of_masks
from tests.support.torchvision_models import (
    CLASSES,
    SIZE,
    Batch,
    faster_rcnn,
    keep_output,
    mask_rcnn,
    retinanet,
    spread,
)


def discs(counts: tuple[int, ...] = (4, 0, 3)) -> Batch:
    """Images with objects in the shape of ellipses, one without any."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, SIZE, SIZE, generator=generator) for _ in counts]
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    targets: list[dict[str, Tensor]] = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * 30
        boxes = torch.cat([corner, corner + 8 + 24 * torch.rand(count, 2, generator=generator)], 1)
        centre, radius = ((boxes[:, 2:] + sign * boxes[:, :2]).mul(0.5).T[:, :, None, None] for sign in (1, -1))
        masks = ((x - centre[0]) / radius[0]).square() + ((y - centre[1]) / radius[1]).square() < 1
        labels = torch.randint(1, CLASSES + 1, (count,), generator=generator)
        targets.append({"boxes": boxes, "labels": labels, "masks": masks.to(torch.uint8)})
    return images, targets


class Seen(NamedTuple):
    """A step, and what passed by."""

    losses: dict[str, Tensor]
    masks: Tensor
    """What the mask predictor gave, (P, C, h, w)."""
    scores: Tensor
    pooled: list[Tensor]
    """The boxes in which masks were predicted, of each image."""
    selected: tuple[list[Tensor], ...]
    """Proposals, indices of what they match, labels, of each image."""


def step(model: Any, data: Batch) -> Seen:
    heads = model.roi_heads
    masks, predicted, pooled, selected = list[Any](), list[Any](), list[Any](), list[Any]()
    keep_output(heads.mask_predictor, masks)
    keep_output(heads.box_predictor, predicted)

    def keep_boxes(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        pooled.append(inputs[1])

    hook = heads.mask_roi_pool.register_forward_pre_hook(keep_boxes)
    select = heads.select_training_samples

    def spy(*arguments: Any) -> Any:
        selected.append(select(*arguments))
        return selected[-1]

    with mock.patch.object(heads, "select_training_samples", spy):
        losses = model(*data)
    hook.remove()
    assert len(masks) == len(pooled) == 1  # the branch runs once
    return Seen(losses, masks[0], predicted[0][0], pooled[0], selected[0])


def by_hand(seen: Seen, data: Batch) -> Array:
    """The gradient of the loss by the logits of all masks; the loss itself is the ranking loss, whatever the masks."""
    masks = seen.masks.detach().double().numpy()
    size = masks.shape[-1]
    weights, truth = list[float](), list[Array]()
    classes, begin = list[int](), 0
    for image, (proposals, matched, labels) in enumerate(zip(*seen.selected[:3], strict=True)):
        known = {tuple(box): row for row, box in enumerate(proposals.tolist())}
        for box in seen.pooled[image].tolist():
            row = known[tuple(box)]
            classes.append(int(labels[row]))
            assert classes[-1] > 0
            true = data[1][image]["masks"][int(matched[row])].double().numpy()
            truth.append(crop(true, box, size))
            weights.append(max(1 / (1 + math.exp(-score)) for score in seen.scores[begin + row, 1:].tolist()))
        begin += len(proposals)
    own = np.stack([masks[index, of_class] for index, of_class in enumerate(classes)])
    gradient = np.zeros(masks.shape)
    slopes = gradient_of_masks(own, truth, weights, seen.losses["loss_classifier"].item())
    for index, slope in enumerate(slopes):
        gradient[index, classes[index]] = slope
    assert len(set(classes)) > 2
    return gradient


def assert_by_hand(seen: Seen, data: Batch) -> None:
    assert_near(seen.losses["loss_mask"], seen.losses["loss_classifier"].detach(), 1e-6)
    (gradient,) = torch.autograd.grad(seen.losses["loss_mask"], seen.masks, retain_graph=True)
    expected = by_hand(seen, data)
    assert np.abs(expected).max() > 1e-6
    assert_near(gradient.float(), expected, 1e-5 if gradient.dtype == torch.float32 else 1e-2)


def made(loss: Any = "rank_sort", **settings: Any) -> Any:
    torch.manual_seed(0)
    model = mask_rcnn()
    spread(model)
    cast("Any", model.roi_heads).mask_predictor.mask_fcn_logits.weight.data *= 20  # far from 0
    use_ranking_loss(model, loss, period=10, **settings)
    return model


@pytest.mark.parametrize("ignored", [False, True])
def test_mask_rcnn(ignored: bool) -> None:
    """Of all positives; none of those that are ignored. Weighted by scores of other size, worth what the ranking is."""
    model, data = made(), discs()
    if ignored:
        model.roi_heads.proposal_matcher.low_threshold = 0.1
    seen = step(model, data)
    proposals, _, labels = seen.selected[:3]
    assert [len(boxes) for boxes in seen.pooled] == [int((of_image > 0).sum()) for of_image in labels]
    assert ignored == (sum(map(len, proposals)) < sum(map(len, step(made(), data).selected[0])))
    assert_by_hand(seen, data)
    torch.stack(list(seen.losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_at_most_200() -> None:
    """Drawn before the branch runs, others each time, each with its own score and true mask."""
    model, data = made(), discs((120, 0, 110))
    boxes = list[set[tuple[float, ...]]]()
    for seen in (step(model, data), step(model, data)):
        assert sum(int((labels > 0).sum()) for labels in seen.selected[2]) > 230
        assert len(seen.masks) == sum(map(len, seen.pooled)) == MAX_MASKS == 200
        boxes.append({tuple(box) for of_image in seen.pooled for box in of_image.tolist()})
        assert_by_hand(seen, data)
    assert boxes[0] != boxes[1]


def test_the_draw() -> None:
    """Without replacement, all with the same chance; all of them where they are few enough."""
    few = torch.arange(300) % 3 == 0
    assert torch.equal(draw_masks(few), few)
    positive = torch.arange(1000) % 4 != 0
    torch.manual_seed(0)
    counts = torch.stack([draw_masks(positive) for _ in range(400)]).sum(0)
    assert counts.sum() == 400 * MAX_MASKS
    assert (counts[~positive] == 0).all()
    expected = 400 * MAX_MASKS / 750
    assert ((counts[positive] - expected).abs() < 6 * expected**0.5).all()


def test_autocast() -> None:
    """Masks of half precision; the loss is made in float32."""
    model, data = made(), discs()
    with torch.autocast("cpu", torch.bfloat16):
        seen = step(model, data)
    assert seen.masks.dtype == torch.bfloat16
    assert seen.losses["loss_mask"].dtype == torch.float32
    assert_by_hand(seen, data)
    torch.stack(list(seen.losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_no_objects() -> None:
    """0, and of the graph: a mask branch without a gradient would stop DistributedDataParallel."""
    model, (images, targets) = made(), discs()
    losses = model(images, [{key: value[:0] for key, value in target.items()} for target in targets])
    assert losses["loss_mask"] == 0
    losses["loss_mask"].backward()
    for part in (model.roi_heads.mask_head, model.roi_heads.mask_predictor):
        assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in part.parameters())


@pytest.mark.parametrize(("loss", "settings"), [("alrp", {}), ("ap", {}), ("rank_sort", {"mask_loss": "bce"})])
def test_masks_that_stay_torchvisions(loss: str, settings: dict[str, Any]) -> None:
    """Bit for bit, on all positives."""
    model = made(loss, **settings)
    theirs = list[Tensor]()
    cross_entropy: Callable[..., Tensor] = roi_heads.maskrcnn_loss

    def spy(*arguments: Any) -> Tensor:
        theirs.append(cross_entropy(*arguments))
        return theirs[-1]

    with mock.patch.object(roi_heads, "maskrcnn_loss", spy):
        losses = model(*discs())
    assert len(theirs) == 1
    assert losses["loss_mask"] is theirs[0]


def test_torchvisions_loss_is_not_computed() -> None:
    with mock.patch.object(roi_heads, "maskrcnn_loss") as spy:
        made()(*discs())
    spy.assert_not_called()


def test_taken_out() -> None:
    """Weights fit with and without it; detection and training are torchvision's again."""
    model, data = made(), discs()
    torch.manual_seed(0)
    plain = mask_rcnn()
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    assert model.roi_heads.has_mask()
    model(*data)
    model.eval()
    model.roi_heads.score_thresh = 0.0
    found = model(data[0])
    assert all(one["masks"].shape == (len(one["boxes"]), 1, SIZE, SIZE) for one in found)
    model.train()
    remove_ranking_loss(model)
    assert "has_mask" not in vars(model.roi_heads)
    results = list[dict[str, Tensor]]()
    for one in (model, plain):
        torch.manual_seed(3)  # torchvision samples
        results.append(one(*data))
    assert list(results[0]) == list(results[1])
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_copied_and_pickled() -> None:
    """After a step, of which nothing is left behind that cannot be copied."""
    model, data = made(), discs()
    plain = model(*data)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        losses = copied(*data)
        assert list(losses) == list(plain)
        assert all(torch.equal(losses[key], value) for key, value in plain.items())
        with torch.no_grad():
            for parameter in copied.roi_heads.mask_predictor.parameters():
                parameter.zero_()  # its own masks, which do not change those of the model
        assert all(torch.equal(value, plain[key]) for key, value in model(*data).items())


def test_an_error_leaves_the_branch_visible() -> None:
    model, (images, targets) = made(), discs()
    targets[0]["masks"] = targets[0]["masks"][:2]
    with pytest.raises(
        ValueError, match=r"masks of targets must have one entry a box, got \(2, 64, 64\) for 4 in image 0"
    ):
        model(images, targets)
    assert model.roi_heads.has_mask()
    del targets[2]["masks"]
    targets[0]["masks"] = torch.zeros(4, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"must have 'masks', got \['boxes', 'labels'\] in image 2"):
        model(images, targets)
    images, targets = discs()
    targets[2]["masks"] *= 255
    with pytest.raises(ValueError, match=r"targets of masks must be in 0..1, got \["):
        model(images, targets)


def test_dice_error() -> None:
    """0 for what is right, 1 for what shares nothing; nothing predicted of nothing is an error of 1, as published."""
    half = torch.zeros(4, 6)
    half[:2] = 1
    sure = 200 * half - 100
    soft = torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for logits, target, expected in (
        (sure, half, 0), (sure, 1 - half, 1), (sure, torch.ones(4, 6), 1 - 24 / 36), (soft.logit(), soft, 0),
        (torch.full((4, 6), -100.0), torch.zeros(4, 6), 1),
    ):  # fmt: skip
        for dtype in (torch.float64, torch.bool, torch.uint8) if target is half else (torch.float64,):
            (error,) = dice_error(logits[None], target[None].to(dtype))
            assert error.item() == pytest.approx(expected, abs=1e-5)
    assert dice_error(sure[None].half(), half[None]).dtype == torch.float32
    assert dice_error(soft[None], half[None]).dtype == torch.float64
    assert dice_error(torch.rand(0, 4, 6), torch.rand(0, 4, 6)).shape == (0,)
    logits = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(dice_error, targets=soft.expand(3, -1, -1)), logits)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"model": retinanet}, ValueError, "mask_loss 'dice' is for models with masks; RetinaNet has none"),
        ({"model": faster_rcnn}, ValueError, "mask_loss 'dice' is for models with masks; FasterRCNN has none"),
        ({"loss": "alrp"}, ValueError, "mask_loss is part of loss 'rank_sort'; got mask_loss='dice' with 'alrp'"),
        ({"mask_loss": "iou"}, ValueError, "mask_loss must be 'dice', 'bce' or None, got 'iou'"),
    ],
)
def test_errors(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    settings = {"model": mask_rcnn, "loss": "rank_sort", "period": 5, "mask_loss": "dice"} | settings
    model = settings.pop("model")()
    with pytest.raises(error, match=words):
        use_ranking_loss(model, **settings)
    assert not any("forward" in vars(module) for module in model.modules())


def test_errors_of_the_loss() -> None:
    masks, scores, zero = torch.zeros(2, 3, 3), torch.ones(2), torch.tensor(0.0)
    head = HeadLoss("rank_sort")
    assert head.mask_loss(masks, masks, scores, zero) == 0
    for arguments, error, words in (
        ((masks.long(), masks, scores, zero), TypeError, "mask_logits must be float16"),
        ((masks, masks[:1], scores, zero), ValueError, r"both have shape \(P, h, w\), got \(2, 3, 3\) and \(1, 3, 3\)"),
        ((masks[0], masks[0], scores, zero), ValueError, r"shape \(P, h, w\), got \(3, 3\) and \(3, 3\)"),
        ((masks, masks - 1, scores, zero), ValueError, r"targets of masks must be in 0..1, got \[-1.0\]"),
        ((masks, masks, scores[:1], zero), ValueError, r"scores must have shape \(P,\), one for each of 2 masks, got"),
        ((masks, masks, scores.long(), zero), TypeError, "scores must be float16"),
        ((masks, masks, scores, scores), ValueError, "classification must be 0-d"),
    ):
        with pytest.raises(error, match=words):
            head.mask_loss(*arguments)
    for loss in ("alrp", "ap"):
        with pytest.raises(ValueError, match=f"mask_loss is part of loss 'rank_sort', got '{loss}'"):
            HeadLoss(loss, period=2).mask_loss(masks, masks, scores, zero)
