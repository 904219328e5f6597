"""Targets read in one pass by Triton: which columns count, where the positives are, and what is wrong.

A block of targets with positives takes a place for them by an atomic counter, in whatever order blocks come; sorting
the P indices afterwards makes the result independent of it. The host waits for nothing.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formulas import MOST_GRADE
from .triton_sort import sort
from .triton_tiled import blocks

BLOCK = 2048
CLASS_TILE = {"ANCHORS": 64, "CLASSES": 32}
WARPS = 4
_MOST_GRADE: tl.constexpr = tl.constexpr(MOST_GRADE)


@triton.jit
def _report(positive, bad, where, positives_ptr, status_ptr, count):
    """Append the places of a block's positives, and count its positives and bad values."""
    found = tl.sum(positive.to(tl.int64), axis=0)
    if found > 0:
        place = tl.atomic_add(status_ptr, found, sem="relaxed") + tl.cumsum(positive.to(tl.int64), axis=0) - 1
        tl.store(positives_ptr + place, where, mask=positive & (place < count))
    wrong = tl.sum(bad.to(tl.int64), axis=0)
    if wrong > 0:
        tl.atomic_add(status_ptr + 1, wrong, sem="relaxed")


@triton.jit(do_not_specialize=["count", "N"])
def dense_kernel(
    targets_ptr, marks_ptr, positives_ptr, status_ptr, count, N: tl.int64,
    SIGNED: tl.constexpr, GRADED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: targets of block b, one for each logit."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + index, mask=index < N, other=0)
    negative, positive = target == 0, target == 1
    if GRADED:
        positive = (target > 0) & (target <= _MOST_GRADE)
    bad = ~(negative | positive)
    if SIGNED:  # -1 would wrap around to the largest value of an unsigned dtype
        bad = bad & (target != -1)
    if marks_ptr is not None:
        tl.store(marks_ptr + index, (~negative).to(tl.uint8), mask=index < N)
    _report(positive, bad, index, positives_ptr, status_ptr, count)


@triton.jit(do_not_specialize=["count", "anchors", "classes", "background", "ignore_index"])
def classes_kernel(
    targets_ptr, marks_ptr, positives_ptr, status_ptr, count, anchors: tl.int64, classes: tl.int64,
    background: tl.int64, ignore_index: tl.int64, SIGNED: tl.constexpr, ANCHORS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Program b: class indices of block b of the anchors; marks with 1, where there was 0, what does not count."""
    anchor = tl.program_id(0).to(tl.int64) * ANCHORS + tl.arange(0, ANCHORS)
    inside = anchor < anchors
    target = tl.load(targets_ptr + anchor, mask=inside, other=0).to(tl.int64)
    ignored = inside & (target == ignore_index)
    nothing = (target == background) | ignored
    if not SIGNED:  # what is negative now was a uint64 too large
        nothing = nothing & (target >= 0)
        ignored = ignored & (target >= 0)
    known = (target >= 0) & (target < classes)
    positive = inside & known & ~nothing
    where = anchor * classes + target
    tl.store(marks_ptr + where, tl.full([ANCHORS], 1, tl.uint8), mask=positive)
    if tl.max(ignored.to(tl.int32), axis=0) > 0:
        for begin in range(0, classes, CLASSES):
            c = begin + tl.arange(0, CLASSES)
            logit = anchor[:, None] * classes + c[None, :]
            one = tl.full([ANCHORS, CLASSES], 1, tl.uint8)
            tl.store(marks_ptr + logit, one, mask=ignored[:, None] & (c[None, :] < classes))
    _report(positive, inside & ~known & ~nothing, where, positives_ptr, status_ptr, count)


def read(
    targets: Tensor, num_classes: int | None, background: int, ignore_index: int, graded: bool, count: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Positives, marks (one byte for each logit), status; contract in :mod:`alrp_triton.backends`."""
    n, signed, marks, targets = targets.numel(), targets.dtype.is_signed, None, targets.contiguous()
    if targets.dtype == torch.bool:
        targets = targets.view(torch.uint8)
    if num_classes is not None:  # few logits do not count: a mask of zeros is written at full speed
        marks = torch.zeros(n * num_classes, dtype=torch.uint8, device=targets.device)
    elif targets.dtype.itemsize > 1:
        marks = torch.empty(n, dtype=torch.uint8, device=targets.device)
    places = torch.zeros(count + 2, dtype=torch.int64, device=targets.device)
    status, positives = places[:2], places[2:]
    with torch.cuda.device_of(targets):
        if num_classes is None:
            dense_kernel[(blocks(n, BLOCK),)](
                targets, marks, positives, status, count, n, SIGNED=signed, GRADED=graded, BLOCK=BLOCK, num_warps=WARPS
            )
        else:
            classes_kernel[(blocks(n, CLASS_TILE["ANCHORS"]),)](
                targets, marks, positives, status, count, n, num_classes, background, ignore_index, SIGNED=signed,
                num_warps=WARPS, **CLASS_TILE,
            )  # fmt: skip
    return sort(positives), marks, status
