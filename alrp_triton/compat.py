"""The published interfaces, so that a detection head written for them switches by changing one import.

``aLRPLoss``, ``APLoss``, ``RankSort``, ``BucketedAPLoss`` and ``BucketedRankSort`` are called with ``apply``,
positionally, and return what the published autograd functions return, in their order. Behind them are the functions of
this package; docs/migration.md lists what differs. New code is better off with :func:`alrp_triton.alrp_loss`,
:func:`alrp_triton.ap_loss` and :func:`alrp_triton.rank_sort_loss`, which check more and say more.
"""

import torch
from torch import Tensor

from .checks import check_tensor
from .functional import DELTA, DELTA_RS, EPS, EPS_RS, alrp_loss, ap_loss, rank_sort_loss

__all__ = ["APLoss", "BucketedAPLoss", "BucketedRankSort", "RankSort", "aLRPLoss"]


class aLRPLoss:  # noqa: N801 (the published name)
    """In place of ``aLRPLoss`` of github.com/kemaloksuz/aLRPLoss."""

    @staticmethod
    def apply(
        logits: Tensor, targets: Tensor, regression_losses: Tensor, delta: float = DELTA, eps: float = EPS
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The aLRP Loss of the classification branch; the caller makes that of the box branch from the ranks.

        Args:
            logits: scores of all anchors and classes, any shape.
            targets: the same shape: 1 positive, 0 negative, -1 ignored; or class indices, as for
                :func:`alrp_triton.alrp_loss`.
            regression_losses: localisation errors of the positives, ``(P,)``; not differentiated.
            delta: half-width of the step.
            eps: as for :func:`alrp_triton.alrp_loss`.

        Returns:
            The loss, 0-d; the ranks of the positives, ``(P,)``; the ascending argsort of their logits, ``(P,)`` int64.
            The published loss of the box branch is then
            ``(regression_losses[order].flip(0).cumsum(0) / rank[order].flip(0)).mean()``.

        Raises:
            TypeError, ValueError: see :func:`alrp_triton.alrp_loss`.
        """
        check_tensor("regression_losses", regression_losses, "floating")
        out = alrp_loss(logits, targets, regression_losses.detach(), delta=delta, eps=eps)
        return out.classification, out.rank, out.order


class APLoss:
    """In place of ``APLoss`` of github.com/kemaloksuz/aLRPLoss and github.com/kemaloksuz/RankSortLoss."""

    @staticmethod
    def apply(logits: Tensor, targets: Tensor, delta: float = DELTA) -> Tensor:
        """AP Loss with interpolated precision.

        Args:
            logits: scores of all anchors and classes, any shape.
            targets: the same shape: 1 positive, 0 negative, -1 ignored; or class indices, as for
                :func:`alrp_triton.alrp_loss`.
            delta: half-width of the step.

        Returns:
            The loss, 0-d.

        Raises:
            TypeError, ValueError: see :func:`alrp_triton.ap_loss`.
        """
        return ap_loss(logits, targets, delta=delta)


class RankSort:
    """In place of ``RankSort`` of github.com/kemaloksuz/RankSortLoss."""

    @staticmethod
    def apply(
        logits: Tensor,
        targets: Tensor,
        delta_RS: float = DELTA_RS,  # noqa: N803 (the published name)
        eps: float = EPS_RS,
    ) -> tuple[Tensor, Tensor]:
        """Rank & Sort Loss.

        Args:
            logits: scores of all anchors and classes, any shape.
            targets: the same shape, floating: the IoU of a positive, 0 negative, -1 ignored.
            delta_RS: half-width of the step.
            eps: as for :func:`alrp_triton.rank_sort_loss`.

        Returns:
            The ranking and the sorting error, 0-d each.

        Raises:
            TypeError, ValueError: see :func:`alrp_triton.rank_sort_loss`.
        """
        out = rank_sort_loss(logits, targets, delta=delta_RS, eps=eps)
        return out.ranking, out.sorting


class BucketedRankSort(RankSort):
    """In place of ``BucketedRankSort`` of github.com/blisgard/BucketedRankingBasedLosses: exact at any delta.

    That one replaces the negatives between two positives by their mean (Yavuz et al., ECCV 2024), which changes nothing
    where the step is hard.
    """


class BucketedAPLoss:
    """In place of ``BucketedAPLoss`` of github.com/blisgard/BucketedRankingBasedLosses: exact at any delta."""

    @staticmethod
    def apply(logits: Tensor, targets: Tensor, delta: float = DELTA) -> Tensor:
        """What the bucketed AP Loss approximates: no AP Loss, but the ranking error of Rank & Sort Loss.

        Its precision is not interpolated, and a positive is compared with itself like with any other.

        Args:
            logits: scores of all anchors and classes, any shape.
            targets: the same shape: 1 (or any quality above 0) positive, 0 negative, -1 ignored.
            delta: half-width of the step.

        Returns:
            The loss, 0-d.

        Raises:
            TypeError, ValueError: see :func:`alrp_triton.rank_sort_loss`.
        """
        check_tensor("targets", targets, "target")
        return rank_sort_loss(
            logits, targets.to(torch.promote_types(targets.dtype, torch.float32)), delta=delta
        ).ranking
