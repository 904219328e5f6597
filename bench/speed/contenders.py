"""Who is timed: the package's backends, other ways to compute the same loss, another loss, and the floor."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss, rank_sort_loss
from alrp_triton.backends import torch_binned
from alrp_triton.dispatch import Backend
from alrp_triton.functional import EPS

from . import baselines
from .problems import Problem, Size

LOOP, DENSE, BUCKETED, SEARCH = "published loop", "dense matrix", "bucketed", "plain bucketize"
FOCAL, FLOOR = "sigmoid focal loss", "copy of the same bytes"
FOCAL_COMPILED = "sigmoid focal loss, compiled"
ALRP, AP, RANK_SORT = "aLRP Loss", "AP Loss", "Rank & Sort Loss"
BASELINES = (LOOP, DENSE, BUCKETED, SEARCH, FOCAL, FOCAL_COMPILED, FLOOR)
LOOP_PAIRS, DENSE_PAIRS = 3_000_000_000, 200_000_000
RULE = (
    f"Nothing is extrapolated: the {LOOP} is left out where P x N exceeds {LOOP_PAIRS:.0e}, the {DENSE} where it "
    f"exceeds {DENSE_PAIRS:.0e}."
)


class Step(NamedTuple):
    """Result of a loss and its backward pass."""

    classification: Tensor
    localisation: Tensor
    grad_logits: Tensor
    grad_box_errors: Tensor


class LogitsStep(NamedTuple):
    """Result of a loss of the logits alone."""

    losses: Tensor  # (number of parts,)
    grad_logits: Tensor  # of their sum


# One training step of a loss, or what stands beside it; None if that is no loss of this package.
Contender = Callable[[], Step | LogitsStep | None]


def take_step(loss: Callable[..., tuple[Any, ...]], problem: Problem) -> Step:
    """Forward, then backward of the sum of both parts."""
    classification, localisation = loss(*problem[:3], delta=problem.delta, eps=EPS)[:2]
    gradients = torch.autograd.grad(classification + localisation, (problem.logits, problem.box_errors))
    return Step(classification.detach(), localisation.detach(), *gradients)


def _logits_step(losses: tuple[Tensor, ...], problem: Problem) -> LogitsStep:
    parts = torch.stack(losses)
    return LogitsStep(parts.detach(), *torch.autograd.grad(parts.sum(), problem.logits))


def ious_of(problem: Problem) -> Tensor:
    """IoUs of the positives, in (0, 1]."""
    return 1 - problem.box_errors.detach()


def family(problem: Problem) -> dict[str, Contender]:
    """All losses of the family on one problem, each at the step that it is published with."""
    logits, targets, errors, delta = problem
    return {
        ALRP: partial(take_step, alrp_loss, problem),
        AP: lambda: _logits_step((ap_loss(logits, targets, delta=delta, num_positives=errors.numel()),), problem),
        RANK_SORT: lambda: _logits_step(rank_sort_loss(logits, targets, ious_of(problem), delta=delta / 2), problem),
    }


def _plain_search(problem: Problem) -> Step:
    """The torch backend without its grid of cells: a binary search for every logit."""
    with patch.object(torch_binned, "make_grid", return_value=None):
        return take_step(partial(alrp_loss, backend="torch"), problem)


def focal_step(problem: Problem, compiler: str = "") -> Callable[[], LogitsStep]:
    """Torchvision's focal loss of dense targets, and its gradient.

    ``compiler``: a backend of torch.compile, which compiles it for this size alone, at the first step.
    """
    from torchvision.ops import sigmoid_focal_loss  # not everywhere where the gate is run

    wanted = (problem.targets == 1).to(problem.logits.dtype)  # in the dtype that it takes
    loss_of = torch.compile(sigmoid_focal_loss, dynamic=False, backend=compiler) if compiler else sigmoid_focal_loss

    def step() -> LogitsStep:
        loss = loss_of(problem.logits, wanted, reduction="sum") / problem.box_errors.numel()
        return LogitsStep(loss.detach(), *torch.autograd.grad(loss, problem.logits))

    return step


def focal(problem: Problem, compiler: str = "") -> Contender:
    """The same as a contender: another loss, which nothing here is compared with."""
    take = focal_step(problem, compiler)

    def step() -> None:
        take()

    return step


def copy(problem: Problem) -> Contender:
    """Reading N logits twice and writing N gradients moves 12 N bytes in float32; so does a copy of 3/2 N."""
    count = problem.logits.numel() * 3 // 2
    source, target = (problem.logits.new_full((count,), value, requires_grad=False) for value in (1, 0))

    def step() -> None:
        target.copy_(source)

    return step


def backends() -> list[Backend]:
    """The package's backends that run on a CPU and are named in the results."""
    return ["torch", *(["numba"] if find_spec("numba") else [])]


def contenders(size: Size, problem: Problem) -> dict[str, Contender]:
    """All contenders at a size on a CPU, by name. Those that ``RULE`` leaves out are not there."""
    found: dict[str, Contender] = {
        name: partial(take_step, partial(alrp_loss, backend=name), problem) for name in backends()
    }
    pairs = size.anchors * size.positives
    if size.group == "family":
        found = family(problem)
    elif size.group == "worst cases":
        found[SEARCH] = partial(_plain_search, problem)
    else:
        ways = {LOOP: pairs <= LOOP_PAIRS, DENSE: pairs <= DENSE_PAIRS, BUCKETED: True}
        for (name, feasible), how in zip(ways.items(), ("loop", "dense", "bucketed"), strict=True):
            if feasible:
                found[name] = partial(take_step, partial(baselines.alrp_loss, how=how), problem)
    if find_spec("torchvision"):
        found[FOCAL] = focal(problem)
    return found | {FLOOR: copy(problem)}
