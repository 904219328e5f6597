"""The rows compared among themselves by score and by grade, in torch operations: blocks of pairs, on any device.

A step is linear in the score, but whether one grade is below another cuts through that: pairs are compared one by one,
O(P^2) work, O(P) memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_PAIRS = 1 << 18  # of a block: its temporaries stay in the cache


def _step(distance: Tensor, delta: float) -> Tensor:
    return (distance / (2 * delta) + 0.5).clamp_(0, 1) if delta > 0 else (distance >= 0).double()


def _blocks(count: int) -> Iterator[slice]:
    size = max(_PAIRS // max(count, 1), 1)
    return (slice(start, start + size) for start in range(0, count, size))


def among_grades(rows: Tensor, grades: Tensor, delta: float) -> Tensor:
    """Sums over the rows of no lower, and of lower grade; contract in :mod:`alrp_triton.operators`."""
    out = rows.new_empty(4, len(rows))
    values = torch.stack([torch.ones_like(grades), 1 - grades], 1)
    for block in _blocks(len(rows)):
        h = _step(rows - rows[block, None], delta)
        lower = grades < grades[block, None]
        out[2:, block] = (h * lower @ values).t()
        out[:2, block] = (h.masked_fill_(lower, 0.0) @ values).t()
    return out + ((rows[0] + rows[-1]) * 0 + (grades * 0).sum())


def below_grades(rows: Tensor, grades: Tensor, weights: Tensor, delta: float) -> Tensor:
    """Sums of the weights of the rows of higher grade; contract in :mod:`alrp_triton.operators`."""
    out = torch.empty_like(rows)
    for block in _blocks(len(rows)):  # of the columns of the matrix
        h = _step(rows[block, None] - rows, delta)
        out[block] = h.masked_fill_(grades <= grades[block, None], 0.0) @ weights
    return out + ((rows[0] + rows[-1]) * 0 + (grades * 0).sum() + (weights * 0).sum())
