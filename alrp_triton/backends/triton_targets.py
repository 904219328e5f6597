"""Targets read in one pass by Triton: which columns count, which are positives, and what is wrong.

A block of targets with positives takes a place for them by an atomic counter, in whatever order blocks come; sorting
them afterwards (:mod:`.triton_sort`) makes the result independent of it. The host waits for nothing.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formulas import MAX_GRADE
from .columns import ALL, NONE
from .triton_layout import blocks

BLOCK = 512  # more takes registers, and so warps
WARPS = 4
_MAX_GRADE: tl.constexpr = tl.constexpr(MAX_GRADE)
_NONE: tl.constexpr = tl.constexpr(NONE)
_ALL: tl.constexpr = tl.constexpr(ALL)


class Found(NamedTuple):
    """The positives in any order, int64 and float64 ``(P,)``; 0 in place of those that are not there."""

    places: Tensor
    """Their flat indices."""
    scores: Tensor
    grades: Tensor
    """What graded targets say of each."""
    groups: Tensor
    status: Tensor
    """int64 ``(5,)``: how many there are, and how many targets mean nothing; the rest is for
    :func:`.triton_sort.rank`, which makes the third 0 where values are out of range."""


@triton.jit
def _report(
    positive, bad, where, target, logits_ptr, groups_ptr, found_ptr, status_ptr, count, run, GRADED: tl.constexpr
):
    """Append what is known of a block's positives, and count them and bad values."""
    found = tl.sum(positive.to(tl.int64), axis=0)
    step = (count + count % 2).to(tl.int64)  # so that 16 bytes divide addresses, whatever the number
    if found > 0:
        place = tl.atomic_add(status_ptr, found, sem="relaxed") + tl.cumsum(positive.to(tl.int64), axis=0) - 1
        kept = positive & (place < count)
        tl.store(found_ptr + place, where, mask=kept)
        score = tl.load(logits_ptr + where, mask=kept, other=0.0).to(tl.float64)
        tl.store(found_ptr + step + place, score.to(tl.int64, bitcast=True), mask=kept)
        if GRADED:
            grade = target.to(tl.float64).to(tl.int64, bitcast=True)
            tl.store(found_ptr + 2 * step + place, grade, mask=kept)
        if groups_ptr is not None:
            group = tl.load(groups_ptr + where // run, mask=kept, other=0)
            tl.store(found_ptr + 3 * step + place, group, mask=kept)
    wrong = tl.sum(bad.to(tl.int64), axis=0)
    if wrong > 0:
        tl.atomic_add(status_ptr + 1, wrong, sem="relaxed")
    if tl.program_id(0) == 0:
        tl.store(status_ptr + 2, 1)


@triton.jit(do_not_specialize=["count", "N", "run"])
def dense_kernel(
    targets_ptr, marks_ptr, logits_ptr, groups_ptr, found_ptr, status_ptr, count, N: tl.int64, run: tl.int64,
    SIGNED: tl.constexpr, GRADED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: targets of block b, one for each logit."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    whole = start + BLOCK <= N  # then there is no mask, and a thread reads 16 bytes at once
    if whole:
        target = tl.load(targets_ptr + index)
    else:
        target = tl.load(targets_ptr + index, mask=index < N, other=0)
    negative, positive = target == 0, target == 1
    if GRADED:
        positive = (target > 0) & (target <= _MAX_GRADE)
    bad = ~(negative | positive)
    if SIGNED:  # -1 would wrap around to the largest value of an unsigned dtype
        bad = bad & (target != -1)
    if marks_ptr is not None:
        if whole:
            tl.store(marks_ptr + index, (~negative).to(tl.uint8))
        else:
            tl.store(marks_ptr + index, (~negative).to(tl.uint8), mask=index < N)
    _report(positive, bad, index, target, logits_ptr, groups_ptr, found_ptr, status_ptr, count, run, GRADED)


@triton.jit(do_not_specialize=["count", "anchors", "classes", "background", "ignore_index", "run"])
def classes_kernel(
    targets_ptr, marks_ptr, logits_ptr, groups_ptr, found_ptr, status_ptr, count, anchors: tl.int64, classes: tl.int64,
    background: tl.int64, ignore_index: tl.int64, run: tl.int64, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: class indices of block b of the anchors; marks as in :class:`.columns.Columns`."""
    anchor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = anchor < anchors
    target = tl.load(targets_ptr + anchor, mask=inside, other=0).to(tl.int64)
    ignored = target == ignore_index
    nothing = (target == background) | ignored
    if not SIGNED:  # what is negative now was a uint64 too large
        nothing = nothing & (target >= 0)
        ignored = ignored & (target >= 0)
    known = (target >= 0) & (target < classes)
    positive = inside & known & ~nothing
    mark = tl.where(positive, target, tl.where(ignored, _ALL, _NONE)).to(tl.int32)
    tl.store(marks_ptr + anchor, mark, mask=inside)
    bad, where = inside & ~known & ~nothing, anchor * classes + target
    _report(positive, bad, where, target, logits_ptr, groups_ptr, found_ptr, status_ptr, count, run, False)


def read(
    targets: Tensor,
    num_classes: int | None,
    background: int,
    ignore_index: int,
    graded: bool,
    count: int,
    logits: Tensor,
    groups: Tensor | None,
) -> tuple[Found, Tensor | None]:
    """The positives as they are found, and marks as in :mod:`alrp_triton.backends`."""
    n, signed, marks, targets = targets.numel(), targets.dtype.is_signed, None, targets.contiguous()
    if targets.dtype == torch.bool:
        targets = targets.view(torch.uint8)
    if num_classes is not None or targets.dtype.itemsize > 1:
        marks = torch.empty(n, dtype=torch.uint8 if num_classes is None else torch.int32, device=targets.device)
    step = count + count % 2
    found = torch.zeros(4 * step + 5, dtype=torch.int64, device=targets.device)
    status = found[4 * step :]
    run = max(logits.numel() // max(0 if groups is None else groups.numel(), 1), 1)
    with torch.cuda.device_of(targets):
        if num_classes is None:
            dense_kernel[(blocks(n, BLOCK),)](
                targets, marks, logits, groups, found, status, count, n, run, SIGNED=signed, GRADED=graded,
                BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        else:
            classes_kernel[(blocks(n, BLOCK),)](
                targets, marks, logits, groups, found, status, count, n, num_classes, background, ignore_index, run,
                SIGNED=signed, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    doubles = found.view(torch.float64)
    scores, grades = doubles[step : step + count], doubles[2 * step : 2 * step + count]
    return Found(found[:count], scores, grades, found[3 * step : 3 * step + count], status), marks
