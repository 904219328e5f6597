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

# How the kernels are launched, by how many numbers there are: a thread has one or two of a block, for the time is that
# of a thread's instructions, one after the other. A bound on the registers, of as many as there are, keeps ptxas from
# saving some of them, at the price of spills, for more programs than there are.
MAX_REGISTERS = {"maxnreg": 255}
FEW = {"BLOCK": 256, "num_warps": 8, **MAX_REGISTERS}
SOME = {"BLOCK": 512, "num_warps": 16, "maxnreg": 128}
MANY = {"BLOCK": 1024, "num_warps": 16, "maxnreg": 128}
AMD = {"BLOCK": 256, "num_warps": 4}


@triton.jit
def width_of(delta, TIMES: tl.constexpr):
    """How wide a cell is: the power of two that is above 2**TIMES times delta, and at most twice that."""
    bits = delta.to(tl.int64, bitcast=True)
    return (((bits >> 52) + (TIMES + 1)) << 52).to(tl.float64, bitcast=True)


@triton.jit
def origin_of(x, width):
    """The middle of the cell of x; x itself where numbers are half a cell apart or more, and where it is not finite."""
    inverse = ((2046 << 52) - width.to(tl.int64, bitcast=True)).to(tl.float64, bitcast=True)  # of a power of two
    middle = tl.floor(tl.abs(x) * inverse + 0.5) * width
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
def _before(work_ptr, place, begin):
    """The sum of the blocks before that which begins there, from memory."""
    before = tl.full([], 0, tl.int64)
    if begin > 0:
        tl.debug_barrier()
        before = tl.load(work_ptr + (place + begin))
    else:
        tl.store(work_ptr + place, before)
    return before


@triton.jit
def add_up(x, work_ptr, place, begin, index, inside):
    """Prefix sums of the block that begins there: those of all up to index, to work[place + 1 + index]."""
    sums = _before(work_ptr, place, begin) + tl.cumsum(tl.where(inside, x, 0), axis=0)
    tl.store(work_ptr + (index + 1 + place), sums, mask=inside)


@triton.jit
def difference(work_ptr, place, first, last):
    """The sum over [first, last) of what add_up has added up at this place."""
    return tl.load(work_ptr + (place + last)) - tl.load(work_ptr + (place + first))


@triton.jit
def _note_run(run, index, size, begins, work_ptr, place, begin):
    """Where a run begins, to work[place + its number]; behind the last where it ends; and 0 in place of a run 0."""
    tl.store(work_ptr + (place + run), index.to(tl.int64), mask=begins)
    tl.store(work_ptr + (place + run + 1), index.to(tl.int64) + 1, mask=index == size - 1)
    if begin == 0:
        tl.store(work_ptr + place, tl.full([], 0, tl.int64))


@triton.jit
def number_runs(fine, coarse, size, work_ptr, place, of_fine, of_coarse, begin, index, inside):
    """As add_up, of two things at once: how many fine, and times 2**32 how many coarse runs have begun up to index.

    Where run r begins goes to work[of_fine + r] and work[of_coarse + r]; of_coarse None: nobody asks; coarse None: nor
    how many there are.
    """
    fine = fine & inside
    begun = fine.to(tl.int32)
    if coarse is not None:
        coarse = coarse & inside
        begun = begun.to(tl.int64) + (coarse.to(tl.int64) << 32)
    runs = _before(work_ptr, place, begin) + tl.cumsum(begun, axis=0)
    tl.store(work_ptr + (index + 1 + place), runs, mask=inside)
    _note_run(runs.to(tl.int32), index, size, fine, work_ptr, of_fine, begin)
    if coarse is not None:  # noqa: SIM102 (known when compiling)
        if of_coarse is not None:
            _note_run((runs >> 32).to(tl.int32), index, size, coarse, work_ptr, of_coarse, begin)


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
def moment_of(weights, distance, rate):
    """Weights times a distance from an origin, by the very operations that any undergoes: so equal ones cancel."""
    return tl.where(weights == 0, 0.0, weights.to(tl.float64) * (distance * rate)).to(tl.int64)


@triton.jit
def moment_about(x, less, first, split, last, low, high, rate, work_ptr, weights, moments):
    """Sum of weights times (their own place, less x - less) times rate over [first, last); origins are low and high.

    The origin is near x, and is subtracted from it first: where x - less is no float64, its last digits are not lost.
    """
    of_low = moment_of(difference(work_ptr, weights, first, split), x - low - less, rate)
    of_high = moment_of(difference(work_ptr, weights, split, last), x - high - less, rate)
    return difference(work_ptr, moments, first, last) - of_low - of_high


def launch(count: int) -> dict[str, int]:
    """Arguments of a launch for so many numbers."""
    if torch.version.hip:
        return AMD
    if count <= FEW["BLOCK"]:
        return FEW
    # Two blocks of MANY take longer than three of SOME.
    return SOME if -(-count // SOME["BLOCK"]) in (1, 3) or _spills_many() else MANY


def _spills_many() -> bool:
    """Whether this GPU is of those for which ptxas saves some of the registers of MANY: compute capability 10."""
    return torch.cuda.is_initialized() and torch.cuda.get_device_capability()[0] == 10
