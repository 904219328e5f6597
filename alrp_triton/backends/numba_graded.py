"""The rows compared among themselves by score and by grade, by numba, pair by pair, on torch's threads."""

# numba has no types, and what it compiles is not called as Python.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from . import threads
from .numba_dense import jit, scale_of, step

_LEAST = 1 << 16  # pairs a thread


@partial(jit, fastmath={"reassoc"})  # so that a sum has many lanes
def _among(rows, grades, scale, first, out):
    """Rows from number ``first`` on -> out (4, ·)."""
    for i in range(out.shape[1]):
        row, grade = rows[first + i], grades[first + i]
        kept = kept_error = missorted = missorted_error = 0.0
        for k in range(len(rows)):
            h = step(rows[k] - row, scale)
            low = h if grades[k] < grade else 0.0
            kept += h - low
            kept_error += (h - low) * (1 - grades[k])
            missorted += low
            missorted_error += low * (1 - grades[k])
        out[0, i], out[1, i], out[2, i], out[3, i] = kept, kept_error, missorted, missorted_error


@partial(jit, fastmath={"reassoc"})
def _below(rows, grades, weights, scale, first, out):
    for k in range(len(out)):
        row, grade = rows[first + k], grades[first + k]
        total = 0.0
        for i in range(len(rows)):
            total += step(row - rows[i], scale) * (weights[i] if grades[i] > grade else 0.0)
        out[k] = total


def _share(task: Callable[[slice], None], count: int) -> None:
    """Call the task for parts of the rows; each sum is one thread's, so results do not depend on their number."""
    threads.run([partial(task, part) for part in threads.cut(count, count * count // _LEAST)])


@np.errstate(invalid="ignore")
def among_grades(rows: Tensor, grades: Tensor, delta: float) -> Tensor:
    """Sums over the rows of no lower, and of lower grade; contract in :mod:`alrp_triton.operators`."""
    s, t, scale, out = rows.numpy(), grades.numpy(), scale_of(delta), np.empty((4, len(rows)))
    _share(lambda part: _among(s, t, scale, part.start, out[:, part]), len(s))
    out += (s[0] + s[-1]) * 0 + (t * 0).sum()
    return torch.from_numpy(out)


@np.errstate(invalid="ignore")
def below_grades(rows: Tensor, grades: Tensor, weights: Tensor, delta: float) -> Tensor:
    """Sums of the weights of the rows of higher grade; contract in :mod:`alrp_triton.operators`."""
    s, t, w, scale, out = rows.numpy(), grades.numpy(), weights.numpy(), scale_of(delta), np.empty(len(rows))
    _share(lambda part: _below(s, t, w, scale, part.start, out[part]), len(s))
    out += (s[0] + s[-1]) * 0 + (t * 0).sum() + (w * 0).sum()
    return torch.from_numpy(out)
