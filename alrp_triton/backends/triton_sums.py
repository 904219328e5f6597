"""Sums over the bins between the knots of the rows, in Triton: what each row has of its columns, and each bin of rows.

For both products of the binned kernels: ``sums_kernel`` makes of the counts and moments of bins the sum of h over all
columns for each row, ``lines_kernel`` of the weights of rows the line that a column meets in each bin. Each is one
program, linear in P, by the prefix sums of :mod:`.triton_prefix`. The step of row i is on in the bins from its lower to
its upper knot, and in the bin t of a lower knot are on those steps that are in the bins of a row's window.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_gradients import PositiveGradients, scale_positives
from .triton_prefix import (
    add_up,
    begins_group,
    bounds_of,
    difference,
    fixed,
    is_finite,
    is_jump,
    largest_of,
    launch,
    load_row,
    moment_about,
    moment_of,
    number_runs,
    origin_of,
    scale_for,
    split_of,
    width_of,
)


@triton.jit
def _knot_at(knots_ptr, t, inside):
    """A knot, made finite: one that is not counts for no row's slope."""
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    most = 1.7e308 if dtype == tl.float64 else 3.4028234663852886e38
    knot = tl.load(knots_ptr + t, mask=inside, other=0.0).to(tl.float64)
    return tl.minimum(tl.maximum(knot, -most), most)


@triton.jit
def _sum_bins(
    groups_ptr, knots_ptr, table_ptr, work_ptr, P, copies, rate, width, BLOCK: tl.constexpr, HARD: tl.constexpr
):
    """Prefix sums over the bins, of counts and of moments about the origins, and their runs: rows 0 … 4 of work."""
    stride = 2 * P + 2
    for begin in range(0, 2 * P, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        inside = t < 2 * P
        count = tl.zeros([BLOCK], tl.int64)
        moment = count
        for copy in range(copies):
            count += tl.load(table_ptr + copy * 4 * P + t, mask=inside, other=0)
            if not HARD:
                moment += tl.load(table_ptr + copy * 4 * P + 2 * P + t, mask=inside, other=0)
        add_up(count, work_ptr, 0, begin, t, inside)
        begins = (t % 2 == 0) & begins_group(groups_ptr, t // 2, inside)  # a group of so many rows has twice the knots
        cell_begins = begins
        if not HARD:
            knot = _knot_at(knots_ptr, t, inside)
            origin = origin_of(knot, width)
            before = origin_of(_knot_at(knots_ptr, t - 1, inside & (t > 0)), width)
            cell_begins = begins | (origin != before)
            moment += moment_of(count, knot - origin, rate)
            add_up(moment, work_ptr, stride, begin, t, inside)
        number_runs(
            cell_begins,
            begins if groups_ptr is not None else None,
            2 * P,
            work_ptr,
            2 * stride,
            3 * stride,
            4 * stride,
            begin,
            t,
            inside,
        )


@triton.jit(do_not_specialize=["P", "copies"])
def sums_kernel(
    rows_ptr, groups_ptr, knots_ptr, rise_ptr, done_ptr, table_ptr, nan_ptr, work_ptr, out_ptr, P, copies,
    delta: tl.float64, unit: tl.float64, BLOCK: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """One program: the sum of h over all columns for each row -> out, from what count_kernel has added up for each bin.

    table: int64 (copies, 2, 2P), times ``unit`` counts and moments; nan: int64 (P,), where a group begins how many NaN
    it has. All counts together are at most 2**60 in absolute value, and each moment is at most two of its counts.
    """
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    stride = 2 * P + 2
    delta = tl.full([], delta, tl.float64)
    rate = delta
    width = delta
    if not HARD:
        rate = 0.5 / delta
        width = width_of(delta, 3)  # a window of knots, rounded up, is shorter than 8 delta
    _sum_bins(groups_ptr, knots_ptr, table_ptr, work_ptr, P, copies, rate, width, BLOCK, HARD)
    tl.debug_barrier()
    for block in range(0, P, BLOCK):
        index = block + tl.arange(0, BLOCK)
        inside = index < P
        index = tl.minimum(index, P - 1)
        row = load_row(rows_ptr, index, None, dtype)
        rise = tl.minimum(tl.maximum(tl.load(rise_ptr + index), 0), 2 * P - 1)  # whatever NaN made of them
        done = tl.minimum(tl.maximum(tl.load(done_ptr + index), 1), 2 * P)
        begin, stop = bounds_of(groups_ptr, work_ptr, 2 * stride, 4 * stride, 2 * index, 2 * P)
        total = difference(work_ptr, 0, done, stop).to(tl.float64)
        window = difference(work_ptr, 0, rise, done)
        if HARD:
            total += window.to(tl.float64)
        else:
            split = split_of(rise, done, work_ptr, 2 * stride, 3 * stride)
            low = origin_of(_knot_at(knots_ptr, rise, inside), width)
            high = origin_of(_knot_at(knots_ptr, done - 1, inside), width)
            sloped = moment_about(row, delta, rise, split, done, low, high, rate, work_ptr, 0, stride)
            total += tl.where(is_jump(row, delta, dtype), 0.5 * window.to(tl.float64), sloped.to(tl.float64))
        bad = ~(
            is_finite(load_row(rows_ptr, begin // 2, None, dtype))
            & is_finite(load_row(rows_ptr, stop // 2 - 1, None, dtype))
        )
        bad = bad | (tl.load(nan_ptr + begin // 2) != 0)
        tl.store(out_ptr + index, tl.where(bad, float("nan"), total * unit), mask=inside)


@triton.jit
def _sum_weights(
    rows_ptr, groups_ptr, weights_ptr, work_ptr, P, factor, scale, delta, rate, width,
    dtype: tl.constexpr, BLOCK: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Prefix sums over the rows of weights, of those with a slope, of their moments, of what is not finite; runs.

    They are rows 0 … 6 of work.
    """
    stride = P + 2
    for begin in range(0, P, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < P
        weight = tl.load(weights_ptr + index, mask=inside, other=0.0) * factor
        row = load_row(rows_ptr, index, inside, dtype)
        bad = ~(is_finite(row) & is_finite(weight))
        add_up(bad.to(tl.int32), work_ptr, 3 * stride, begin, index, inside)
        weight = fixed(weight, scale)
        add_up(weight, work_ptr, 0, begin, index, inside)
        begins = begins_group(groups_ptr, index, inside)
        cell_begins = begins
        if not HARD:
            before = load_row(rows_ptr, index - 1, inside & (index > 0), dtype)
            origin = origin_of(row - delta, width)
            cell_begins = begins | (origin != origin_of(before - delta, width))
            weight = tl.where(is_jump(row, delta, dtype), 0, weight)
            add_up(weight, work_ptr, stride, begin, index, inside)
            moment = tl.where(bad, 0, moment_of(weight, row - origin - delta, rate))
            add_up(moment, work_ptr, 2 * stride, begin, index, inside)
        number_runs(
            cell_begins,
            begins if groups_ptr is not None else None,
            P,
            work_ptr,
            4 * stride,
            5 * stride,
            6 * stride,
            begin,
            index,
            inside,
        )


@triton.jit
def _write_line(
    t, begin, first, last, bad, inside, rows_ptr, knots_ptr, lines_ptr, work_ptr, P, unit, delta, rate, width,
    HARD: tl.constexpr,
):  # fmt: skip
    """The line of bin t, in which rows [begin, first) have h = 1 and rows [first, last) a slope or a half."""
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    stride = P + 2
    if HARD:
        value = difference(work_ptr, 0, begin, last).to(tl.float64)
        slope = value * 0.0
    else:
        split = split_of(first, last, work_ptr, 4 * stride, 5 * stride)
        low = origin_of(load_row(rows_ptr, tl.minimum(first, P - 1), None, dtype) - delta, width)
        high = origin_of(load_row(rows_ptr, tl.maximum(last - 1, 0), None, dtype) - delta, width)
        knot = _knot_at(knots_ptr, t, inside)
        about = moment_about(knot, 0.0, first, split, last, low, high, rate, work_ptr, stride, 2 * stride)
        sloped = difference(work_ptr, stride, first, last)
        jumping = (difference(work_ptr, 0, first, last) - sloped).to(tl.float64)
        value = (difference(work_ptr, 0, begin, first) - about).to(tl.float64) + 0.5 * jumping
        slope = sloped.to(tl.float64)
    nan = float("nan")
    tl.store(lines_ptr + 2 * t, tl.where(bad, nan, value * unit).to(dtype), mask=inside)
    tl.store(lines_ptr + 2 * t + 1, tl.where(bad, nan, slope * unit).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["P", "positives"])
def lines_kernel(
    rows_ptr, groups_ptr, knots_ptr, rise_ptr, done_ptr, weights_ptr, lines_ptr, below_ptr, work_ptr,
    grad_positives_ptr, ranking_scale_ptr, auxiliary_scale_ptr, values_scale_ptr, grad_scores_ptr, grad_values_ptr,
    P, positives, delta: tl.float64,
    BLOCK: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """One program: the sum of weight h over the rows -> lines[bins, 0 and 1]: value at the lower knot, and slope.

    Weights are times the scale of the ranking loss, if there is one. below: 0, or NaN for the rows of a group that has
    a row or weight that is not finite, whose lines are NaN too. Beside it :func:`.scale_positives`.
    """
    scale_positives(
        grad_positives_ptr, ranking_scale_ptr, auxiliary_scale_ptr, values_scale_ptr, grad_scores_ptr, grad_values_ptr,
        positives, BLOCK,
    )  # fmt: skip
    dtype: tl.constexpr = knots_ptr.dtype.element_ty
    stride = P + 2
    factor = tl.full([], 1.0, tl.float64)
    if ranking_scale_ptr is not None:
        factor = tl.load(ranking_scale_ptr).to(tl.float64)
    scale, unit = scale_for(largest_of(weights_ptr, factor, P, BLOCK), P, 60)
    delta = tl.full([], delta, tl.float64)
    rate = delta
    width = delta
    if not HARD:
        rate = 0.5 / delta
        width = width_of(delta, 3)
    _sum_weights(rows_ptr, groups_ptr, weights_ptr, work_ptr, P, factor, scale, delta, rate, width, dtype, BLOCK, HARD)
    tl.debug_barrier()
    for block in range(0, P, BLOCK):
        index = block + tl.arange(0, BLOCK)
        inside = index < P
        index = tl.minimum(index, P - 1)
        begin, stop = bounds_of(groups_ptr, work_ptr, 4 * stride, 6 * stride, index, P)
        bad = difference(work_ptr, 3 * stride, begin, stop) != 0
        tl.store(below_ptr + index, tl.where(bad, float("nan"), 0.0).to(dtype), mask=inside)
        # Of the t + 1 knots up to its own lower one so many are lower ones as rows come up to it, all others are upper
        # ones; likewise at its upper knot. NaN have no knots in order: they write the lines of a group by their place.
        rise = tl.where(bad, 2 * index, tl.load(rise_ptr + index))
        _write_line(
            rise, begin, rise - index, index + 1, bad, inside, rows_ptr, knots_ptr, lines_ptr, work_ptr, P, unit, delta,
            rate, width, HARD,
        )  # fmt: skip
        done = tl.where(bad, 2 * index + 1, tl.load(done_ptr + index))
        _write_line(
            done, begin, index + 1, done - index, bad, inside, rows_ptr, knots_ptr, lines_ptr, work_ptr, P, unit, delta,
            rate, width, HARD,
        )  # fmt: skip


def sum_bins(
    rows: Tensor,
    row_groups: Tensor | None,
    knots: Tensor,
    rise: Tensor,
    done: Tensor,
    table: Tensor,
    nan: Tensor,
    delta: float,
    unit: float,
) -> Tensor:
    """The sum of h over all columns for each row, float64 ``(P,)``, as :func:`sums_kernel` has it."""
    p, out = rows.numel(), torch.empty_like(rows)
    work = torch.empty(5 * (2 * p + 2), dtype=torch.int64, device=rows.device)
    with torch.cuda.device_of(rows):
        sums_kernel[(1,)](
            rows, row_groups, knots, rise, done, table, nan, work, out, p, table.shape[0], delta, unit,
            HARD=delta == 0, **launch(p),
        )  # fmt: skip
    return out


def lines_of(
    rows: Tensor,
    row_groups: Tensor | None,
    knots: Tensor,
    rise: Tensor,
    done: Tensor,
    weights: Tensor,
    gradients: PositiveGradients,
    delta: float,
) -> tuple[Tensor, Tensor]:
    """Lines ``(2P, 2)``, and what is below all knots of the group of each row ``(P,)``, of :func:`lines_kernel`."""
    p = rows.numel()
    lines, below = knots.new_empty(2 * p, 2), knots.new_empty(p)
    work = torch.empty(7 * (p + 2), dtype=torch.int64, device=rows.device)
    with torch.cuda.device_of(rows):
        lines_kernel[(1,)](
            rows, row_groups, knots, rise, done, weights, lines, below, work, *gradients, p,
            gradients.positives, delta, HARD=delta == 0, **launch(p),
        )  # fmt: skip
    return lines, below
