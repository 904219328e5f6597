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

    The count of steps is a buffer, in the ``state_dict``. The host knows it, and waits for it where others have written
    it: a loaded state, the other processes of DistributedDataParallel, an average of weights. Once the second loss has
    taken over only a loaded state is looked at.
    """

    steps: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        with torch.inference_mode(False):  # else no later step may change it
            self.register_buffer("steps", torch.tensor(0))
        self._known: int | None = 0
        self._written = self._stamp()

    def _stamp(self) -> tuple[int, int]:
        """Another one whenever the buffer has been written into, or is another tensor."""
        return id(self.steps), -1 if self.steps.is_inference() else self.steps._version

    def _count(self) -> int:
        over = self._known is not None and self._known >= 2 * self.length
        if self._known is None or not (over or torch.compiler.is_compiling() or self._written == self._stamp()):
            self._known, self._written = int(self.steps), self._stamp()
        return self._known

    @property
    def share(self) -> float:
        """That of the second loss in this step."""
        return min(max((self._count() + 1 - self.length) / (self.length + 1), 0.0), 1.0)

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
            self._known = self._count() + 1
            self.steps.fill_(self._known)
            if not torch.compiler.is_compiling():
                self._written = self._stamp()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known, self._written = None, (0, 0)  # of another tensor

    def extra_repr(self) -> str:
        return f"length={self.length}"
