"""Which backend computes: what the names stand for, where they can run, and how a product is made of those of groups.

The public functions from ``matvec`` on are the kernels of the operators of their names, whose contract is stated in
:mod:`alrp_triton.operators`.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from .checks import check_ious, check_marks
from .cost import prefer_binned, prefer_dense

Backend = Literal[
    "auto", "torch", "numba", "numba_dense", "numba_binned", "triton", "triton_tiled", "triton_binned"
]  # fmt: skip
_BACKENDS: tuple[str, ...] = get_args(Backend)

_MODULES = {
    "torch": "torch_binned",
    "numba_dense": "numba_dense",
    "numba_binned": "numba_binned",
    "triton_tiled": "triton_tiled",
    "triton_binned": "triton_binned",
}
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


def resolve(backend: str, device_type: str, rows: int, columns: int) -> str:
    """The backend that runs a product; what ``"auto"``, ``"numba"`` and ``"triton"`` stand for is stated here."""
    if backend == "auto":
        if device_type == "cuda":  # ROCm builds of torch call their devices so, too
            backend = "torch" if _triton_lacks() else "triton"
        else:
            backend = "numba" if device_type == "cpu" and _HAS_NUMBA else "torch"
    if backend == "numba":
        backend = "numba_dense" if prefer_dense(rows, columns) else "numba_binned"
    if backend == "triton":
        backend = "triton_binned" if prefer_binned(rows, columns) else "triton_tiled"
    return backend


def _of_rows(rows: Tensor, backend: str) -> ModuleType:
    """The module for the rows among themselves: of the linear algorithm there is one that is fast enough for all."""
    backend = resolve(backend, rows.device.type, rows.numel(), 3 * rows.numel())  # there are three sums
    pairwise = {"numba_dense": "numba_dense", "triton_tiled": "triton_tiled", "triton_binned": "triton_tiled"}
    return _module(pairwise.get(backend, "knots"))


def _family(backend: str, like: Tensor) -> str:
    """torch, numba or triton, for what each of them does in one way only."""
    return resolve(backend, like.device.type, 1, 1).partition("_")[0]


def _blocks(row_groups: Tensor) -> list[tuple[int, slice]]:
    """The groups that have rows, and where those are. The host reads it: on a GPU it waits for the device."""
    groups, ends = row_groups.unique_consecutive(return_counts=True)
    ends = ends.cumsum(0).tolist()
    return [(group, slice(*where)) for group, where in zip(groups.tolist(), pairwise([0, *ends]), strict=True)]


class _Columns:
    """The columns by group: ``column_groups`` has an entry for each of so many equal runs of them."""

    def __init__(self, column_groups: Tensor) -> None:
        groups = column_groups.reshape(-1)
        self.runs = groups.numel()
        self.order: Tensor | None = None
        if bool((groups[1:] < groups[:-1]).any()):
            groups, self.order = groups.sort(stable=True)
        self.groups = groups

    def __getitem__(self, group: int) -> slice | Tensor:
        """The runs of a group."""
        begin, end = (int(torch.searchsorted(self.groups, group, side=side)) for side in ("left", "right"))
        return slice(begin, end) if self.order is None else self.order[begin:end]

    def of(self, tensor: Tensor) -> Tensor:
        """With a row for each run."""
        return tensor.reshape(self.runs, -1)


def _by_block(kernel: Callable[..., Tensor], row_groups: Tensor, *of_rows: Tensor) -> Tensor:
    """What a kernel makes of vectors of the rows, ``(..., P)``, of those of each group by themselves."""
    return torch.cat([kernel(*(v[here] for v in of_rows)) for _, here in _blocks(row_groups)], -1)


def sort_rows(scores: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if _family(backend, scores) == "triton" and scores.numel() <= (sorting := _module("triton_sort")).MOST:
        return sorting.sort_rows(scores)
    if scores.is_cuda:  # there sort() takes a NaN with its sign set, as a cast to bfloat16 makes, for the least number
        scores = scores.nan_to_num(torch.nan, torch.inf, -torch.inf)
    return scores.sort(stable=True)


def matvec(
    rows: Tensor,
    columns: Tensor,
    weights: Tensor | None,
    delta: float,
    backend: str,
    row_groups: Tensor | None = None,
    column_groups: Tensor | None = None,
) -> Tensor:
    if rows.numel() == 0 or columns.numel() == 0:
        return torch.zeros_like(rows)
    if row_groups is None or column_groups is None:
        backend = resolve(backend, rows.device.type, rows.numel(), columns.numel())
        return _module(_MODULES[backend]).matvec(rows, columns, weights, delta)
    runs = _Columns(column_groups)
    sums = [
        matvec(
            rows[here],
            runs.of(columns)[runs[group]],
            None if weights is None else runs.of(weights)[runs[group]],
            delta,
            backend,
        )
        for group, here in _blocks(row_groups)
    ]
    return torch.cat(sums)


def rmatvec(
    rows: Tensor,
    weights: Tensor,
    columns: Tensor,
    mask: Tensor | None,
    delta: float,
    backend: str,
    row_groups: Tensor | None = None,
    column_groups: Tensor | None = None,
) -> Tensor:
    if rows.numel() == 0 or columns.numel() == 0:
        return torch.zeros_like(columns, memory_format=torch.contiguous_format)
    if row_groups is None or column_groups is None:
        backend = resolve(backend, rows.device.type, rows.numel(), columns.numel())
        return _module(_MODULES[backend]).rmatvec(rows, weights, columns, mask, delta)
    result = torch.zeros_like(columns, memory_format=torch.contiguous_format)
    runs = _Columns(column_groups)
    for group, here in _blocks(row_groups):
        those = runs[group]
        keep = None if mask is None else runs.of(mask)[those]
        runs.of(result)[those] = rmatvec(rows[here], weights[here], runs.of(columns)[those], keep, delta, backend)
    return result


def among_rows(rows: Tensor, values: Tensor, delta: float, backend: str, row_groups: Tensor | None = None) -> Tensor:
    if rows.numel() == 0:
        return rows.new_zeros(3, 0)
    if row_groups is not None:
        return _by_block(partial(among_rows, delta=delta, backend=backend), row_groups, rows, values)
    return _of_rows(rows, backend).among_rows(rows, values, delta)


def below_rows(rows: Tensor, weights: Tensor, delta: float, backend: str, row_groups: Tensor | None = None) -> Tensor:
    if rows.numel() == 0:
        return torch.zeros_like(rows)
    if row_groups is not None:
        return _by_block(partial(below_rows, delta=delta, backend=backend), row_groups, rows, weights)
    return _of_rows(rows, backend).below_rows(rows, weights, delta)


def among_grades(rows: Tensor, grades: Tensor, delta: float, backend: str, row_groups: Tensor | None = None) -> Tensor:
    if rows.numel() == 0:
        return rows.new_zeros(4, 0)
    if row_groups is not None:
        return _by_block(partial(among_grades, delta=delta, backend=backend), row_groups, rows, grades)
    return _module(f"{_family(backend, rows)}_graded").among_grades(rows, grades, delta)


def below_grades(
    rows: Tensor, grades: Tensor, weights: Tensor, delta: float, backend: str, row_groups: Tensor | None = None
) -> Tensor:
    if rows.numel() == 0:
        return torch.zeros_like(rows)
    if row_groups is not None:
        return _by_block(partial(below_grades, delta=delta, backend=backend), row_groups, rows, grades, weights)
    return _module(f"{_family(backend, rows)}_graded").below_grades(rows, grades, weights, delta)


def _losses(backend: str, like: Tensor) -> ModuleType:
    return _module("triton_losses" if _family(backend, like) == "triton" else "losses")


def alrp_terms(
    false_positives: Tensor,
    among: Tensor,
    box_errors: Tensor,
    order: Tensor,
    at_zero: float,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = _losses(backend, among)
    return module.alrp_terms(false_positives, among, box_errors, order, at_zero, eps, dtype)


def ap_terms(
    false_positives: Tensor,
    positives_above: Tensor,
    at_zero: float,
    interpolate: bool,
    dtype: torch.dtype,
    backend: str,
    row_groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    kernel = _losses(backend, false_positives).ap_terms
    if row_groups is None or not interpolate or row_groups.numel() == 0:
        return kernel(false_positives, positives_above, at_zero, interpolate, dtype)
    # The greatest precision so far is that of a group. A group's means count as often as it has positives.
    loss, updates, count = false_positives.new_zeros(()), list[Tensor](), row_groups.numel()
    for _, here in _blocks(row_groups):
        mean, update = kernel(false_positives[here], positives_above[here], at_zero, interpolate, torch.float64)
        part = (here.stop - here.start) / count
        loss += mean * part
        updates.append(update * part)
    return loss.to(dtype), torch.cat(updates, -1)


def rank_sort_terms(
    false_positives: Tensor, among: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _losses(backend, among).rank_sort_terms(false_positives, among, eps, dtype)


def classify(
    targets: Tensor,
    num_classes: int | None,
    background: int,
    ignore_index: int,
    graded: bool,
    count: int | None,
    source: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_backend(backend, targets.device)
    kernel = _module(f"{'torch' if targets.numel() == 0 else _family(backend, targets)}_targets").classify
    form = num_classes, background, ignore_index, graded
    if count is None:
        count = int(kernel(targets, *form, 0)[2][0])
    negatives, positives, status = kernel(targets, *form, count)
    check_marks(targets, *form, count, source, status)
    return negatives, positives


def checked_ious(ious: Tensor) -> Tensor:
    check_ious(ious)
    return ious.clone()
