# pyright: reportMissingImports=false
"""A warm start in the criteria of Ultralytics: against those of two models more, without it and without a ranking."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.test_ultralytics import extras
from tests.support.compare import assert_blend
from tests.support.ultralytics_models import batch_of, build

# Imported there first, with settings.
# isort: split
from ultralytics import YOLO

from alrp_triton.integrations.ultralytics import ranking_loss_of, remove_ranking_loss, use_ranking_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What is minimised, part by part; what is logged; the gradient of the layers that say scores and boxes; of all."""
    model.zero_grad()
    total, items = model(batch)
    total.sum().backward()
    found = {name: each.grad.flatten() for name, each in model.named_parameters() if each.grad is not None}
    last = [gradient for name, gradient in found.items() if re.search(r"cv[23]\.\d\.2\.", name)]
    assert len(last) in (12, 24)  # weights and biases of three levels, of one branch or two
    return total.detach(), torch.stack(list(items.values())), torch.cat(last), torch.cat(list(found.values()))


@pytest.mark.parametrize("loss", ["rank_sort", "alrp", "ap"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("yolov8n", "DetectionModel"), ("yolo26n", "DetectionModel"), ("yolo11n-seg", "SegmentationModel")],
)
def test_warm_start(name: str, kind: str, loss: Any) -> None:
    """Two steps of the library's losses, two of a blend, then the ranking; a copy and a state go on from there."""
    batch = batch_of() | extras(kind)
    own = step(build(name, kind, box=3.0), batch)
    model = build(name, kind, box=3.0)
    use_ranking_loss(model, loss, period=100, prior=None, backend="torch")
    ranked = step(model, batch)
    model = build(name, kind, box=3.0)
    losses = use_ranking_loss(model, loss, period=100, backend="torch", warm_start=2)  # raises no scores
    for number, share in enumerate((0, 0, 1 / 3, 2 / 3, 1, 1)):
        if number == 1:  # these are no steps
            with torch.no_grad():
                model(batch)
            model.eval().loss(batch)
            model.train()
        if number == 3:
            assert_blend(step(copy.deepcopy(model), batch), own, ranked, share, rounded=1)
            assert all(steps == 3 for key, steps in losses.state_dict().items() if key.endswith("warm_start.steps"))
            state = copy.deepcopy(losses.state_dict())
            losses = use_ranking_loss(model, loss, period=100, backend="torch", warm_start=2)
            losses.load_state_dict(state)
        assert_blend(step(model, batch), own, ranked, share, rounded=1)
    counts = {key: int(steps) for key, steps in losses.state_dict().items() if key.endswith("warm_start.steps")}
    branches = ["one2many", "one2one"] if name == "yolo26n" else ["head"]
    assert counts == {f"{branch}.warm_start.steps": 6 for branch in branches}
    remove_ranking_loss(model)
    assert_blend(step(model, batch), own, ranked, 0)


def test_nothing_of_a_step_is_kept() -> None:
    """Neither boxes nor what the assigner said, with their graph, where nothing was ranked."""
    model = build()
    use_ranking_loss(model, "alrp", period=1, warm_start=5, backend="torch")
    model(batch_of())
    ranking = model.criterion.ranking
    assert ranking.decoded is None
    assert ranking.assigned is None
    assert ranking.box is None


def test_what_has_no_warm_start() -> None:
    model = build()
    for value, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="warm_start must be"):
            use_ranking_loss(model, warm_start=value)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"prior must be left as it is with warm_start=3.* got 0.2"):
        use_ranking_loss(YOLO("yolo11n.yaml"), warm_start=3, prior=0.2)
    assert not ranking_loss_of(model)
    assert "warm_start" not in "".join(use_ranking_loss(model).state_dict())
