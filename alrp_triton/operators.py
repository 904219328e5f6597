"""The torch operators that the package is built on.

Each is a custom operator (``torch.ops.alrp_triton.*``) with a kernel, for whatever device, and a fake kernel that tells
shapes and dtypes: to tracing and compiling it is one opaque node, checks of values and launches of Triton kernels
included, which so cost no graph break. ``rows`` are the positives' scores, float64 ``(P,)``, ascending, NaN last.

* ``sort_rows(scores, backend)``: rows made of scores in any order, float64 ``(P,)``; and the place that each had, int64
  ``(P,)``. A stable sort.
* ``matvec(rows, columns, weights, delta, backend)``: y_i = sum_j H_ij v_j, float64 ``(P,)``. ``columns`` are float16,
  bfloat16, float32 or float64 of any shape. ``weights`` is v: None (all ones), a bool mask, or floats, in that shape. A
  column of weight 0 or False is not looked at.
* ``rmatvec(rows, weights, columns, mask, delta, backend)``: g_j = sum_i H_ij w_i in the dtype and shape of the columns,
  0 where the mask is False.
* ``among_rows(rows, values, delta, backend)``: the rows' comparisons among themselves, float64 ``(3, P)``: H 1, H v,
  and R v, for ``values`` v, float64 ``(P,)``. R is the ranking: R_ik = 1 for s_k > s_i and for k = i, h(0) for others
  that tie, else 0.
* ``below_rows(rows, weights, delta, backend)``: the transpose of the last, R^T w, float64 ``(P,)``.
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
  rank_sort: own and share of the ranking error, share (for a missorted positive) and own of the sorting error. A kernel
  reads the third row, for 16 bytes divide its address whatever P is, and Triton compiles for one alignment.
* ``classify(targets, num_classes, background, ignore_index, graded, count, source, backend)``: bool mask of the
  negatives ``(N,)``, and int64 flat indices ``(count,)`` of the positives, ascending. Checks that the backend can run,
  what values the targets have, and that ``count``, which the argument ``source`` told, is right
  (:func:`alrp_triton.checks.check_marks`); None: the host waits to learn it. ``graded``: dense targets are positive not
  only at 1 but from 0 to ``formulas.MOST_GRADE``.
* ``checked_ious(ious)``: the same, if they are in range (:func:`alrp_triton.checks.check_ious`).
* ``gather_positives``, ``sum_over_ranks``: see :mod:`alrp_triton.distributed`.

**Groups.** ``row_groups``, int64 ``(P,)``, is the group of each row; rows ascend by group, and within one by score.
``column_groups``, int64 of any shape, is the group of each of so many equal runs of the columns. H is 0 where a row and
a column, or two rows, are not of one group. None: all are of one. The host reads the groups, so a GPU's has to wait.

A row that is not finite makes every result NaN that counts; so do a weight of ``rmatvec`` and ``below_rows`` and, in
what contains v, a value of ``among_rows``. A column that counts and is NaN makes ``matvec`` NaN; in ``rmatvec`` its own
entry is NaN. Results are bitwise repeatable on the CPU and in the Triton kernels.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch, distributed


def _like_first(first: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def _sort_rows(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scores), scores.new_empty(scores.shape, dtype=torch.int64)


def _rmatvec(rows: Tensor, weights: Tensor, columns: Tensor, *_: Any) -> Tensor:
    return _like_first(columns)


def _among_rows(rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(3, rows.numel())


def _among_grades(rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(4, rows.numel())


def _alrp_terms(
    false_positives: Tensor, among: Tensor, box_errors: Tensor, order: Tensor, at_zero: float, eps: float,
    dtype: torch.dtype, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, rank = (false_positives.new_empty(shape, dtype=dtype) for shape in ((), false_positives.shape))
    return loss, torch.empty_like(loss), rank, torch.empty_like(among)


def _ap_terms(
    false_positives: Tensor, above: Tensor, at_zero: float, interpolate: bool, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, Tensor]:
    return false_positives.new_empty((), dtype=dtype), false_positives.new_empty(2, false_positives.numel())


def _rank_sort_terms(
    false_positives: Tensor, among: Tensor, eps: float, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss = false_positives.new_empty((), dtype=dtype)
    return loss, torch.empty_like(loss), torch.empty_like(among)


def _classify(
    targets: Tensor, num_classes: int | None, background: int, ignore_index: int, graded: bool, count: int | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = torch.library.get_ctx().new_dynamic_size() if count is None else count
    negatives = targets.new_empty(targets.numel() * (num_classes or 1), dtype=torch.bool)
    return negatives, targets.new_empty(found, dtype=torch.int64)


def _gather_positives(
    scores: Tensor, values: Tensor, groups: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = torch.library.get_ctx().new_dynamic_size()
    own = scores.new_empty(scores.numel(), dtype=torch.int64)
    return scores.new_empty(total), values.new_empty(total), own.new_empty(0 if groups is None else total), own


_library = torch.library.Library("alrp_triton", "DEF")


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator of a schema: that of its kernel's signature, in the language of torch, which every version reads."""
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"alrp_triton::{name}", fake, lib=_library)
    return getattr(torch.ops.alrp_triton, name)


_OF_ROWS, _OF_BOTH = "Tensor? row_groups=None", "Tensor? row_groups=None, Tensor? column_groups=None"
sort_rows = _define("sort_rows(Tensor scores, str backend) -> (Tensor, Tensor)", dispatch.sort_rows, _sort_rows)
matvec = _define(
    f"matvec(Tensor rows, Tensor columns, Tensor? weights, float delta, str backend, {_OF_BOTH}) -> Tensor",
    dispatch.matvec,
    _like_first,
)
rmatvec = _define(
    "rmatvec(Tensor rows, Tensor weights, Tensor columns, Tensor? mask, float delta, str backend, "
    f"{_OF_BOTH}) -> Tensor",
    dispatch.rmatvec,
    _rmatvec,
)
among_rows = _define(
    f"among_rows(Tensor rows, Tensor values, float delta, str backend, {_OF_ROWS}) -> Tensor",
    dispatch.among_rows,
    _among_rows,
)
below_rows = _define(
    f"below_rows(Tensor rows, Tensor weights, float delta, str backend, {_OF_ROWS}) -> Tensor",
    dispatch.below_rows,
    _like_first,
)
among_grades = _define(
    f"among_grades(Tensor rows, Tensor grades, float delta, str backend, {_OF_ROWS}) -> Tensor",
    dispatch.among_grades,
    _among_grades,
)
below_grades = _define(
    f"below_grades(Tensor rows, Tensor grades, Tensor weights, float delta, str backend, {_OF_ROWS}) -> Tensor",
    dispatch.below_grades,
    _like_first,
)
alrp_terms = _define(
    "alrp_terms(Tensor false_positives, Tensor among, Tensor box_errors, Tensor order, float at_zero, float eps, "
    "ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    dispatch.alrp_terms,
    _alrp_terms,
)
ap_terms = _define(
    "ap_terms(Tensor false_positives, Tensor positives_above, float at_zero, bool interpolate, ScalarType dtype, "
    f"str backend, {_OF_ROWS}) -> (Tensor, Tensor)",
    dispatch.ap_terms,
    _ap_terms,
)
rank_sort_terms = _define(
    "rank_sort_terms(Tensor false_positives, Tensor among, float eps, ScalarType dtype, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    dispatch.rank_sort_terms,
    _rank_sort_terms,
)
classify = _define(
    "classify(Tensor targets, SymInt? num_classes, SymInt background, SymInt ignore_index, bool graded, SymInt? count, "
    "str source, str backend) -> (Tensor, Tensor)",
    dispatch.classify,
    _classify,
)
checked_ious = _define("checked_ious(Tensor ious) -> Tensor", dispatch.checked_ious, _like_first)
gather_positives = _define(
    "gather_positives(Tensor scores, Tensor values, Tensor? groups, Tensor order, str call, str process_group) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    distributed.gather_positives,
    _gather_positives,
)
sum_over_ranks = _define(
    "sum_over_ranks(Tensor numbers, Tensor(a!) order, str process_group) -> Tensor",
    distributed.sum_over_ranks,
    _like_first,
)


_TRACES_UNKNOWN_SIZES = torch.__version__ >= "2.10"


def of_unknown_size(operator: Any) -> Any:
    """The operator, in a call whose result has a size that nobody knows before.

    Dynamo before torch 2.10 breaks the graph there, runs it as plain Python, and stumbles over what it sees inside: so
    it is kept out. Where it is not imported nothing is compiled.
    """
    if _TRACES_UNKNOWN_SIZES or "torch._dynamo" not in sys.modules:
        return operator
    return torch.compiler.disable(operator)
