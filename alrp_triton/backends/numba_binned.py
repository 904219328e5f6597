"""The two products of the comparison matrix on a CPU by numba: the algorithm of ``torch_binned`` in a few loops.

Tables are made once for both products; the loops are those of :mod:`.numba_loops`.

Groups are segments of the rows (:mod:`.numba_tables`) and streams of columns (:mod:`.numba_streams`). Functions are
compiled at first use, some seconds for each kind of input, and cached on disk by numba.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..formulas import at_zero
from . import threads
from .columns import Columns, working_dtype
from .knots import Floats, Indices
from .numba_loops import count_columns, draw_lines, evaluate_columns, sum_up
from .numba_streams import block_size, make_streams
from .numba_tables import ZERO, most_cells
from .numba_tables import empty_tables as empty_tables
from .numba_tables import fill_tables as fill_tables
from .segments import bounds_of

_NO_BYTES, _NO_INTEGERS, _NO_FLOATS = np.empty(0, np.uint8), np.empty(0, np.int32), np.empty(0)
_NO_GROUPS = np.empty(0, np.int64)


class _Call(NamedTuple):
    """What both products hand to their loops."""

    bounds: Indices
    marks: tuple[NDArray[np.uint8], int, NDArray[np.int32], Floats]
    """Bytes, number of classes and marks of anchors, weights; what there is not is empty."""
    run: int
    runs: Indices
    run_at: Indices
    segment: Indices
    begin: Indices
    end: Indices
    table: tuple[NDArray[np.uint8], int, NDArray[np.floating]]

    def blocks(self, here: slice) -> tuple[Any, ...]:
        return (
            *self.marks, self.run, self.runs, self.run_at, self.segment[here], self.begin[here], self.end[here],
            self.bounds, *self.table,
        )  # fmt: skip


def _call(rows: Tensor, row_groups: Tensor | None, columns: Columns, tables: list[Tensor]) -> _Call:
    n, p, grouped = columns.values.numel(), rows.numel(), row_groups is not None
    bounds = bounds_of(row_groups, p)
    groups = _NO_GROUPS, _NO_GROUPS
    if columns.groups is not None and row_groups is not None:
        groups = columns.groups.numpy(), row_groups.numpy()
    streams = make_streams(*groups, bounds, n, block_size(n, p))
    marks = _NO_BYTES, 0, _NO_INTEGERS, _NO_FLOATS
    if columns.marks is None:  # all count
        pass
    elif columns.marks.is_floating_point():
        marks = _NO_BYTES, 0, _NO_INTEGERS, columns.marks.double().numpy()
    elif columns.num_classes is not None:
        marks = _NO_BYTES, columns.num_classes, columns.marks.numpy(), _NO_FLOATS
    else:
        marks = columns.marks.numpy(), 0, _NO_INTEGERS, _NO_FLOATS
    table = tables[0].numpy(), int(most_cells(p, grouped)), ZERO[working_dtype(columns.values)]
    return _Call(bounds, marks, *streams, table)  # pyright: ignore[reportCallIssue]


def _share(task: Callable[[slice, Tensor, int], None], columns: Columns, call: _Call) -> None:
    """Call the task for all blocks, each thread on a run of them, with the columns that it reads and their first.

    Half precision, which numba does not compute with, is widened: block by block, where there is one stream.
    """
    inference = torch.is_inference_mode_enabled()  # of this thread alone
    values, working, count = columns.values, working_dtype(columns.values), len(call.segment)
    if values.dtype != working and columns.groups is not None:
        values = values.to(working)

    def of_thread(blocks: slice) -> None:
        with torch.inference_mode(inference):
            if values.dtype == working:
                task(blocks, values, 0)
                return
            for b in range(blocks.start, blocks.stop):
                begin, end = int(call.begin[b]), int(call.end[b])
                task(slice(b, b + 1), values[begin:end].to(working), begin)

    if count == 1 and values.dtype == working:
        task(slice(0, 1), values, 0)
    else:
        threads.run([partial(of_thread, blocks) for blocks in threads.cut(count, count)])


def matvec(rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float, tables: list[Tensor]) -> Tensor:
    """y_i = sum_j H_ij v_j, float64 ``(P,)``."""
    call = _call(rows, row_groups, columns, tables)
    bins = 2 * (call.bounds[1:] - call.bounds[:-1])[call.segment] + 1
    ends = bins.cumsum()
    sums, sums_at = np.zeros((int(ends[-1]) if len(ends) else 0, 2)), ends - bins

    def count(blocks: slice, values: Tensor, shift: int) -> None:
        count_columns(values.numpy(), shift, *call.blocks(blocks), sums, sums_at[blocks])

    _share(count, columns, call)
    out = torch.empty_like(rows)
    sum_up(sums, sums_at, call.segment, call.bounds, at_zero(delta), *call.table, out.numpy())
    return out


def rmatvec(
    rows: Tensor, row_groups: Tensor | None, weights: Tensor, columns: Columns, delta: float, tables: list[Tensor]
) -> Tensor:
    """g_j = sum_i H_ij w_i, in the dtype of the columns ``(N,)``; 0 where a column does not count."""
    call = _call(rows, row_groups, columns, tables)
    lines = draw_lines(weights.numpy(), call.bounds, at_zero(delta), *call.table)
    result = (torch.empty_like if row_groups is None else torch.zeros_like)(columns.values)
    working = working_dtype(result)
    wide = result if result.dtype == working else result.to(working) if row_groups is not None else None

    def evaluate(blocks: slice, values: Tensor, shift: int) -> None:
        out = torch.empty_like(values) if wide is None else wide
        evaluate_columns(values.numpy(), shift, *call.blocks(blocks), *lines, out.numpy())
        if wide is None:
            result[shift : shift + len(out)] = out

    _share(evaluate, columns, call)
    return result if wide is None or wide is result else wide.to(result.dtype)
