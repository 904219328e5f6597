"""The torch operators that the losses are built on: four stages, and what processes tell each other between them.

    find -> (gather_positives) -> count -> (sum_over_processes) -> terms            forward
    spread                                                                      backward

Each is a custom operator (``torch.ops.alrp_triton.*``) with a kernel, for whatever device, and a fake kernel that tells
shapes and dtypes: to tracing and compiling it is one opaque node, checks of values and launches of Triton kernels
included, which so cost no graph break. The kernels are those of :mod:`alrp_triton.stages`.

**Rows** are the positives in ascending order of their scores, float64 ``(P,)``, NaN last. P-sized data is float64, for
false positives near eps, and ranks near N, have to keep their digits. With groups, rows ascend by group, and within one
by score; ``row_groups``, int64 ``(P,)``, is the group of each, and ``groups``, int64, that of each of so many equal
runs of the logits. A row and a logit, or two rows, that are not of one group do not see each other. Both are None where
there is one group. **Input order** is that of the flat index of a positive in the logits; ``order``, int64 ``(P,)``,
tells the place in it that each row has.

* ``find(logits, targets, values, groups, num_classes, background, ignore_index, graded, ious, count, count_argument,
  process_group, backend)``: reads the targets. ``logits`` are flat ``(N,)``. Returns ``positives``, the flat indices,
  int64 ``(P,)`` in input order; ``marks``, which logits are negatives
  (:class:`alrp_triton.backends.columns.Columns`), empty where the targets can stand for themselves, dense and of one
  byte; then rows, the values of the rows, float64 ``(P,)``, their groups (empty without groups), and ``order``.
  ``values`` are in input order; None: what graded targets hold, or 0.
  Checks that the backend can run, what values the targets have, with ``ious`` that values are in range, and that
  ``count``, told by the argument that ``count_argument`` names, is right (:func:`alrp_triton.checks.check_marks`);
  None: the host waits to learn it. What it refuses it tells the other processes of ``process_group`` ("": there are
  none). ``graded``: dense targets are positive not only at 1 but from 0 to ``formulas.MAX_GRADE``.
* ``count(rows, row_groups, logits, marks, num_classes, groups, delta, backend)``: ``false_positives``, FP_i = sum of
  H_ij over the negatives j, float64 ``(P,)``; and ``tables``, what the backend made of the rows and needs again in
  ``spread``.
* ``terms(loss, rows, row_groups, values, order, false_positives, delta, eps, dtype, backend)``: compares the rows among
  themselves and makes of all sums what a loss is (:mod:`alrp_triton.formulas`): its **ranking loss**, and an
  **auxiliary loss**, which is the localisation of aLRP, the sorting of Rank & Sort, else 0; 0-d, and the ranks ``(P,)``
  in input order, in ``dtype``; ``grad_positives``, float64 ``(3, P)`` in input order: the gradient of either loss in
  the positives' logits, and that of the auxiliary loss in the values, 0 where there is none; ``grad_per_fp``, float64
  ``(P,)``: what each false positive of a row is charged with by the ranking loss. Gradients are for an incoming
  gradient of 1: backward scales and spreads them. ``loss`` is ``alrp``, ``ap``, ``interpolated_ap`` or ``rank_sort``.
* ``spread(rows, row_groups, grad_per_fp, grad_positives, positives, ranking_scale, auxiliary_scale, values_scale,
  dtype, logits, marks, num_classes, groups, tables, delta, backend)``: the gradient in the logits ``(N,)``: at a
  negative j ``ranking_scale`` times the sum of H_ij grad_per_fp_i, at a positive its ``grad_positives`` times the
  scales of both losses, 0 elsewhere; and that in the values ``(P,)``, in ``dtype``. The scales are incoming gradients,
  0-d, or None for 0. A gradient that only Nones go into is empty.
* ``gather_positives``, ``sum_over_processes``: see :mod:`alrp_triton.distributed`.

A row that is not finite makes every result of its group NaN that counts; so do a value or weight in what contains it,
and a negative that is NaN. In ``spread`` a negative that is NaN has a gradient of NaN. Results are bitwise repeatable
on the CPU and in the Triton kernels.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch, distributed, stages


def _find(
    logits: Tensor, targets: Tensor, values: Tensor | None, groups: Tensor | None, num_classes: int | None,
    background: int, ignore_index: int, graded: bool, ious: bool, count: int | None, count_argument: str,
    process_group: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    found = torch.library.get_ctx().new_dynamic_size() if count is None else count
    positives = targets.new_empty(found, dtype=torch.int64)
    narrow = num_classes is None and targets.dtype.itemsize == 1
    marks = targets.new_empty(
        0 if narrow else targets.numel(), dtype=torch.uint8 if num_classes is None else torch.int32
    )
    rows = positives.new_empty(found, dtype=torch.float64)
    row_groups = positives.new_empty(0 if groups is None else found)
    return positives, marks, rows, torch.empty_like(rows), row_groups, torch.empty_like(positives)


def _count(
    rows: Tensor, row_groups: Tensor | None, logits: Tensor, marks: Tensor | None, num_classes: int | None,
    groups: Tensor | None, delta: float, backend: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    columns = dispatch.columns_of(logits, marks, num_classes, groups)
    return torch.empty_like(rows), dispatch.empty_tables(rows, row_groups, columns, backend)


def _terms(
    loss: str, rows: Tensor, row_groups: Tensor | None, values: Tensor, order: Tensor, false_positives: Tensor,
    delta: float, eps: float, dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    p = rows.numel()
    ranking, rank = (rows.new_empty(shape, dtype=dtype) for shape in ((), p))
    return ranking, torch.empty_like(ranking), rank, rows.new_empty(3, p), torch.empty_like(rows)


def _spread(
    rows: Tensor, row_groups: Tensor | None, grad_per_fp: Tensor, grad_positives: Tensor, positives: Tensor,
    ranking_scale: Tensor | None, auxiliary_scale: Tensor | None, values_scale: Tensor | None, dtype: torch.dtype,
    logits: Tensor, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad = logits.new_empty(0) if ranking_scale is None and auxiliary_scale is None else torch.empty_like(logits)
    return grad, logits.new_empty(0 if values_scale is None else grad_positives.shape[1], dtype=dtype)


def _gather_positives(
    rows: Tensor, values: Tensor, row_groups: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = torch.library.get_ctx().new_dynamic_size()
    order = rows.new_empty(total, dtype=torch.int64)
    local_index = rows.new_empty(rows.numel(), dtype=torch.int64)
    groups = order.new_empty(0 if row_groups is None else total)
    return rows.new_empty(total), values.new_empty(total), groups, order, local_index


def _sum_over_processes(numbers: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(numbers)


_library = torch.library.Library("alrp_triton", "DEF")


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator of a schema: that of its kernel's signature, in the language of torch, which every version reads."""
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"alrp_triton::{name}", fake, lib=_library)
    return getattr(torch.ops.alrp_triton, name)


_OF_LOGITS = "Tensor logits, Tensor? marks, SymInt? num_classes, Tensor? groups"
find = _define(
    "find(Tensor logits, Tensor targets, Tensor? values, Tensor? groups, SymInt? num_classes, SymInt background, "
    "SymInt ignore_index, bool graded, bool ious, SymInt? count, str count_argument, str process_group, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    stages.find,
    _find,
)
count = _define(
    f"count(Tensor rows, Tensor? row_groups, {_OF_LOGITS}, float delta, str backend) -> (Tensor, Tensor[])",
    stages.count,
    _count,
)
terms = _define(
    "terms(str loss, Tensor rows, Tensor? row_groups, Tensor values, Tensor order, Tensor false_positives, "
    "float delta, float eps, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    stages.terms,
    _terms,
)
spread = _define(
    "spread(Tensor rows, Tensor? row_groups, Tensor grad_per_fp, Tensor grad_positives, Tensor positives, "
    "Tensor? ranking_scale, Tensor? auxiliary_scale, Tensor? values_scale, ScalarType dtype, "
    f"{_OF_LOGITS}, Tensor[] tables, float delta, str backend) "
    "-> (Tensor, Tensor)",
    stages.spread,
    _spread,
)
gather_positives = _define(
    "gather_positives(Tensor rows, Tensor values, Tensor? row_groups, Tensor order, Tensor collectives, str call, "
    "str process_group, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    stages.gather_positives,
    _gather_positives,
)
sum_over_processes = _define(
    "sum_over_processes(Tensor numbers, Tensor(a!) collectives, str process_group) -> Tensor",
    distributed.sum_over_processes,
    _sum_over_processes,
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
