"""Ranking apart, image by image: against a loop over the groups, for every loss and backend."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from alrp_triton import ALRPLoss, alrp_loss, ap_loss, rank_sort_loss
from alrp_triton.dispatch import Backend
from reference import dense
from tests.support.compare import assert_gradient, assert_near
from tests.support.inside import Inside

SHAPE = (4, 30, 3)  # images, anchors, classes
LOSSES = ("alrp", "ap", "ap without interpolation", "rank_sort")


class Batch(NamedTuple):
    logits: NDArray[np.float32]
    targets: NDArray[np.int64]
    values: NDArray[np.float32]
    """Box errors or IoUs of the positives."""
    groups: NDArray[np.int64]


class Result(NamedTuple):
    losses: tuple[Any, ...]
    gradients: tuple[Any, ...]
    """Of each loss in what it reaches."""


def draw(form: str, seed: int = 0) -> Batch:
    """Images of which one has no positives and another no negatives; groups in one of their forms."""
    rng = np.random.default_rng(seed)
    logits = (np.round(rng.normal(size=SHAPE) * 8) / 8).astype(np.float32)
    targets = rng.choice([-1, 0, 1], SHAPE, p=[0.1, 0.7, 0.2])
    targets[1] = np.minimum(targets[1], 0)
    targets[2] = np.where(targets[2] == 0, -1, targets[2])
    values = rng.uniform(0, 1, int((targets == 1).sum())).astype(np.float32)
    groups = {
        "one an image": np.array([7, 3, -(2**40), 4]),
        "in order": np.arange(4),
        "one an anchor": rng.integers(0, 5, SHAPE[:2]),
        "one a logit": rng.integers(-3, 3, SHAPE),
        "all in one": np.zeros((), np.int64),
    }[form]
    return Batch(logits, targets, values, groups)


def of_oracle(loss: str, logits: Any, targets: Any, values: Any, delta: float) -> Result:
    if loss == "alrp":
        out = dense.alrp_loss(logits, targets, values, delta)
        return Result((out.classification, out.localisation), (out.grad_logits, out.grad_box_errors))
    if loss == "rank_sort":
        out = dense.rank_sort_loss(logits, targets, values, delta)
        return Result((out.ranking, out.sorting), (out.grad_ranking, out.grad_sorting))
    out = dense.ap_loss(logits, targets, loss == "ap", delta)
    return Result((out.loss,), (out.grad_logits,))


def one_by_one(loss: str, batch: Batch, delta: float) -> Result:
    """The mean over the groups, each weighted by its number of positives."""
    shape, missing = batch.logits.shape, batch.logits.ndim - batch.groups.ndim
    groups = np.broadcast_to(batch.groups.reshape(batch.groups.shape + (1,) * missing), shape)
    positive, total = batch.targets == 1, len(batch.values)
    losses: list[float] = [0.0, 0.0]
    of_logits = [np.zeros(shape), np.zeros(shape)]
    of_values = np.zeros(total)
    for group in np.unique(groups):
        here, mine = groups == group, (groups == group)[positive]
        if not mine.any():
            continue
        weight = mine.sum() / total
        out = of_oracle(loss, batch.logits[here], batch.targets[here], batch.values[mine], delta)
        for k, (value, gradient) in enumerate(zip(out.losses, out.gradients, strict=True)):
            losses[k] += weight * value
            if loss == "alrp" and k == 1:
                of_values[mine] = weight * gradient
            else:
                of_logits[k][here] = weight * gradient
    if loss == "alrp":
        return Result(tuple(losses), (of_logits[0], of_values))
    return Result(tuple(losses), tuple(of_logits)) if loss == "rank_sort" else Result((losses[0],), (of_logits[0],))


def run(loss: str, batch: Batch, delta: float, device: str, backend: Backend = "auto", **settings: Any) -> Result:
    logits = torch.as_tensor(batch.logits).to(device).clone().requires_grad_()
    values = torch.tensor(batch.values, device=device, requires_grad=True)
    targets, groups = (torch.tensor(a, device=device) for a in (batch.targets, batch.groups))
    settings |= {"groups": groups, "delta": delta, "backend": backend}
    if loss == "alrp":
        losses, sources = alrp_loss(logits, targets, values, **settings)[:2], (logits, values)
    elif loss == "rank_sort":
        losses, sources = tuple(rank_sort_loss(logits, targets, values, **settings)), (logits, logits)
    else:
        losses, sources = (ap_loss(logits, targets, interpolate=loss == "ap", **settings),), (logits,)
    gradients = [
        torch.autograd.grad(loss, source, retain_graph=True)[0] for loss, source in zip(losses, sources, strict=True)
    ]
    return Result(losses, tuple(gradients))


def assert_same(actual: Result, expected: Result) -> None:
    for mine, theirs in zip(actual.losses, expected.losses, strict=True):
        assert_near(mine, theirs, 1e-6)
    for mine, theirs in zip(actual.gradients, expected.gradients, strict=True):
        assert_near(mine, theirs, 2e-6)


@pytest.mark.parametrize("delta", [1.0, 0.0])
@pytest.mark.parametrize("form", ["one an image", "in order", "one an anchor", "one a logit", "all in one"])
@pytest.mark.parametrize("loss", LOSSES)
def test_against_a_loop_over_groups(loss: str, form: str, delta: float, device: str) -> None:
    batch = draw(form)
    assert_same(run(loss, batch, delta, device), one_by_one(loss, batch, delta))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_backend(loss: str, backend: Backend, device: str) -> None:
    # Of size N all losses do the same, and a run for each anchor takes long in Triton's interpreter.
    for form in ("one an image", "one an anchor") if loss == "alrp" or "triton" not in backend else ("one an image",):
        batch = draw(form, seed=1)
        if backend == "triton_tiled":
            with pytest.raises(ValueError, match=r"'triton_tiled' ranks one group: .* 'triton_binned'"):
                run(loss, batch, 0.5, device, backend)
        else:
            assert_same(run(loss, batch, 0.5, device, backend), one_by_one(loss, batch, 0.5))


def test_a_gradient_that_leaks_into_another_group_is_caught(device: str) -> None:
    batch = draw("in order")
    together = run("alrp", batch._replace(groups=np.zeros(4, np.int64)), 1.0, device)
    with pytest.raises(AssertionError):
        assert_same(together, one_by_one("alrp", batch, 1.0))


def test_balance_within_each_group(device: str) -> None:
    batch = draw("in order")
    of_logits: Tensor = run("alrp", batch, 1.0, device).gradients[0]
    for image in of_logits:
        assert_gradient(image, image, 1e-6)
    assert not of_logits[1].any()  # no positives


def test_ranks_and_their_order(device: str) -> None:
    batch = draw("one an image")
    logits, targets, values = (torch.tensor(a, device=device) for a in batch[:3])
    groups = torch.tensor(batch.groups, device=device)
    out = alrp_loss(logits, targets, values, groups=groups)
    by_module = ALRPLoss()(logits, targets, values, groups=groups)
    assert torch.equal(by_module.total, out.total)
    assert all(torch.equal(a, b) for a, b in zip(by_module.positives, out.positives, strict=True))
    positive = batch.targets == 1
    of_image = np.nonzero(positive)[0]
    for image in range(4):
        expected = dense.alrp_loss(batch.logits[image], batch.targets[image], batch.values[of_image == image])
        assert_near(out.rank.cpu()[of_image == image], expected.rank, 1e-6)
    keys = [(batch.groups[of_image[k]], batch.logits[positive][k], k) for k in out.order.tolist()]
    assert keys == sorted(keys)


def test_what_is_not_a_number_stays_in_its_group(device: str) -> None:
    """The loss shows it; the gradients of the other images stay what they were."""
    batch = draw("in order")
    logits = batch.logits.copy()
    logits[0][batch.targets[0] == 0] = np.nan
    broken = run("alrp", batch._replace(logits=logits), 1.0, device)
    sound = run("alrp", batch, 1.0, device)
    assert broken.losses[0].isnan()
    counts = torch.tensor(batch.targets[0] != -1, device=device)
    assert torch.equal(broken.gradients[0][0].isnan(), counts)
    assert torch.equal(broken.gradients[0][1:], sound.gradients[0][1:])


@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("image", [0, 1, 2])
def test_a_group_without_a_finite_positive(image: int, worst: float, backend: Backend, device: str) -> None:
    """It has no knots in order, and what its negatives find there must not fall into another group, or out of memory."""
    if backend == "triton_tiled":
        pytest.skip("it ranks one group")
    logits = torch.tensor([[1.0, -2.5, -2.9, -2.8, -2.0]] * 3, device=device)
    targets = torch.tensor([[1, 0, 0, 0, 0]] * 3, device=device)
    found: list[Result] = []
    for first in (1.0, worst):
        logits[image, 0] = first
        batch = Batch(logits.cpu().numpy(), targets.cpu().numpy(), np.full(3, 0.5, np.float32), np.arange(3))
        found.append(run("alrp", batch, 1.0, device, backend))
    sound, broken = (result.gradients[0] for result in found)
    assert broken[image].isnan().all()
    others = [other for other in range(3) if other != image]
    assert torch.equal(broken[others], sound[others])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_no_logits(shape: tuple[int, ...], device: str) -> None:
    logits = torch.zeros(shape, device=device, requires_grad=True)
    groups = torch.zeros(shape[:1], dtype=torch.int64, device=device)
    out = alrp_loss(logits, torch.zeros(shape, device=device), torch.zeros(0, device=device), groups=groups)
    out.classification.backward()
    assert out.classification == 0


def test_groups_are_the_callers(device: str) -> None:
    """They may come from inference mode, and be written to before the backward pass."""
    batch = draw("one an anchor")
    expected = run("alrp", batch, 1.0, device).gradients[0]
    with torch.inference_mode():
        of_inference = torch.tensor(batch.groups, device=device)
    written = torch.tensor(batch.groups, device=device)
    for groups in (of_inference, written):
        logits = torch.tensor(batch.logits, device=device, requires_grad=True)
        targets, values = (torch.tensor(a, device=device) for a in (batch.targets, batch.values))
        loss = alrp_loss(logits, targets, values, groups=groups).classification
        if groups is written:
            groups.zero_()
        assert torch.equal(torch.autograd.grad(loss, logits)[0], expected)


def test_groups_of_a_large_batch_cost_little_more() -> None:
    """Linear: as many operations for each group as for a batch without groups, and not one for each pair of groups."""

    class Counter(Inside):
        seen = 0

        def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
            self.seen += 1
            return super().operation(func, args, kwargs)

    counts: list[int] = []
    for images in (4, 16):
        logits = torch.randn(images, 50, 4, requires_grad=True)
        targets = (torch.rand(images, 50, 4) < 0.1).long()
        errors = torch.rand(int(targets.sum()), requires_grad=True)
        with Counter() as counter:
            out = alrp_loss(logits, targets, errors, groups=torch.arange(images), backend="torch")
            torch.autograd.grad(out.classification, logits)
        counts.append(counter.seen)
    assert counts[1] < 4.5 * counts[0]
