"""Sums over windows of ascending numbers, in linear time: prefix sums of integers, in Triton.

What a row needs of its window, the others whose step it is on, is a sum of v_k (x_k - s). By prefix sums that is

    [sum of v_k (x_k - o)] + [sum of v_k] (o - s),    o an origin near all of them,

each bracket a difference of two prefix sums. In floating point such a difference loses the digits that the sums before
have used up. Here all are **int64 in fixed point**: every difference is exact, whatever lies before (even where a sum
wraps around), and results are bitwise repeatable. What is rounded is each summand, to
about 2**-47 of the largest |v| for some thousand rows, and twice that for twice as many.

Origins are the middles of **cells**, a grid of a power of two wider than any window, from which a float64 is subtracted
without rounding. So a window lies in at most two cells: it is split where the second begins. Where numbers are so large
that no two are within delta, each is an origin of its own. Cells, ties and groups are **runs** of equal neighbours,
numbered by a prefix sum too; where a run begins is looked up by its number.

Kernels are single programs that loop over blocks; what one pass leaves in memory the next reads, behind a barrier.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl

# How the kernels are launched: as many numbers a block as fit without spills. Without a bound on the registers ptxas
# saves some of the 255 that there are, at the price of spills, to run more programs than there are.
MOST_REGISTERS = {"maxnreg": 255}
LAUNCH = {"BLOCK": 1024, "num_warps": 8, **MOST_REGISTERS}
LAUNCH_AMD = {"BLOCK": 256, "num_warps": 4}


@triton.jit
def width_of(delta, TIMES: tl.constexpr):
    """How wide a cell is: the power of two that is above 2**TIMES times delta, and at most twice that."""
    bits = delta.to(tl.int64, bitcast=True)
    return (((bits >> 52) + (TIMES + 1)) << 52).to(tl.float64, bitcast=True)


@triton.jit
def origin_of(x, width):
    """The middle of the cell of x; x itself where numbers are half a cell apart or more, and where it is not finite."""
    middle = tl.floor(tl.abs(x) / width + 0.5) * width
    return tl.where(tl.abs(x) < width * 2.0**51, tl.where(x < 0, -middle, middle), x)


@triton.jit
def scale_for(largest, P, BITS: tl.constexpr):
    """The power of two s with P largest s < 2**BITS, and 1 / s; for ``largest`` below 2**-900 as if it were that."""
    of_largest = ((largest.to(tl.int64, bitcast=True) >> 52) & 2047) - 1022  # largest < 2**of_largest
    of_count = (P.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022
    exponent = BITS - of_count - tl.maximum(of_largest, -900)
    scale = ((1023 + exponent) << 52).to(tl.float64, bitcast=True)
    return scale, ((1023 - exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit
def load_row(rows_ptr, index, inside, dtype: tl.constexpr):
    """Rows in float64, of values that the dtype of the columns has; ``inside`` None: all indices are in range."""
    if inside is None:
        row = tl.load(rows_ptr + index)
    else:
        row = tl.load(rows_ptr + index, mask=inside, other=0.0)
    return row.to(dtype).to(tl.float64)


@triton.jit
def narrowed(low, high, middle, before):
    """The range of a bisection once it is known which of its middles, in an open range, are before what it seeks."""
    return tl.where(before, middle + 1, low), tl.where((low < high) & ~before, middle, high)


@triton.jit
def is_jump(row, delta, dtype: tl.constexpr):
    """Whether delta is below the resolution around a row's score, so that its step is two jumps (knots.make_knots)."""
    return delta <= tl.abs(row) * (2.0**-53 if dtype == tl.float64 else 2.0**-24)


@triton.jit
def is_finite(x):
    """Whether it is no NaN and no infinity."""
    return tl.abs(x) < float("inf")


@triton.jit
def fixed(x, scale):
    """Times scale, an integer; 0 for what is not finite."""
    return tl.where(is_finite(x), x * scale, 0.0).to(tl.int64)


@triton.jit
def largest_of(values_ptr, factor, P, BLOCK: tl.constexpr):
    """The largest finite |value times factor|."""
    most = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, P, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        value = tl.abs(tl.load(values_ptr + index, mask=index < P, other=0.0) * factor)
        most = tl.maximum(most, tl.where(is_finite(value), value, 0.0))
    return tl.max(most, axis=0)


@triton.jit
def add_up(x, sum_before, work_ptr, place, index, inside):
    """Prefix sums of a block, those of all up to index, to work[place + 1 + index]; returns that of the whole block."""
    x = tl.where(inside, x, 0)
    tl.store(work_ptr + (index + 1 + place), sum_before + tl.cumsum(x, axis=0), mask=inside)
    return sum_before + tl.sum(x, axis=0)


@triton.jit
def difference(work_ptr, place, first, last):
    """The sum over [first, last) of what add_up has added up at this place."""
    return tl.load(work_ptr + (place + last)) - tl.load(work_ptr + (place + first))


@triton.jit
def number_runs(fine, coarse, runs_before, work_ptr, place, of_fine, of_coarse, index, inside):
    """As add_up, of two things at once: how many fine, and times 2**32 how many coarse runs have begun up to index.

    Where run r begins goes to work[of_fine + r] and work[of_coarse + r]; of_coarse None: nobody asks.
    """
    fine = fine & inside
    coarse = coarse & inside
    begun = fine.to(tl.int64) + (coarse.to(tl.int64) << 32)
    runs = runs_before + tl.cumsum(begun, axis=0)
    tl.store(work_ptr + (index + 1 + place), runs, mask=inside)
    tl.store(work_ptr + (of_fine + runs.to(tl.int32)), index.to(tl.int64), mask=fine)
    if of_coarse is not None:
        tl.store(work_ptr + (of_coarse + (runs >> 32).to(tl.int32)), index.to(tl.int64), mask=coarse)
    return runs_before + tl.sum(begun, axis=0)


@triton.jit
def end_runs(runs, size, work_ptr, of_fine, of_coarse):
    """Behind the last of all runs, where it ends; and 0 where run 0 would begin, so that all is in range."""
    tl.store(work_ptr + of_fine, 0)
    tl.store(work_ptr + (of_fine + 1 + runs.to(tl.int32)), size.to(tl.int64))
    if of_coarse is not None:
        tl.store(work_ptr + of_coarse, 0)
        tl.store(work_ptr + (of_coarse + 1 + (runs >> 32).to(tl.int32)), size.to(tl.int64))


@triton.jit
def begins_group(groups_ptr, index, inside):
    """Whether a row is the first of its group."""
    begins = index == 0
    if groups_ptr is not None:
        before = tl.load(groups_ptr + index - 1, mask=inside & (index > 0), other=0)
        begins = begins | (tl.load(groups_ptr + index, mask=inside, other=0) != before)
    return begins


@triton.jit
def bounds_of(groups_ptr, work_ptr, runs, of_coarse, index, size):
    """Where the group of each begins, and where it ends: coarse runs."""
    begin = tl.zeros(index.shape, tl.int32)
    stop = begin + size
    if groups_ptr is not None:
        run = (tl.load(work_ptr + (index + 1 + runs)) >> 32).to(tl.int32)
        begin = tl.load(work_ptr + (of_coarse + run)).to(tl.int32)
        stop = tl.load(work_ptr + (run + 1 + of_coarse)).to(tl.int32)
    return begin, stop


@triton.jit
def split_of(first, last, work_ptr, runs, of_fine):
    """Where the second cell of [first, last) begins; ``first`` if there is one only. Cells are fine runs."""
    run = tl.load(work_ptr + (runs + last)).to(tl.int32)
    return tl.maximum(tl.load(work_ptr + (of_fine + run)).to(tl.int32), first)


@triton.jit
def moment_of(weights, x, origin, rate):
    """Weights times how far x is from the origin, by the very operations that any x undergoes: so equal ones cancel."""
    return tl.where(weights == 0, 0.0, weights.to(tl.float64) * ((x - origin) * rate)).to(tl.int64)


@triton.jit
def moment_about(x, first, split, last, low, high, rate, work_ptr, weights, moments):
    """Sum of weights times (their own x, less x) times rate over [first, last), whose cells have origins low, high."""
    of_low = moment_of(difference(work_ptr, weights, first, split), x, low, rate)
    of_high = moment_of(difference(work_ptr, weights, split, last), x, high, rate)
    return difference(work_ptr, moments, first, last) - of_low - of_high


def launch() -> dict[str, int]:
    """Arguments of every launch."""
    return LAUNCH_AMD if torch.version.hip else LAUNCH
