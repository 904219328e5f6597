"""The positives among themselves, in Triton: one program, linear in P, by the prefix sums of :mod:`.triton_prefix`.

A row's window are the rows that are less than delta away by float64 subtraction, as the pairs would be compared; it is
found by bisection. Above it h is 1. Rows that tie, of which ranking speaks, are a run.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_prefix import (
    add_up,
    begins_group,
    bounds_of,
    difference,
    fixed,
    is_finite,
    largest_of,
    launch,
    moment_about,
    moment_of,
    narrowed,
    number_runs,
    origin_of,
    scale_for,
    split_of,
    width_of,
)

# Where in the memory of a kernel is what, prefix sums and the beginnings of runs, in units of P + 2 numbers.
_CELLS: tl.constexpr = tl.constexpr(0)  # runs of rows of one cell, and of one group
_CELL_BEGINS: tl.constexpr = tl.constexpr(1)
_GROUP_BEGINS: tl.constexpr = tl.constexpr(2)
_POSITIONS: tl.constexpr = tl.constexpr(3)  # of rows, relative to the origin of their cell
_TIES: tl.constexpr = tl.constexpr(4)  # runs of rows that tie, and how many values are not finite
_TIE_BEGINS: tl.constexpr = tl.constexpr(5)
_VALUES: tl.constexpr = tl.constexpr(6)
_MOMENTS: tl.constexpr = tl.constexpr(7)  # values times positions
WEIGHTS: tl.constexpr = tl.constexpr(8)
BAD_WEIGHTS: tl.constexpr = tl.constexpr(9)  # how many are not finite
SLOTS = 10


@triton.jit
def sum_rows(
    rows_ptr, groups_ptr, values_ptr, work_ptr, P, delta, VALUES: tl.constexpr, BLOCK: tl.constexpr, HARD: tl.constexpr
):
    """Prefix sums over the rows, of their positions and, if VALUES, of values and moments; and runs.

    Returns the unit of the sums of values.
    """
    stride = P + 2
    unit = tl.full([], 1.0, tl.float64)
    scale = unit
    if VALUES:
        scale, unit = scale_for(largest_of(values_ptr, unit, P, BLOCK), P, 61)
    of_position = scale_for(tl.full([], 1.0, tl.float64), P, 61)[0]
    width = delta
    rate = delta
    if not HARD:
        rate = 0.5 / delta
        width = width_of(delta, 2)
    for block in range(0, P, BLOCK):
        index = block + tl.arange(0, BLOCK)
        inside = index < P
        row = tl.load(rows_ptr + index, mask=inside, other=0.0)
        before = tl.load(rows_ptr + index - 1, mask=inside & (index > 0), other=0.0)
        begins = begins_group(groups_ptr, index, inside)
        cell_begins = begins
        origin = row
        if not HARD:
            origin = origin_of(row, width)
            cell_begins = begins | (origin != origin_of(before, width))
            position = fixed((row - origin) * rate, of_position)
            add_up(position, work_ptr, _POSITIONS * stride, block, index, inside)
        number_runs(
            cell_begins, begins if groups_ptr is not None else None, P, work_ptr, _CELLS * stride,
            _CELL_BEGINS * stride, _GROUP_BEGINS * stride, block, index, inside,
        )  # fmt: skip
        if VALUES or HARD:
            bad = begins & (index < 0)
            if VALUES:
                value = tl.load(values_ptr + index, mask=inside, other=0.0)
                bad = ~is_finite(value)
                value = fixed(value, scale)
                add_up(value, work_ptr, _VALUES * stride, block, index, inside)
                if not HARD:
                    moment = tl.where(is_finite(row), moment_of(value, row - origin, rate), 0)
                    add_up(moment, work_ptr, _MOMENTS * stride, block, index, inside)
            number_runs(
                begins | (row != before), bad, P, work_ptr, _TIES * stride, _TIE_BEGINS * stride, None, block, index,
                inside,
            )  # fmt: skip
    return unit


@triton.jit
def _window(rows_ptr, row, index, begin, stop, P, delta):
    """Which rows of the group are less than delta away: from the first up to the last, not included."""
    first = begin
    of_first = index
    last = index + 1
    of_last = stop
    span = P
    while span > 0:
        middle = (first + of_first) // 2
        open = first < of_first
        near = tl.load(rows_ptr + middle, mask=open, other=0.0) - row > -delta
        first, of_first = narrowed(first, of_first, middle, open & ~near)
        middle = (last + of_last) // 2
        open = last < of_last
        near = tl.load(rows_ptr + middle, mask=open, other=0.0) - row < delta
        last, of_last = narrowed(last, of_last, middle, open & near)
        span = span // 2
    return first, last


@triton.jit
def _tie(work_ptr, index, P):
    """From which row up to which, not included, scores are the same."""
    stride = P + 2
    run = tl.load(work_ptr + (index + 1 + _TIES * stride)).to(tl.int32)
    first = tl.load(work_ptr + (_TIE_BEGINS * stride + run)).to(tl.int32)
    return first, tl.load(work_ptr + (run + 1 + _TIE_BEGINS * stride)).to(tl.int32)


@triton.jit
def compare(
    rows_ptr, groups_ptr, values_ptr, work_ptr, index, P, delta, unit, VALUES: tl.constexpr, HARD: tl.constexpr
):
    """Of rows at index the sums of h, of h v, of v ranked, from what sum_rows left; without VALUES the first alone."""
    stride = P + 2
    row = tl.load(rows_ptr + index)
    begin, stop = bounds_of(groups_ptr, work_ptr, _CELLS * stride, _GROUP_BEGINS * stride, index, P)
    poison = tl.load(rows_ptr + begin) * 0.0 + tl.load(rows_ptr + stop - 1) * 0.0  # rows ascend, NaN last
    of_values = _VALUES * stride
    soft = poison
    ranked = poison
    if HARD:
        first, last = _tie(work_ptr, index, P)
        count = (stop - first).to(tl.float64)
        if VALUES:
            own = difference(work_ptr, of_values, index, index + 1)
            soft = (difference(work_ptr, of_values, first, stop) - own).to(tl.float64) * unit
            ranked = soft
    else:
        rate = 0.5 / delta
        width = width_of(delta, 2)
        first, last = _window(rows_ptr, row, index, begin, stop, P, delta)
        split = split_of(first, last, work_ptr, _CELLS * stride, _CELL_BEGINS * stride)
        low = origin_of(tl.load(rows_ptr + first), width)
        high = origin_of(tl.load(rows_ptr + last - 1), width)
        of_position, unit_of_position = scale_for(tl.full([], 1.0, tl.float64), P, 61)
        positions = difference(work_ptr, _POSITIONS * stride, first, last)
        positions -= (split - first) * fixed((row - low) * rate, of_position)
        positions -= (last - split) * fixed((row - high) * rate, of_position)
        count = (stop - last).to(tl.float64) + 0.5 * (last - first).to(tl.float64)
        count += positions.to(tl.float64) * unit_of_position
        if VALUES:
            own = difference(work_ptr, of_values, index, index + 1)
            moment = moment_about(row, 0.0, first, split, last, low, high, rate, work_ptr, of_values, _MOMENTS * stride)
            soft = (difference(work_ptr, of_values, last, stop) + moment).to(tl.float64)
            soft = (soft + 0.5 * (difference(work_ptr, of_values, first, last) - own).to(tl.float64)) * unit
            first, last = _tie(work_ptr, index, P)
            ranked = difference(work_ptr, of_values, last, stop).to(tl.float64)
            ranked = (ranked + 0.5 * (difference(work_ptr, of_values, first, last) - own).to(tl.float64)) * unit
    if VALUES:
        bad = difference(work_ptr, _TIES * stride, begin, stop) >> 32 != 0
        value = tl.load(values_ptr + index)  # itself, of which no digit is lost
        soft = tl.where(bad, float("nan"), soft + (value if HARD else 0.5 * value)) + poison
        ranked = tl.where(bad, float("nan"), ranked + value) + poison
    return count + poison, soft, ranked


@triton.jit
def write_below(
    rows_ptr, groups_ptr, order_ptr, out_ptr, work_ptr, P, unit, WHERE: tl.constexpr, BAD: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """For each row the sum of the weights of those in whose ranking it counts -> out[order]."""
    stride = P + 2
    weights = WHERE * stride
    for block in range(0, P, BLOCK):
        inside = block + tl.arange(0, BLOCK) < P
        index = tl.minimum(block + tl.arange(0, BLOCK), P - 1)
        begin, stop = bounds_of(groups_ptr, work_ptr, _CELLS * stride, _GROUP_BEGINS * stride, index, P)
        poison = tl.load(rows_ptr + begin) * 0.0 + tl.load(rows_ptr + stop - 1) * 0.0
        first, last = _tie(work_ptr, index, P)
        if HARD:
            total = difference(work_ptr, weights, begin, last).to(tl.float64)
        else:
            own = difference(work_ptr, weights, index, index + 1)
            total = 0.5 * (difference(work_ptr, weights, first, last) - own).to(tl.float64)
            total += (difference(work_ptr, weights, begin, first) + own).to(tl.float64)
        bad = difference(work_ptr, BAD * stride, begin, stop) >> SHIFT != 0
        where = index
        if order_ptr is not None:
            where = tl.load(order_ptr + index)
        tl.store(out_ptr + where, tl.where(bad, float("nan"), total * unit) + poison, mask=inside)


@triton.jit(do_not_specialize=["P"])
def among_rows_kernel(
    rows_ptr, groups_ptr, values_ptr, work_ptr, out_ptr, P, delta: tl.float64, BLOCK: tl.constexpr, HARD: tl.constexpr
):
    """One program: for each row the sums of h, of h v, of v ranked -> out[0 … 2]."""
    delta = tl.full([], delta, tl.float64)
    unit = sum_rows(rows_ptr, groups_ptr, values_ptr, work_ptr, P, delta, True, BLOCK, HARD)
    tl.debug_barrier()
    for block in range(0, P, BLOCK):
        index = block + tl.arange(0, BLOCK)
        inside = index < P
        count, soft, ranked = compare(
            rows_ptr, groups_ptr, values_ptr, work_ptr, tl.minimum(index, P - 1), P, delta, unit, True, HARD
        )
        tl.store(out_ptr + index, count, mask=inside)
        tl.store(out_ptr + P + index, soft, mask=inside)
        tl.store(out_ptr + 2 * P + index, ranked, mask=inside)


@triton.jit(do_not_specialize=["P"])
def below_rows_kernel(rows_ptr, groups_ptr, weights_ptr, work_ptr, out_ptr, P, BLOCK: tl.constexpr, HARD: tl.constexpr):
    """One program: for each row the sum of the weights of those in whose ranking it counts -> out."""
    zero = tl.full([], 0.0, tl.float64)
    unit = sum_rows(rows_ptr, groups_ptr, weights_ptr, work_ptr, P, zero, True, BLOCK, True)
    tl.debug_barrier()
    write_below(rows_ptr, groups_ptr, None, out_ptr, work_ptr, P, unit, _VALUES, _TIES, 32, BLOCK, HARD)


def work_of(rows: Tensor) -> Tensor:
    """Memory in which a kernel hands from pass to pass."""
    return torch.empty(SLOTS * (rows.numel() + 2), dtype=torch.int64, device=rows.device)


def among_rows(rows: Tensor, row_groups: Tensor | None, values: Tensor, delta: float) -> Tensor:
    """Products ``(3, P)`` of the rows' own matrix H with 1 and with v, and v ranked, R v.

    Each summand is off by at most 2**-57 P of the largest |v|, or of 1; and as float64 is.
    """
    out = rows.new_empty(3, rows.numel())
    with torch.cuda.device_of(rows):
        among_rows_kernel[(1,)](
            rows, row_groups, values, work_of(rows), out, rows.numel(), delta, HARD=delta == 0, **launch(rows.numel())
        )
    return out


def below_rows(rows: Tensor, row_groups: Tensor | None, weights: Tensor, delta: float) -> Tensor:
    """The transpose of the last of :func:`among_rows`, R^T w, as exact."""
    out = torch.empty_like(rows)
    with torch.cuda.device_of(rows):
        below_rows_kernel[(1,)](
            rows, row_groups, weights, work_of(rows), out, rows.numel(), HARD=delta == 0, **launch(rows.numel())
        )
    return out
