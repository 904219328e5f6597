"""Ranking losses in criteria by shape: RF-DETR's own, and small ones that call as those of RT-DETR and D-FINE do."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

pytest.importorskip("torchvision.ops", reason="the integrations need torchvision", exc_type=ImportError)
pytest.importorskip("scipy", reason="queries are matched by scipy", exc_type=ImportError)

from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou_loss

from alrp_triton import alrp_loss, ap_loss, rank_sort_loss
from alrp_triton.integrations.box_errors import paired_iou
from alrp_triton.integrations.detr import remove_ranking_loss, use_ranking_loss
from tests.support.compare import assert_near

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES, QUERIES, LAYERS, GROUPS = 5, 12, 3, 4
TARGETS = [
    {"labels": torch.tensor([1, 3]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.5, 0.3, 0.4]])},
    {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},  # nothing there
    {"labels": torch.tensor([4]), "boxes": torch.tensor([[0.5, 0.5, 0.9, 0.8]])},
]
Output = dict[str, Any]
Pairs = list[tuple[Tensor, Tensor]]


def output(seed: int, queries: int = QUERIES) -> Output:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(TARGETS), queries, CLASSES, generator=generator)
    boxes = torch.rand(len(TARGETS), queries, 4, generator=generator) * 0.5 + 0.2
    return {"pred_logits": logits.requires_grad_(), "pred_boxes": boxes.requires_grad_()}


def match(outputs: Output, targets: Any, groups: int = 1) -> Pairs:
    """One query for each object, in each group."""
    pairs: Pairs = []
    size = outputs["pred_logits"].shape[1] // groups
    for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True):
        cost = torch.cdist(boxes, target["boxes"], p=1) - logits.sigmoid()[:, target["labels"]]
        parts = [linear_sum_assignment(part) for part in cost.detach().numpy().reshape(groups, size, -1)]
        queries = [torch.as_tensor(rows) + size * group for group, (rows, _) in enumerate(parts)]
        pairs.append((torch.cat(queries), torch.cat([torch.as_tensor(columns) for _, columns in parts])))
    return pairs


class Criterion(nn.Module):
    """What RT-DETR's and D-FINE's criteria have in common."""

    def __init__(self, kind: str = "vfl", losses: tuple[str, ...] = ("vfl", "boxes")) -> None:
        super().__init__()
        self.kind, self.losses, self.num_classes = kind, losses, CLASSES
        self.weight_dict = {f"loss_{kind}": 2.0, "loss_bbox": 5.0, "loss_giou": 3.0}
        self.register_buffer("empty_weight", torch.ones(CLASSES + 1))

    def loss_labels_vfl(
        self, outputs: Output, targets: Any, indices: Pairs, num_boxes: Any, values: Any = None
    ) -> Output:
        return {f"loss_{self.kind}": outputs["pred_logits"].sigmoid().sum() / num_boxes}

    def loss_boxes(
        self, outputs: Output, targets: Any, indices: Pairs, num_boxes: Any, boxes_weight: Any = None
    ) -> Output:
        pairs = [
            (boxes[queries], target["boxes"][objects])
            for boxes, target, (queries, objects) in zip(outputs["pred_boxes"], targets, indices, strict=True)
        ]
        own, others = (torch.cat(each) for each in zip(*pairs, strict=True))
        corners = [box_convert(each, "cxcywh", "xyxy") for each in (own, others)]
        giou = generalized_box_iou_loss(corners[0], corners[1], reduction="sum")
        return {"loss_bbox": (own - others).abs().sum() / num_boxes, "loss_giou": giou / num_boxes}

    def get_loss(
        self, loss: str, outputs: Output, targets: Any, indices: Pairs, num_boxes: Any, **kwargs: Any
    ) -> Output:
        methods: dict[str, Callable[..., Output]] = {"vfl": self.loss_labels_vfl, "boxes": self.loss_boxes}
        return methods[loss](outputs, targets, indices, num_boxes, **kwargs)

    def weighted(
        self, suffix: str, outputs: Output, targets: Any, indices: Pairs, union: Pairs | None = None
    ) -> Output:
        values: Output = {}
        for loss in self.losses:
            pairs = union if union is not None and loss == "boxes" else indices
            found = self.get_loss(loss, outputs, targets, pairs, 3.0)
            values |= {
                key + suffix: each * self.weight_dict[key] for key, each in found.items() if key in self.weight_dict
            }
        return values


class LikeRTDetr(Criterion):
    """The last layer, the auxiliary ones, denoising where there is any, the encoder."""

    def forward(self, outputs: Output, targets: Any) -> Output:
        without = {key: value for key, value in outputs.items() if "aux" not in key}
        values = self.weighted("", outputs, targets, match(without, targets))
        for number, each in enumerate(outputs["aux_outputs"]):
            values |= self.weighted(f"_aux_{number}", each, targets, match(each, targets))
        for number, each in enumerate(outputs.get("dn_aux_outputs", [])):
            values |= self.weighted(f"_dn_{number}", each, targets, outputs["dn_meta"])
        for number, each in enumerate(outputs["enc_aux_outputs"]):
            values |= self.weighted(f"_enc_{number}", each, targets, match(each, targets))
        return values


class LikeDFine(Criterion):
    """Boxes are trained with the pairs of all layers, classes with those of their own; ``pre_outputs`` come third."""

    def get_loss(
        self, loss: str, outputs: Output, targets: Any, indices: Pairs, num_boxes: Any, **kwargs: Any
    ) -> Output:
        kwargs = {"vfl": {"values": torch.ones(1)}, "boxes": {"boxes_weight": torch.ones(1)}}[loss]
        return super().get_loss(loss, outputs, targets, indices, num_boxes, **kwargs)

    def forward(self, outputs: Output, targets: Any, **kwargs: Any) -> Output:
        layers = [("", outputs)]
        layers += [(f"_aux_{number}", each) for number, each in enumerate(outputs["aux_outputs"])]
        layers.append(("_pre", outputs["pre_outputs"]))
        pairs = [match(each, targets) for _, each in layers]
        union = [tuple(torch.cat(sides) for sides in zip(*image, strict=True)) for image in zip(*pairs, strict=True)]
        values: Output = {}
        for (suffix, each), own in zip(layers, pairs, strict=True):
            values |= self.weighted(suffix, each, targets, own, cast("Pairs", union))
        for number, each in enumerate(outputs.get("dn_outputs", [])):
            values |= self.weighted(f"_dn_{number}", each, targets, outputs["dn_meta"])
        if "dn_pre_outputs" in outputs:
            values |= self.weighted("_dn_pre", outputs["dn_pre_outputs"], targets, outputs["dn_meta"])
        return values


def rt_detr_outputs(denoising: bool = True) -> Output:
    found = {**output(0), "aux_outputs": [output(1), output(2)], "enc_aux_outputs": [output(3)]}
    if denoising:
        found |= {"dn_aux_outputs": [output(4, 6), output(5, 6), output(6, 6)], "dn_meta": match(output(4, 6), TARGETS)}
    return found


def d_fine_outputs() -> Output:
    found = {**output(0), "aux_outputs": [output(1)], "pre_outputs": output(2), "dn_outputs": [output(3, 6)]}
    return found | {"dn_pre_outputs": output(4, 6), "dn_meta": match(output(3, 6), TARGETS)}


def numbers(values: Output) -> dict[str, float]:
    return {name: value.detach().item() for name, value in values.items()}


def by_hand(loss: str, outputs: Output, pairs: Pairs, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Class loss and raw box loss, from dense targets; each group by a call of its own, weighted by its positives."""
    logits, size = outputs["pred_logits"], outputs["pred_logits"].shape[1] // groups
    sums: list[Tensor] = [torch.zeros(()), torch.zeros(())]
    count = 0
    for group in range(groups):
        dense = torch.zeros(len(TARGETS), size, CLASSES)
        found: list[tuple[int, tuple[Tensor, Tensor]]] = []
        for image, (queries, objects) in enumerate(pairs):
            for query, each in zip((queries - size * group).tolist(), objects.tolist(), strict=True):
                if 0 <= query < size:
                    label = int(TARGETS[image]["labels"][each])
                    dense[image, query, label] = 1
                    own, other = outputs["pred_boxes"][image, size * group + query], TARGETS[image]["boxes"][each]
                    corners = [box_convert(box[None].double(), "cxcywh", "xyxy") for box in (own, other)]
                    place = (image * size + query) * CLASSES + label
                    found.append(
                        (place, (generalized_box_iou_loss(corners[0], corners[1])[0], paired_iou(*corners)[0]))
                    )
        found.sort(key=lambda each: each[0])
        scores = logits[:, size * group : size * (group + 1)]
        gious, ious = (torch.stack([each[k] for _, each in found]).float() for k in (0, 1))
        if loss == "alrp":
            out = alrp_loss(scores, dense, gious / 2 / 0.5, backend="torch")
            parts = (out.classification, out.localisation)
        elif loss == "ap":
            parts = (ap_loss(scores, dense, backend="torch"), torch.zeros(()))
        else:
            parts = (rank_sort_loss(scores, dense, ious, backend="torch").total, torch.zeros(()))
        sums = [total + part * len(found) for total, part in zip(sums, parts, strict=True)]
        count += len(found)
    return sums[0] / count, sums[1] / count


def all_of(outputs: Output) -> dict[str, Output]:
    named = {"": outputs}
    for key, suffix in (
        ("aux_outputs", "_aux"),
        ("dn_aux_outputs", "_dn"),
        ("enc_aux_outputs", "_enc"),
        ("dn_outputs", "_dn"),
    ):
        named |= {f"{suffix}_{number}": each for number, each in enumerate(outputs.get(key, []))}
    return named | {
        suffix: outputs[key]
        for key, suffix in (("pre_outputs", "_pre"), ("dn_pre_outputs", "_dn_pre"))
        if key in outputs
    }


@pytest.mark.parametrize("loss", ["alrp", "ap", "rank_sort"])
@pytest.mark.parametrize("kind", ["rt_detr", "d_fine"])
@pytest.mark.parametrize("order", [("vfl", "boxes"), ("boxes", "vfl")])
def test_each_output_is_a_ranking_of_its_own(loss: Any, kind: str, order: Any) -> None:
    criterion = LikeRTDetr("vfl", order) if kind == "rt_detr" else LikeDFine("mal", order)
    outputs, key = (rt_detr_outputs(), "loss_vfl") if kind == "rt_detr" else (d_fine_outputs(), "loss_mal")
    theirs = criterion(outputs, TARGETS)
    losses = use_ranking_loss(criterion, loss, period=100, backend="torch")
    ours = criterion(outputs, TARGETS)
    assert set(ours) == set(theirs)
    names = {"rt_detr": ["last", "auxiliary_0", "auxiliary_1", "denoising_0", "denoising_1", "denoising_2", "encoder_0"],
             "d_fine": ["last", "auxiliary_0", "pre", "denoising_0", "denoising_pre"]}[kind]  # fmt: skip
    assert list(losses) == names
    again = copy.deepcopy(outputs)
    expected: list[Tensor] = []
    for suffix, each in all_of(again).items():
        pairs = outputs["dn_meta"] if "dn" in suffix else match(each, TARGETS)
        classification, box = by_hand(loss, each, pairs)
        assert_near(ours[key + suffix], 2 * classification, 1e-5, key + suffix)
        assert_near(ours["loss_bbox" + suffix], theirs["loss_bbox" + suffix], 0, "L1 stays")
        giou = 50 * box if loss == "alrp" else theirs["loss_giou" + suffix]
        assert_near(ours["loss_giou" + suffix], giou, 1e-5, "loss_giou" + suffix)
        expected += [2 * classification] + ([50 * box] if loss == "alrp" else [])
    # Boxes whose loss is the library's own have the library's weight, and none of ours to report.
    assert all(math.isnan(each.box_weight) == (loss != "alrp") for each in losses.values())
    replaced = (key, "loss_giou") if loss == "alrp" else key
    torch.stack([value for name, value in ours.items() if name.startswith(replaced)]).sum().backward()
    torch.stack(expected).sum().backward()
    for each, other in zip(all_of(outputs).values(), all_of(again).values(), strict=True):
        assert_near(each["pred_logits"].grad, other["pred_logits"].grad, 1e-5, "gradient of logits")
        if loss == "alrp":
            assert_near(each["pred_boxes"].grad, other["pred_boxes"].grad, 1e-5, "gradient of boxes")
    remove_ranking_loss(criterion)
    assert numbers(criterion(outputs, TARGETS)) == numbers(theirs)
    assert list(vars(criterion)["_modules"]) == []
    assert criterion.weight_dict["loss_giou"] == 3.0
    assert not {"forward", "loss_boxes", "loss_labels_vfl"} & set(vars(criterion))
    remove_ranking_loss(criterion)


def test_outputs_have_names_wherever_they_are() -> None:
    """Inside of others, as DINO has its denoising; made anew by the criterion, where no name is known; outside of it."""

    class Elsewhere(Criterion):
        def forward(self, outputs: Output, targets: Any) -> Output:
            values = self.weighted("", dict(outputs), targets, match(outputs, targets))
            inside = outputs["dn_meta"]["known"]
            for number, each in enumerate([inside, *inside["aux_outputs"]]):
                values |= self.weighted(f"_dn_{number}", each, targets, match(each, targets))
            anew = {key: value[:, 2:] for key, value in outputs.items() if key.startswith("pred")}
            return values | self.weighted("_anew", anew, targets, match(anew, targets))

    criterion = Elsewhere()
    losses = use_ranking_loss(criterion, "ap", backend="torch")
    criterion({**output(0), "dn_meta": {"known": {**output(1), "aux_outputs": [output(2)]}}}, TARGETS)
    assert list(losses) == ["last", "denoising_meta_known", "denoising_meta_known_auxiliary_0", "other_3"]
    use_ranking_loss(criterion, "ap", backend="torch")
    found = criterion.get_loss("vfl", output(0), TARGETS, match(output(0), TARGETS), 1.0)
    assert_near(found["loss_vfl"], by_hand("ap", output(0), match(output(0), TARGETS))[0], 1e-6)


def test_state_goes_with_the_criterion() -> None:
    """In its state_dict, also before an output was seen; without denoising in a step nothing is mixed up."""
    criterion = LikeRTDetr()
    losses = use_ranking_loss(criterion, period=2, backend="torch")
    for denoising in (True, False, True):
        criterion(rt_detr_outputs(denoising), TARGETS)
    assert {name: int(each.balance.steps) for name, each in losses.items() if each.balance is not None} == {
        name: 0 if "denoising" in name else 1 for name in losses
    }
    fresh = LikeRTDetr()
    of_fresh = use_ranking_loss(fresh, period="later", backend="torch")
    assert list(of_fresh) == ["last"]
    fresh.load_state_dict(criterion.state_dict())
    of_fresh.set_period(2)
    copies = [fresh, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion).half()]
    expected = criterion(rt_detr_outputs(), TARGETS)
    for each in copies:
        assert numbers(each(rt_detr_outputs(), TARGETS)) == numbers(expected)
        assert all(
            torch.equal(value, each.state_dict()[name])
            for name, value in criterion.state_dict().items()
            if "ranking_loss" in name
        )
    unseen = use_ranking_loss(fresh, period=2, backend="torch")
    with torch.inference_mode():  # Lightning validates before it trains
        fresh.eval()(rt_detr_outputs(), TARGETS)
    fresh.train()(rt_detr_outputs(), TARGETS)
    assert all(each.balance is not None and each.balance.steps == 1 for each in unseen.values())
    later = use_ranking_loss(fresh, period="later", backend="torch")
    later.set_period(7)
    fresh(rt_detr_outputs(), TARGETS)
    assert {each.period for each in later.values()} == {7}
    before = copy.deepcopy(criterion.state_dict())
    criterion.eval()(rt_detr_outputs(), TARGETS)  # a validation loss
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())
    state = {"0.balance.weight": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"by number, '0.balance.weight'.*such as 'last', 'auxiliary_0'"):
        losses.load_state_dict(state)


def test_averages_of_weights_that_begin_before_the_first_step() -> None:
    """As RF-DETR's do by default: a copy that has not seen the outputs, loaded back at the end, and by a run that goes on."""
    criterion = LikeRTDetr()
    losses = use_ranking_loss(criterion, "alrp", period=100, backend="torch")
    average: Any = AveragedModel(criterion)
    criterion(rt_detr_outputs(), TARGETS)
    seen = list(losses)
    state = copy.deepcopy(average.state_dict())
    AveragedModel(criterion).load_state_dict(state)
    criterion.load_state_dict(average.module.state_dict())
    assert list(losses) == ["last"]
    assert losses["last"].balance is not None
    assert losses["last"].balance.steps == 0
    criterion(rt_detr_outputs(), TARGETS)
    assert list(losses) == seen
    with pytest.raises(
        RuntimeError, match=r"Missing key.*ranking_loss\.auxiliary_0"
    ):  # what is no state of them is none
        criterion.load_state_dict({})


def rf_detr(**settings: Any) -> Any:
    """Its own criterion and matcher."""
    pytest.importorskip("rfdetr", reason="RF-DETR is a user's, not the package's", exc_type=ImportError)
    from rfdetr.models.criterion import SetCriterion
    from rfdetr.models.matcher import HungarianMatcher

    weights = {
        f"loss_{name}{suffix}": weight
        for name, weight in (("ce", 1.0), ("bbox", 5.0), ("giou", 2.0))
        for suffix in ("", "_0", "_enc")
    }
    matcher = HungarianMatcher(cost_class=2, cost_bbox=5, cost_giou=2, focal_alpha=0.25)
    losses = ["labels", "boxes", "cardinality"]
    return SetCriterion(CLASSES, matcher, weights, 0.25, losses, group_detr=GROUPS, ia_bce_loss=True, **settings)


def rf_detr_outputs(groups: int = GROUPS) -> Output:
    layers = [output(seed, QUERIES * groups) for seed in range(3)]
    return {**layers[0], "aux_outputs": [layers[1]], "enc_outputs": layers[2]}


@pytest.mark.parametrize("loss", ["alrp", "rank_sort"])
@pytest.mark.parametrize("training", [True, False])
def test_rf_detr_ranks_its_groups_apart(loss: Any, training: bool) -> None:
    groups = GROUPS if training else 1
    criterion, outputs = rf_detr().train(training), rf_detr_outputs(groups)
    theirs = criterion(outputs, TARGETS)
    weights = criterion.weight_dict
    losses = use_ranking_loss(criterion, loss, period=100, backend="torch")
    ours = criterion(outputs, TARGETS)
    assert set(ours) == set(theirs)
    assert list(losses) == ["last", "auxiliary_0", "encoder"]
    again = rf_detr_outputs(groups)
    total: list[Tensor] = []
    for suffix, each in {"": again, "_0": again["aux_outputs"][0], "_enc": again["enc_outputs"]}.items():
        pairs = criterion.matcher(each, TARGETS, group_detr=groups)
        classification, box = by_hand(loss, each, pairs, groups)
        assert_near(ours["loss_ce" + suffix], classification, 1e-5, "loss_ce" + suffix)
        if loss == "alrp":
            assert_near(ours["loss_giou" + suffix], 50 * box, 1e-5, "loss_giou" + suffix)
        total += [classification, 50 * box]
    replaced = ("loss_ce", "loss_giou") if loss == "alrp" else ("loss_ce",)
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {
        name for name in ours if name.startswith(replaced)
    }
    assert {name: value for name, value in criterion.weight_dict.items() if value != weights[name]} == (
        {"loss_giou": 1, "loss_giou_0": 1, "loss_giou_enc": 1} if loss == "alrp" else {}
    )
    torch.stack([value for name, value in ours.items() if name.startswith(replaced)]).sum().backward()
    torch.stack(total).sum().backward()
    assert_near(outputs["pred_logits"].grad, again["pred_logits"].grad, 1e-5, "gradient of logits")
    if loss == "alrp":
        assert_near(outputs["pred_boxes"].grad, again["pred_boxes"].grad, 1e-5, "gradient of boxes")
    criterion.weight_dict["loss_bbox"] = 7.0  # meanwhile
    remove_ranking_loss(criterion)
    assert numbers(criterion(outputs, TARGETS)) == numbers(theirs)
    assert criterion.weight_dict is weights
    assert weights["loss_bbox"] == 7
    assert weights["loss_giou"] == 2


def test_rf_detr_may_divide_by_the_number_of_boxes_itself() -> None:
    criterion, outputs = rf_detr(), rf_detr_outputs()
    use_ranking_loss(criterion, "rank_sort", backend="torch")
    own, whole = criterion(outputs, TARGETS), criterion(outputs, TARGETS, num_boxes=torch.ones(()))
    number = criterion.num_boxes_for_targets(outputs, TARGETS)
    assert number == GROUPS * 3
    for name, value in own.items():
        assert_near(whole[name], value * (number if name.startswith("loss") else 1), 1e-6, name)


def test_rf_detr_may_fill_targets_up() -> None:
    """To one size, with boxes that are none: they are no positives."""
    filled = [
        {
            "labels": torch.cat([target["labels"], torch.zeros(3 - len(target["labels"]), dtype=torch.int64)]),
            "boxes": torch.cat([target["boxes"], torch.full((3 - len(target["labels"]), 4), 0.5)]),
            "valid": torch.arange(3) < len(target["labels"]),
        }
        for target in TARGETS
    ]
    criterion, outputs = rf_detr(), rf_detr_outputs()
    use_ranking_loss(criterion, period=100, backend="torch")
    ours, theirs = criterion(outputs, filled), criterion(outputs, TARGETS)
    assert all(ours[name].isclose(theirs[name]) for name in ours if name.startswith("loss"))


def test_rf_detr_that_compiles_its_losses_calls_them_one_by_one() -> None:
    criterion = rf_detr()
    use_ranking_loss(criterion, period=100)
    assert criterion._can_batch_detection_losses([], []) is False
    remove_ranking_loss(criterion)
    assert "_can_batch_detection_losses" not in vars(criterion)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_that_are_no_classes(label: int) -> None:
    """The matching may let them pass; in the ranking they would stand for what is ignored, or for the background."""
    criterion = Criterion()
    use_ranking_loss(criterion, "rank_sort", backend="torch")
    targets = [{**target, "labels": target["labels"].clone()} for target in TARGETS]
    pairs = match(output(0), TARGETS)
    image = next(index for index, target in enumerate(targets) if len(target["labels"]))
    targets[image]["labels"][0] = label
    with pytest.raises(
        ValueError, match=rf"labels of targets must be in 0\.\.{CLASSES - 1}, got \[{label}\] in image {image}"
    ):
        criterion.get_loss("vfl", output(0), targets, pairs, 1.0)


def test_what_is_no_such_criterion_is_refused() -> None:
    criterion = LikeRTDetr()
    before = dict(vars(criterion))
    with pytest.raises(TypeError, match="criterion must be a module"):
        use_ranking_loss(cast("Any", object()))
    with pytest.raises(TypeError, match=r"method loss_labels or loss_labels_\*; Linear has none"):
        use_ranking_loss(nn.Linear(1, 1), period=1)
    with pytest.raises(ValueError, match="period must be given"):
        use_ranking_loss(criterion)
    with pytest.raises(ValueError, match=r"box_weight is for loss 'alrp'.*'ap'"):
        use_ranking_loss(criterion, "ap", box_weight=1.0)
    criterion.losses = ("labels", "boxes")
    with pytest.raises(TypeError, match="softmax with a 'no object' class"):
        use_ranking_loss(criterion, period=1)
    criterion.losses = ("vfl", "boxes")
    del criterion.weight_dict["loss_giou"]
    with pytest.raises(ValueError, match=r"a weight for 'loss_giou'.*'loss_vfl', 'loss_bbox'"):
        use_ranking_loss(criterion, period=1)
    assert vars(criterion) == before

    class Other(LikeRTDetr):
        def loss_labels_mal(self, logits: Tensor) -> Tensor:
            return logits

    with pytest.raises(
        TypeError, match=r"loss_labels_mal\(outputs, targets, indices, num_boxes, ...\); Other has \(logits\)"
    ):
        use_ranking_loss(Other(), "ap")
    use_ranking_loss(criterion, "ap")
    criterion.num_classes = CLASSES - 1
    with pytest.raises(ValueError, match=r"sigmoid for each of 4 classes, got shape \(3, 12, 5\)"):
        criterion(rt_detr_outputs(), TARGETS)
    criterion.losses = ("boxes",)
    with pytest.raises(RuntimeError, match="nothing was ranked: LikeRTDetr has not called loss_labels_vfl"):
        criterion(rt_detr_outputs(), TARGETS)
