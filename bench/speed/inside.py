"""The operators opened: what their kernels do, seen operation by operation; and launches of Triton kernels replaced."""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # pyright: ignore[reportPrivateImportUsage]

from alrp_triton import backends, checks, stages


class Inside(TorchDispatchMode):
    """The package's operators run as they are, on fake tensors too; ``operation`` is called for all that torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "alrp_triton":
            self.operators.add(func._opname)
            with self:
                return getattr(stages, func._opname)(*args, **(kwargs or {}))
        return self.operation(func, args, kwargs or {})

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class Count(Inside):
    """Counts operations that a GPU would run, and allocations, which it fills; sees for what the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.allocations = 0
        self.waits: list[str] = []

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.waits.append(func._opname)
        result = super().operation(func, args, kwargs)
        if func._opname.startswith(("empty", "new_empty")):
            self.allocations += 1
            result.zero_()
        elif not func.is_view and func._opname != "promote_types":
            self.operations += 1
        return result


def triton_kernels() -> Iterator[tuple[ModuleType, str]]:
    """Where a Triton kernel is found: module and name, of each module that has it."""
    for found in iter_modules(backends.__path__):
        if found.name.startswith("triton_"):
            module = import_module(f"{backends.__name__}.{found.name}")
            yield from ((module, name) for name in list(vars(module)) if name.endswith("_kernel"))


class Stub:
    """Stands for any Triton kernel."""

    launches = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        self.launches += 1


_ONE, _TRUE = torch.ones((), dtype=torch.int64), torch.ones((), dtype=torch.bool)


def _check_values(condition: Tensor | bool, error: Callable[[], ValueError], message: str) -> None:
    """What ``checks.check_values`` costs on a GPU. What the condition is of was never computed, so it cannot hold.

    A condition that is no tensor was read from the CPU, where a GPU has a tensor, and makes one by a comparison.
    """
    if not isinstance(condition, Tensor):
        _ = _ONE == 1
    torch._assert_async(_TRUE, message)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


@contextmanager
def stubs() -> Generator[Stub]:
    """No Triton kernel does anything, and values of targets are not looked at."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, TRITON_INTERPRET="1"))  # or the kernels run on no CPU
        stub = Stub()
        for module, name in triton_kernels():
            stack.enter_context(patch.object(module, name, stub))
        stack.enter_context(patch.object(checks, "check_values", _check_values))
        yield stub


@contextmanager
def filled() -> Generator[None]:
    """Memory that kernels would have written is 0 from the start: as an index that is in range, as a float no NaN.

    One function of torch stands for another, so a call costs no Python; to fill takes some tenths of a microsecond,
    which :func:`bench.speed.host.price_of_filling` tells. Memory that comes in another way is an error at worst and
    never read beyond, for on a CPU torch checks the range of every index.
    """
    with (
        patch.object(torch, "empty", torch.zeros),
        patch.object(torch, "empty_like", torch.zeros_like),
        patch.object(Tensor, "new_empty", Tensor.new_zeros),
    ):
        yield
