"""How functions are compiled by numba."""

import warnings
from collections.abc import Callable
from typing import Any

import numba


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
