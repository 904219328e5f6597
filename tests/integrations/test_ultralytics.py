# pyright: reportMissingImports=false, reportPrivateUsage=false
"""Ranking losses in the criteria of Ultralytics: real ones, against the oracle, with boxes by hand."""

import copy
import importlib.util
import math
import pickle
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from reference.dense import alrp_loss
from tests.support.compare import assert_gradient, assert_near
from tests.support.ultralytics_models import (
    ANCHORS,
    BOXES,
    CLASSES,
    GAIN,
    ByHand,
    batch_of,
    branches,
    build,
    by_hand,
    expected,
    losses_of,
    outputs_of,
)

# Imported there first, with settings.
# isort: split
import ultralytics
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.utils.loss import v8DetectionLoss

from alrp_triton.integrations import ultralytics_criterion
from alrp_triton.integrations.ultralytics import ranking_loss_of, remove_ranking_loss, use_ranking_loss

pytestmark = pytest.mark.usefixtures("one_thread")
LOSSES = ["rank_sort", "alrp", "ap"]
MODELS = ["yolov8n", "yolo11n", "yolo26n"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_branch_is_the_oracles_and_all_else_is_theirs(name: str, loss: Any) -> None:
    model, batch = build(name), batch_of()
    outputs, plain = outputs_of(model), model.init_criterion()
    use_ranking_loss(model, loss, period=10, backend="torch")
    assert isinstance(model.criterion, type(plain))
    for branch, part, given in branches(model.criterion, outputs):
        assert isinstance(part, v8DetectionLoss)
        theirs, items = losses_of(plain if branch == "head" else getattr(plain, branch), given, batch)
        theirs_of_boxes = torch.autograd.grad(theirs[2 if loss == "alrp" else 0 :: 2].sum(), given["boxes"])[0]
        hand = by_hand(part, given, batch)
        assert hand.dense.sum() > 10 if branch != "one2one" else hand.dense.sum() > 2
        classification, localisation, of_logits, of_errors = expected(loss, hand)
        total, ours = losses_of(part, given, batch)
        assert_near(ours[1], GAIN * classification, 1e-5, "classes")
        assert ours[2] == items[2]
        assert_near(total.detach(), 3 * ours, 1e-6, "what is minimised: the items times the images")
        total.sum().backward()
        assert_gradient(given["scores"].grad.permute(0, 2, 1).flatten(), 3 * GAIN * of_logits, 1e-5)
        if loss == "alrp":  # the initial weight is 50, and the gain of boxes of no effect
            assert_near(ours[0], 50 * GAIN * localisation, 1e-5, "boxes")
            pulled = 3 * 50 * GAIN * (hand.errors * torch.from_numpy(of_errors)).sum()
            theirs_of_boxes = theirs_of_boxes + torch.autograd.grad(pulled, given["boxes"])[0]
        else:
            assert ours[0] == items[0]
        assert_near(given["boxes"].grad, theirs_of_boxes, 1e-5, "gradient of boxes")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_nothing_in_any_image(name: str, loss: Any) -> None:
    model, batch = build(name), batch_of([])
    losses = use_ranking_loss(model, loss, period=1, backend="torch")
    state = copy.deepcopy(losses.state_dict())
    total, items = model(batch)
    assert all(value == 0 for value in items.values())
    total.sum().backward()
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    assert all(gradient is not None and not gradient.any() for _, gradient in gradients)
    assert all(torch.equal(value, state[key]) for key, value in losses.state_dict().items())
    model(batch_of(BOXES[:2]))[0].sum().backward()  # and only in one
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("loss", LOSSES)
def test_nan_is_not_hidden(loss: Any) -> None:
    model, batch = build(), batch_of()
    use_ranking_loss(model, loss, period=1, backend="torch")
    outputs = outputs_of(model)
    with torch.no_grad():
        outputs["scores"].fill_(math.nan)
    assert model.criterion(outputs, batch)[1]["cls_loss"].isnan()


def answers_of(criterion: Any) -> list[tuple[Tensor, Any]]:
    """What its assigner is asked from now on, by scores, and says."""
    answers = list[tuple[Tensor, Any]]()

    def keep(module: Any, given: Any, out: Any) -> None:
        answers.append((given[0], out))

    vars(criterion)["assigner"].register_forward_hook(keep)
    return answers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision(dtype: torch.dtype, loss: Any) -> None:
    """Scores of the assigner are not rounded with the logits, so that the least of them stay positive."""
    model, batch = build(), batch_of()
    use_ranking_loss(model, loss, period=1, backend="torch")
    outputs = outputs_of(model, dtype)
    seen = answers_of(model.criterion)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):  # on a CPU there is no other
        total, items = model.criterion(outputs, batch)
    ((_, (labels, _, scores, positive, _)),) = seen
    assert items["cls_loss"].dtype == torch.float32
    assert scores.dtype == torch.float32
    dense = torch.zeros_like(scores, dtype=torch.int64)
    dense[positive] = dense[positive].scatter(1, labels[positive][:, None], 1)
    hand = ByHand(
        outputs["scores"].detach().permute(0, 2, 1).float().numpy(), dense.numpy(), scores.numpy(), torch.zeros(0)
    )
    if loss != "alrp":
        assert_near(items["cls_loss"], GAIN * expected(loss, hand)[0], 1e-5)
    total.sum().backward()
    assert outputs["scores"].grad.any()
    assert outputs["boxes"].grad.any()
    assert outputs["scores"].grad.isfinite().all()


def test_a_positive_of_score_zero() -> None:
    """Is a negative to Rank & Sort, as to the library; aLRP Loss has as many positives as there are boxes."""
    model, batch = build(), batch_of([(0, 1, (0, 0, 60, 60))])
    outputs = outputs_of(model)
    with torch.no_grad():
        outputs["boxes"].view(3, 4, 16, ANCHORS)[:, :, 0] = 30.0  # all boxes are points: their overlap is 0
    for loss in ("rank_sort", "alrp"):
        use_ranking_loss(model, loss, period=1, backend="torch")
        hand = by_hand(model.criterion, outputs, batch)
        assert hand.dense.any()
        assert not hand.grades.any()
        items = model.criterion(outputs, batch)[1]
        assert_near(items["cls_loss"], GAIN * expected(loss, hand)[0], 1e-5)
        assert (items["cls_loss"] == 0) == (loss == "rank_sort")


def test_each_branch_has_a_balance_of_its_own() -> None:
    model, batch = build("yolo26n"), batch_of()
    losses = use_ranking_loss(model, "alrp", period=2, backend="torch")
    outputs = outputs_of(model)
    assert list(losses) == ["one2many", "one2one"]
    found: dict[str, tuple[float, float]] = {}
    for branch, part, given in branches(model.criterion, outputs):
        found[branch] = expected("alrp", by_hand(part, given, batch))[:2]
    for step in range(2):
        model.criterion(outputs, batch)
        for branch, (classification, localisation) in found.items():
            weight = 50 if step == 0 else (classification + localisation) / localisation
            assert_near(losses[branch].box_weight, weight, 1e-5)
    assert losses["one2many"].box_weight != losses["one2one"].box_weight
    total = model.criterion(outputs, batch)[0]  # by the gains of the branches
    parts = [part.loss(given, batch)[0] for _, part, given in branches(model.criterion, outputs)]
    assert_near(total, model.criterion.o2m * parts[0] + model.criterion.o2o * parts[1], 1e-5)


def test_a_constant_weight_and_gains() -> None:
    model, batch = build(box=3.0), batch_of()
    outputs = outputs_of(model)
    use_ranking_loss(model, "alrp", box_weight=2.0, tau=0.0, backend="torch")
    hand = by_hand(model.criterion, outputs, batch)
    localisation = alrp_loss(hand.logits, hand.dense, hand.errors.detach().numpy() / 2).localisation
    assert_near(model.criterion(outputs, batch)[1]["box_loss"], GAIN * 2 * localisation, 1e-5)
    model.args.box = 0.0  # none at all
    assert model.criterion(outputs, batch)[1]["box_loss"] == 0


def test_what_is_recorded_copied_pickled_and_removed() -> None:
    model, batch = build("yolo26n"), batch_of()
    plain = model(batch)[0]  # makes the criterion
    criterion = vars(model)["criterion"]
    losses = use_ranking_loss(model, "alrp", period=1, backend="torch")
    assert model.criterion is criterion
    assert list(ranking_loss_of(model).values()) == list(losses.values())
    assert set(model.state_dict()) == set(build("yolo26n").state_dict())
    state = copy.deepcopy(losses.state_dict())

    def unchanged() -> bool:
        return all(torch.equal(value, state[key]) for key, value in losses.state_dict().items())

    with torch.no_grad():
        model(batch)
    model.eval()
    model.loss(batch)  # a validation loss with gradients
    model.train()
    twin = copy.deepcopy(model)
    twin(batch)  # has its own
    assert unchanged()
    assert ranking_loss_of(twin)["one2one"].balance is not losses["one2one"].balance
    assert twin.criterion.one2one.ranking.model is twin
    with torch.no_grad():  # the step before has moved the statistics of the model
        assert float(model(batch)[0][0]) != float(plain[0])
    # A pickle has their criterion.
    pickled = pickle.dumps(model)
    assert b"alrp_triton" not in pickled
    loaded = pickle.loads(pickled)
    assert type(loaded.criterion.one2one) is v8DetectionLoss
    remove_ranking_loss(model)
    assert not ranking_loss_of(model)
    assert vars(criterion).keys() == vars(loaded.criterion).keys()
    assert all(torch.equal(a, b) for a, b in zip(model(batch)[0], loaded(batch)[0], strict=True))
    remove_ranking_loss(model)
    remove_ranking_loss(build())


def test_removed_it_is_theirs_bit_for_bit() -> None:
    model, batch = build(), batch_of()
    outputs = outputs_of(model)
    plain = model.init_criterion()(outputs, batch)[0]
    use_ranking_loss(model, backend="torch")
    assert not torch.equal(model.criterion(outputs, batch)[0], plain)
    use_ranking_loss(model, "ap", backend="torch")  # in the place of the other
    remove_ranking_loss(model)
    assert torch.equal(model.criterion(outputs, batch)[0], plain)


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_scores_of_an_untrained_head_are_raised(name: str) -> None:
    def biases(model: Any) -> list[list[Tensor]]:
        heads = [getattr(model.model[-1], each, None) for each in ("cv3", "one2one_cv3")]
        return [[level[-1].bias.detach().clone() for level in head] for head in heads if head is not None]

    model, batch = build(name), batch_of()
    before = biases(model)
    use_ranking_loss(model, prior=None, backend="torch")
    low = model(batch)[1]
    assert_near(torch.stack(biases(model)[0]), torch.stack(before[0]), 0.0)
    model = build(name)
    use_ranking_loss(model, prior=0.2, backend="torch")
    after = biases(model)
    assert len(after) == (2 if name == "yolo26n" else 1)
    for old, new in zip(before, after, strict=True):
        assert max(float(level.max()) for level in new) == pytest.approx(math.log(0.2 / 0.8), rel=1e-6)
        lifts = torch.stack(new) - torch.stack(old)
        assert_near(lifts, lifts[0, 0].expand_as(lifts), 1e-6)  # all levels alike
    assert_near(model(batch)[1]["cls_loss"], low["cls_loss"], 0.02)  # but for the assigner the ranking is the same
    use_ranking_loss(model, backend="torch")  # lower: is left
    assert_near(torch.stack(biases(model)[0]), torch.stack(after[0]), 0.0)
    with torch.no_grad():
        for head in (getattr(model.model[-1], each, None) for each in ("cv3", "one2one_cv3")):
            if head is not None:
                head[0][-1].bias -= 7  # trained: this level for itself
    trained = biases(model)
    use_ranking_loss(model, prior=0.9, backend="torch")
    assert_near(torch.stack(biases(model)[0]), torch.stack(trained[0]), 0.0)


def extras(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    if kind == "SegmentationModel":
        return {
            "masks": torch.randint(0, 3, (3, 16, 16)).float(),
            "sem_masks": torch.randint(0, CLASSES, (3, 16, 16)),
        }
    if kind == "PoseModel":
        return {"keypoints": torch.rand(len(BOXES), 17, 3)}
    return {}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("yolo11n-seg", "SegmentationModel"),
        ("yolo26n-seg", "SegmentationModel"),
        ("yolo11n-pose", "PoseModel"),
        ("yolo26n-pose", "PoseModel"),
        ("yolo11n-obb", "OBBModel"),
    ],
)
def test_other_tasks(name: str, kind: str, loss: Any) -> None:
    """Their other losses stay; the assigner's own answer is ranked."""
    model, batch = build(name, kind), batch_of() | extras(kind)
    if kind == "OBBModel":
        batch["bboxes"] = torch.cat([batch["bboxes"], torch.rand(len(BOXES), 1)], 1)
        if loss == "alrp":
            with pytest.raises(TypeError, match="along the axes for loss 'alrp'"):
                use_ranking_loss(model, loss, period=1)
            return
    outputs = model(batch["img"])
    plain = copy.deepcopy(model).init_criterion()
    use_ranking_loss(model, loss, period=1, backend="torch")
    for branch, part, given in branches(model.criterion, outputs):
        answers = answers_of(part)
        theirs = (plain if branch == "head" else getattr(plain, branch)).loss(given, batch)[1]
        total, ours = part.loss(given, batch)
        ((sigmoids, (labels, _, scores, positive, _)),) = answers
        assert positive.any()
        dense = torch.zeros_like(scores, dtype=torch.int64)
        dense[positive] = dense[positive].scatter(1, labels[positive][:, None], 1)
        logits = given["scores"].detach().permute(0, 2, 1)
        assert_near(logits.sigmoid(), sigmoids, 1e-6)
        if loss != "alrp":
            hand = ByHand(logits.numpy(), dense.numpy(), scores.numpy(), torch.zeros(0))
            assert_near(ours["cls_loss"], GAIN * expected(loss, hand)[0], 1e-5)
        replaced = {"cls_loss", "box_loss"} if loss == "alrp" else {"cls_loss"}
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value) == (key not in replaced), key
        assert total.requires_grad


def test_what_cannot_be_ranked_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="period must be given for loss 'alrp'"):
        use_ranking_loss(model, "alrp")
    with pytest.raises(ValueError, match="box_weight is for loss 'alrp', box losses of 'rank_sort'"):
        use_ranking_loss(model, box_weight=1.0)
    for prior in (0.0, 1.0):
        with pytest.raises(ValueError, match="prior must be"):
            use_ranking_loss(model, prior=prior)
    with pytest.raises(ValueError, match="loss must be"):
        use_ranking_loss(model, cast("Any", "bce"))
    with pytest.raises(TypeError, match=r"must be a YOLO of Ultralytics, or its model, .* got Linear"):
        use_ranking_loss(cast("Any", torch.nn.Linear(1, 1)))
    with pytest.raises(TypeError, match="got ClassificationModel"):
        use_ranking_loss(YOLO("yolo11n-cls.yaml"))
    with pytest.raises(TypeError, match="got WorldModel"):
        use_ranking_loss(cast("Any", tasks.WorldModel.__new__(tasks.WorldModel)))
    with pytest.raises(TypeError, match=r"alrp_triton\.integrations\.transformers"):
        use_ranking_loss(cast("Any", tasks.RTDETRDetectionModel.__new__(tasks.RTDETRDetectionModel)))
    assert getattr(model, "criterion", None) is None
    model.class_weights = torch.ones(CLASSES)
    with pytest.raises(ValueError, match="cls_pw must be 0"):
        use_ranking_loss(model)
    model.args = vars(model.args)
    with pytest.raises(ValueError, match=r"model.args must have the gains box, cls and dfl .* got dict"):
        use_ranking_loss(model)
    yolo = YOLO("yolo11n.yaml")
    with pytest.raises(ValueError, match="process_group of a YOLO must be None or 'world'"):
        use_ranking_loss(yolo, process_group=cast("Any", object()))
    assert not ranking_loss_of(yolo)


def test_older_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their trainers start other processes without callbacks."""
    monkeypatch.setattr(ultralytics, "__version__", "8.4.139")
    path = ultralytics_criterion.__file__
    spec = importlib.util.spec_from_file_location("alrp_triton.integrations.older", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"needs ultralytics>=8.4.140, got 8.4.139"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
