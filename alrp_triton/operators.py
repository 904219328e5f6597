"""The torch operators that the package is built on, and which backend runs them.

Each is a custom operator (``torch.ops.alrp_triton.*``) with a kernel for each device and a fake kernel, so that the
choice by device is torch's. ``rows`` are the positives' scores, float64 ``(P,)``, ascending, NaN last.

* ``matvec(rows, columns, weights, delta, backend)``: y_i = sum_j H_ij v_j, float64 ``(P,)``. ``columns`` are float16,
  bfloat16, float32 or float64 of any shape. ``weights`` is v: None (all ones), a bool mask, or floats, in that shape. A
  column of weight 0 or False is not looked at.
* ``rmatvec(rows, weights, columns, mask, delta, backend)``: g_j = sum_i H_ij w_i in the dtype and shape of the columns,
  0 where the mask is False.
* ``among_rows(rows, values, delta, backend)``: the rows' comparisons among themselves, float64 ``(3, P)``: H 1, H v,
  and H v with the hard step (delta = 0), for ``values`` v, float64 ``(P,)``.
* ``below_rows(rows, weights, backend)``: the transpose of the last, g_k = sum of w_i over s_i <= s_k, float64 ``(P,)``.
* ``among_grades(rows, grades, delta, backend)``: the same with a second order, ``grades`` t, float64 ``(P,)``: float64
  ``(4, P)``; for each row i the sums of H_ik and of H_ik (1 - t_k) over the rows of t_k >= t_i, and over those of
  t_k < t_i. Pair by pair: O(P^2) work, O(P) memory.
* ``below_grades(rows, grades, weights, delta, backend)``: the transpose of the third, g_k = sum of H_ik w_i over the
  rows of t_i > t_k, float64 ``(P,)``.
* ``alrp_terms``, ``ap_terms``, ``rank_sort_terms``: what a loss makes of its sums (:mod:`alrp_triton.formulas`), given
  ``false_positives``, float64 ``(P,)``, and what ``among_rows`` (its first row for ``ap_terms``) or ``among_grades``
  return. The losses, 0-d, in ``dtype``; for ``alrp_terms`` also the ranks, in the order of the input, which ``order``
  tells; and what the gradients are made of, float64, a row each, divided by P:
  alrp: each positive's own gradient, its share for a false positive, 1 / rank;
  ap: own, share;
  rank_sort: own and share of the ranking error, own and share (for a missorted positive) of the sorting error.
* ``classify(targets, num_classes, background, ignore_index, graded, count, backend)``: bool mask of the negatives
  ``(N,)``, int64 flat indices ``(count,)`` of the positives, ascending, and int64 ``(2,)``: how many positives there
  are, and how many values that mean nothing (or just not 0). If there are not ``count`` positives, the indices mean
  nothing. ``graded``: dense targets are positive not only at 1 but from 0 to ``formulas.MOST_GRADE``.

A row that is not finite makes every result NaN that counts; so do a weight of ``rmatvec`` and ``below_rows`` and, in
what contains v, a value of ``among_rows``. A column that counts and is NaN makes ``matvec`` NaN; in ``rmatvec`` its own
entry is NaN. Results are bitwise repeatable on the CPU and in the Triton kernels.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .cost import prefer_binned, prefer_dense

Backend = Literal[
    "auto", "torch", "numba", "numba_dense", "numba_binned", "triton", "triton_tiled", "triton_binned"
]  # fmt: skip

_MODULES = {
    "torch": "torch_binned",
    "numba_dense": "numba_dense",
    "numba_binned": "numba_binned",
    "triton_tiled": "triton_tiled",
    "triton_binned": "triton_binned",
}
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_NUMBA = importlib.util.find_spec("numba") is not None


@cache
def _module(name: str) -> ModuleType:
    """A module of backends/. Imported at first use: triton and numba are neither needed nor always there."""
    return importlib.import_module(f".backends.{name}", __package__)


def check_backend_name(backend: object) -> None:
    """Raise ValueError if ``backend`` is unknown."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(map(repr, get_args(Backend)))}, got {backend!r}")


def check_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError, saying why, if ``backend`` is unknown or cannot run on tensors of ``device``."""
    check_backend_name(backend)
    if backend.startswith("numba"):
        if not _HAS_NUMBA:
            raise ValueError(f"backend={backend!r} needs the package numba, which is not installed (pip install numba)")
        if device.type != "cpu":
            raise ValueError(f"backend={backend!r} needs a CPU, but the logits are on {str(device)!r}: use 'auto'")
    if backend.startswith("triton"):
        if not _HAS_TRITON:
            raise ValueError(
                f"backend={backend!r} needs the package triton, which is not installed (pip install triton)"
            )
        if not _module("triton_tiled").runs_on(device):
            raise ValueError(
                f"backend={backend!r} needs a CUDA or ROCm GPU, but the logits are on {str(device)!r}: "
                "use 'torch' or 'auto' (to try the kernels without a GPU: TRITON_INTERPRET=1 before their first use)"
            )


def resolve(backend: str, device_type: str, rows: int, columns: int) -> str:
    """The backend that runs a product; what ``"auto"``, ``"numba"`` and ``"triton"`` stand for is stated here."""
    if backend == "auto":
        if device_type == "cuda":  # ROCm builds of torch call their devices so, too
            backend = "triton" if _HAS_TRITON else "torch"
        else:
            backend = "numba" if device_type == "cpu" and _HAS_NUMBA else "torch"
    if backend == "numba":
        backend = "numba_dense" if prefer_dense(rows, columns) else "numba_binned"
    if backend == "triton":
        backend = "triton_binned" if prefer_binned(rows, columns) else "triton_tiled"
    return backend


def _matvec(rows: Tensor, columns: Tensor, weights: Tensor | None, delta: float, backend: str) -> Tensor:
    if rows.numel() == 0 or columns.numel() == 0:
        return torch.zeros_like(rows)
    backend = resolve(backend, rows.device.type, rows.numel(), columns.numel())
    return _module(_MODULES[backend]).matvec(rows, columns, weights, delta)


def _rmatvec(rows: Tensor, weights: Tensor, columns: Tensor, mask: Tensor | None, delta: float, backend: str) -> Tensor:
    if rows.numel() == 0 or columns.numel() == 0:
        return torch.zeros_like(columns, memory_format=torch.contiguous_format)
    backend = resolve(backend, rows.device.type, rows.numel(), columns.numel())
    return _module(_MODULES[backend]).rmatvec(rows, weights, columns, mask, delta)


def _of_rows(rows: Tensor, backend: str) -> ModuleType:
    """The module for the rows among themselves: of the linear algorithm there is one that is fast enough for all."""
    backend = resolve(backend, rows.device.type, rows.numel(), 3 * rows.numel())  # there are three sums
    pairwise = {"numba_dense": "numba_dense", "triton_tiled": "triton_tiled", "triton_binned": "triton_tiled"}
    return _module(pairwise.get(backend, "knots"))


def _among_rows(rows: Tensor, values: Tensor, delta: float, backend: str) -> Tensor:
    return rows.new_zeros(3, 0) if rows.numel() == 0 else _of_rows(rows, backend).among_rows(rows, values, delta)


def _below_rows(rows: Tensor, weights: Tensor, backend: str) -> Tensor:
    return torch.zeros_like(rows) if rows.numel() == 0 else _of_rows(rows, backend).below_rows(rows, weights)


def _family(backend: str, like: Tensor) -> str:
    """torch, numba or triton, for what each of them does in one way only."""
    return resolve(backend, like.device.type, 1, 1).partition("_")[0]


def _among_grades(rows: Tensor, grades: Tensor, delta: float, backend: str) -> Tensor:
    if rows.numel() == 0:
        return rows.new_zeros(4, 0)
    return _module(f"{_family(backend, rows)}_graded").among_grades(rows, grades, delta)


def _below_grades(rows: Tensor, grades: Tensor, weights: Tensor, delta: float, backend: str) -> Tensor:
    if rows.numel() == 0:
        return torch.zeros_like(rows)
    return _module(f"{_family(backend, rows)}_graded").below_grades(rows, grades, weights, delta)


def _terms_of(loss: str) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        *of_loss, backend = arguments
        module = "triton_losses" if _family(backend, of_loss[0]) == "triton" else "losses"
        return getattr(_module(module), f"{loss}_terms")(*of_loss)

    return kernel


_alrp_terms, _ap_terms, _rank_sort_terms = map(_terms_of, ("alrp", "ap", "rank_sort"))


def _classify(
    targets: Tensor,
    num_classes: int | None,
    background: int,
    ignore_index: int,
    graded: bool,
    count: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = _module(f"{'torch' if targets.numel() == 0 else _family(backend, targets)}_targets")
    return module.classify(targets, num_classes, background, ignore_index, graded, count)


def _matvec_fake(rows: Tensor, columns: Tensor, weights: Tensor | None, delta: float, backend: str) -> Tensor:
    return torch.empty_like(rows)


def _rmatvec_fake(
    rows: Tensor, weights: Tensor, columns: Tensor, mask: Tensor | None, delta: float, backend: str
) -> Tensor:
    return torch.empty_like(columns, memory_format=torch.contiguous_format)


def _among_rows_fake(rows: Tensor, values: Tensor, delta: float, backend: str) -> Tensor:
    return rows.new_empty(3, rows.numel())


def _below_rows_fake(rows: Tensor, weights: Tensor, backend: str) -> Tensor:
    return torch.empty_like(rows)


def _among_grades_fake(rows: Tensor, grades: Tensor, delta: float, backend: str) -> Tensor:
    return rows.new_empty(4, rows.numel())


def _below_grades_fake(rows: Tensor, grades: Tensor, weights: Tensor, delta: float, backend: str) -> Tensor:
    return torch.empty_like(rows)


def _alrp_terms_fake(
    false_positives: Tensor,
    among: Tensor,
    box_errors: Tensor,
    order: Tensor,
    at_zero: float,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, rank = (false_positives.new_empty(shape, dtype=dtype) for shape in ((), false_positives.shape))
    return loss, torch.empty_like(loss), rank, torch.empty_like(among)


def _ap_terms_fake(
    false_positives: Tensor,
    positives_above: Tensor,
    at_zero: float,
    interpolate: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return false_positives.new_empty((), dtype=dtype), false_positives.new_empty(2, false_positives.numel())


def _rank_sort_terms_fake(
    false_positives: Tensor, among: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    loss = false_positives.new_empty((), dtype=dtype)
    return loss, torch.empty_like(loss), torch.empty_like(among)


def _classify_fake(
    targets: Tensor,
    num_classes: int | None,
    background: int,
    ignore_index: int,
    graded: bool,
    count: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    negatives = targets.new_empty(targets.numel() * (num_classes or 1), dtype=torch.bool)
    return negatives, targets.new_empty(count, dtype=torch.int64), targets.new_empty(2, dtype=torch.int64)


_OPERATORS = {
    "matvec(Tensor rows, Tensor columns, Tensor? weights, float delta, str backend) -> Tensor": (_matvec, _matvec_fake),
    "rmatvec(Tensor rows, Tensor weights, Tensor columns, Tensor? mask, float delta, str backend) -> Tensor": (
        _rmatvec,
        _rmatvec_fake,
    ),
    "among_rows(Tensor rows, Tensor values, float delta, str backend) -> Tensor": (_among_rows, _among_rows_fake),
    "below_rows(Tensor rows, Tensor weights, str backend) -> Tensor": (_below_rows, _below_rows_fake),
    "among_grades(Tensor rows, Tensor grades, float delta, str backend) -> Tensor": (_among_grades, _among_grades_fake),
    "below_grades(Tensor rows, Tensor grades, Tensor weights, float delta, str backend) -> Tensor": (
        _below_grades,
        _below_grades_fake,
    ),
    "alrp_terms(Tensor false_positives, Tensor among, Tensor box_errors, Tensor order, float at_zero, float eps, "
    "ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)": (_alrp_terms, _alrp_terms_fake),
    "ap_terms(Tensor false_positives, Tensor positives_above, float at_zero, bool interpolate, ScalarType dtype, "
    "str backend) -> (Tensor, Tensor)": (_ap_terms, _ap_terms_fake),
    "rank_sort_terms(Tensor false_positives, Tensor among, float eps, ScalarType dtype, str backend) "
    "-> (Tensor, Tensor, Tensor)": (_rank_sort_terms, _rank_sort_terms_fake),
    "classify(Tensor targets, int? num_classes, int background, int ignore_index, bool graded, int count, str backend) "
    "-> (Tensor, Tensor, Tensor)": (_classify, _classify_fake),
}
_library = torch.library.Library("alrp_triton", "DEF")
for _signature, (_kernel, _fake) in _OPERATORS.items():
    _name = _library.define(_signature)
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"alrp_triton::{_name}", _fake, lib=_library)

matvec = torch.ops.alrp_triton.matvec
rmatvec = torch.ops.alrp_triton.rmatvec
among_rows = torch.ops.alrp_triton.among_rows
below_rows = torch.ops.alrp_triton.below_rows
among_grades = torch.ops.alrp_triton.among_grades
below_grades = torch.ops.alrp_triton.below_grades
alrp_terms = torch.ops.alrp_triton.alrp_terms
ap_terms = torch.ops.alrp_triton.ap_terms
rank_sort_terms = torch.ops.alrp_triton.rank_sort_terms
classify = torch.ops.alrp_triton.classify
