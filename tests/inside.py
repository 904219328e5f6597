"""The operators opened: what their kernels do, seen operation by operation, and launches of Triton kernels replaced."""

# pyright: reportPrivateUsage=false
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode  # pyright: ignore[reportPrivateImportUsage]

from alrp_triton import dispatch


class Inside(TorchDispatchMode):
    """The package's operators run as they are, on fake tensors too; ``operation`` is called for all that torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "alrp_triton":
            self.operators.add(func._opname)
            with self:
                return getattr(dispatch, func._opname)(*args, **(kwargs or {}))
        return self.operation(func, args, kwargs or {})

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


def replace_kernels(monkeypatch: pytest.MonkeyPatch, replacement: Callable[[Any, str], Any]) -> None:
    """Every Triton kernel by what ``replacement`` makes of it and its name."""
    for name in ("triton_tiled", "triton_binned", "triton_graded", "triton_targets", "triton_losses", "triton_sort"):
        module = dispatch._module(name)
        for attribute, kernel in list(vars(module).items()):
            if attribute.endswith("_kernel"):
                monkeypatch.setattr(module, attribute, replacement(kernel, attribute))
