"""Which backend computes: what the names stand for, where they can run, and what each stage of a loss asks of them.

The stages of a loss (:mod:`alrp_triton.stages`) and :class:`alrp_triton.ComparisonMatrix` are made of these functions.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .backends.columns import Columns
from .backends.segments import bounds_of
from .cost import prefer_binned

Backend = Literal["auto", "torch", "numba", "triton", "triton_tiled", "triton_binned"]
_BACKENDS: tuple[str, ...] = get_args(Backend)

_PRODUCTS = {
    "torch": "torch_binned",
    "numba": "numba_binned",
    "triton_tiled": "triton_tiled",
    "triton_binned": "triton_binned",
}
_POSITIVES = {"torch": "positives", "numba": "numba_positives"}
# Before 3.4 Triton hands a kernel's float64 arguments, delta among them, over as float32.
_MIN_TRITON = (3, 4)
_HAS_NUMBA = importlib.util.find_spec("numba") is not None


@cache
def backend_module(name: str) -> ModuleType:
    """A module of backends/. Imported at first use: triton and numba are neither needed nor always there."""
    return importlib.import_module(f".backends.{name}", __package__)


def positives_module(kind: str) -> ModuleType:
    """What compares positives in NumPy's arrays, for ``torch`` or ``numba``."""
    return backend_module(_POSITIVES[kind])


@cache
def _triton_lacks() -> str:
    """Why the Triton kernels run on no device; "" if there is no such reason."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed (pip install triton)"
    version: str = importlib.import_module("triton").__version__
    if tuple(map(int, version.split(".")[:2])) < _MIN_TRITON:
        return f"needs triton 3.4 or newer (torch 2.8 and newer bring it), found {version}: use 'torch' or 'auto'"
    return ""


def check_backend_name(backend: object) -> None:
    """Raise ValueError if ``backend`` is unknown."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")


def check_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError, saying why, if ``backend`` is unknown or cannot run on tensors of ``device``."""
    check_backend_name(backend)
    if backend == "numba":
        if not _HAS_NUMBA:
            raise ValueError(f"backend={backend!r} needs the package numba, which is not installed (pip install numba)")
        if device.type != "cpu":
            raise ValueError(f"backend={backend!r} needs a CPU, but the logits are on {str(device)!r}: use 'auto'")
    if backend.startswith("triton"):
        if lacks := _triton_lacks():
            raise ValueError(f"backend={backend!r} {lacks}")
        if not backend_module("triton_tiled").runs_on(device):
            raise ValueError(
                f"backend={backend!r} needs a CUDA or ROCm GPU, but the logits are on {str(device)!r}: "
                "use 'torch' or 'auto' (to try the kernels without a GPU: TRITON_INTERPRET=1 before their first use)"
            )


def resolve(backend: str, device_type: str, rows: int, columns: int, grouped: bool = False) -> str:
    """The backend that runs a product; what ``"auto"`` and ``"triton"`` stand for is stated here."""
    if backend == "auto":
        if device_type == "cuda":  # ROCm builds of torch call their devices so, too
            backend = "torch" if _triton_lacks() else "triton"
        else:
            backend = "numba" if device_type == "cpu" and _HAS_NUMBA else "torch"
    if backend == "triton":
        backend = "triton_binned" if grouped or prefer_binned(rows, columns) else "triton_tiled"
    return backend


def family(backend: str, like: Tensor) -> str:
    """torch, numba or triton: what most is done by in one way only."""
    return resolve(backend, like.device.type, 1, 1).partition("_")[0]


def products(rows: Tensor, columns: Columns, backend: str) -> ModuleType:
    """The module that multiplies rows and columns of these sizes."""
    sizes = rows.numel(), columns.values.numel(), columns.groups is not None
    return backend_module(_PRODUCTS[resolve(backend, rows.device.type, *sizes)])


def columns_of(logits: Tensor, marks: Tensor | None, num_classes: int | None, groups: Tensor | None) -> Columns:
    """What the backends compare with rows; marks of one byte, or floats, need no number of classes."""
    of_anchors = marks is not None and marks.dtype == torch.int32
    return Columns(logits, marks, num_classes if of_anchors else None, groups)


def empty_tables(rows: Tensor, row_groups: Tensor | None, columns: Columns, backend: str) -> list[Tensor]:
    """What a backend keeps of its rows from one product to the next, uninitialised."""
    # Where sizes choose between two modules there are tables for either.
    module = backend_module(_PRODUCTS.get(backend) or f"{family(backend, rows)}_binned")
    return module.empty_tables(rows, row_groups is not None, columns)


def tables_for(rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float, backend: str) -> list[Tensor]:
    """The same, made, for both products."""
    tables = empty_tables(rows, row_groups, columns, backend)
    if rows.numel() and columns.values.numel():
        products(rows, columns, backend).fill_tables(tables, rows, row_groups, columns, delta)
    return tables


def matvec(
    rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float, tables: list[Tensor], backend: str
) -> Tensor:
    """H v, float64 ``(P,)``."""
    if rows.numel() == 0 or columns.values.numel() == 0:
        return torch.zeros_like(rows)
    return products(rows, columns, backend).matvec(rows, row_groups, columns, delta, tables)


def rmatvec(
    rows: Tensor,
    row_groups: Tensor | None,
    weights: Tensor,
    columns: Columns,
    delta: float,
    tables: list[Tensor],
    backend: str,
) -> Tensor:
    """H^T w, ``(N,)``, in the dtype of the columns; 0 where a column does not count."""
    if rows.numel() == 0 or columns.values.numel() == 0:
        return torch.zeros_like(columns.values)
    return products(rows, columns, backend).rmatvec(rows, row_groups, weights, columns, delta, tables)


def by_numpy(kernel: Callable[..., Any], rows: Tensor, row_groups: Tensor | None, *of_rows: Tensor) -> Any:
    """A kernel for arrays of the rows, called with those and the bounds of the segments."""
    return kernel(*(vector.cpu().numpy() for vector in (rows, *of_rows)), bounds_of(row_groups, rows.numel()))


_OF_ROWS = {"among_rows": (3,), "below_rows": (), "among_grades": (4,), "below_grades": ()}


def compare_rows(function: str, rows: Tensor, *vectors: Tensor, delta: float, backend: str) -> Tensor:
    """What a function of ``positives.py``, by name, makes of rows without groups, and of vectors of their size."""
    if rows.numel() == 0:
        return rows.new_zeros(*_OF_ROWS[function], 0)
    kind = family(backend, rows)
    if kind == "triton":
        return getattr(backend_module("triton_positives"), function)(rows, None, *vectors, delta)
    kernel = partial(getattr(positives_module(kind), function), delta=delta)
    return torch.from_numpy(by_numpy(kernel, rows, None, *vectors)).to(rows.device)


def sort_rows(scores: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Scores in ascending order, NaN last, and the place that each had, int64; stable."""
    if _by_counting(scores, backend):
        rows, *_, order, _ = backend_module("triton_sort").rank(scores.contiguous(), None, None)
        return rows, order
    if scores.is_cuda:  # there sort() takes a NaN with its sign set, as a cast to bfloat16 makes, for the least number
        scores = scores.nan_to_num(torch.nan, torch.inf, -torch.inf)
    return scores.sort(stable=True)


def _by_counting(scores: Tensor, backend: str) -> bool:
    return family(backend, scores) == "triton" and scores.numel() <= backend_module("triton_sort").MAX_COUNT


def ranked(
    scores: Tensor, values: Tensor, groups: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows made of scores in any order, their values, their groups (empty: there is one), and the places they had."""
    if _by_counting(scores, backend):
        return backend_module("triton_sort").rank(scores, values, groups)[:4]
    rows, order = sort_rows(scores, backend)
    if groups is None:
        return rows, values.index_select(0, order), order.new_empty(0), order
    groups, by_group = groups.index_select(0, order).sort(stable=True)
    order = order.index_select(0, by_group)
    return rows.index_select(0, by_group), values.index_select(0, order), groups, order
