"""Groups as segments: rows of one group, and the columns that are compared with them."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .columns import ALL, Columns


def bounds_of(row_groups: Tensor | None, rows: int) -> NDArray[np.int64]:
    """Where the segments of rows begin, those of one group each, and the end of the last."""
    if row_groups is None:
        return np.array([0, rows])
    groups = row_groups.cpu().numpy()
    return np.concatenate([[0], np.flatnonzero(groups[1:] != groups[:-1]) + 1, [rows]])


def widened(marks: Tensor, num_classes: int) -> Tensor:
    """Which columns count, bool, from the marks of some anchors."""
    counts = (marks != ALL).unsqueeze(1).repeat(1, num_classes).view(-1)
    anchors = (marks >= 0).nonzero().view(-1)
    return counts.index_fill_(0, anchors * num_classes + marks.index_select(0, anchors), False)


def _segments(
    rows: int, row_groups: Tensor | None, columns: Columns
) -> Iterator[tuple[slice, slice | Tensor, Columns]]:
    """The rows of each group, which of the equal runs of columns are of it, and its columns."""
    if row_groups is None or columns.groups is None:
        yield slice(0, rows), slice(0, 1), columns
        return
    runs = columns.groups.numel()
    values, marks, classes = columns.values.view(runs, -1), columns.marks, columns.num_classes
    if marks is not None and classes is not None and values.shape[1] % classes:  # a run is less than an anchor
        marks, classes = widened(marks, classes).logical_not_(), None
    groups, order = columns.groups, None
    if bool((groups[1:] < groups[:-1]).any()):
        groups, order = groups.sort(stable=True)
    of_rows, counts = row_groups.unique_consecutive(return_counts=True)
    bounds = [0, *counts.cumsum(0).tolist()]
    begin, end = (torch.searchsorted(groups, of_rows, side=side).tolist() for side in ("left", "right"))
    for where, first, stop in zip(pairwise(bounds), begin, end, strict=True):
        those = slice(first, stop) if order is None else order[first:stop]
        marked = None if marks is None else marks.view(runs, -1)[those].view(-1)
        yield slice(*where), those, Columns(values[those].view(-1), marked, classes)


def sum_by_segment(
    kernel: Callable[[Tensor, Columns], Tensor], rows: Tensor, row_groups: Tensor | None, columns: Columns
) -> Tensor:
    """What a kernel makes of the rows and columns of each segment ``(P,)``."""
    sums = [
        kernel(rows[here], those) if those.values.numel() else torch.zeros_like(rows[here])
        for here, _, those in _segments(rows.numel(), row_groups, columns)
    ]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def spread_by_segment(
    kernel: Callable[[Tensor, Tensor, Columns], Tensor],
    rows: Tensor,
    row_groups: Tensor | None,
    weights: Tensor,
    columns: Columns,
) -> Tensor:
    """What a kernel makes of the rows, weights and columns of each segment ``(N,)``; 0 where there is no row."""
    if row_groups is None or columns.groups is None:
        return kernel(rows, weights, columns)
    result = torch.zeros_like(columns.values)
    by_run = result.view(columns.groups.numel(), -1)
    for here, runs, those in _segments(rows.numel(), row_groups, columns):
        if those.values.numel():
            by_run[runs] = kernel(rows[here], weights[here], those).view(-1, by_run.shape[1])
    return result
