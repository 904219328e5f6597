"""Targets read in torch operations: which columns count, and where the positives are.

On a GPU the host waits for the answer; there this is the way only where triton is missing.
"""

import torch
from torch import Tensor

from ..formulas import MAX_GRADE
from .columns import ALL, NONE

# Few enough values that a part is still in the cache for the next operation; on a GPU all at once.
_CHUNK = 1 << 17
_MIN_MAX = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)  # dtypes whose extremes tell all


def _is_bad(targets: Tensor, codes: Tensor) -> bool:
    """Whether some dense targets are none of 1, 0 and -1; codes are the targets as int8."""
    lowest = -1 if targets.dtype.is_signed else 0  # -1 would wrap around to the largest value of an unsigned dtype
    low, high = (targets if targets.dtype in _MIN_MAX else codes).aminmax()
    if int(low) < lowest or int(high) > 1:
        return True
    return targets.dtype not in _MIN_MAX and bool((codes.to(targets.dtype) != targets).any())


def _grades_as_codes(targets: Tensor) -> Tensor:
    """Grades, floating, as int8: 1 positive, 0 negative, -1 ignored, 2 what means nothing."""
    positive = (targets > 0) & (targets <= MAX_GRADE)
    codes = torch.where(positive, 1, torch.where(targets == -1, -1, 2)).to(torch.int8)
    return codes.masked_fill_(targets == 0, 0)


def _find(mask: Tensor) -> Tensor:
    """Indices of what is True, ascending, fast where little is: runs of 8 that are all False are seen as one number."""
    if mask.numel() % 8:
        return mask.nonzero().view(-1)
    words = mask.view(torch.int64).nonzero().view(-1)
    word, byte = mask.view(-1, 8).index_select(0, words).nonzero().unbind(1)
    return words.index_select(0, word) * 8 + byte


def _dense(targets: Tensor, graded: bool) -> tuple[Tensor, Tensor | None, bool]:
    targets = targets.reshape(-1)
    chunk = _CHUNK if targets.device.type == "cpu" else max(targets.numel(), 1)
    marks = None if targets.dtype.itemsize == 1 else torch.empty_like(targets, dtype=torch.uint8)
    positives: list[Tensor] = []
    bad = False
    for start in range(0, targets.numel(), chunk):
        part = targets[start : start + chunk]
        if graded and part.is_floating_point():
            part = _grades_as_codes(part)
        codes = part.to(torch.int8)
        bad = bad or _is_bad(part, codes)
        # logical_not is what == 0 would give, several times faster.
        positives.append(_find(codes.bitwise_xor(1).logical_not()).add_(start))
        if marks is not None:
            marks[start : start + chunk] = codes
    return torch.cat(positives) if positives else targets.new_empty(0, dtype=torch.int64), marks, bad


def _indices(targets: Tensor, num_classes: int, background: int, ignore_index: int) -> tuple[Tensor, Tensor, bool]:
    signed = targets.dtype.is_signed
    targets = targets.reshape(-1).long()  # a number of classes would wrap around in a narrow dtype
    inside = (targets >= 0) & (targets < num_classes)
    ignored = targets == ignore_index
    nothing = (targets == background) | ignored
    if not signed:  # what is negative now was a uint64 too large
        nothing &= targets >= 0
    positive = inside & ~nothing
    where = positive.nonzero().view(-1)
    marks = torch.where(positive, targets, torch.where(ignored, ALL, NONE)).int()
    return where * num_classes + targets[where], marks, not bool((inside | nothing).all())


def read(
    targets: Tensor, num_classes: int | None, background: int, ignore_index: int, graded: bool, count: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Positives, marks, status; contract in :mod:`alrp_triton.backends`."""
    if num_classes is None:
        positives, marks, bad = _dense(targets, graded)
    else:
        positives, marks, bad = _indices(targets, num_classes, background, ignore_index)
    found = positives.numel()
    status = torch.tensor([found, bad], dtype=torch.int64, device=targets.device)
    return positives if found == count else positives.new_zeros(count), marks, status
