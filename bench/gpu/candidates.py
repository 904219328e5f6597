"""Ways to add up the forward product that the package does not have yet, beside the one that it has.

On an H200 the two 64-bit atomics of each logit take most of a step (docs/performance.md, "On a GPU"). Which of these is
to replace them a GPU decides: ``python -m bench.gpu.candidates`` there prints what each takes, alone, tables given. No
GPU has run it yet; with ``--compile`` it prints what the compiler makes of them.

* ``two``: as the package does, on whole blocks and without a mask;
* ``packed``: one atomic, number and position in one integer, on a copy of the table for few enough logits;
* ``shared``: in shared memory, which Triton does not offer but PTX does, two 32-bit additions for a logit; NVIDIA only,
  and the interpreter has none of it.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false, reportPossiblyUnboundVariable=false

import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alrp_triton.backends import triton_binned
from alrp_triton.backends.columns import Columns

from ..problems import CASES, Size, draw_problem
from ..tables import number, table
from .clock import Clock

_find, _position, CELLS = triton_binned._find, triton_binned._position, triton_binned.CELLS
BLOCK, WARPS = 1024, 4
REGISTERS = 128  # at most; without a bound some are spilled for the sake of more programs
# Of a packed sum the lower bits are of positions in units of 2**-30, so that 2**16 of them, each at most 1, fit.
PACKED_BITS: tl.constexpr = tl.constexpr(47)
_PACKED_COLUMNS = (1 << 16) - BLOCK
# In shared memory a bin has two words: positions in units of 2**-28, of at most 1, without what they carry; and their
# number from bit 14 on, below it what was carried. A program adds fewer than 2**18 logits.
COUNT_BIT: tl.constexpr = tl.constexpr(14)
_SHARED_COLUMNS = (1 << 18) - BLOCK
_PROGRAMS = 4 * 132

_ZERO = tl.constexpr("{ st.shared.v2.u32 [$1], {$2, $2}; mov.u32 $0, 0; }")
_LOW = tl.constexpr("ld.shared.u32 $0, [$1];")
_HIGH = tl.constexpr("ld.shared.u32 $0, [$1+4];")
# [address], position, what a logit counts: 0 for one that does not.
_ADD = tl.constexpr("""{
.reg .pred counts;
.reg .u32 sum, more;
setp.ne.u32 counts, $3, 0;
mov.u32 sum, 0;
@counts atom.shared.add.u32 sum, [$1], $2;
add.cc.u32 sum, sum, $2;
addc.u32 more, $3, 0;
@counts red.shared.add.u32 [$1+4], more;
mov.u32 $0, more;
}""")


def declare(bins: int) -> str:
    """PTX whose result is the address of a table of so many bins in shared memory."""
    return f"{{ .shared .align 16 .b8 bins[{8 * bins}]; mov.u32 $0, bins; }}"


@triton.jit
def _add(x, live, table_ptr, shared, knots_ptr, lut_ptr, P, rate, CELLS: tl.constexpr, WAY: tl.constexpr):
    """A block's logits to the table. Those that do not reach the lowest knot, and NaN, add nothing."""
    bin = _find(x, live, knots_ptr, lut_ptr, P, P * 0, P, CELLS)
    position = tl.minimum(_position(x, bin, live, knots_ptr, rate, False), 1.0)  # above it no row has a slope
    if WAY == "two":
        tl.atomic_add(table_ptr + bin, tl.full(bin.shape, 1, tl.int64), mask=live, sem="relaxed")
        moment = tl.where(live, position * 1073741824.0, 0.0).to(tl.int64)
        tl.atomic_add(table_ptr + 2 * P + bin, moment, mask=live, sem="relaxed")
    elif WAY == "packed":
        moment = tl.where(live, position * 1073741824.0, 0.0).to(tl.int64)
        one = tl.full(bin.shape, 1, tl.int64) << PACKED_BITS
        tl.atomic_add(table_ptr + bin, one + moment, mask=live, sem="relaxed")
    else:
        moment = tl.where(live, position * 268435456.0, 0.0).to(tl.int32)
        counted = live.to(tl.int32) << COUNT_BIT
        tl.inline_asm_elementwise(_ADD, "=r,r,r,r", [shared + 8 * bin, moment, counted], tl.int32, False, 1)


@triton.jit(do_not_specialize=["P", "N", "each", "copies"])
def count_kernel(
    columns_ptr, knots_ptr, lut_ptr, table_ptr, P, N: tl.int64, each, copies, rate,
    CELLS: tl.constexpr, WAY: tl.constexpr, BLOCK: tl.constexpr, DECLARE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Program b: so many blocks of logits, ``each``, to table[b % copies]."""
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    program = tl.program_id(0)
    size = 2 * P if WAY == "packed" else 4 * P
    table_ptr += (program % copies).to(tl.int64) * size
    shared = program
    if WAY == "shared":
        shared = tl.inline_asm_elementwise(DECLARE, "=r,r", [program], tl.int32, False, 1)
        for begin in range(0, 2 * P, THREADS):
            bin = tl.minimum(begin + tl.arange(0, THREADS), 2 * P - 1)
            tl.inline_asm_elementwise(_ZERO, "=r,r,r", [shared + 8 * bin, bin * 0], tl.int32, False, 1)
        tl.debug_barrier()
    lowest = tl.load(knots_ptr)
    begin = program.to(tl.int64) * each * BLOCK
    end = tl.minimum(begin + each * BLOCK, N)
    for block in range((end - begin) // BLOCK):
        x = tl.load(columns_ptr + begin + block * BLOCK + tl.arange(0, BLOCK)).to(dtype)
        _add(x, x >= lowest, table_ptr, shared, knots_ptr, lut_ptr, P, rate, CELLS, WAY)
    rest = begin + (end - begin) // BLOCK * BLOCK
    if rest < end:
        index = rest + tl.arange(0, BLOCK)
        x = tl.load(columns_ptr + index, mask=index < end, other=float("-inf")).to(dtype)
        _add(x, x >= lowest, table_ptr, shared, knots_ptr, lut_ptr, P, rate, CELLS, WAY)
    if WAY == "shared":
        tl.debug_barrier()
        for begin_bin in range(0, 2 * P, THREADS):
            bin = begin_bin + tl.arange(0, THREADS)
            at = shared + 8 * tl.minimum(bin, 2 * P - 1)
            low = tl.inline_asm_elementwise(_LOW, "=r,r", [at], tl.uint32, False, 1)
            high = tl.inline_asm_elementwise(_HIGH, "=r,r", [at], tl.uint32, False, 1)
            number = (high >> COUNT_BIT).to(tl.int64)
            carried = (high & ((1 << COUNT_BIT) - 1)).to(tl.int64)
            some = (number > 0) & (bin < 2 * P)
            tl.atomic_add(table_ptr + bin, number, mask=some, sem="relaxed")
            moment = ((carried << 32) + low.to(tl.int64)) << 2
            tl.atomic_add(table_ptr + 2 * P + bin, moment, mask=some, sem="relaxed")


class Way(NamedTuple):
    """How logits are added up; ``programs``: at most so many, but for what one of them may add."""

    name: str
    programs: int
    columns: int  # that a copy of the table, or a program, may add
    copies: int


WAYS = (
    Way("two", 1 << 30, 1 << 62, 64),
    Way("packed", 1 << 30, _PACKED_COLUMNS, 0),  # as many as there have to be
    Way("shared", _PROGRAMS, _SHARED_COLUMNS, 4),
    Way("shared", _PROGRAMS // 2, _SHARED_COLUMNS, 4),
)


def tables_of(rows: Tensor, columns: Tensor, delta: float) -> list[Tensor]:
    """Knots and look-up table, as the package makes them."""
    these = Columns(columns.reshape(-1), None)
    tables = triton_binned.empty_tables(rows, False, these)
    triton_binned.fill_tables(tables, rows, None, these, delta)
    return tables


def prepare(way: Way, rows: Tensor, columns: Tensor, delta: float) -> Callable[[], Tensor]:
    """A call that adds up all columns: int64 ``(2, 2P)``, for each bin, numbers and positions in units of 2**-30."""
    p, n = rows.numel(), columns.numel()
    knots, _, _, lut, _ = tables_of(rows, columns, delta)
    blocks = triton.cdiv(n, BLOCK)
    each = min(triton.cdiv(blocks, way.programs), way.columns // BLOCK)
    programs = triton.cdiv(blocks, each)
    copies = way.copies or triton.cdiv(programs, way.columns // BLOCK)
    size = 2 * p if way.name == "packed" else 4 * p
    sums = torch.empty(copies, size, dtype=torch.int64, device=columns.device)
    declared = declare(triton.next_power_of_2(2 * p)) if way.name == "shared" else ""

    def step() -> Tensor:
        sums.zero_()
        count_kernel[(programs,)](
            columns, knots, lut, sums, p, n, each, copies, 0.5 / delta, CELLS=CELLS, WAY=way.name,
            BLOCK=BLOCK, DECLARE=declared, THREADS=32 * WARPS, num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
        if way.name == "packed":
            return torch.stack([(sums >> PACKED_BITS.value).sum(0), (sums & ((1 << PACKED_BITS.value) - 1)).sum(0)])
        return sums.sum(0).reshape(2, -1)

    return step


def wrong(sums: Tensor, rows: Tensor, columns: Tensor, delta: float) -> float:
    """How far sums are from those of torch in float64: of a logit's position; infinite where a number is another."""
    knots = tables_of(rows, columns, delta)[0]
    flat = columns.reshape(-1).to(knots.dtype)
    bins = torch.searchsorted(knots, flat, right=True) - 1
    live = bins >= 0
    numbers = torch.bincount(bins[live], minlength=knots.numel())
    low = knots[bins.clamp(0)]
    positions = ((flat - low) * (0.5 / delta)).clamp(max=1.0).double()[live]
    inside = torch.zeros(numbers.numel(), dtype=torch.float64, device=flat.device).index_add_(0, bins[live], positions)
    if not torch.equal(numbers, sums[0]):
        return float("inf")
    return float(((sums[1].double() * 2.0**-30 - inside).abs() / numbers.clamp(min=1)).max())


def compiled() -> dict[str, dict[str, int]]:
    """Registers, spills and atomics of each for sm_90, in a process without the interpreter."""
    from ..kernels import Kernel, compile_for
    from ..machine_code import basic_blocks, count, resources

    found: dict[str, dict[str, int]] = {}
    for way in dict.fromkeys(way.name for way in WAYS):
        constants = {"CELLS": CELLS, "WAY": way, "BLOCK": BLOCK, "DECLARE": declare(2048), "THREADS": 32 * WARPS}
        of = Kernel(count_kernel, constants, {"each": "i32", "rate": "fp32"}, WARPS, options=(("maxnreg", REGISTERS),))
        kernel = compile_for(of, "sm_90")
        found[way] = resources(kernel) | count(basic_blocks(kernel), "ATOMS", "RED")
    return found


def main() -> None:
    """Time all, at the sizes of detectors."""
    if sys.argv[1:] == ["--compile"]:
        print(json.dumps(compiled()))
        return
    device = torch.device("cuda")
    clock, lines = Clock(device), list[list[str]]()
    for case, scores in (("RetinaNet", "mid-training"), ("RetinaNet", "late"), ("RetinaNet", "initialisation"),
                         ("ATSS", "mid-training"), ("DETR, a decoder layer", "mid-training")):  # fmt: skip
        size = Size("candidates", *CASES[case], 1.0, scores, case)
        problem = draw_problem(size, device, torch.float32, 0)
        columns = problem.logits.detach()
        (anchors,) = torch.nonzero(problem.targets < columns.shape[1], as_tuple=True)
        rows = columns[anchors, problem.targets[anchors]].double().sort().values
        for way in WAYS:
            step = prepare(way, rows, columns, size.delta)
            off, taken = wrong(step(), rows, columns, size.delta), clock.median(clock.capture(step), 9).device_ms
            lines.append([case, scores, way.name, str(way.programs), number(taken), f"{off:.1e}"])
            print(*lines[-1], flush=True)
    print(table(["detector", "scores", "way", "programs at most", "ms by graph replay", "off"], lines, left=3))


if __name__ == "__main__":
    main()
