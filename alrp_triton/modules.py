"""Losses as modules: they store their settings and call the functions of :mod:`alrp_triton.functional`."""

import math
from typing import Any

from torch import Tensor, nn

from .checks import check_bool, check_delta, check_number, no_reduction
from .dispatch import Backend, check_backend_name
from .distributed import GradientReduction, ProcessGroup, check_gradient_reduction, check_process_group
from .functional import (
    DELTA,
    DELTA_RS,
    EPS,
    EPS_RS,
    ALRPLossOutput,
    RankSortLossOutput,
    alrp_loss,
    ap_loss,
    rank_sort_loss,
)
from .targets import IGNORE_INDEX, check_indices


class _RankingLoss(nn.Module):
    """What all losses of the family are set up with."""

    # For modules that version 0.3 pickled.
    process_group: ProcessGroup | None = None
    gradient_reduction: GradientReduction = "mean"

    def __init__(
        self,
        delta: float,
        background: int | None,
        ignore_index: int,
        process_group: ProcessGroup | None,
        gradient_reduction: GradientReduction,
        backend: Backend,
    ) -> None:
        super().__init__()
        check_indices(background, ignore_index)
        check_process_group(process_group)
        check_gradient_reduction(gradient_reduction)
        check_backend_name(backend)
        self.delta = check_delta(delta)
        self.background = background
        self.ignore_index = ignore_index
        self.process_group = process_group
        self.gradient_reduction = gradient_reduction
        self.backend: Backend = backend

    def _settings(self) -> dict[str, Any]:
        """The keyword arguments of the function, by name."""
        of_some = {name: getattr(self, name) for name in ("interpolate", "delta", "eps") if hasattr(self, name)}
        return {
            **of_some,
            "background": self.background,
            "ignore_index": self.ignore_index,
            "process_group": self.process_group,
            "gradient_reduction": self.gradient_reduction,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())


class ALRPLoss(_RankingLoss):
    """Module over :func:`alrp_triton.alrp_loss`; see there for arguments, results, errors and the reference.

    Example::

        criterion = ALRPLoss()
        balance = SelfBalance(period=len(loader))
        ...
        out = criterion(logits, targets, box_errors)
        loss = out.classification + balance(out.classification, out.localisation)
    """

    @no_reduction
    def __init__(
        self,
        *,
        delta: float = DELTA,
        eps: float = EPS,
        background: int | None = None,
        ignore_index: int = IGNORE_INDEX,
        process_group: ProcessGroup | None = None,
        gradient_reduction: GradientReduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(delta, background, ignore_index, process_group, gradient_reduction, backend)
        self.eps = check_number("eps", eps, 0.0, math.inf)

    def forward(
        self, logits: Tensor, targets: Tensor, box_errors: Tensor, *, groups: Tensor | None = None
    ) -> ALRPLossOutput:
        """See :func:`alrp_triton.alrp_loss`."""
        return alrp_loss(logits, targets, box_errors, groups=groups, **self._settings())


class APLoss(_RankingLoss):
    """Module over :func:`alrp_triton.ap_loss`; see there for arguments, results, errors and the reference.

    Example::

        criterion = APLoss()
        ...
        loss = criterion(logits, targets) + box_weight * box_loss
    """

    @no_reduction
    def __init__(
        self,
        *,
        interpolate: bool = True,
        delta: float = DELTA,
        background: int | None = None,
        ignore_index: int = IGNORE_INDEX,
        process_group: ProcessGroup | None = None,
        gradient_reduction: GradientReduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(delta, background, ignore_index, process_group, gradient_reduction, backend)
        check_bool("interpolate", interpolate)
        self.interpolate = interpolate

    def forward(
        self, logits: Tensor, targets: Tensor, *, num_positives: int | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """See :func:`alrp_triton.ap_loss`."""
        return ap_loss(logits, targets, num_positives=num_positives, groups=groups, **self._settings())


class RankSortLoss(_RankingLoss):
    """Module over :func:`alrp_triton.rank_sort_loss`; see there for arguments, results, errors and the reference.

    Example::

        criterion = RankSortLoss()
        ...
        out = criterion(logits, targets, ious)
        loss = out.total
        loss = loss + balance_by_value(loss, box_loss)
    """

    @no_reduction
    def __init__(
        self,
        *,
        delta: float = DELTA_RS,
        eps: float = EPS_RS,
        background: int | None = None,
        ignore_index: int = IGNORE_INDEX,
        process_group: ProcessGroup | None = None,
        gradient_reduction: GradientReduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(delta, background, ignore_index, process_group, gradient_reduction, backend)
        self.eps = check_number("eps", eps, 0.0, math.inf)

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        ious: Tensor | None = None,
        *,
        num_positives: int | None = None,
        groups: Tensor | None = None,
    ) -> RankSortLossOutput:
        """See :func:`alrp_triton.rank_sort_loss`."""
        return rank_sort_loss(logits, targets, ious, num_positives=num_positives, groups=groups, **self._settings())
