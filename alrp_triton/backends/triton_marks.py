"""Which columns count (:mod:`.columns`), as kernels read it."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

import triton
import triton.language as tl

from .columns import ALL, NONE

LANES = 128  # anchors looked at together: one a thread
FEW_CLASSES: tl.constexpr = tl.constexpr(8)  # classes
_NONE: tl.constexpr = tl.constexpr(NONE)
_ALL: tl.constexpr = tl.constexpr(ALL)


@triton.jit
def counted(marks_ptr, start, column, inside, CLASSES: tl.constexpr, dtype: tl.constexpr):
    """How often the columns at start + column count (:class:`.columns.Columns`): 0 if not inside, which None all are.

    CLASSES: the number of classes, if marks are of anchors; else 0.
    """
    if CLASSES > 0:
        anchor = start // CLASSES
        of_class = column.to(tl.uint32) + (start - anchor * CLASSES).to(tl.uint32)
        after = of_class // CLASSES  # by a multiplication, for the divisor is known when compiling
        of_class = (of_class - after * CLASSES).to(tl.int32)
        at = marks_ptr + anchor + after.to(tl.int32)
        if inside is None:
            mark = tl.load(at)
        else:
            mark = tl.load(at, mask=inside, other=_ALL)
        weight = ((mark != _ALL) & (mark != of_class)).to(dtype)
    elif marks_ptr is None:
        if inside is None:
            weight = tl.full(column.shape, 1.0, dtype)
        else:
            weight = inside.to(dtype)
    else:
        OF_BYTES: tl.constexpr = marks_ptr.dtype.element_ty == tl.uint8
        if inside is None:
            mark = tl.load(marks_ptr + start + column)
        else:
            mark = tl.load(marks_ptr + start + column, mask=inside, other=1 if OF_BYTES else 0)
        if OF_BYTES:
            weight = (mark == 0).to(dtype)
        else:
            weight = mark.to(dtype)
    return weight


@triton.jit
def clear(out_ptr, marks_ptr, start, end, CLASSES: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """0 at those of the columns [start, end), at most BLOCK, that do not count by marks of anchors.

    Once all are stored, the few anchors of a block say which these are: to know it of each column takes a division.
    With few classes there are many anchors: from FEW_CLASSES on this is the way.
    """
    zero = tl.zeros([LANES], out_ptr.dtype.element_ty)
    for begin in range(0, BLOCK // CLASSES + 2, LANES):
        anchor = start // CLASSES + begin + tl.arange(0, LANES)
        column = anchor * CLASSES
        mark = tl.load(marks_ptr + anchor, mask=column < end, other=_NONE)
        if tl.min((mark == _NONE).to(tl.int32), axis=0) == 0:
            tl.debug_barrier()  # behind what other threads have stored
            of_class = column + mark
            tl.store(out_ptr + of_class, zero, mask=(mark >= 0) & (of_class >= start) & (of_class < end))
            if tl.min(mark, axis=0) == _ALL:
                for _ in range(CLASSES):
                    tl.store(out_ptr + column, zero, mask=(mark == _ALL) & (column >= start) & (column < end))
                    column += 1
