"""Warnings, each once a process, of what is nearly certainly a mistake and yet no error."""

import inspect
import warnings
from collections import deque
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

_ENOUGH = 1000  # logits, of which some lie outside of [0, 1] in any detector
_LEVEL = (3.4, 4.6)  # ratio of the sizes of neighbouring levels: 4, and what odd sizes make of it
_LEVELS, _STEPS, _CALLS = range(3, 9), 3, 64  # of a pyramid; so many steps in a row; in the first calls of a process
_INSIDE = (str(Path(__file__).parent), str(Path(torch.__file__).parent))

_to_look = True  # at values: in the first call with enough of them
_to_watch = _CALLS  # sizes
_sizes = deque[int](maxlen=_STEPS * _LEVELS[-1])


def reset() -> None:
    """As in a new process."""
    global _to_look, _to_watch
    _to_look, _to_watch = True, _CALLS
    _sizes.clear()


def hint(logits: Tensor) -> None:
    """Warn of logits that look like probabilities (on a CPU, of the first that are looked at), or like one level.

    Sizes are those of logits that require a gradient. Nothing is looked at where a graph is made, of whatever kind.
    """
    if torch.compiler.is_compiling() or not (_to_look or _to_watch):
        return
    if type(logits) not in (Tensor, torch.nn.Parameter) or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return
    if _to_look and logits.device.type == "cpu" and logits.numel() >= _ENOUGH:
        _look(logits.detach())
    if _to_watch and logits.requires_grad:
        _watch(logits.numel())


def _look(logits: Tensor) -> None:
    global _to_look
    try:
        low, high = (float(each) for each in logits.aminmax())
    except RuntimeError:  # make_fx, vmap, fake tensors: there are no values; the loss itself says what it cannot do
        return
    _to_look = False
    if 0 <= low < high <= 1:
        _warn(
            f"logits are all between {low:.3g} and {high:.3g}, as probabilities are; pass what the head gives before "
            "the sigmoid"
        )


def _watch(size: int) -> None:
    global _to_watch
    _to_watch -= 1
    _sizes.append(size)
    sizes = list(_sizes)
    for levels in _LEVELS:
        steps = [sizes[-levels * (k + 1) : len(sizes) - levels * k] for k in range(_STEPS)]
        if len(sizes) >= _STEPS * levels and (all(map(_falls, steps)) or all(_falls(step[::-1]) for step in steps)):
            _to_watch = 0
            _warn(
                f"the loss was called with {', '.join(map(str, steps[0]))} logits, {_STEPS} times in a row, as the "
                "levels of a feature pyramid have them; all levels and images of a batch are one ranking: concatenate "
                "them, and call the loss once"
            )
            return


def _falls(sizes: list[int]) -> bool:
    return all(sizes) and all(_LEVEL[0] < before / after < _LEVEL[1] for before, after in pairwise(sizes))


def _warn(message: str) -> None:
    """At the line of the user, below the package's own frames and torch's."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
