"""Targets read in torch operations: who is a negative, and where the positives are.

On a GPU the host waits for the answer; there this is the way only where triton is missing.
"""

import torch
from torch import Tensor

from ..formulas import MOST_GRADE

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
    positive = (targets > 0) & (targets <= MOST_GRADE)
    codes = torch.where(positive, 1, torch.where(targets == -1, -1, 2)).to(torch.int8)
    return codes.masked_fill_(targets == 0, 0)


def _find(mask: Tensor) -> Tensor:
    """Indices of what is True, ascending, fast where little is: runs of 8 that are all False are seen as one number."""
    if mask.numel() % 8:
        return mask.nonzero().view(-1)
    words = mask.view(torch.int64).nonzero().view(-1)
    word, byte = mask.view(-1, 8).index_select(0, words).nonzero().unbind(1)
    return words.index_select(0, word) * 8 + byte


def _classify_dense(targets: Tensor, graded: bool) -> tuple[Tensor, Tensor, bool]:
    targets = targets.reshape(-1)
    chunk = _CHUNK if targets.device.type == "cpu" else max(targets.numel(), 1)
    negatives = torch.empty(targets.shape, dtype=torch.bool, device=targets.device)
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
        torch.logical_not(codes, out=negatives[start : start + chunk])
    return negatives, torch.cat(positives) if positives else negatives.new_empty(0, dtype=torch.int64), bad


def _classify_indices(
    targets: Tensor, num_classes: int, background: int, ignore_index: int
) -> tuple[Tensor, Tensor, bool]:
    signed = targets.dtype.is_signed
    targets = targets.reshape(-1).long()  # a number of classes would wrap around in a narrow dtype
    inside = (targets >= 0) & (targets < num_classes)
    counted = targets != ignore_index
    nothing = (targets == background) | ~counted
    if not signed:  # what is negative now was a uint64 too large
        nothing &= targets >= 0
    where = (inside & ~nothing).nonzero().view(-1)
    positives = where * num_classes + targets[where]
    negatives = counted.unsqueeze(1).repeat(1, num_classes).view(-1)
    negatives.index_fill_(0, positives, False)
    return negatives, positives, not bool((inside | nothing).all())


def classify(
    targets: Tensor, num_classes: int | None, background: int, ignore_index: int, graded: bool, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask of the negatives, positives, status; contract in :mod:`alrp_triton.operators`."""
    if num_classes is None:
        negatives, positives, bad = _classify_dense(targets, graded)
    else:
        negatives, positives, bad = _classify_indices(targets, num_classes, background, ignore_index)
    found = positives.numel()
    status = torch.tensor([found, bad], dtype=torch.int64, device=targets.device)
    return negatives, positives if found == count else positives.new_zeros(count), status
