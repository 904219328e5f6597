"""The two products of the comparison matrix on a CPU by numba, pair by pair, for problems with few pairs.

There the tables of ``numba_binned`` cost more than the matrix that they stand for. Vector instructions, float64, one
thread; the strip of columns at hand stays in the first-level cache.
"""

# numba has no types, and what it compiles is not called as Python.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .knots import below_rows as below_rows

_STRIP = 1024


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile at first use, to run without Python's lock; cached on disk where there is a place for it."""
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:
        warnings.warn(
            f"numba compiles {function.__name__} anew in every process, for it cannot cache it: {error}. "
            "NUMBA_CACHE_DIR can name a folder that is writable.",
            RuntimeWarning,
            stacklevel=2,
        )
        return numba.njit(**options)(function)


@jit
def _step(d, scale):
    """The step h of a difference; scale is 1 / (2 delta), or 0 for delta = 0. 0 for NaN."""
    h = d * scale + 0.5 if scale > 0 else (1.0 if d >= 0 else 0.0)
    h = h if h > 0 else 0.0
    return h if h < 1 else 1.0


@partial(jit, fastmath={"reassoc"})  # so that a sum has many lanes
def _sum_columns(rows, columns, weights, scale, out):
    for begin in range(0, len(columns), _STRIP):
        x, v = columns[begin : begin + _STRIP], weights[begin : begin + _STRIP]
        for i in range(len(rows)):
            total = 0.0
            for j in range(len(x)):
                total += _step(x[j] - rows[i], scale) * v[j]
            out[i] += total


@jit
def _sum_rows(rows, weights, columns, scale, out):
    for begin in range(0, len(columns), _STRIP):
        x, g = columns[begin : begin + _STRIP], out[begin : begin + _STRIP]
        for i in range(len(rows)):
            for j in range(len(x)):
                g[j] += _step(x[j] - rows[i], scale) * weights[i]


def _scale(delta: float) -> float:
    return 0.5 / delta if delta > 0 else 0.0


@np.errstate(invalid="ignore")
def matvec(rows: Tensor, columns: Tensor, weights: Tensor | None, delta: float) -> Tensor:
    """y_i = sum_j h(x_j - s_i) v_j; contract in :mod:`alrp_triton.operators`."""
    x = columns.reshape(-1).double()
    v = torch.ones_like(x) if weights is None else weights.reshape(-1).double()
    x = torch.where(v != 0, x, 0.0)
    out = torch.zeros_like(rows)
    _sum_columns(rows.numpy(), x.numpy(), v.numpy(), _scale(delta), out.numpy())
    # What is not finite in the rows, and NaN in the columns, makes the sums NaN.
    return out + (rows[0] + rows[-1]) * 0 + torch.where(x.isnan(), x, 0.0).sum()


@np.errstate(invalid="ignore")
def among_rows(rows: Tensor, values: Tensor, delta: float) -> Tensor:
    """Products of the rows' own matrix with 1 and v, hard with v; contract in :mod:`alrp_triton.operators`."""
    s, v, out = rows.numpy(), values.numpy(), torch.zeros(3, rows.numel(), dtype=torch.float64)
    wanted = (np.ones_like(s), _scale(delta)), (v, _scale(delta)), (v, 0.0)
    for (weights, scale), row in zip(wanted, out, strict=True):
        _sum_columns(s, s, weights, scale, row.numpy())
        row += float((s[0] + s[-1]) * 0 + (weights * 0).sum())
    return out


@np.errstate(invalid="ignore")
def rmatvec(rows: Tensor, weights: Tensor, columns: Tensor, mask: Tensor | None, delta: float) -> Tensor:
    """g_j = sum_i h(x_j - s_i) w_i; contract in :mod:`alrp_triton.operators`."""
    x = columns.reshape(-1).double()
    out = torch.zeros_like(x)
    _sum_rows(rows.numpy(), weights.numpy(), x.numpy(), _scale(delta), out.numpy())
    out = torch.where(x.isnan(), x, out + (rows[0] + rows[-1]) * 0 + (weights * 0).sum()).to(columns.dtype)
    return (out if mask is None else torch.where(mask.reshape(-1), out, 0.0)).reshape(columns.shape)
