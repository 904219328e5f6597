"""What a part of the work is to the process that does it: units, records, and the time that is left."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch

Record = dict[str, Any]
Thing = TypeVar("Thing")


class Unit(NamedTuple):
    """The least that is done or left out; each begins with a line, so that what crashes has a name."""

    name: str
    run: Callable[[], Iterable[Record]]


class Context:
    """What a process works with.

    Args:
        rehearse: on the CPU, at toy sizes, Triton's kernels in its interpreter.
        seconds: from now on, after which nothing more is begun.
        attempt: how many processes crashed or ended before, at units of the same shard.
        seed: of random problems.
    """

    def __init__(self, rehearse: bool, seconds: float, attempt: int = 0, seed: int = 0) -> None:
        self.rehearse, self.attempt, self.seed = rehearse, attempt, seed
        self.until = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    def some(self, of: Sequence[Thing], count: int) -> Sequence[Thing]:
        """All of them; in a rehearsal the first few, for Triton's interpreter is slow."""
        return of[:count] if self.rehearse else of

    @property
    def compiler(self) -> str:
        """Backend of torch.compile; a rehearsal takes the way there, and does not wait for a C++ compiler."""
        return "aot_eager" if self.rehearse else "inductor"

    def wait(self) -> None:
        """For the device."""
        if not self.rehearse:
            torch.cuda.synchronize()


class Skipped(Exception):  # noqa: N818
    """There is a reason, which is no fault, not to do a shard; the text says it."""


def plain(value: Any) -> Any:
    """As JSON has it: numbers that are not finite are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(of) for of in value]
    return value


def explain(error: BaseException) -> str:
    """An exception in a line or two."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]
