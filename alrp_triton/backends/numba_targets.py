"""Targets read in one pass by numba: which columns count, where the positives are, and what is wrong."""

# numba has no types, and what it compiles is not called as Python.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..formulas import MAX_GRADE
from . import threads
from .columns import ALL, NONE
from .numba_jit import jit

_STRIP = 1024
_MIN_OF_THREAD = 1 << 16  # targets a thread


@jit
def _dense(targets, signed, most, marks, positives, status, first):
    """Targets from number ``first`` on, one for each logit; their positives to the front of ``positives``.

    Positive is 1, or with ``most`` what is above 0 and not above that. Without ``marks`` none are made.
    """
    found = bad = 0
    for begin in range(0, len(targets), _STRIP):
        t = targets[begin : begin + _STRIP]
        marked = known = 0
        for j in range(len(t)):  # without a branch, so that it becomes vector instructions
            zero = t[j] == 0
            one = t[j] == 1 if most is None else (t[j] > 0) & (t[j] <= most)
            marked += one
            # -1 would wrap around to the largest value of an unsigned dtype
            known += zero | one | (signed & (t[j] == -1))
        if marks is not None:
            mark = marks[begin : begin + _STRIP]
            for j in range(len(t)):
                mark[j] = t[j] != 0
        bad += len(t) - known
        if marked:
            for j in range(len(t)):
                if t[j] == 1 if most is None else (t[j] > 0) & (t[j] <= most):
                    if found < len(positives):
                        positives[found] = first + begin + j
                    found += 1
    status[0], status[1] = found, bad


@jit
def _indices(targets, signed, classes, background, ignore_index, marks, positives, status, first):
    """Class indices of the anchors from number ``first`` on."""
    found = bad = 0
    for j in range(len(targets)):
        t = targets[j]
        ignored = (t == ignore_index) & (signed | (t >= 0))  # below 0 was a uint64 too large
        nothing = ((t == background) & (signed | (t >= 0))) | ignored
        inside = (t >= 0) & (t < classes)
        marks[j] = ALL if ignored else NONE
        bad += not (inside | nothing)
        if inside and not nothing:
            marks[j] = t
            if found < len(positives):
                positives[found] = (first + j) * classes + t
            found += 1
    status[0], status[1] = found, bad


def read(
    targets: Tensor, num_classes: int | None, background: int, ignore_index: int, graded: bool, count: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Positives, marks, status; contract in :mod:`alrp_triton.backends`."""
    signed, narrow, targets = targets.dtype.is_signed, targets.dtype.itemsize == 1, targets.reshape(-1)
    if num_classes is not None:
        targets = targets.long()  # a number of classes would wrap around in a narrow dtype
    elif targets.dtype in (torch.float16, torch.bfloat16):  # which numba does not know
        targets = targets.float()
    t = (targets.view(torch.uint8) if targets.dtype == torch.bool else targets).numpy()
    marks = None
    if num_classes is not None or not narrow:
        marks = torch.empty(len(t), dtype=torch.uint8 if num_classes is None else torch.int32)
    parts = threads.cut(len(t), len(t) // _MIN_OF_THREAD)
    places, status = np.empty((len(parts), count), np.int64), np.empty((len(parts), 2), np.int64)

    def task(part: int, here: slice) -> None:
        results = None if marks is None else marks.numpy()[here], places[part], status[part], here.start
        if num_classes is None:
            _dense(t[here], signed, MAX_GRADE if graded else None, *results)
        else:
            _indices(t[here], signed, num_classes, background, ignore_index, *results)

    threads.run([partial(task, part, here) for part, here in enumerate(parts)])
    found = status.sum(0)
    positives = np.concatenate([place[:n] for place, n in zip(places, status[:, 0], strict=True)])
    if found[0] != count:
        positives = np.zeros(count, np.int64)
    return torch.from_numpy(positives), marks, torch.from_numpy(found)
