"""Settings and data of ranking losses in torchvision's detectors: empty, of other dtypes, wrong."""

# pyright: reportPrivateUsage=false
import math
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision.ops", reason="torchvision is an extra", exc_type=ImportError)

from torchvision.models.detection._utils import BoxCoder

from alrp_triton.integrations.head_loss import Boxes, HeadLoss, Loss
from alrp_triton.integrations.torchvision import (
    use_ranking_loss,
)
from alrp_triton.integrations.torchvision_heads import _decoded
from tests.support.compare import assert_near
from tests.support.torchvision_models import (
    CLASSES,
    LOSSES,
    MODELS,
    batch,
    faster_rcnn,
    fcos,
    keep_boxes,
    make,
    retinanet,
    spread,
)


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


def test_labels_are_integers() -> None:
    images, targets = batch()
    targets[2]["labels"] = targets[2]["labels"].float()
    for name in ("retinanet", "fcos"):
        with pytest.raises(TypeError, match=r"labels of targets must be integers, got torch\.float32 in image 2"):
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
