"""What docstrings give as the losses' dense equivalents: run as they stand there, they are the losses."""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss, rank_sort_loss

LOSSES = {"alrp": alrp_loss, "ap": ap_loss, "rank_sort": rank_sort_loss}


def dense_equivalent(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a docstring defines."""
    text = inspect.getdoc(loss) or ""
    block = text.split("Dense equivalent, for some thousand logits::\n\n")[1].split("\n\nArgs:")[0]
    names: dict[str, Any] = {"torch": torch}
    exec(textwrap.dedent(block), names)
    return names[f"dense_{loss.__name__}"]


@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_docstring_s_dense_equivalent_is_the_loss(name: str, ties: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(500, generator=generator, dtype=torch.float64) * 2
    targets = (torch.rand(500, generator=generator) < 0.1).long() - (torch.rand(500, generator=generator) < 0.1).long()
    targets[values.argsort(descending=True)[:3]] = 1  # above all negatives: without error
    count = int((targets == 1).sum())
    of_positives = torch.rand(count, generator=generator, dtype=torch.float64)
    if ties:
        values, of_positives = (values * 4).round() / 4, (of_positives * 8).round() / 8

    def run(of: Callable[..., Any]) -> list[Tensor]:
        logits, errors = values.clone().requires_grad_(), of_positives.clone().requires_grad_(name == "alrp")
        out = of(logits, targets) if name == "ap" else of(logits, targets, errors)
        losses = [out] if name == "ap" else list(out[:2])
        weights = (1.0, 3.0)  # each loss has a gradient of its own
        torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=False)]).sum().backward()
        assert logits.grad is not None
        assert logits.grad.abs().sum() > 0
        return [*losses, logits.grad, *([errors.grad] if errors.grad is not None else [])]

    for found, wanted in zip(run(dense_equivalent(LOSSES[name])), run(LOSSES[name]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
