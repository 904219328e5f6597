"""A sort of P numbers by counting, in Triton: one launch, where a sort of torch takes several, of few threads.

The place of a number is how many come before it, so each is compared with all: O(P^2) work, which for some thousand
numbers, spread over the GPU, takes no longer than a launch does.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_tiled import blocks

TILE = {"ROWS": 16, "COLUMNS": 64}
WARPS = 4
MOST = 8192  # numbers, 7e7 comparisons; for more torch sorts. Chosen from the desk: no GPU has timed it


@triton.jit(do_not_specialize=["P"])
def sort_kernel(keys_ptr, sorted_ptr, order_ptr, P, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Program b: block b of the keys to their places, ascending and stable, NaN last; and where they were."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key = tl.load(keys_ptr + tl.minimum(index, P - 1))
    y = key[:, None]
    before = tl.zeros([ROWS, COLUMNS], tl.int32)
    for begin in range(0, P, COLUMNS):
        other = begin + tl.arange(0, COLUMNS)
        x = tl.load(keys_ptr + tl.minimum(other, P - 1))[None, :]
        less = (x < y) | ((x == x) & (y != y))
        equal = (x == y) | ((x != x) & (y != y))
        earlier = other[None, :] < index[:, None]
        before += ((less | (equal & earlier)) & (other < P)[None, :]).to(tl.int32)
    place = tl.sum(before, axis=1)
    tl.store(sorted_ptr + place, key, mask=index < P)
    if order_ptr is not None:
        tl.store(order_ptr + place, index.to(tl.int64), mask=index < P)


def sort(keys: Tensor) -> Tensor:
    """Integers ``(P,)`` in ascending order."""
    if keys.numel() > MOST:
        return keys.sort().values
    out = torch.empty_like(keys)
    _launch(keys, out, None)
    return out


def sort_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in ascending order, and the places that they had."""
    rows = rows.contiguous()
    out, order = torch.empty_like(rows), torch.empty(rows.shape, dtype=torch.int64, device=rows.device)
    _launch(rows, out, order)
    return out, order


def _launch(keys: Tensor, out: Tensor, order: Tensor | None) -> None:
    if (p := keys.numel()) > 0:
        with torch.cuda.device_of(keys):
            sort_kernel[(blocks(p, TILE["ROWS"]),)](keys, out, order, p, num_warps=WARPS, **TILE)
