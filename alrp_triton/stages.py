"""The stages of a loss, on the backend that is wanted: kernels of the operators of their names.

Their contract is stated in :mod:`alrp_triton.operators`.
"""

from functools import partial

import torch
from torch import Tensor

from . import distributed
from .checks import check_ious, check_marks
from .dispatch import (
    backend_module,
    by_numpy,
    check_backend,
    columns_of,
    family,
    matvec,
    positives_module,
    products,
    ranked,
    rmatvec,
    tables_for,
)


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
    count_argument: str,
    process_group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reads the targets; ranks the positives."""
    try:
        check_backend(backend, targets.device)
        if groups is not None and backend == "triton_tiled":
            raise ValueError(
                "backend='triton_tiled' ranks one group: with groups use 'auto', 'triton' or 'triton_binned'"
            )
        kind, form = family(backend, targets), (num_classes, background, ignore_index, graded)
        if kind == "triton" and targets.numel() and logits.numel():
            return _find_by_triton(logits, targets, values, groups, form, ious, count, count_argument, backend)
        if ious and values is not None:
            check_ious(values)
        read = backend_module(f"{'torch' if kind == 'triton' else kind}_targets").read
        if count is None:
            count = int(read(targets, *form, 0)[2][0])
        positives, marks, status = read(targets, *form, count)
        found, bad = status if status.is_cuda else status.tolist()
        check_marks(targets, *form, count, count_argument, found, (bad == 0, found == count))
        scores = logits.index_select(0, positives).double()
        if values is None:
            values = targets.reshape(-1).index_select(0, positives) if graded else torch.zeros_like(scores)
        of_rows = None
        if groups is not None:
            of_rows = groups.index_select(0, positives // max(logits.numel() // max(groups.numel(), 1), 1))
        marks = targets.new_empty(0, dtype=torch.uint8) if marks is None else marks
        return positives, marks, *ranked(scores, values.double(), of_rows, backend)
    except (TypeError, ValueError) as error:
        distributed.send_failure(process_group, error, targets.device)
        raise


def _find_by_triton(
    logits: Tensor,
    targets: Tensor,
    values: Tensor | None,
    groups: Tensor | None,
    form: tuple[int | None, int, int, bool],
    ious: bool,
    count: int | None,
    count_argument: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``find`` with the positives as a kernel has found them: in any order, with their scores."""
    read = partial(backend_module("triton_targets").read, targets, *form, logits=logits, groups=groups)
    if count is None:
        count = int(read(count=0)[0].status[0])
    found, marks = read(count=count)
    groups, sorting = None if groups is None else found.groups, backend_module("triton_sort")
    graded = values is None and form[-1]
    if values is not None:
        values = values.contiguous()
    if count <= sorting.MAX_COUNT:
        given = found.grades if graded else values
        rows, row_values, row_groups, order, positives = sorting.rank(found.scores, given, groups, found, graded, ious)
        in_range, *sound = found.status[2:].unbind()
    else:
        positives, by_place = found.places.sort(stable=True)
        scores, grades = (of.index_select(0, by_place) for of in (found.scores, found.grades))  # without grades 0
        groups = None if groups is None else groups.index_select(0, by_place)
        rows, row_values, row_groups, order = ranked(
            scores, grades if values is None else values.double(), groups, backend
        )
        in_range, sound = None, (found.status[1] == 0, found.status[0] == count)
    if ious and values is not None:
        check_ious(values, in_range)
    check_marks(targets, *form, count, count_argument, found.status[0], sound)
    marks = targets.new_empty(0, dtype=torch.uint8) if marks is None else marks
    return positives, marks, rows, row_values, row_groups, order


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
    """Ranks the positives of all processes."""

    def as_given(of_rows: Tensor) -> Tensor:
        return torch.empty_like(of_rows).index_copy_(0, order, of_rows)

    local_groups = None if row_groups is None else as_given(row_groups)
    scores, values, groups, local_index = distributed.gather(
        as_given(rows), as_given(values), local_groups, call, process_group
    )
    return *ranked(scores, values, groups, backend), local_index


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
    """Compares the positives with the negatives."""
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
    """Compares the positives among themselves, and makes of all sums what a loss is."""
    p, kind = rows.numel(), family(backend, rows)
    if p == 0:
        ranking, auxiliary, rank = (rows.new_zeros(shape, dtype=dtype) for shape in ((), (), 0))
        return ranking, auxiliary, rank, rows.new_zeros(3, 0), torch.zeros_like(rows)
    if kind == "triton":
        return backend_module("triton_positives").terms(
            loss, rows, row_groups, values, order, false_positives, delta, eps, dtype
        )
    kernel = partial(positives_module(kind).terms, loss, delta=delta, eps=eps)
    results = by_numpy(kernel, rows, row_groups, values, order, false_positives)
    losses, rank, *others = (torch.from_numpy(result) for result in results)
    in_dtype = (losses[0].to(dtype, copy=True), losses[1].to(dtype, copy=True), rank.to(dtype))
    return tuple(result.to(rows.device) for result in (*in_dtype, *others))  # pyright: ignore[reportReturnType]


def spread(
    rows: Tensor,
    row_groups: Tensor | None,
    grad_per_fp: Tensor,
    grad_positives: Tensor,
    positives: Tensor,
    ranking_scale: Tensor | None,
    auxiliary_scale: Tensor | None,
    values_scale: Tensor | None,
    dtype: torch.dtype,
    logits: Tensor,
    marks: Tensor | None,
    num_classes: int | None,
    groups: Tensor | None,
    tables: list[Tensor],
    delta: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gives each logit its part of the gradient."""
    columns = columns_of(logits, marks, num_classes, groups)
    if ranking_scale is not None and rows.numel() and logits.numel() and family(backend, rows) == "triton":
        gradients = backend_module("triton_gradients").gradients_of(
            grad_positives, ranking_scale, auxiliary_scale, values_scale, dtype, logits
        )
        grad = products(rows, columns, backend).rmatvec(
            rows, row_groups, grad_per_fp, columns, delta, tables, gradients
        )
        return grad.index_copy_(0, positives, gradients.grad_scores), gradients.grad_values
    grad_values = logits.new_empty(0, dtype=dtype)
    if values_scale is not None:
        grad_values = (grad_positives[2] * values_scale).to(dtype)
    if ranking_scale is None and auxiliary_scale is None:
        return logits.new_empty(0), grad_values
    if ranking_scale is None:  # the auxiliary loss leaves the negatives alone
        grad = torch.zeros_like(logits)
    else:
        grad = rmatvec(rows, row_groups, grad_per_fp * ranking_scale, columns, delta, tables, backend)
    of_scores = zip(grad_positives[:2].unbind(), (ranking_scale, auxiliary_scale), strict=True)
    scaled = [gradient * scale for gradient, scale in of_scores if scale is not None]
    return grad.index_copy_(0, positives, sum(scaled[1:], scaled[0]).to(grad.dtype)), grad_values
