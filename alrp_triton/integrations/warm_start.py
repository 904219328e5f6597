"""A beginning with another loss, from which a ranking takes over."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_integer

Parts = tuple[Tensor, ...]


def check_warm_start(warm_start: object) -> int:
    """The steps. TypeError or ValueError unless an int from 0 on."""
    return check_integer("warm_start", warm_start, 0, 2**31, such_as="such as 500, or 0 for none")


class WarmStart(nn.Module):
    """The first ``length`` steps have one loss; in as many more the other takes over, linearly.

    The count of steps is a buffer, in the ``state_dict``; the host waits for it once after loading.
    """

    steps: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("steps", torch.tensor(0))
        self._known: int | None = 0

    @property
    def share(self) -> float:
        """That of the second loss in this step."""
        if self._known is None:
            self._known = int(self.steps)
        return min(max((self._known + 1 - self.length) / (self.length + 1), 0.0), 1.0)

    def forward(self, first: Callable[[], Parts], second: Callable[[], Parts]) -> Parts:
        """The parts of both losses, blended; a loss of which nothing is taken is not computed."""
        share = self.share
        if share == 1:
            return second()
        if share == 0:
            return first()
        pairs = zip(first(), second(), strict=True)
        return tuple(one * (1 - share) + other * share for one, other in pairs)

    def count(self) -> None:
        """The step is over. In ``eval`` mode, and where gradients are disabled, it was none."""
        if self.training and torch.is_grad_enabled():
            self._known = (int(self.steps) if self._known is None else self._known) + 1
            self.steps.fill_(self._known)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known = None

    def extra_repr(self) -> str:
        return f"length={self.length}"
