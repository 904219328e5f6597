"""What trains one head of a detector: a ranking loss, and the box loss of its paper. Knows no framework."""

import math
from collections.abc import Callable, ItemsView, ValuesView
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..balance import (
    INITIAL_WEIGHT,
    InitialWeight,
    Period,
    SelfBalance,
    balance_by_value,
    check_initial_weight,
    check_period,
)
from ..boxes import TAU, giou_localisation_error
from ..checks import check_number, check_tensor
from ..dispatch import Backend
from ..distributed import (
    GradientReduction,
    ProcessGroup,
    check_gradient_reduction,
    check_process_group,
    name_and_size,
)
from ..functional import DELTA, DELTA_RS
from ..modules import ALRPLoss, APLoss, RankSortLoss
from ..targets import IGNORE_INDEX, check_form, positives_of
from .box_errors import Boxes as Boxes
from .box_errors import BoxLoss, box_errors, checked, paired_iou
from .masks import dice_error
from .warm_start import WarmStart

__all__ = ["Boxes", "DetectorLoss", "HeadLoss", "HeadLosses", "Loss"]

Loss = Literal["alrp", "ap", "rank_sort"]
"""The losses by name."""

_DELTAS: dict[Loss, float] = {"alrp": DELTA, "ap": DELTA, "rank_sort": DELTA_RS}
_BOX_LOSSES: dict[Loss, BoxLoss] = {"alrp": "giou", "ap": "smooth_l1", "rank_sort": "giou"}
TAU_RPN = 0.7  # of the localisation error in an RPN, published
RPN_WEIGHT = 0.2  # of both losses of an RPN, published


def check_box_weight(loss: Loss, box_weight: float | None) -> None:
    """ValueError: a weight where box losses stay the detector's own, so that it has nothing to weigh."""
    if box_weight is not None and loss != "alrp":
        raise ValueError(f"box_weight is for loss 'alrp', box losses of {loss!r} are the detector's; got {box_weight}")


class HeadLosses(NamedTuple):
    """What :class:`HeadLoss` returns; the loss to minimise is the sum."""

    classification: Tensor
    """0-d; of Rank & Sort Loss, ``ranking + sorting``."""
    box: Tensor
    """0-d; weighted."""


class HeadLoss(nn.Module):
    """A ranking loss for the scores of a head, with the box loss and the balance of its paper.

    | loss      | box loss                               | its weight, with ``box_weight=None``             |
    | --------- | -------------------------------------- | ------------------------------------------------ |
    | alrp      | GIoU, ranked: aLRP's localisation part | :class:`alrp_triton.SelfBalance`, by ``period``  |
    | ap        | smooth L1, mean over all P x 4 deltas  | 1                                                |
    | rank_sort | GIoU, mean weighted by the scores      | :func:`alrp_triton.balance_by_value`, by step    |

    The state of the self-balancing is in the ``state_dict``: save it with the checkpoint. It goes to the device of the
    logits by itself. It records nothing in ``eval`` mode, nor where gradients are disabled, as for a validation loss.

    Args:
        loss: ``"alrp"``, ``"ap"`` or ``"rank_sort"``.
        period: of ``SelfBalance``, an epoch in your steps; ``"later"``: set it before the first step. Needed for
            ``"alrp"`` unless ``box_weight`` is given, else of no effect.
        initial_weight: of ``SelfBalance``, until its first period ends: 50 as published, or ``"auto"``, to fine-tune.
        tau: of the localisation error of ``"alrp"``: 0.5 for detection heads, 0.7 for an RPN.
        box_loss: ``"giou"`` or ``"smooth_l1"``; None: that of the paper. aLRP Loss needs one that is an overlap.
        box_weight: a constant weight of the box loss instead of the balance of the paper.
        delta: half-width of the step; None: that of the paper, 1 (0.5 for ``"rank_sort"``).
        process_group: rank the logits of all its processes together, and take the mean of the box loss over the
            positives of all; see :func:`alrp_triton.alrp_loss`.
        gradient_reduction: see :func:`alrp_triton.alrp_loss`.
        backend: see :func:`alrp_triton.alrp_loss`.

    Attributes:
        box_weight: 0-d tensor, the weight of the box loss in the last step; for logs. NaN before the first, and where a
            library's own box loss stays.
        box_error: 0-d tensor, the plain mean of the positives' box losses, 1 - GIoU or smooth L1, before ranks and
            weights, in the last step in which this process had any (NaN before the first). For logs: it is what falls
            as boxes improve, where aLRP's localisation part depends on the ranks too.
        period: of ``SelfBalance``, None without one; may be set.
        process_group: may be set, where processes are started later.
        warm_start: set by an adapter that knows the library's own loss, for :meth:`blended`.
        smooth_l1_beta: where smooth L1 becomes L1; published: 1, on deltas in units of their standard deviation.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; ``"alrp"`` without ``period`` and
            ``box_weight``, or with ``"smooth_l1"``.
        ImportError: torchvision is missing (when this module is imported).

    Reference: the papers of the three losses, see their functions, and the published implementations.
    """

    box_weight: Tensor
    box_error: Tensor
    smooth_l1_beta: float = 1.0

    def __init__(
        self,
        loss: Loss = "alrp",
        *,
        period: Period | None = None,
        initial_weight: InitialWeight = INITIAL_WEIGHT,
        tau: float = TAU,
        box_loss: BoxLoss | None = None,
        box_weight: float | None = None,
        delta: float | None = None,
        process_group: ProcessGroup | None = None,
        gradient_reduction: GradientReduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if loss not in get_args(Loss):
            raise ValueError(f"loss must be 'alrp', 'ap' or 'rank_sort', got {loss!r}")
        if box_loss is not None and box_loss not in get_args(BoxLoss):
            raise ValueError(f"box_loss must be 'giou', 'smooth_l1' or None, got {box_loss!r}")
        if loss == "alrp" and box_loss == "smooth_l1":
            raise ValueError("box_loss must be 'giou' for loss 'alrp', which ranks overlaps; got 'smooth_l1'")
        if period is not None:
            period = check_period(period)
        elif loss == "alrp" and box_weight is None:
            raise ValueError(
                "period must be given for loss 'alrp': an epoch in your steps, len(loader), or 'later', and set before "
                "the first step; got None"
            )
        if box_weight is not None:
            box_weight = check_number("box_weight", box_weight, 0.0, math.inf)
        check_initial_weight(initial_weight)
        check_gradient_reduction(gradient_reduction)
        self.loss: Loss = loss
        self.warm_start: WarmStart | None = None
        self.tau = check_number("tau", tau, 0.0, 1.0, high_open=True)
        self.box_loss: BoxLoss = box_loss or _BOX_LOSSES[loss]
        self.constant_weight = 1.0 if box_weight is None and loss == "ap" else box_weight
        criterion = {"alrp": ALRPLoss, "ap": APLoss, "rank_sort": RankSortLoss}[loss]
        self.criterion = criterion(
            delta=_DELTAS[loss] if delta is None else delta,
            process_group=process_group,
            gradient_reduction=gradient_reduction,
            backend=backend,
        )
        self.balance: SelfBalance | None = None
        if loss == "alrp" and self.constant_weight is None:
            assert period is not None
            self.balance = SelfBalance(period, initial_weight=initial_weight)
        self.box_weight = torch.tensor(math.nan)
        self.box_error = torch.tensor(math.nan)

    @property
    def period(self) -> Period | None:
        return None if self.balance is None else self.balance.period

    @period.setter
    def period(self, period: Period | None) -> None:
        if self.balance is not None:
            self.balance.period = check_period(period)
        elif period is not None:
            check_period(period)

    @property
    def process_group(self) -> ProcessGroup | None:
        return self.criterion.process_group

    @process_group.setter
    def process_group(self, process_group: ProcessGroup | None) -> None:
        check_process_group(process_group)
        self.criterion.process_group = process_group

    def __setstate__(self, state: dict[str, Any]) -> None:
        state.setdefault("box_error", torch.tensor(math.nan))  # pickled by version 0.5
        if "warm_start" not in state["_modules"]:
            state.setdefault("warm_start", None)
        super().__setstate__(state)

    def forward(self, logits: Tensor, targets: Tensor, boxes: Boxes, groups: Tensor | None = None) -> HeadLosses:
        """The losses of all anchors of a batch: all images, all levels, for they are one ranking.

        Args:
            logits: ``(N, C)``, or another shape; pre-sigmoid, no column for the background.
            targets: as for :func:`alrp_triton.alrp_loss`: ``(N,)`` class indices, C for background, -1 for ignored;
                or dense, the shape of the logits.
            boxes: of the positives. Computed in float32 at least, whatever their dtype.
            groups: what is ranked apart, see :func:`alrp_triton.alrp_loss`; box losses are those of all positives.

        Raises:
            TypeError, ValueError: as the losses do; boxes that are not ``(P, 4)``, or lack deltas that are needed.
                More or fewer boxes than positives are an error of the loss, which calls what it gets of each of them
                ``box_errors``, ``ious`` or ``num_positives``.
        """
        boxes = checked(boxes, self.box_loss, process_group=self.process_group)
        # One value for each positive: what the ranking needs, and the box loss that stands beside it.
        errors = box_errors(boxes, self.box_loss, self.smooth_l1_beta)
        if errors.numel():
            self.box_error = errors.detach().mean()
        if isinstance(self.criterion, ALRPLoss):
            ranked = self.criterion(logits, targets, giou_localisation_error(errors, self.tau), groups=groups)
            return self._weighted(ranked.classification, ranked.localisation)
        if isinstance(self.criterion, APLoss):
            classification = self.criterion(logits, targets, num_positives=errors.numel(), groups=groups)
            return self._weighted(classification, self._mean(errors, torch.ones_like(errors)))
        ious = paired_iou(boxes.predicted.detach(), boxes.target)
        ranked = self.criterion(logits, targets, ious, groups=groups)
        scores = _positive_scores(logits.detach(), targets, errors.numel(), self.criterion.backend)
        return self._weighted(ranked.total, self._mean(errors, scores))

    @property
    def share(self) -> float:
        """That of the ranking in this step: 1 but for a warm start."""
        return 1.0 if self.warm_start is None else self.warm_start.share

    def blended(self, own: Callable[[], tuple[Tensor, ...]], ranked: Callable[[], HeadLosses]) -> HeadLosses:
        """The ranked losses; in a warm start, and until the ranking has taken over, the library's own with them."""
        if self.warm_start is None:
            return ranked()
        if self.balance is not None and self.training and torch.is_grad_enabled():
            self.balance.told_period()  # before the first step, and not when the ranking begins
        return HeadLosses(*self.warm_start(own, ranked))

    def count_step(self) -> None:
        """Moves the warm start on, where there is one; see :meth:`WarmStart.count`."""
        if self.warm_start is not None:
            self.warm_start.count()

    def mask_loss(self, mask_logits: Tensor, mask_targets: Tensor, scores: Tensor, classification: Tensor) -> Tensor:
        """The loss of a mask branch beside Rank & Sort Loss: dice, its mean weighted by scores, balanced by value.

        The mean goes over the positives of all processes. Call it on all of them, also where there are no positives.

        Args:
            mask_logits: ``(P, h, w)``, pre-sigmoid; of each positive the mask of its own class.
            mask_targets: ``(P, h, w)``, from 0 to 1; see :func:`alrp_triton.integrations.masks.dice_error`.
            scores: ``(P,)``, floating, the greatest class score of each; no gradient goes to them.
            classification: 0-d, that of :meth:`forward`; the loss is worth as much.

        Returns:
            0-d, differentiable in ``mask_logits``; 0 without positives.

        Raises:
            TypeError, ValueError: another loss than ``"rank_sort"``; masks that :func:`dice_error` refuses; scores that
                are not floating or not ``(P,)``.

        Reference: Oksuz et al., ICCV 2021, and the published implementation of its Mask R-CNN.
        """
        if self.loss != "rank_sort":
            raise ValueError(f"mask_loss is part of loss 'rank_sort', got {self.loss!r}")
        errors = dice_error(mask_logits, mask_targets)
        check_tensor("scores", scores, "floating")
        if scores.shape != errors.shape:
            raise ValueError(
                f"scores must have shape (P,), one for each of {len(errors)} masks, got {tuple(scores.shape)}"
            )
        return balance_by_value(classification, self._mean(errors, scores.detach().to(errors.dtype)))

    def _mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """The weighted mean over the positives of all processes; the gradient is that of this process' own part."""
        total = (values * weights).sum()
        sums = torch.stack([total.detach(), weights.sum()])
        name, size = name_and_size(self.process_group)
        if name:
            sums = sums.double()  # one dtype on all processes
            group = None if self.process_group == "world" else self.process_group
            dist.all_reduce(sums, group=group)
        divisor = torch.where(sums[1] > 0, sums[1], 1.0)
        # DDP will take the mean of the processes' gradients, where their sum is that of the joint loss.
        share = total / divisor * (float(size) if self.criterion.gradient_reduction == "mean" else 1.0)
        return (sums[0] / divisor + (share - share.detach())).to(values.dtype)

    def _weighted(self, classification: Tensor, box: Tensor) -> HeadLosses:
        if self.balance is not None:
            if self.balance.weight.device != classification.device:
                with torch.inference_mode(False):  # else no later step may change it
                    self.balance.to(classification.device)
            self.balance.train(self.training and torch.is_grad_enabled())
            weighted = self.balance(classification, box)
            self.box_weight = self.balance.weight.clone()
        elif self.constant_weight is not None:
            weighted = box * self.constant_weight
            self.box_weight = torch.full_like(box.detach(), self.constant_weight)
        else:
            weighted = balance_by_value(classification, box)
            self.box_weight = torch.where(box == 0, 1.0, weighted / box).detach()
        return HeadLosses(classification, weighted)

    def extra_repr(self) -> str:
        return f"loss={self.loss!r}, box_loss={self.box_loss!r}, tau={self.tau}, box_weight={self.constant_weight}"


class DetectorLoss(nn.ModuleDict):
    """The losses of a detector, :class:`HeadLoss` by the name of the head; their state belongs in a checkpoint."""

    def set_period(self, period: Period) -> None:
        """Of the self-balancing of all heads, see :class:`HeadLoss`; of no effect where there is none."""
        for loss in self.values():
            loss.period = period

    def set_process_group(self, process_group: ProcessGroup | None) -> None:
        """Of all heads, see :class:`HeadLoss`: what a launcher starts is not there yet when a model is made."""
        for loss in self.values():
            loss.process_group = process_group

    def __getitem__(self, key: str) -> HeadLoss:
        return cast("HeadLoss", super().__getitem__(key))

    def items(self) -> ItemsView[str, HeadLoss]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cast("ItemsView[str, HeadLoss]", super().items())

    def values(self) -> ValuesView[HeadLoss]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cast("ValuesView[HeadLoss]", super().values())


def greatest_scores(logits: Tensor) -> Tensor:
    """The greatest class score of each row of ``(P, C)`` logits, ``(P,)`` float32."""
    return logits.float().amax(-1).sigmoid()


def _positive_scores(logits: Tensor, targets: Tensor, count: int, backend: Backend) -> Tensor:
    """The greatest class score of each positive's anchor, ``(P,)``: the weight of its box in Rank & Sort Loss."""
    form = check_form(logits, targets, None, IGNORE_INDEX)
    positives = positives_of(logits, targets, form, count, "boxes", backend)
    if form.num_classes is None:  # dense: a positive is one entry
        return logits.flatten()[positives].float().sigmoid()
    anchors = positives // form.num_classes
    return greatest_scores(logits.reshape(-1, form.num_classes)[anchors])
