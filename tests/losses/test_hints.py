"""Warnings of what is nearly certainly a mistake: when they come, and that they come once."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from alrp_triton import ALRPLoss, alrp_loss, ap_loss, hints, rank_sort_loss

Call = Callable[[Tensor, Tensor], Any]
CALLS: dict[str, Call] = {
    "alrp": lambda x, t: alrp_loss(x, t, torch.rand(int(t.sum()))),
    "ap": ap_loss,
    "rank_sort": lambda x, t: rank_sort_loss(x, t, torch.rand(int(t.sum()))),
    "module": lambda x, t: ALRPLoss()(x, t, torch.rand(int(t.sum()))),
}


@pytest.fixture(autouse=True)
def a_new_process(no_hints: None) -> None:
    hints.reset()


def step(call: Call, size: int, make: Callable[[int], Tensor] = torch.randn, gradient: bool = True) -> None:
    call(make(size).requires_grad_(gradient), (torch.arange(size) % 100 == 0).long())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_probabilities(call: Call) -> None:
    with pytest.warns(UserWarning, match=r"logits are all between 0\.2\d+ and 0\.7\d+, as probabilities are") as seen:
        step(call, 2000, probabilities)
    assert seen[0].filename == __file__
    step(call, 2000, probabilities)  # once


def probabilities(size: int) -> Tensor:
    return 0.25 + torch.rand(size) / 2


def low(size: int) -> Tensor:
    return torch.linspace(-1e-3, 1, size)


def high(size: int) -> Tensor:
    return torch.linspace(0, 1.01, size)


def nan(size: int) -> Tensor:
    return torch.full((size,), torch.nan)


@pytest.mark.parametrize("make", [torch.randn, torch.zeros, low, high, nan])
def test_logits(make: Callable[[int], Tensor]) -> None:
    """Those of a head, also of one that gives all the same; and what is looked at first was right, so all is."""
    step(ap_loss, 2000, make)
    step(ap_loss, 2000, probabilities)


def test_few_logits_may_be_anything() -> None:
    step(ap_loss, 500, probabilities)
    with pytest.warns(UserWarning, match="as probabilities are"):
        step(ap_loss, 1000, probabilities)


@pytest.mark.parametrize("sizes", [(15200, 3800, 950, 247, 70), (70, 247, 950, 3800), (16, 4, 1)])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_levels(call: Call, sizes: tuple[int, ...]) -> None:
    """RetinaNet's on an image of 800 x 1216, with one anchor, a level at a time; once, in whatever order."""
    with pytest.warns(
        UserWarning, match=r"was called with \d+, \d+, \d+.* logits, 3 times in a row, as the levels of"
    ) as seen:
        [step(call, size) for size in 6 * sizes]
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize("sizes", [(1600, 400), (1600, 400, 400, 100), (900, 300, 100), (1600, 400, 1600, 400), (1600, 0, 0), (0, 0, 0), (1600, 400, 100, 50)])  # fmt: skip
def test_other_sizes(sizes: tuple[int, ...]) -> None:
    for size in 3 * sizes:
        step(ap_loss, size)


def test_images_of_many_scales() -> None:
    """At random, each four times as many logits as the next: levels come back in one order, these do not."""
    rng = random.Random(0)
    for _ in range(300):
        step(ap_loss, rng.choice([1600, 400, 100]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_where_there_are_no_values() -> None:
    """Graphs that are made of the loss, and the first look is still to come."""
    logits, targets = torch.randn(2000), (torch.arange(2000) % 100 == 0).long()

    def loss(x: Tensor) -> Tensor:
        return ap_loss(x, targets, num_positives=20)

    graph = make_fx(loss)(logits)
    assert torch.equal(graph(logits), ap_loss(logits, targets))
    hints.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert ap_loss(logits, targets, num_positives=20).shape == ()
    with pytest.warns(UserWarning, match="as probabilities are"):
        step(ap_loss, 2000, probabilities)


def test_what_is_not_trained_is_not_watched() -> None:
    for size in 6 * (1600, 400, 100):
        step(ap_loss, size, gradient=False)


def test_a_warning_may_be_an_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="as probabilities are"):
            step(ap_loss, 1000, probabilities)
        step(ap_loss, 1000, probabilities)
