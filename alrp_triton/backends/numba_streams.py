"""The columns of each group as a stream, in blocks and strips, for the loops of numba.

A **stream** is what is compared with a segment of the rows: the runs of its group, one after the other. Streams are cut
into blocks by the sizes of the problem alone, and each block is summed by itself, so results do not depend on the
number of threads. A strip is so much of a block as fits the first-level cache.
"""

# numba has no types, and what it compiles is not called as Python.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false

import math

import numpy as np

from .columns import ALL
from .numba_jit import jit

# A block is long against the start of a thread and against its table, and where there are some, longer.
_SHORT, _SOME_BLOCKS = 1 << 16, 8
_LONG, _MAX_BLOCKS = 1 << 18, 32
STRIP = 1024  # columns that take a step together: their numbers fit the first-level cache


@jit
def make_streams(groups, row_groups, bounds, columns, size):
    """The columns of each segment, in blocks.

    Returns:
        run: columns of a run.
        runs: the runs, by group.
        run_at: by segment, where among them its own begin.
        segment, begin, end: by block, its segment, and where in the stream of that it is.
    """
    segments = len(bounds) - 1
    run_at, length = np.zeros(segments, np.int64), np.full(segments, columns)
    run, runs = columns, np.zeros(1, np.int64)
    if len(row_groups) > 0:
        run = columns // len(groups)
        runs = np.argsort(groups, kind="mergesort")
        in_order = groups[runs]
        for s in range(segments):
            of_rows = row_groups[bounds[s]]
            run_at[s] = np.searchsorted(in_order, of_rows)
            length[s] = (np.searchsorted(in_order, of_rows, side="right") - run_at[s]) * run
    count = 0
    for s in range(segments):
        count += -(-length[s] // size)
    segment, begin, end = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    b = 0
    for s in range(segments):
        for at in range(0, length[s], size):
            segment[b], begin[b], end[b] = s, at, min(at + size, length[s])
            b += 1
    return run, runs, run_at, segment, begin, end


def block_size(columns: int, rows: int) -> int:
    """How long a block is, but for the last of a stream."""
    short, long = (math.ceil(columns / size) for size in (_SHORT, _LONG))
    return max(math.ceil(columns / min(max(min(short, _SOME_BLOCKS), long), _MAX_BLOCKS)), rows, 1)


@jit
def _piece(run, runs, first, begin, most):
    """Where in memory a stream goes on at ``begin``: the column, and how many follow it there, at most so many."""
    number = begin // run
    inside = begin - number * run
    return runs[first + number] * run + inside, min(most, run - inside)


@jit
def take(values, shift, run, runs, first, begin, x):
    """A strip of a stream, from ``begin`` on, to x. ``values`` begin at column ``shift``."""
    at = 0
    while at < len(x):
        column, size = _piece(run, runs, first, begin + at, len(x) - at)
        for j in range(size):
            x[at + j] = values[column - shift + j]
        at += size


@jit
def put(out, shift, run, runs, first, begin, g):
    """The results of a strip of a stream to their columns."""
    at = 0
    while at < len(g):
        column, size = _piece(run, runs, first, begin + at, len(g) - at)
        for j in range(size):
            out[column - shift + j] = g[at + j]
        at += size


@jit
def hide(marks, classes, excluded, run, runs, first, begin, x, hidden):
    """Make ``hidden`` of what does not count of a strip."""
    at = 0
    while at < len(x) and (classes > 0 or len(marks) > 0):
        column, size = _piece(run, runs, first, begin + at, len(x) - at)
        if classes > 0:
            anchor = column // classes
            j, c = at, column - anchor * classes
            while j < at + size:
                stop = min(at + size, j + classes - c)
                mark = excluded[anchor]
                if c <= mark < c + stop - j:
                    x[j + mark - c] = hidden
                elif mark == ALL:
                    x[j:stop] = hidden
                anchor, c, j = anchor + 1, 0, stop
        else:
            here, given = x[at : at + size], marks[column : column + size]
            for j in range(size):  # without an offset, so that it becomes vector instructions
                here[j] = here[j] if given[j] == 0 else hidden
        at += size
