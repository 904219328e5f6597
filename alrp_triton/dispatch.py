"""Which backend computes: what the names stand for, where they can run, and what each stage of a loss asks of them.

``find``, ``count``, ``terms`` and ``spread`` are the kernels of the operators of their names, whose contract is stated
in :mod:`alrp_triton.operators`; the functions from ``tables_for`` to ``sort_rows`` are what
:class:`alrp_triton.ComparisonMatrix` is made of.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import distributed
from .backends.columns import Columns
from .backends.segments import bounds_of
from .checks import check_ious, check_marks
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
_LEAST_TRITON = (3, 4)
_HAS_NUMBA = importlib.util.find_spec("numba") is not None


@cache
def _module(name: str) -> ModuleType:
    """A module of backends/. Imported at first use: triton and numba are neither needed nor always there."""
    return importlib.import_module(f".backends.{name}", __package__)


@cache
def _triton_lacks() -> str:
    """Why the Triton kernels run on no device; "" if there is no such reason."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed (pip install triton)"
    version: str = importlib.import_module("triton").__version__
    if tuple(map(int, version.split(".")[:2])) < _LEAST_TRITON:
        return f"needs triton 3.4 or newer (torch 2.8 and newer bring it), found {version}: use 'torch' or 'auto'"
    return ""


def check_backend_name(backend: object) -> None:
    """Raise ValueError if ``backend`` is unknown."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")


def check_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError, saying why, if ``backend`` is unknown or cannot run on tensors of ``device``."""
    check_backend_name(backend)
    if backend.startswith("numba"):
        if not _HAS_NUMBA:
            raise ValueError(f"backend={backend!r} needs the package numba, which is not installed (pip install numba)")
        if device.type != "cpu":
            raise ValueError(f"backend={backend!r} needs a CPU, but the logits are on {str(device)!r}: use 'auto'")
    if backend.startswith("triton"):
        if lacks := _triton_lacks():
            raise ValueError(f"backend={backend!r} {lacks}")
        if not _module("triton_tiled").runs_on(device):
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


def _products(rows: Tensor, columns: Columns, backend: str) -> ModuleType:
    sizes = rows.numel(), columns.values.numel(), columns.groups is not None
    return _module(_PRODUCTS[resolve(backend, rows.device.type, *sizes)])


def columns_of(logits: Tensor, marks: Tensor | None, num_classes: int | None, groups: Tensor | None) -> Columns:
    """What the backends compare with rows; marks of one byte, or floats, need no number of classes."""
    of_anchors = marks is not None and marks.dtype == torch.int32
    return Columns(logits, marks, num_classes if of_anchors else None, groups)


def empty_tables(rows: Tensor, row_groups: Tensor | None, columns: Columns, backend: str) -> list[Tensor]:
    """What a backend keeps of its rows from one product to the next, uninitialised; the same for a whole family."""
    module = _module(f"{family(backend, rows)}_binned")
    return module.empty_tables(rows, row_groups is not None, columns)


def tables_for(rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float, backend: str) -> list[Tensor]:
    """The same, made, for both products."""
    tables = empty_tables(rows, row_groups, columns, backend)
    if rows.numel() and columns.values.numel():
        _products(rows, columns, backend).fill_tables(tables, rows, row_groups, columns, delta)
    return tables


def matvec(
    rows: Tensor, row_groups: Tensor | None, columns: Columns, delta: float, tables: list[Tensor], backend: str
) -> Tensor:
    """H v, float64 ``(P,)``."""
    if rows.numel() == 0 or columns.values.numel() == 0:
        return torch.zeros_like(rows)
    return _products(rows, columns, backend).matvec(rows, row_groups, columns, delta, tables)


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
    return _products(rows, columns, backend).rmatvec(rows, row_groups, weights, columns, delta, tables)


def _by_numpy(kernel: Callable[..., Any], rows: Tensor, row_groups: Tensor | None, *of_rows: Tensor) -> Any:
    """A kernel for arrays of the rows, called with those and the bounds of the segments."""
    return kernel(*(vector.cpu().numpy() for vector in (rows, *of_rows)), bounds_of(row_groups, rows.numel()))


_OF_ROWS = {"among_rows": (3,), "below_rows": (), "among_grades": (4,), "below_grades": ()}


def compare_rows(function: str, rows: Tensor, *vectors: Tensor, delta: float, backend: str) -> Tensor:
    """What a function of ``positives.py``, by name, makes of rows without groups, and of vectors of their size."""
    if rows.numel() == 0:
        return rows.new_zeros(*_OF_ROWS[function], 0)
    kind = family(backend, rows)
    if kind == "triton":
        return getattr(_module("triton_positives"), function)(rows, None, *vectors, delta)
    kernel = partial(getattr(_module(_POSITIVES[kind]), function), delta=delta)
    return torch.from_numpy(_by_numpy(kernel, rows, None, *vectors)).to(rows.device)


def sort_rows(scores: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Scores in ascending order, NaN last, and the place that each had, int64; stable."""
    if _by_counting(scores, backend):
        rows, *_, order, _ = _module("triton_sort").rank(scores.contiguous(), None, None)
        return rows, order
    if scores.is_cuda:  # there sort() takes a NaN with its sign set, as a cast to bfloat16 makes, for the least number
        scores = scores.nan_to_num(torch.nan, torch.inf, -torch.inf)
    return scores.sort(stable=True)


def _by_counting(scores: Tensor, backend: str) -> bool:
    return family(backend, scores) == "triton" and scores.numel() <= _module("triton_sort").MOST


def ranked(
    scores: Tensor, values: Tensor, groups: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows made of scores in any order, their values, their groups (empty: there is one), and the places they had."""
    if _by_counting(scores, backend):
        return _module("triton_sort").rank(scores, values, groups)[:4]
    rows, order = sort_rows(scores, backend)
    if groups is None:
        return rows, values.index_select(0, order), order.new_empty(0), order
    groups, by_group = groups.index_select(0, order).sort(stable=True)
    order = order.index_select(0, by_group)
    return rows.index_select(0, by_group), values.index_select(0, order), groups, order


def find(
    logits: Tensor,
    targets: Tensor,
    values: Tensor | None,
    groups: Tensor | None,
    num_classes: int | None,
    background: int,
    ignore_index: int,
    graded: bool,
    ious: bool,
    count: int | None,
    source: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_backend(backend, targets.device)
    if groups is not None and backend == "triton_tiled":
        raise ValueError("backend='triton_tiled' ranks one group: with groups use 'auto', 'triton' or 'triton_binned'")
    kind, form = family(backend, targets), (num_classes, background, ignore_index, graded)
    if kind == "triton" and targets.numel() and logits.numel():
        return _find_by_triton(logits, targets, values, groups, form, ious, count, source, backend)
    if ious and values is not None:
        check_ious(values)
    read = _module(f"{'torch' if kind == 'triton' else kind}_targets").read
    if count is None:
        count = int(read(targets, *form, 0)[2][0])
    positives, marks, status = read(targets, *form, count)
    found, bad = status if status.is_cuda else status.tolist()
    check_marks(targets, *form, count, source, found, (bad == 0, found == count))
    scores = logits.index_select(0, positives).double()
    if values is None:
        values = targets.reshape(-1).index_select(0, positives) if graded else torch.zeros_like(scores)
    of_rows = None
    if groups is not None:
        of_rows = groups.index_select(0, positives // max(logits.numel() // max(groups.numel(), 1), 1))
    marks = targets.new_empty(0, dtype=torch.uint8) if marks is None else marks
    return positives, marks, *ranked(scores, values.double(), of_rows, backend)


def _find_by_triton(
    logits: Tensor,
    targets: Tensor,
    values: Tensor | None,
    groups: Tensor | None,
    form: tuple[int | None, int, int, bool],
    ious: bool,
    count: int | None,
    source: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``find`` with the positives as a kernel has found them: in any order, with their scores."""
    read = partial(_module("triton_targets").read, targets, *form, logits=logits, groups=groups)
    if count is None:
        count = int(read(count=0)[0].status[0])
    found, marks = read(count=count)
    groups, sorting = None if groups is None else found.groups, _module("triton_sort")
    graded = values is None and form[-1]
    if values is not None:
        values = values.contiguous()
    if count <= sorting.MOST:
        given = found.grades if graded else values
        rows, wide, row_groups, order, positives = sorting.rank(found.scores, given, groups, found, graded, ious)
        in_range, *sound = found.status[2:].unbind()
    else:
        positives, by_place = found.places.sort(stable=True)
        scores, grades = (of.index_select(0, by_place) for of in (found.scores, found.grades))  # without grades 0
        groups = None if groups is None else groups.index_select(0, by_place)
        rows, wide, row_groups, order = ranked(scores, grades if values is None else values.double(), groups, backend)
        in_range, sound = None, (found.status[1] == 0, found.status[0] == count)
    if ious and values is not None:
        check_ious(values, in_range)
    check_marks(targets, *form, count, source, found.status[0], sound)
    marks = targets.new_empty(0, dtype=torch.uint8) if marks is None else marks
    return positives, marks, rows, wide, row_groups, order


def gather_positives(
    rows: Tensor,
    values: Tensor,
    row_groups: Tensor | None,
    order: Tensor,
    collectives: Tensor,
    call: str,
    process_group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def as_given(of_rows: Tensor) -> Tensor:
        return torch.empty_like(of_rows).index_copy_(0, order, of_rows)

    own_groups = None if row_groups is None else as_given(row_groups)
    scores, values, groups, mine = distributed.gather(as_given(rows), as_given(values), own_groups, call, process_group)
    return *ranked(scores, values, groups, backend), mine


def count(
    rows: Tensor,
    row_groups: Tensor | None,
    logits: Tensor,
    marks: Tensor | None,
    num_classes: int | None,
    groups: Tensor | None,
    delta: float,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    columns = columns_of(logits, marks, num_classes, groups)
    tables = tables_for(rows, row_groups, columns, delta, backend)
    return matvec(rows, row_groups, columns, delta, tables, backend), tables


def terms(
    loss: str,
    rows: Tensor,
    row_groups: Tensor | None,
    values: Tensor,
    order: Tensor,
    false_positives: Tensor,
    delta: float,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    p, kind = rows.numel(), family(backend, rows)
    if p == 0:
        first, second, rank = (rows.new_zeros(shape, dtype=dtype) for shape in ((), (), 0))
        return first, second, rank, rows.new_zeros(3, 0), torch.zeros_like(rows)
    if kind == "triton":
        return _module("triton_positives").terms(
            loss, rows, row_groups, values, order, false_positives, delta, eps, dtype
        )
    kernel = partial(_module(_POSITIVES[kind]).terms, loss, delta=delta, eps=eps)
    results = _by_numpy(kernel, rows, row_groups, values, order, false_positives)
    losses, rank, *others = (torch.from_numpy(result) for result in results)
    in_dtype = (losses[0].to(dtype, copy=True), losses[1].to(dtype, copy=True), rank.to(dtype))
    return tuple(result.to(rows.device) for result in (*in_dtype, *others))  # pyright: ignore[reportReturnType]


def spread(
    rows: Tensor,
    row_groups: Tensor | None,
    share: Tensor,
    own: Tensor,
    positives: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    of_values: Tensor | None,
    dtype: torch.dtype,
    logits: Tensor,
    marks: Tensor | None,
    num_classes: int | None,
    groups: Tensor | None,
    tables: list[Tensor],
    delta: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    columns = columns_of(logits, marks, num_classes, groups)
    if first is not None and rows.numel() and logits.numel() and family(backend, rows) == "triton":
        scaled = _module("triton_tiled").own_of(own, first, second, of_values, dtype, logits)
        grad = _products(rows, columns, backend).rmatvec(rows, row_groups, share, columns, delta, tables, scaled)
        return grad.index_copy_(0, positives, scaled.pulls), scaled.grad_values
    grad_values = own.new_empty(0, dtype=dtype) if of_values is None else (own[2] * of_values).to(dtype)
    if first is None and second is None:
        return logits.new_empty(0), grad_values
    if first is None:  # the second loss leaves the negatives alone
        grad = torch.zeros_like(logits)
    else:
        grad = rmatvec(rows, row_groups, share * first, columns, delta, tables, backend)
    pulls = [pull * scale for pull, scale in zip(own[:2].unbind(), (first, second), strict=True) if scale is not None]
    return grad.index_copy_(0, positives, sum(pulls[1:], pulls[0]).to(grad.dtype)), grad_values
