"""How functions are compiled by numba."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba

_HERE = Path(__file__).parent
SOURCES = [_HERE.parent / "formulas.py", _HERE / "columns.py", *sorted(_HERE.glob("numba_*.py"))]
"""What compiled functions are made of."""


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile at first use, to run without Python's lock; cached on disk where there is a place for it."""
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError as error:
        warnings.warn(
            f"numba compiles {function.__name__} anew in every process, for it cannot cache it: {error}. "
            "NUMBA_CACHE_DIR can name a folder that is writable.",
            RuntimeWarning,
            stacklevel=2,
        )
        return numba.njit(**options)(function)
    if folder := compiled.stats.cache_path:
        _drop_stale(folder)
    return compiled


@cache
def _drop_stale(folder: str) -> None:
    """Drops what is older than a source; looked at once a process.

    numba looks at a function's own file, and its machine code has those of functions and constants of others in it: an
    edit there, or a change of branches, would leave the old values in force.
    """
    newest = max(source.stat().st_mtime_ns for source in SOURCES)
    for index in Path(folder).glob("*.nbi"):
        with suppress(FileNotFoundError):  # another process has dropped it
            if index.stat().st_mtime_ns < newest:
                index.unlink()
