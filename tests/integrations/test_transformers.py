"""Ranking losses in transformers: against the oracle with their own matching, in tiny models of random weights."""

import copy
import gc
import pickle
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from reference.dense import alrp_loss, ap_loss, rank_sort_loss
from tests.support.compare import assert_gradient, assert_near

pytest.importorskip("transformers", reason="transformers is a user's, not the package's", exc_type=ImportError)
pytest.importorskip("torchvision.ops", reason="the integrations need torchvision", exc_type=ImportError)

import transformers
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import box_iou, generalized_box_iou
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher, RTDetrLoss

from alrp_triton.integrations import queries as shared
from alrp_triton.integrations.transformers import remove_ranking_loss, use_ranking_loss
from tests.support.tiny_detr import CLASSES, GROUPS, LABELS, LAYERS, QUERIES, build

hf, corners = cast("Any", transformers), cast("Any", center_to_corners_format)
pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["RTDetr", "RTDetrV2", "DFine", "Deimv2", "DeformableDetr", "ConditionalDetr", "DabDetr", "LwDetr"]
CLASS_KEYS = ("loss_ce", "loss_vfl", "loss_mal")


def run(model: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return model(pixel_values=torch.randn(len(LABELS), 3, 64, 64), labels=LABELS)


def by_hand(logits: Tensor, boxes: Tensor, indices: Any) -> tuple[np.ndarray, Tensor, Tensor]:
    """Dense targets, and the GIoU errors and IoUs of the positives in the order of their flat index."""
    dense = np.zeros(logits.shape, np.int64)
    found: list[tuple[int, Tensor, Tensor]] = []
    for image, (queries, objects) in enumerate(indices):
        for query, each in zip(queries.tolist(), objects.tolist(), strict=True):
            label = int(LABELS[image]["class_labels"][each])
            dense[image, query, label] = 1
            pair = [corners(b[None].double()) for b in (boxes[image, query], LABELS[image]["boxes"][each])]
            giou, (iou, _) = generalized_box_iou(*pair)[0, 0], box_iou(*pair)
            found.append(
                (int(np.ravel_multi_index((image, query, label), logits.shape)), (1 - giou) / 2 / 0.5, iou[0, 0])
            )
    found.sort(key=lambda each: each[0])
    return dense, torch.stack([e for _, e, _ in found]), torch.stack([i for *_, i in found])


def expected(loss: str, logits: Tensor, boxes: Tensor, indices: Any, groups: int = 1) -> float:
    dense, errors, ious = by_hand(logits.detach(), boxes.detach(), indices)
    scores, size, total = logits.detach().numpy(), logits.shape[1] // groups, 0.0
    group = np.nonzero(dense)[1] // size  # of each positive
    for each in range(groups):
        part, marks = (array[:, each * size : (each + 1) * size] for array in (scores, dense))
        if loss == "alrp":
            value = alrp_loss(part, marks, errors.numpy()[group == each]).classification
        elif loss == "ap":
            value = ap_loss(part, marks).loss
        else:
            result = rank_sort_loss(part, marks, ious.numpy()[group == each])
            value = result.ranking + result.sorting
        total += value * (group == each).mean()
    return total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loss", ["alrp", "rank_sort"])
def test_all_rankings_are_the_oracles_and_all_else_is_theirs(
    name: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    theirs = run(model).loss_dict
    keys = set(model.state_dict())
    calls: list[tuple[Tensor, Tensor, Any]] = []
    ranked = shared.ranked

    def spy(head_loss: Any, logits: Tensor, boxes: Tensor, targets: Any, indices: Any, groups: int) -> Any:
        calls.append((logits, boxes, indices))
        assert groups == (GROUPS if name == "LwDetr" else 1)
        return ranked(head_loss, logits, boxes, targets, indices, groups)

    monkeypatch.setattr(shared, "ranked", spy)
    losses = use_ranking_loss(model, loss, period=100 if loss == "alrp" else None, backend="torch")  # pyright: ignore[reportArgumentType]
    out = run(model)
    ours = out.loss_dict
    assert set(ours) == set(theirs)
    values = [value for key, value in ours.items() if key.startswith(CLASS_KEYS)]
    assert len(values) == len(calls) == len(losses)
    for value, (logits, boxes, indices) in zip(values, calls, strict=True):
        assert_near(value, expected(loss, logits, boxes, indices, GROUPS if name == "LwDetr" else 1), 1e-5, "a ranking")
    replaced = (*CLASS_KEYS, "loss_giou") if loss == "alrp" else CLASS_KEYS
    for key, value in ours.items():
        if not key.startswith(replaced):
            assert_near(value, theirs[key], 1e-5, key)
    out.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert {key for key in model.state_dict() if not key.startswith("ranking_loss.")} == keys
    remove_ranking_loss(model)
    assert set(model.state_dict()) == keys
    assert all(torch.equal(value, theirs[key]) for key, value in run(model).loss_dict.items())


@pytest.mark.parametrize("name", ["RTDetr", "DeformableDetr"])
def test_gradients_and_matching_by_hand(name: str) -> None:
    """Called as the model calls it: one layer, its own matcher, losses and gradients of logits and boxes."""
    model = build(name, **({"num_denoising": 0} if name == "RTDetr" else {}))
    model.config.auxiliary_loss = False
    matcher = (
        RTDetrHungarianMatcher(model.config)
        if name == "RTDetr"
        else DeformableDetrHungarianMatcher(model.config.class_cost, model.config.bbox_cost, model.config.giou_cost)
    )
    losses = use_ranking_loss(model, period=100, backend="torch")
    torch.manual_seed(3)
    logits = torch.randn(len(LABELS), QUERIES, CLASSES, requires_grad=True)
    boxes = (torch.rand(len(LABELS), QUERIES, 4) * 0.5 + 0.2).requires_grad_()
    total, values, _ = model.loss_function(logits, LABELS, logits.device, boxes, model.config)
    total.backward()

    indices = matcher({"logits": logits, "pred_boxes": boxes}, LABELS)
    again = boxes.detach().clone().requires_grad_()
    dense, errors, _ = by_hand(logits, again, indices)
    oracle = alrp_loss(logits.detach().numpy(), dense, errors.detach().numpy())
    lengths = [(again[i, q] - LABELS[i]["boxes"][o]).abs().sum() for i, (q, o) in enumerate(indices)]
    l1 = torch.stack(lengths).sum() / sum(len(each["boxes"]) for each in LABELS)
    assert_near(values["loss_giou"], 50 * oracle.localisation, 1e-5, "localisation, of initial weight")
    cls = next(value for key, value in values.items() if key.startswith(CLASS_KEYS))
    assert_near(total, float((cls + values["loss_giou"] + 5 * l1).detach()), 1e-5, "total")
    assert_near(cls, oracle.classification, 1e-5, "classification")
    (5 * l1 + 50 * (errors * torch.from_numpy(oracle.grad_box_errors)).sum()).backward()
    assert logits.grad is not None
    assert boxes.grad is not None
    assert again.grad is not None
    assert_gradient(logits.grad.flatten(), oracle.grad_logits, 1e-5)
    assert_near(boxes.grad, again.grad, 1e-5, "gradient of boxes")
    assert float(losses["last"].box_weight) == pytest.approx(50)


def test_ap_is_ranked_without_boxes() -> None:
    model = build("ConditionalDetr")
    use_ranking_loss(model, "ap", backend="torch")
    out = run(model)
    matcher = DeformableDetrHungarianMatcher(model.config.class_cost, model.config.bbox_cost, model.config.giou_cost)
    layer = {"logits": out.logits, "pred_boxes": out.pred_boxes}
    assert_near(out.loss_dict["loss_ce"], expected("ap", out.logits, out.pred_boxes, matcher(layer, LABELS)), 1e-5)


def test_nothing_in_any_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("RTDetr")
    use_ranking_loss(model, period=100, backend="torch")
    monkeypatch.setattr(f"{__name__}.LABELS", [LABELS[1]] * 2)
    out = run(model)
    assert out.loss_dict["loss_vfl"] == 0
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_state_is_kept_for_each_layer() -> None:
    model = build("RTDetr")
    losses = use_ranking_loss(model, period=2, backend="torch")
    assert len(losses) == 2 * LAYERS + 1
    for seed in range(2):
        run(model, seed)
    weights = [float(each.box_weight) for each in losses.values()]
    assert len(set(weights)) > 1
    assert 50.0 not in weights
    resumed = pickle.loads(pickle.dumps(model))
    fresh = use_ranking_loss(resumed, period=2, backend="torch")
    fresh.load_state_dict(losses.state_dict())
    assert_near(run(resumed, 5).loss, run(model, 5).loss, 1e-6)
    before = copy.deepcopy(losses.state_dict())
    with torch.no_grad():
        run(model)
    assert all(torch.equal(value, before[key]) for key, value in losses.state_dict().items())
    run(model.eval())  # a validation loss with gradients, and that of a copy
    run(copy.deepcopy(model.train()).eval())
    assert all(torch.equal(value, before[key]) for key, value in losses.state_dict().items())
    run(model.train())
    assert any(not torch.equal(value, before[key]) for key, value in losses.state_dict().items())


def RTDetrForObjectDetectionLoss(  # noqa: N802
    logits: Any, labels: Any, device: Any, pred_boxes: Any, config: Any, **kwargs: Any
) -> Any:
    """Of a transformers before 5.18, as far as it matters: queries of denoising are in the main loss."""
    values = RTDetrLoss(config)({"logits": logits, "pred_boxes": pred_boxes}, labels)
    return sum(values.values()), values, None


def test_queries_of_denoising_are_no_detections() -> None:
    torch.manual_seed(3)
    logits, boxes = torch.randn(3, QUERIES + 8, CLASSES), torch.rand(3, QUERIES + 8, 4) * 0.5 + 0.2
    model = build("RTDetr")
    results: list[Any] = []
    for first in (0, 8):
        model.loss_function = RTDetrForObjectDetectionLoss
        use_ranking_loss(model, period=100, backend="torch")
        meta = {"dn_num_split": [8, QUERIES]}
        _, values, _ = model.loss_function(
            logits[:, first:], LABELS, "cpu", boxes[:, first:], model.config, denoising_meta_values=meta
        )
        results.append(values)
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_deimv2_without_auxiliary_losses_leaves_denoising_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """There transformers itself has its queries in the main loss, in all versions so far."""
    seen: list[tuple[int, ...]] = []
    ranked = shared.ranked

    def spy(head_loss: Any, logits: Tensor, *rest: Any) -> Any:
        seen.append(tuple(logits.shape))
        return ranked(head_loss, logits, *rest)

    monkeypatch.setattr(shared, "ranked", spy)
    model = build("Deimv2", auxiliary_loss=False)
    use_ranking_loss(model, period=100, backend="torch")
    run(model).loss.backward()
    assert seen == [(len(LABELS), QUERIES, CLASSES)]


def test_nothing_is_left_of_a_step() -> None:
    """Without the garbage collector: a criterion, which may hold tensors, is gone as it is without a ranking loss."""
    model = build("DFine")
    use_ranking_loss(model, period=100, backend="torch")
    gc.collect()
    gc.disable()
    try:
        run(model)
        assert not [each for each in gc.get_objects() if issubclass(type(each), RTDetrLoss)]
    finally:
        gc.enable()


def test_losses_have_names() -> None:
    model = build("RTDetr")
    losses = use_ranking_loss(model, period=100, backend="torch")
    assert list(losses) == ["last", "auxiliary_0", "encoder", "denoising_0", "denoising_1"]
    run(model)
    assert list(losses) == ["last", "auxiliary_0", "encoder", "denoising_0", "denoising_1"]
    assert all(float(each.box_error) > 0 for each in losses.values())
    with pytest.raises(ValueError, match=r"losses by number, '0.balance.weight', as version 0.5"):
        losses.load_state_dict({"0.balance.weight": torch.tensor(1.0)})
    kept = losses.state_dict()
    half = copy.deepcopy(model).half()
    assert all(value.dtype == kept[name].dtype for name, value in half.ranking_loss.state_dict().items())
    assert model.ranking_loss is losses
    again = use_ranking_loss(model, "ap")
    assert model.ranking_loss is again
    remove_ranking_loss(model)
    assert not hasattr(model, "ranking_loss")


def test_what_cannot_be_ranked_is_refused() -> None:
    softmax = build("Detr")
    with pytest.raises(TypeError, match="sigmoid; DetrForObjectDetection has a softmax with a 'no object' class"):
        use_ranking_loss(softmax, period=1)
    assert softmax.loss_function.__name__ == "ForObjectDetectionLoss"
    with pytest.raises(TypeError, match="model must be a detector"):
        use_ranking_loss(torch.nn.Linear(1, 1), period=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="ResNetForImageClassification has ForSequenceClassificationLoss"):
        use_ranking_loss(hf.ResNetForImageClassification(softmax.config.backbone_config), period=1)
    model = build("RTDetr")
    with pytest.raises(ValueError, match="period must be given"):
        use_ranking_loss(model)
    with pytest.raises(ValueError, match="box_weight is for loss 'alrp'"):
        use_ranking_loss(model, "ap", box_weight=1.0)
    model.config.use_focal_loss = False
    with pytest.raises(ValueError, match="use_focal_loss=False"):
        use_ranking_loss(model, "ap")
    assert model.loss_function.__name__ == "RTDetrForObjectDetectionLoss"
