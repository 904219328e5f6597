"""Self-balancing of the classification and the box part of a loss."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import check_integer, check_number, check_tensor

Period = int | Literal["later"]
InitialWeight = float | Literal["auto"]
INITIAL_WEIGHT = 50.0  # published
_AUTOMATIC = -(2**40)  # from here on steps are counted in the first period of an automatic weight


def check_period(period: object) -> Period:
    """The period. TypeError or ValueError unless it is ``"later"``, or an int from 1 on."""
    if isinstance(period, str) and period == "later":
        return "later"
    return check_integer("period", period, 1, 2**31, such_as="an epoch in your steps, len(loader), or 'later'")


def check_initial_weight(initial_weight: object) -> tuple[float, bool]:
    """The weight to begin with, and whether it is automatic. TypeError or ValueError unless a number, or ``"auto"``."""
    if initial_weight == "auto":
        return 1.0, True
    if isinstance(initial_weight, str):
        raise ValueError(f"initial_weight must be a number or 'auto', got {initial_weight!r}")
    return check_number("initial_weight", initial_weight, 0.0, torch.finfo(torch.float32).max), False


def _check_losses(**losses: Tensor) -> None:
    for name, loss in losses.items():
        check_tensor(name, loss, "floating")
        if loss.ndim != 0:
            raise ValueError(f"{name} must be 0-d, got shape {tuple(loss.shape)}")


def balance_by_value(classification: Tensor, box: Tensor) -> Tensor:
    """The box loss, weighted so that in this very step it is worth as much as the classification loss.

    The self-balancing of Rank & Sort Loss: the weight is ``classification / box``, taken as a constant, so the value of
    the result is that of ``classification`` and its gradient goes to ``box``. No step waits for the device. Where the
    ratio is no number to weigh with (``box`` is 0, or one of the two is not finite) the weight is 1, so nothing is
    divided by zero, and NaN in ``box`` stays to be seen.

    Args:
        classification: 0-d, floating; ``ranking + sorting`` of :func:`alrp_triton.rank_sort_loss`.
        box: 0-d, floating; the box loss, such as the mean of 1 - GIoU over the positives.

    Returns:
        0-d, differentiable in ``box``.

    Raises:
        TypeError, ValueError: losses that are not 0-d floating tensors.

    Reference: Oksuz et al., "Rank & Sort Loss for Object Detection and Instance Segmentation", ICCV 2021, where it is
    the balancing by value, and the published implementation.
    """
    _check_losses(classification=classification, box=box)
    with torch.no_grad():
        weight = classification.detach() / box.detach()
        weight = torch.where(weight.isfinite(), weight, 1.0)
    return box * weight


class SelfBalance(nn.Module):
    """Weight of the localisation part, adapted once a period so that both parts pull alike.

    The weight starts at ``initial_weight``. At every ``period``-th step it becomes, from the losses of that period,
    (mean localisation + mean classification) / mean localisation, and applies from that very step on, as published.
    A step without positives, in which both losses are 0, is not counted, as published. The state lives in buffers: it
    is in the ``state_dict``, survives a resume, moves with the module, and no step waits for the device. Steps whose
    losses are not finite (say, an overflow that a gradient scaler skips) are left out of the means, and a period that
    gives no finite weight (a mean localisation of 0) leaves it as it is. In ``eval`` mode the weight is applied and
    nothing is recorded. The state stays float32 when the module is cast.

    Args:
        period: number of steps with positives between two updates, at least 1; published: an epoch (3665 steps of 32
            images of COCO). ``"later"``: not known yet; set ``balance.period`` before the first step.
        initial_weight: weight until the end of the first period; published: 50, for a training from the beginning, in
            which boxes are bad and positives rank low. Of a detector that is good already, as in fine-tuning, the
            localisation is near to balance, and 50 far from it: ``"auto"`` is in each step of the first period the
            weight that the steps so far give (1 before the first).

    Attributes:
        weight: the weight in force, float32 0-d buffer.
        period: may be set at any time, and is not part of the state; a period that is longer already ends at the next
            step.

    Raises:
        TypeError, ValueError: ``period`` or ``initial_weight`` of the wrong type or out of range; losses that are not
            0-d floating tensors.
        RuntimeError: a step is recorded, and ``period`` is ``"later"`` still.

    Reference: Oksuz et al., NeurIPS 2020, Section 4.2 ("Self-balancing"), and the published implementation.
    """

    weight: Tensor
    steps: Tensor
    classification_sum: Tensor
    localisation_sum: Tensor

    def __init__(self, period: Period, *, initial_weight: InitialWeight = INITIAL_WEIGHT) -> None:
        super().__init__()
        self.period = period
        weight, automatic = check_initial_weight(initial_weight)
        self.register_buffer("weight", torch.tensor(weight, dtype=torch.float32))
        self.register_buffer("steps", torch.tensor(_AUTOMATIC if automatic else 0))
        self.register_buffer("classification_sum", torch.tensor(0.0, dtype=torch.float32))
        self.register_buffer("localisation_sum", torch.tensor(0.0, dtype=torch.float32))

    @property
    def period(self) -> Period:
        return self._period

    @period.setter
    def period(self, period: Period) -> None:
        self._period: Period = check_period(period)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "period" in state:  # pickled by version 0.5, or before
            state["_period"] = state.pop("period")
        super().__setstate__(state)

    def forward(self, classification: Tensor, localisation: Tensor) -> Tensor:
        """Record both raw losses (0-d); return the weighted localisation loss, differentiable in ``localisation``."""
        _check_losses(classification=classification, localisation=localisation)
        if self.training:
            self._record(classification.detach(), localisation.detach())
        # A copy: the next step changes the buffer, and this step's backward may still be to come.
        return localisation * self.weight.clone()

    def told_period(self) -> int:
        """The number. RuntimeError: it is ``"later"`` still."""
        if self._period == "later":
            raise RuntimeError("period is 'later': set it before the first step, an epoch in your steps, len(loader)")
        return self._period

    @torch.no_grad()
    def _record(self, classification: Tensor, localisation: Tensor) -> None:
        period = self.told_period()
        finite = classification.isfinite() & localisation.isfinite()
        self.classification_sum += torch.where(finite, classification, 0.0)
        self.localisation_sum += torch.where(finite, localisation, 0.0)
        self.steps += (classification != 0) | (localisation != 0)  # NaN is not 0
        automatic = self.steps < 0
        ended = self.steps - automatic * _AUTOMATIC >= period  # beyond it after a resume with a shorter period
        balanced = (self.localisation_sum + self.classification_sum) / self.localisation_sum  # NaN or inf for 0
        self.weight.copy_(torch.where((automatic | ended) & balanced.isfinite(), balanced, self.weight))
        for total in (self.steps, self.classification_sum, self.localisation_sum):
            total.masked_fill_(ended, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SelfBalance":
        """Move the state, but keep it float32: half precision would stop counting within a period."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, moved in list(self.named_buffers()):
            if moved.dtype != before[name].dtype:
                setattr(self, name, before[name].to(moved.device))
        return self

    def extra_repr(self) -> str:
        return f"period={self.period!r}"
