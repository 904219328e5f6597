"""docs/published.md: what it says that the code has is what the code does, row by row."""

# pyright: reportPrivateUsage=false

import inspect
import math
import re
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from io import StringIO
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from alrp_triton import SelfBalance, alrp_loss, ap_loss, giou_localisation_error, rank_sort_loss
from tests.support.processes import ROOT

pytest.importorskip("torchvision.ops", exc_type=ImportError)
from torchvision.ops import generalized_box_iou_loss

from alrp_triton.integrations import torchvision as of_torchvision
from alrp_triton.integrations.atss import atss_match
from alrp_triton.integrations.head_loss import Boxes, HeadLoss, Loss
from alrp_triton.integrations.masks import dice_error, draw_masks
from alrp_triton.integrations.torchvision import use_ranking_loss
from tests.support.torchvision_models import faster_rcnn, retinanet

PAGE = (ROOT / "docs" / "published.md").read_text()


class Row:
    """Of the tables "Losses", "Heads" and "Recipe of the trainer"."""

    def __init__(self, line: str) -> None:
        self.name, self.published, self.here, self.note = (cell.strip() for cell in line.strip("|\n").split("|"))


def rows(section: str) -> dict[str, Row]:
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return {row.name: row for row in map(Row, lines)}


def number(value: Any) -> str:
    return f"{float(value):g}"


def default(function: Callable[..., Any], name: str) -> Any:
    return inspect.signature(function).parameters[name].default


SQUARES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 8, 10], [2, 0, 10, 9]])
TRUE = torch.tensor([[0.0, 0, 10, 10]] * 3)


def head(loss: Loss, deltas: list[float] | None = None, **settings: Any) -> tuple[HeadLoss, Any, Tensor]:
    """Three positives among six anchors of two classes; the loss, what it gives, and its gradient in the logits."""
    part = HeadLoss(loss, period=10, **settings)
    logits = torch.tensor([[0.0, 3], [1, -1], [2, 0], [0.5, 0], [1, 1], [-1, 0.25]], requires_grad=True)
    targets = torch.tensor([0, 0, 1, 2, 2, 2])
    off = torch.tensor([deltas or [0.0, 0, 0, 0]] * 3)
    out = part(logits, targets, Boxes(SQUARES, TRUE, off, torch.zeros_like(off)))
    (gradient,) = torch.autograd.grad(out.classification, logits)
    return part, out, gradient


def tied() -> str:
    """Two tied positives with errors 1 and 0: the second counts the first by what is asked for; ranks are 1.5."""
    localisation = alrp_loss(torch.zeros(2), torch.ones(2), torch.tensor([1.0, 0.0])).localisation
    return number(2 * 1.5 * localisation - 1)


def of_iou_zero() -> str:
    out = rank_sort_loss(torch.zeros(2), torch.tensor([1, 0]), torch.zeros(1))
    return "positive" if out.ranking > 0 else "negative"


def without_positives() -> str:
    logits = torch.randn(5, requires_grad=True)
    total = rank_sort_loss(logits, torch.zeros(5)).total + ap_loss(logits, torch.zeros(5))
    (gradient,) = torch.autograd.grad(total, logits)
    return "0" if not gradient.any() else "not 0"


def smooth_l1() -> str:
    """Of one delta that is off by 4, and three that are right: 3.5 in all."""
    _, out, _ = head("ap", [4.0, 0, 0, 0])
    return {0.875: "mean of 4 deltas", 3.5: "sum of 4 deltas"}[out.box.item()]


def beta() -> str:
    """Off by d < beta: d^2 / 2 / beta, mean of four."""
    _, out, _ = head("ap", [0.5, 0.5, 0.5, 0.5])
    return number(0.125 / out.box)


def without_period() -> str:
    with pytest.raises(ValueError, match="period must be given"):
        HeadLoss("alrp")
    return "none"


def empty_steps() -> str:
    balance = SelfBalance(1)
    balance(torch.zeros(()), torch.zeros(()))
    return "not counted" if balance.weight == 50 else "counted"


def saved() -> str:
    part, *_ = head("alrp")
    return "saved" if part.state_dict()["balance.steps"] == 1 else "not saved"


def box_weight() -> str:
    """The weight of a box by the scores of its anchor: the greatest, or that of its class."""
    part, out, _ = head("rank_sort")
    errors, scores = generalized_box_iou_loss(SQUARES, TRUE), torch.tensor([3.0, 1.0, 2.0]).sigmoid()
    mean = (errors * scores).sum() / scores.sum()
    return "greatest score" if torch.isclose(out.box / part.box_weight, mean, rtol=1e-5) else "another"


def by_value() -> str:
    _, out, _ = head("rank_sort")
    return "by value" if torch.isclose(out.box, out.classification) else "another"


def deviations(**settings: Any) -> str:
    model = retinanet()
    before = cast("Any", model.head.regression_head).box_coder.weights
    use_ranking_loss(model, period=1, **settings)
    coders = [cast("Any", model.head.regression_head).box_coder, model.box_coder]
    (weights,) = {coder.weights for coder in coders}
    return "the model's" if weights == before else ", ".join(number(1 / weight) for weight in weights)


def greatest_ratio() -> str:
    return number(math.exp(cast("Any", faster_rcnn().roi_heads).box_coder.bbox_xform_clip))


def ground_truths(loss: Loss) -> str:
    model = faster_rcnn()
    use_ranking_loss(model, loss, period=1)
    proposals = cast("Any", model.roi_heads).add_gt_proposals([torch.rand(5, 4)], [torch.rand(2, 4)])
    return {5: "no", 7: "yes"}[len(proposals[0])]


def sampled() -> str:
    model = faster_rcnn()
    use_ranking_loss(model, period=1)
    (kept,) = cast("Any", model.roi_heads).subsample([torch.arange(5000) % 3])
    return "all" if len(kept) == 5000 else str(len(kept))


def proposals() -> str:
    model = faster_rcnn()
    before = cast("Any", model.rpn)._post_nms_top_n
    use_ranking_loss(model, period=1)
    return "the model's" if cast("Any", model.rpn)._post_nms_top_n == before else "others"


def dice() -> str:
    """Where the mask is predicted exactly, x = t: 2 x^2 / (2 x^2 + eps) is one half for 2 x^2 = eps."""
    x = torch.full((1, 1, 1), math.sqrt(0.5e-5), dtype=torch.float64)
    return (
        number(1e-5) if torch.isclose(dice_error(x.logit(), x), torch.tensor(0.5, dtype=torch.float64)) else "another"
    )


def gradient_of_an_rpn() -> str:
    *_, gradient = head("alrp", tau=0.7)
    logits = torch.tensor([[0.0, 3], [1, -1], [2, 0], [0.5, 0], [1, 1], [-1, 0.25]], requires_grad=True)
    errors = giou_localisation_error(generalized_box_iou_loss(SQUARES, TRUE), 0.7)
    out = alrp_loss(logits, torch.tensor([0, 0, 1, 2, 2, 2]), errors)
    (plain,) = torch.autograd.grad(out.classification, logits)
    return "as it is" if torch.allclose(plain, gradient) else "scaled"


def prior() -> str:
    model = retinanet()
    layer = cast("Any", model.head).classification_head.cls_logits
    before = layer.bias.clone()
    use_ranking_loss(model, period=1)
    assert torch.allclose(before.sigmoid(), torch.tensor(0.01))
    return "the model's" if torch.equal(layer.bias, before) else "another"


HERE: dict[str, dict[str, Callable[[], str]]] = {
    "Losses": {
        "delta of aLRP Loss": lambda: number(default(alrp_loss, "delta")),
        "delta of AP Loss": lambda: number(default(ap_loss, "delta")),
        "delta of Rank & Sort Loss": lambda: number(default(rank_sort_loss, "delta")),
        "eps of aLRP Loss": lambda: number(default(alrp_loss, "eps")),
        "eps of Rank & Sort Loss": lambda: number(default(rank_sort_loss, "eps")),
        "precision of AP Loss": lambda: "interpolated" if default(ap_loss, "interpolate") else "plain",
        "a tied positive in aLRP's localisation": tied,
        "a positive of IoU 0 in Rank & Sort Loss": of_iou_zero,
        "gradient without positives": without_positives,
    },
    "Heads": {
        "tau of a detection head": lambda: number(use_ranking_loss(faster_rcnn(), period=1)["roi_heads"].tau),
        "tau of an RPN": lambda: number(use_ranking_loss(faster_rcnn(), period=1)["rpn"].tau),
        "weight of an RPN's losses": lambda: number(default(use_ranking_loss, "rpn_weight")),
        "box loss of aLRP Loss": lambda: HeadLoss("alrp", period=1).box_loss,
        "box loss of AP Loss": lambda: HeadLoss("ap").box_loss,
        "box loss of Rank & Sort Loss": lambda: HeadLoss("rank_sort").box_loss,
        "smooth L1 of a positive": smooth_l1,
        "beta of smooth L1": beta,
        "weight of AP Loss' box loss": lambda: number(head("ap")[0].box_weight),
        "first weight of aLRP's box loss": lambda: number(head("alrp")[0].box_weight),
        "period of self-balancing": without_period,
        "steps without positives": empty_steps,
        "state of self-balancing": saved,
        "weight of a box in Rank & Sort Loss": box_weight,
        "balance of Rank & Sort Loss": by_value,
        "deviations of deltas": deviations,
        "greatest ratio of a box to its anchor": greatest_ratio,
        "candidates of ATSS on a level": lambda: number(default(atss_match, "candidates")),
        "ground truths among proposals, aLRP Loss": lambda: ground_truths("alrp"),
        "ground truths among proposals, Rank & Sort Loss": lambda: ground_truths("rank_sort"),
        "proposals that train a box head": sampled,
        "proposals an image": proposals,
        "most masks of Rank & Sort Loss": lambda: number(draw_masks(torch.ones(1000, dtype=torch.bool)).sum()),
        "eps of dice": dice,
        "gradient of aLRP's RPN in the Rank & Sort repository": gradient_of_an_rpn,
        "prior of the class scores": prior,
    },
}


def trainer() -> dict[str, Callable[[], str]]:
    import yaml
    from lightning.pytorch import Trainer

    from alrp_triton.trainer import LEARNING_RATES, RankingDetector
    from alrp_triton.trainer.fitting import fit

    with redirect_stdout(StringIO()) as printed, suppress(SystemExit):
        fit(["--data.root", "x", "--out", "y", "--print_config"])
    config: Any = yaml.safe_load(printed.getvalue())
    model: Any = RankingDetector({1: "a"}, **config["model"])
    epochs = config["trainer"]["max_epochs"]
    model.trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    model.batches_per_epoch, model.images_per_step = 10, config["data"]["batch"]
    (optimizer,), _ = model.configure_optimizers()

    def down() -> str:
        steps = range(600, model.total_steps)
        rates = [round(model._share_of_lr(step), 12) for step in steps]
        falls = [600 + k + 1 for k, (one, other) in enumerate(pairwise(rates)) if other != one]
        return ", ".join(number(round(fall / model.total_steps, 3)) for fall in falls)

    def of(detector: str, loss: str) -> Callable[[], str]:
        return lambda: number(LEARNING_RATES[detector][loss])

    return {
        "optimiser": lambda: {torch.optim.SGD: "sgd"}[type(optimizer)],
        "momentum": lambda: number(optimizer.defaults["momentum"]),
        "weight decay": lambda: number(optimizer.defaults["weight_decay"]),
        "warm-up, steps": lambda: number(model.settings.warm_up),
        "steps down at, share of the epochs": down,
        "epochs": lambda: number(epochs),
        "images a step": lambda: number(model.images_per_step),
        "size of images": lambda: number(model.settings.size),
        "learning rate of aLRP, RetinaNet": of("retinanet", "alrp"),
        "learning rate of aLRP, Faster R-CNN": of("fasterrcnn", "alrp"),
        "learning rate of AP, RetinaNet": of("retinanet", "ap"),
        "learning rate of Rank & Sort, ATSS": of("retinanet", "rank_sort"),
        "learning rate of Rank & Sort, Faster R-CNN": of("fasterrcnn", "rank_sort"),
        "deviations of deltas": lambda: deviations(box_coder=model.settings.box_coder),
        "clipping of gradients": lambda: "none" if config["trainer"]["gradient_clip_val"] is None else "some",
    }


@pytest.mark.parametrize(("section", "name"), [(section, name) for section, of in HERE.items() for name in of])
def test_a_constant(section: str, name: str) -> None:
    assert rows(section)[name].here == HERE[section][name]()


def test_the_recipe_of_the_trainer() -> None:
    pytest.importorskip("tests.support.coco_data")
    found = trainer()
    assert {name: row.here for name, row in rows("Recipe of the trainer").items()} == {
        name: value() for name, value in found.items()
    }


def test_every_row_is_held_and_every_difference_explained() -> None:
    for section, of in HERE.items():
        assert list(rows(section)) == list(of)
    for section in (*HERE, "Recipe of the trainer"):
        for row in rows(section).values():
            assert row.note or row.published == row.here, row.name


def test_detectors_exist() -> None:
    text = PAGE.split("## Detectors\n")[1]
    for name in re.findall(r"`(Ranking\w+)`", text):
        source = "".join(path.read_text() for path in (ROOT / "alrp_triton" / "integrations").glob("mmdet*.py"))
        assert f"class {name}(" in source
    assert 'assignment="atss"' in text
    assert "atss" in of_torchvision.Assignment.__args__
