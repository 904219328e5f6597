"""A step of any loss of the family, as checks of behaviour take it."""

from typing import Any

import torch
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss, rank_sort_loss

from ..speed.problems import Problem, Size, draw_problem
from .oracles import ALRP, AP, LOSSES, RANK_SORT
from .work import Context, Record

TRITON = ("triton_tiled", "triton_binned")


def losses_of(loss: str, problem: Problem, **settings: Any) -> tuple[Tensor, ...]:
    """The parts of a loss of a problem."""
    logits, targets, errors, delta = problem
    settings["delta"] = delta
    if loss == ALRP:
        return alrp_loss(logits, targets, errors, **settings)[:2]
    if loss == RANK_SORT:
        return tuple(rank_sort_loss(logits, targets, 1 - errors.detach(), **settings))
    return (ap_loss(logits, targets, interpolate=loss == AP, num_positives=errors.numel(), **settings),)


def step_of(loss: str, problem: Problem, **settings: Any) -> tuple[Tensor, ...]:
    """Its parts and the gradients of their sum."""
    parts = losses_of(loss, problem, **settings)
    sources = [problem.logits, *([problem.box_errors] if loss == ALRP else [])]
    return *(part.detach() for part in parts), *torch.autograd.grad(sum(parts[1:], parts[0]), sources)


def record(name: str, passed: bool, **more: Any) -> Record:
    """A check that has no difference to tell."""
    return {"check": name, "passed": passed, **more}


def problem_of(context: Context, seed: int = 0) -> Problem:
    """One in which both backends have several blocks to do."""
    size = Size("behaviour", 800, 8) if context.rehearse else Size("behaviour", 800_000, 300, 1.0, "mid-training")
    return draw_problem(size, context.device, torch.float32, seed)


def losses_to_try(context: Context) -> tuple[str, ...]:
    """All; a rehearsal has time for two."""
    return (ALRP, RANK_SORT) if context.rehearse else LOSSES
