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

from ..formulas import at_zero
from .knots import below_rows as below_rows
from .knots import ranked, working_dtype

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
def step(d, scale):
    """The step h of a difference; scale is 1 / (2 delta), or 0 for delta = 0. 0 for NaN."""
    h = d * scale + 0.5 if scale > 0 else (1.0 if d >= 0 else 0.0)
    h = h if h > 0 else 0.0
    return h if h < 1 else 1.0


@jit
def _read(columns, weights, x, v):
    """Columns and weights of a strip to x and v, and 0 for NaN; whether there was a NaN that counts."""
    nan = False
    for j in range(len(columns)):
        v[j] = 1.0 if weights is None else weights[j]
        nan |= (columns[j] != columns[j]) & (v[j] != 0)
        x[j] = columns[j] if columns[j] == columns[j] else 0
    return nan


@partial(jit, fastmath={"reassoc"})  # so that a sum has many lanes
def _sum(x, v, row, scale):
    total = 0.0
    for j in range(len(x)):
        total += step(x[j] - row, scale) * v[j]
    return total


@jit
def _sum_columns(rows, columns, weights, scale, out):
    """Add to out the sum of h v for each row; NaN if a column that counts is."""
    of_x, of_v = np.empty(_STRIP), np.empty(_STRIP)
    poison = (rows[0] + rows[-1]) * 0
    for begin in range(0, len(columns), _STRIP):
        part = columns[begin : begin + _STRIP]
        x, v = of_x[: len(part)], of_v[: len(part)]
        if _read(part, None if weights is None else weights[begin : begin + _STRIP], x, v):
            poison = np.nan
        for i in range(len(rows)):
            out[i] += _sum(x, v, rows[i], scale)
    for i in range(len(rows)):
        out[i] += poison


@jit
def _sum_rows(rows, weights, columns, mask, scale, out):
    """Fill out with the sum of h w for each column, in its own dtype; 0 where masked."""
    of_x, of_g = np.empty(_STRIP), np.empty(_STRIP)
    poison = (rows[0] + rows[-1]) * 0 + (weights * 0).sum()
    for begin in range(0, len(columns), _STRIP):
        part, result = columns[begin : begin + _STRIP], out[begin : begin + _STRIP]
        x, g = of_x[: len(part)], of_g[: len(part)]
        for j in range(len(x)):
            x[j] = part[j]
            g[j] = poison
        for i in range(len(rows)):
            for j in range(len(x)):
                g[j] += step(x[j] - rows[i], scale) * weights[i]
        for j in range(len(x)):
            result[j] = g[j] if x[j] == x[j] else x[j]
        if mask is not None:
            keep = mask[begin : begin + _STRIP]
            for j in range(len(x)):
                result[j] = result[j] if keep[j] else 0


def scale_of(delta: float) -> float:
    """The ``scale`` of :func:`step`."""
    return 0.5 / delta if delta > 0 else 0.0


def _flat(tensor: Tensor) -> Any:
    """As an array; half precision, which numba does not compute with, is widened."""
    tensor = tensor.reshape(-1)
    return tensor.to(working_dtype(tensor)).numpy() if tensor.is_floating_point() else tensor.numpy()


def matvec(rows: Tensor, columns: Tensor, weights: Tensor | None, delta: float) -> Tensor:
    """y_i = sum_j h(x_j - s_i) v_j; contract in :mod:`alrp_triton.operators`."""
    out = torch.zeros_like(rows)
    v = None if weights is None else _flat(weights)
    _sum_columns(rows.numpy(), _flat(columns), v, scale_of(delta), out.numpy())
    return out


@np.errstate(invalid="ignore")
def among_rows(rows: Tensor, values: Tensor, delta: float) -> Tensor:
    """Products of the rows' own matrix with 1 and v, and v ranked; contract in :mod:`alrp_triton.operators`."""
    s, v, out = rows.numpy(), values.numpy(), np.zeros((3, rows.numel()))
    _sum_columns(s, s, None, scale_of(delta), out[0])
    _sum_columns(s, s, v, scale_of(delta), out[1])
    out[1] += (v * 0).sum()
    out[2] = ranked(s, v, at_zero(delta))
    return torch.from_numpy(out)


def rmatvec(rows: Tensor, weights: Tensor, columns: Tensor, mask: Tensor | None, delta: float) -> Tensor:
    """g_j = sum_i h(x_j - s_i) w_i; contract in :mod:`alrp_triton.operators`."""
    x, keep = _flat(columns), None if mask is None else mask.reshape(-1).numpy()
    out = torch.empty(x.shape, dtype=working_dtype(columns))
    _sum_rows(rows.numpy(), weights.numpy(), x, keep, scale_of(delta), out.numpy())
    return out.to(columns.dtype).reshape(columns.shape)
