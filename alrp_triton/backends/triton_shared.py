"""A table of 64-bit sums in the shared memory of a program, for NVIDIA: what Triton does not offer and PTX does.

Added to a table in global memory each logit goes to the L2 cache, twice; on an H200 that took most of a step.
In shared memory a sum is two words, and a 64-bit addition is two of 32 bits, of which the second takes what the first
has carried. Sums of integers do not depend on their order: results are bitwise repeatable.

A sum holds the number of a bin's columns, from bit 46 on, and below it their positions, each at most 1, in units of
2**-28. Triton hands every thread its instructions and knows nothing of the memory: the caller sets barriers, and gives
vectors of no fewer elements than there are threads, lest several of them do the same.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl

# 44 KiB: a program may have 48 unasked, and Triton needs some for its reductions. Two programs of 16 warps hide the
# latencies of a multiprocessor, and leave more than half of an H100's 256 KiB to the L1 cache.
BINS = 5632
WARPS = 16
THREADS = 32 * WARPS
BLOCK = 4 * THREADS  # columns at a time
PROGRAMS = 2  # for each multiprocessor
# What a sum has room for: of a program, and of all together in global memory.
MAX_COLUMNS, MAX_OF_ALL = (1 << 18) - BLOCK, 1 << 32
SETTINGS = {"SHARED": True, "THREADS": THREADS, "num_warps": WARPS, "maxnreg": 65536 // (THREADS * PROGRAMS)}
UNIT_BITS: tl.constexpr = tl.constexpr(28)
_UNIT: tl.constexpr = tl.constexpr(2.0**28)
_ONE: tl.constexpr = tl.constexpr(1 << 46)  # a column
_ONE_ABOVE: tl.constexpr = tl.constexpr(1 << 14)  # in the upper word

_DECLARE: tl.constexpr = tl.constexpr(f"{{ .shared .align 16 .b8 sums[{8 * BINS}]; mov.u32 $0, sums; }}")
_CLEAR: tl.constexpr = tl.constexpr("{ st.shared.v2.u32 [$1], {$2, $2}; mov.u32 $0, 0; }")
# At an address, the lower word, the upper word, if the last is not 0.
_ADD: tl.constexpr = tl.constexpr("""{
.reg .pred on;
.reg .u32 before, sum, upper;
setp.ne.u32 on, $4, 0;
mov.u32 before, 0;
@on atom.shared.add.u32 before, [$1], $2;
add.cc.u32 sum, before, $2;
addc.u32 upper, $3, 0;
@on red.shared.add.u32 [$1+4], upper;
mov.u32 $0, upper;
}""")
_LOW: tl.constexpr = tl.constexpr("ld.shared.u32 $0, [$1];")
_HIGH: tl.constexpr = tl.constexpr("ld.shared.u32 $0, [$1+4];")


@triton.jit
def declare():
    """Where the table is; once in a kernel."""
    return tl.inline_asm_elementwise(_DECLARE, "=r,r", [tl.program_id(0)], tl.int32, False, 1)


@triton.jit
def clear_sums(sums, bins, THREADS: tl.constexpr):
    """0 to all so many."""
    for begin in range(0, bins, THREADS):
        bin = tl.minimum(begin + tl.arange(0, THREADS), bins - 1)
        tl.inline_asm_elementwise(_CLEAR, "=r,r,r", [sums + 8 * bin, bin * 0], tl.int32, False, 1)


@triton.jit
def add_each(sums, bin, position, on):
    """A column and its position, at most 1, to each of the bins whose ``on`` is true."""
    position = (position * _UNIT + 0.5).to(tl.int32)
    one = tl.full(position.shape, _ONE_ABOVE, tl.int32)
    tl.inline_asm_elementwise(_ADD, "=r,r,r,r,r", [sums + 8 * bin, position, one, on.to(tl.int32)], tl.int32, False, 1)


@triton.jit
def add_block(sums, bin, position, on, THREADS: tl.constexpr):
    """All columns of a block whose ``on`` is true, to one bin."""
    total = tl.sum(tl.where(on, (position * _UNIT + 0.5).to(tl.int64) + _ONE, 0), axis=0)
    thread = tl.arange(0, THREADS)
    low = (thread * 0) + total.to(tl.int32)
    high = (thread * 0) + (total >> 32).to(tl.int32)
    first = (thread == 0).to(tl.int32)
    tl.inline_asm_elementwise(_ADD, "=r,r,r,r,r", [sums + 8 * (bin + thread * 0), low, high, first], tl.int32, False, 1)


@triton.jit
def read_sums(sums, bin):
    """Numbers and positions of bins, int64."""
    low = tl.inline_asm_elementwise(_LOW, "=r,r", [sums + 8 * bin], tl.uint32, False, 1).to(tl.int64)
    high = tl.inline_asm_elementwise(_HIGH, "=r,r", [sums + 8 * bin], tl.uint32, False, 1).to(tl.int64)
    return high // _ONE_ABOVE, ((high % _ONE_ABOVE) << 32) + low
