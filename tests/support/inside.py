"""Launches of Triton kernels replaced; and the operators opened, which the benchmark does too."""

from collections.abc import Callable
from typing import Any

import pytest

from bench.speed.inside import Inside as Inside
from bench.speed.inside import triton_kernels


def replace_kernels(monkeypatch: pytest.MonkeyPatch, replacement: Callable[[Any, str], Any]) -> None:
    """Every Triton kernel by what ``replacement`` makes of it and its name."""
    for module, name in triton_kernels():
        monkeypatch.setattr(module, name, replacement(getattr(module, name), name))
