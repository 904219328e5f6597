"""Losses as modules: they store their settings and call the functions of :mod:`alrp_triton.functional`."""

import math

from torch import Tensor, nn

from .checks import check_delta, check_number
from .functional import DELTA, EPS, ALRPLossOutput, alrp_loss
from .operators import Backend, check_backend_name
from .targets import IGNORE_INDEX, check_indices


class ALRPLoss(nn.Module):
    """Module over :func:`alrp_triton.alrp_loss`; see there for arguments, results, errors and the reference.

    Example::

        criterion = ALRPLoss()
        balance = SelfBalance(period=len(loader))
        ...
        out = criterion(logits, targets, box_errors)
        loss = out.classification + balance(out.classification, out.localisation)
    """

    def __init__(
        self,
        *,
        delta: float = DELTA,
        eps: float = EPS,
        background: int | None = None,
        ignore_index: int = IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_indices(background, ignore_index)
        check_backend_name(backend)
        self.delta = check_delta(delta)
        self.eps = check_number("eps", eps, 0.0, math.inf)
        self.background = background
        self.ignore_index = ignore_index
        self.backend: Backend = backend

    def forward(self, logits: Tensor, targets: Tensor, box_errors: Tensor) -> ALRPLossOutput:
        """See :func:`alrp_triton.alrp_loss`."""
        return alrp_loss(
            logits,
            targets,
            box_errors,
            delta=self.delta,
            eps=self.eps,
            background=self.background,
            ignore_index=self.ignore_index,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"delta={self.delta}, eps={self.eps}, background={self.background}, ignore_index={self.ignore_index}, "
            f"backend={self.backend!r}"
        )
