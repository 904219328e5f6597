"""Warnings, each once a process, of what is nearly certainly a mistake and yet no error."""

import warnings
from collections import deque

import torch
from torch import Tensor

_ENOUGH = 1000  # logits, of which some lie outside of [0, 1] in any detector
_LEVEL = (3.4, 4.6)  # ratio of the sizes of neighbouring levels: 4, and what odd sizes make of it
_CALLS = 3  # in a row that fall, or grow, as levels do

_to_look = True  # at values: in the first call with enough of them
_to_watch = True  # sizes
_sizes = deque[int](maxlen=_CALLS)


def reset() -> None:
    """As in a new process."""
    global _to_look, _to_watch
    _to_look = _to_watch = True
    _sizes.clear()


def hint(logits: Tensor) -> None:
    """Warn of logits that look like probabilities (on a CPU, of the first that are looked at), or like one level."""
    if torch.compiler.is_compiling() or type(logits) not in (Tensor, torch.nn.Parameter):
        return
    if _to_look and logits.device.type == "cpu" and logits.numel() >= _ENOUGH:
        _look(logits.detach())
    if _to_watch and logits.requires_grad:
        _watch(logits.numel())


def _look(logits: Tensor) -> None:
    global _to_look
    _to_look = False
    low, high = (float(each) for each in logits.aminmax())
    if 0 <= low < high <= 1:
        warnings.warn(
            f"logits are all between {low:.3g} and {high:.3g}, as probabilities are; pass what the head gives before "
            "the sigmoid",
            stacklevel=6,
        )


def _watch(size: int) -> None:
    global _to_watch
    _sizes.append(size)
    if len(_sizes) < _CALLS or not all(_sizes):
        return
    ratios = [before / after for before, after in zip(list(_sizes)[:-1], list(_sizes)[1:], strict=True)]
    low, high = _LEVEL
    if all(low < ratio < high for ratio in ratios) or all(low < 1 / ratio < high for ratio in ratios):
        _to_watch = False
        warnings.warn(
            f"{_CALLS} calls in a row had {', '.join(map(str, _sizes))} logits, as the levels of a feature pyramid "
            "have; all levels and images of a batch are one ranking: concatenate them, and call the loss once",
            stacklevel=6,
        )
