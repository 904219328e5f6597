"""The positives put in order by counting, in Triton: one launch, where sorts of torch take several, of few threads.

The place of a number is how many come before it, so each is compared with all: O(P^2) work, which for some thousand
numbers, spread over the GPU, takes no longer than a launch does.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formulas import MAX_GRADE
from .triton_layout import blocks
from .triton_targets import Found

TILE = {"ROWS": 8, "COLUMNS": 64}
WARPS = 4
MAX_COUNT = 4096  # numbers, 2e7 comparisons; for more torch sorts. Chosen from the desk: no GPU has timed it
_MAX_GRADE: tl.constexpr = tl.constexpr(MAX_GRADE)


@triton.jit(do_not_specialize=["P"])
def order_kernel(
    scores_ptr, groups_ptr, places_ptr, values_ptr, status_ptr, rows_ptr, row_groups_ptr, order_ptr, positives_ptr,
    row_values_ptr, P, BY_PLACE: tl.constexpr, IOUS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program b: block b of the numbers to their places among the rows: by group, then score, NaN last; stable.

    ``order`` tells where each was: as they come, or with ``places`` in the ascending order of these, which go to
    ``positives``. Values are in that order, too (BY_PLACE), or as the numbers come.
    """
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = index < P
    mine = tl.minimum(index, P - 1)
    score = tl.load(scores_ptr + mine, mask=inside, other=0.0)
    y = score[:, None]
    number = index.to(tl.int64)
    if places_ptr is not None:
        number = tl.load(places_ptr + mine, mask=inside, other=0)
    group = number
    if groups_ptr is not None:
        group = tl.load(groups_ptr + mine, mask=inside, other=0)
    before = tl.zeros([ROWS, COLUMNS], tl.int32)
    earlier = tl.zeros([ROWS, COLUMNS], tl.int32)
    for begin in range(0, P, COLUMNS):
        other = begin + tl.arange(0, COLUMNS)
        theirs = tl.minimum(other, P - 1)
        x = tl.load(scores_ptr + theirs)[None, :]
        first = other[None, :] < index[:, None]
        if places_ptr is not None:
            place = tl.load(places_ptr + theirs)[None, :]
            # Places are equal only where they stand for positives that are not there.
            first = (place < number[:, None]) | ((place == number[:, None]) & first)
        less = (x < y) | ((x == x) & (y != y))
        equal = (x == y) | ((x != x) & (y != y))
        less = less | (equal & first)
        if groups_ptr is not None:
            of = tl.load(groups_ptr + theirs)[None, :]
            less = (of < group[:, None]) | ((of == group[:, None]) & less)
        counts = (other < P)[None, :]
        before += (less & counts).to(tl.int32)
        if places_ptr is not None:
            earlier += (first & counts).to(tl.int32)
    row = tl.sum(before, axis=1)
    rank = index
    if places_ptr is not None:
        rank = tl.sum(earlier, axis=1)
        tl.store(positives_ptr + rank, number, mask=inside)
    tl.store(rows_ptr + row, score, mask=inside)
    tl.store(order_ptr + row, rank.to(tl.int64), mask=inside)
    if groups_ptr is not None:
        tl.store(row_groups_ptr + row, group, mask=inside)
    if row_values_ptr is not None:
        value = tl.zeros([ROWS], tl.float64)
        if values_ptr is not None:
            value = tl.load(values_ptr + (rank if BY_PLACE else index), mask=inside, other=0.0).to(tl.float64)
        tl.store(row_values_ptr + row, value, mask=inside)
        if IOUS:  # a NaN is let through
            wrong = inside & ((value < 0) | (value > _MAX_GRADE))
            if tl.max(wrong.to(tl.int32), axis=0) > 0:
                tl.store(status_ptr + 2, 0)
    if status_ptr is not None:  # noqa: SIM102 (known when compiling)
        if tl.program_id(0) == 0:
            tl.store(status_ptr + 3, (tl.load(status_ptr + 1) == 0).to(tl.int64))
            tl.store(status_ptr + 4, (tl.load(status_ptr) == P).to(tl.int64))


def rank(
    scores: Tensor,
    values: Tensor | None,
    groups: Tensor | None,
    found: Found | None = None,
    graded: bool = False,
    ious: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, float64, made of scores, their values (0 of None), groups (empty: there is one), and order; and positives.

    The positives are those that were ``found``, in ascending order, to which ``values`` and ``order`` refer, but for
    the values of ``graded`` targets, which are as found; without them the scores themselves are in order. Writes what
    ``found.status`` has room for: whether values are in the range of ``ious``, no target is bad, and all were found.
    """
    p, device = scores.numel(), scores.device
    rows, row_values = (torch.empty(p, dtype=torch.float64, device=device) for _ in range(2))
    order, positives = (torch.empty(p, dtype=torch.int64, device=device) for _ in range(2))
    row_groups = torch.empty(0 if groups is None else p, dtype=torch.int64, device=device)
    places, status = (None, None) if found is None else (found.places, found.status)
    if p > 0 or found is not None:
        with torch.cuda.device_of(scores):
            order_kernel[(max(blocks(p, TILE["ROWS"]), 1),)](
                scores, groups, places, values, status, rows, row_groups, order, positives, row_values, p,
                BY_PLACE=found is not None and not graded, IOUS=ious, num_warps=WARPS, **TILE,
            )  # fmt: skip
    return rows, row_values, row_groups, order, positives
