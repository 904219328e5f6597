"""A warm start in criteria by shape: RF-DETR's own, and small ones, against two more, without it and without a ranking."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from tests.support.compare import assert_blend, assert_near

pytest.importorskip("torchvision.ops", reason="the integrations need torchvision", exc_type=ImportError)
pytest.importorskip("scipy", reason="queries are matched by scipy", exc_type=ImportError)

from alrp_triton.integrations import detr
from tests.integrations.test_detr import (
    TARGETS,
    Criterion,
    LikeDFine,
    LikeRTDetr,
    all_of,
    d_fine_outputs,
    rf_detr,
    rf_detr_outputs,
    rt_detr_outputs,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LOSSES = ["alrp", "ap", "rank_sort"]
SHARES = (0, 0, 1 / 3, 2 / 3, 1, 1)  # of the ranking, with warm_start=2
BAD = [(-1, ValueError), (1.5, TypeError), (True, TypeError), (2**31 + 1, ValueError)]


def weighted(criterion: Any, loss_dict: dict[str, Tensor]) -> Tensor:
    weights = {} if isinstance(criterion, Criterion) else criterion.weight_dict  # the small ones weigh them themselves
    return torch.stack([value * weights.get(key, 1) for key, value in sorted(loss_dict.items()) if "loss" in key])


def step(criterion: Any, make_outputs: Callable[[], Any]) -> tuple[Tensor, ...]:
    """The total, the gradient of the logits and boxes of all outputs, and each loss."""
    outputs = make_outputs()
    loss_dict = criterion(outputs, TARGETS)
    each = weighted(criterion, loss_dict)
    each.sum().backward()
    found = [value.grad for one in all_of(outputs).values() for value in (one["pred_logits"], one["pred_boxes"])]
    if "enc_outputs" in outputs:
        found += [outputs["enc_outputs"][name].grad for name in ("pred_logits", "pred_boxes")]
    return each.sum(), torch.cat([grad.flatten() for grad in found if grad is not None]), each


CRITERIA: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "rf_detr": (rf_detr, rf_detr_outputs),
    "rt_detr": (LikeRTDetr, rt_detr_outputs),
    "boxes_first": (lambda: LikeRTDetr("vfl", ("boxes", "vfl")), rt_detr_outputs),
    "d_fine": (LikeDFine, d_fine_outputs),
    "d_fine_boxes_first": (lambda: LikeDFine("mal", ("boxes", "vfl")), d_fine_outputs),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CRITERIA)
def test_criteria(name: str, loss: Any) -> None:
    """Two steps of its own losses, two of a blend, then the ranking; it goes on from the state, and in copies."""
    make, make_outputs = CRITERIA[name]
    criteria = make(), make(), make()
    own = step(criteria[0], make_outputs)
    detr.use_ranking_loss(criteria[1], loss, period=100, backend="torch")
    ranked = step(criteria[1], make_outputs)
    criterion = criteria[2]
    losses = detr.use_ranking_loss(criterion, loss, period=100, backend="torch", warm_start=2)
    for number, share in enumerate(SHARES):
        with torch.no_grad():
            criterion(make_outputs(), TARGETS)  # is no step
        criterion.eval()(make_outputs() if name != "rf_detr" else rf_detr_outputs(1), TARGETS)
        criterion.train()
        if number in (1, 3):  # on from here in another one, once by its state and then as a copy
            fresh = make()
            detr.use_ranking_loss(fresh, loss, period=100, backend="torch", warm_start=2)
            fresh.load_state_dict(criterion.state_dict())
            others = fresh, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))
            for other in others:
                assert_blend(step(other, make_outputs), own, ranked, share)
            assert losses.state_dict()["last.warm_start.steps"] == number
            criterion, losses = others[number - 1], others[number - 1].ranking_loss
            continue
        assert_blend(step(criterion, make_outputs), own, ranked, share)
    assert losses.state_dict()["last.warm_start.steps"] == len(SHARES)
    assert [key for key in losses.state_dict() if "warm" in key] == ["last.warm_start.steps"]
    detr.remove_ranking_loss(criterion)
    for ours, theirs in zip(step(criterion, make_outputs), own, strict=True):
        assert torch.equal(ours, theirs)


def test_a_sum_of_batches_that_rf_detr_divides_later() -> None:
    """It gives another number of boxes, by which its own loss is divided already, and the ranking is not yet."""
    criteria = rf_detr(), rf_detr(), rf_detr()
    detr.use_ranking_loss(criteria[1], period=100, backend="torch")
    detr.use_ranking_loss(criteria[2], period=100, backend="torch", warm_start=1)
    own, ranked, *found = [
        weighted(criterion, criterion(rf_detr_outputs(), TARGETS, num_boxes=torch.ones(())))
        for criterion in (*criteria, *[criteria[2]] * 2)
    ]
    for ours, share in zip(found, (0, 1 / 2, 1), strict=True):
        assert_near(ours, (1 - share) * own + share * ranked, 1e-6)


def test_an_output_that_comes_late_is_where_the_others_are() -> None:
    criteria = LikeRTDetr(), LikeRTDetr()
    detr.use_ranking_loss(criteria[0], "ap", backend="torch")
    losses = detr.use_ranking_loss(criteria[1], "ap", backend="torch", warm_start=1)
    for _ in range(2):
        criteria[1](rt_detr_outputs(denoising=False), TARGETS)
    assert "denoising_0" not in losses
    first, second = (criterion(rt_detr_outputs(), TARGETS) for criterion in criteria)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_what_cannot_be_blended_is_refused() -> None:
    criterion = LikeRTDetr()
    before = dict(vars(criterion))
    for value, error in BAD:
        with pytest.raises(error, match="warm_start must be"):
            detr.use_ranking_loss(criterion, "ap", warm_start=value)  # pyright: ignore[reportArgumentType]
    criterion.weight_dict["loss_giou_aux_0"] = 4.0
    with pytest.raises(ValueError, match=r"warm_start with loss 'alrp' .* got 3.0, 4.0 with warm_start=5"):
        detr.use_ranking_loss(criterion, period=1, warm_start=5)
    assert vars(criterion) == before
    detr.use_ranking_loss(criterion, period=1)
    with pytest.raises(ValueError, match=r"got 3.0, 4.0"):  # of the weights that it had
        detr.use_ranking_loss(criterion, period=1, warm_start=5)
    assert "warm_start" not in repr(detr.ranking_in(criterion))
    detr.use_ranking_loss(criterion, "rank_sort", warm_start=5)

    class Unweighted(Criterion):
        weight_dict: Any = None

    other = Unweighted()
    other.weight_dict = None
    with pytest.raises(ValueError, match="in weight_dict, to give it to the criterion's own; got none"):
        detr.use_ranking_loss(other, period=1, warm_start=5)


def test_a_count_that_others_have_written() -> None:
    """Averages of weights copy into buffers, and so do processes that begin with the first one's, or a user."""
    criterion = LikeRTDetr()
    losses = detr.use_ranking_loss(criterion, "rank_sort", backend="torch", warm_start=2)
    average: Any = AveragedModel(criterion)
    for _ in range(4):
        criterion(rt_detr_outputs(), TARGETS)
    of_average = average.module.ranking_loss["last"].warm_start
    assert (losses["last"].share, of_average.share) == (1, 0)
    of_average.steps.fill_(4)
    assert of_average.share == 1
    copied: Any = copy.deepcopy(average)
    assert copied.module.ranking_loss["last"].share == 1
    again: Any = detr.use_ranking_loss(criterion, "rank_sort", backend="torch", warm_start=2)["last"]
    criterion(rt_detr_outputs(), TARGETS)
    again.warm_start.steps.fill_(2)
    assert again.share == pytest.approx(1 / 3)
    criterion(rt_detr_outputs(), TARGETS)
    assert (int(again.warm_start.steps), again.share) == (3, pytest.approx(2 / 3))


def test_a_period_is_told_before_the_first_step() -> None:
    """And not in the step in which the ranking begins."""
    criterion = LikeRTDetr()
    losses = detr.use_ranking_loss(criterion, "alrp", period="later", backend="torch", warm_start=1000)
    with torch.no_grad():
        criterion(rt_detr_outputs(), TARGETS)
    with pytest.raises(RuntimeError, match="period is 'later': set it before the first step"):
        criterion(rt_detr_outputs(), TARGETS)
    losses.set_period(10)
    criterion(rt_detr_outputs(), TARGETS)


def test_made_in_inference_mode() -> None:
    criterion = LikeRTDetr()
    with torch.inference_mode():
        losses = detr.use_ranking_loss(criterion, "alrp", period=9, backend="torch", warm_start=1)
    for steps in (1, 2):
        criterion(rt_detr_outputs(), TARGETS)
        assert losses["last"].warm_start is not None
        assert int(losses["last"].warm_start.steps) == steps
