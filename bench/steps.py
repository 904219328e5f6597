"""What is checked and timed: one training step's loss, forward and backward, on a seeded random problem."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from alrp_triton import alrp_loss
from alrp_triton.functional import DELTA, EPS

from .baselines import published_loop

LOOP = "published loop"
LOOP_PAIRS = 2_000_000_000
RULE = f"The {LOOP} is left out where P x N exceeds {LOOP_PAIRS:.0e}; nothing is extrapolated."

# (logits, targets, box_errors) -> classification, localisation, …
Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class Problem(NamedTuple):
    """Input of a loss."""

    logits: Tensor  # (N,) float32
    targets: Tensor  # (N,) int64, the dtype in which the published code passes them
    box_errors: Tensor  # (P,) float32


class Step(NamedTuple):
    """Output of a loss and its backward pass."""

    classification: Tensor
    localisation: Tensor
    grad_logits: Tensor
    grad_box_errors: Tensor


def make_problem(anchors: int, positives: int, device: torch.device, seed: int, ignored: int = 0) -> Problem:
    """Positives with scores from N(0, 1), scattered among negatives from N(-1, 1); box errors uniform in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same numbers on every device
    logits = torch.randn(anchors, generator=generator) - 1
    where = torch.randperm(anchors, generator=generator)
    # Distinct, because the published loop leaves ties of positives to its sort.
    scores = torch.randn(2 * positives, generator=generator).unique()
    logits[where[:positives]] = scores[torch.randperm(len(scores), generator=generator)[:positives]]
    targets = torch.zeros(anchors, dtype=torch.int64)
    targets[where[:positives]] = 1
    targets[where[positives : positives + ignored]] = -1
    box_errors = torch.rand(positives, generator=generator)
    return Problem(logits.to(device).requires_grad_(), targets.to(device), box_errors.to(device).requires_grad_())


def take_step(loss: Loss, problem: Problem) -> Step:
    """Forward, then backward of the sum of both parts."""
    classification, localisation = loss(*problem)[:2]
    gradients = torch.autograd.grad(classification + localisation, (problem.logits, problem.box_errors))
    return Step(classification.detach(), localisation.detach(), *gradients)


def contenders(anchors: int, positives: int, device: torch.device) -> dict[str, Loss]:
    """The losses to compare at a size, by name; the baseline comes last and follows ``RULE``."""
    losses: dict[str, Loss] = {"torch": partial(alrp_loss, delta=DELTA, eps=EPS, backend="torch")}
    if device.type == "cuda" and find_spec("triton") is not None:
        losses["triton"] = partial(alrp_loss, delta=DELTA, eps=EPS, backend="triton")
    if anchors * positives <= LOOP_PAIRS:
        losses[LOOP] = partial(published_loop, delta=DELTA, eps=EPS)
    return losses
