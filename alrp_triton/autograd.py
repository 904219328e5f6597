"""Ranking losses as one autograd function: the stages of the forward pass, and the error-driven update of the backward.

The losses of the family differ in what they make of the comparisons of the positives, which is of size P: the stage
``terms``. What is of size N is the same for all: false positives are a product with the comparison matrix, the gradient
of the negatives one with its transpose.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import operators
from .dispatch import Backend
from .distributed import COLLECTIVES
from .targets import TargetForm


class Settings(NamedTuple):
    """What a loss is called with, beside tensors."""

    loss: str
    """``alrp``, ``ap``, ``interpolated_ap`` or ``rank_sort``."""
    call: str
    """The loss and its settings, for the other processes to compare; "" where there are none."""
    delta: float
    eps: float
    backend: Backend
    process_group: str
    """Name of the group that ranks together; "": this process by itself."""
    gradient_scale: float


class Positives(NamedTuple):
    """What the caller knows of the positives."""

    values: Tensor | None
    """``(P,)``, what the loss wants of each, in the order of their flat index: box errors or IoUs."""
    number: int | None
    count_argument: str
    """The argument that tells their number, for errors."""
    ious: bool = False
    """Whether the values are IoUs, which have a range."""


class Ranked(NamedTuple):
    """The positives in the order of the rows (:mod:`.operators`); with a process group those of all its processes."""

    rows: Tensor
    values: Tensor
    groups: Tensor | None
    order: Tensor


class Logits(NamedTuple):
    """The logits of this process, flat, and which of them are negatives, as the operators take them."""

    flat: Tensor
    """Contiguous: 1-D logits can be flat and lie apart in memory."""
    marks: Tensor
    num_classes: int | None
    groups: Tensor | None


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on a gradient; differentiating it raises. ``cause`` ties the gradient to what it was made from."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *cause: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            "a ranking loss has no second derivative: its gradient is the error-driven update of the paper and not the "
            "derivative of a function. Leave the loss out of terms that differentiate gradients (gradient penalties)."
        )


class RankingLoss(torch.autograd.Function):
    """The stage ``terms`` forward, the stage ``spread`` backward; saves its inputs, the marks and O(P) numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        values: Tensor | None,
        settings: Settings,
        positives: Tensor,
        local_order: Tensor | None,  # of the positives of this process, among themselves; None: there are no others
        local_index: Tensor | None,  # those of this process among the positives of all
        false_positives: Tensor,
        num_classes: int | None,
        # Tensors one by one, for Dynamo of torch 2.10 passes them on in no other way.
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        ranked, (flat, marks, groups, *tables) = Ranked(*tensors[:4]), tensors[4:]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if values is not None:
            dtype = torch.promote_types(dtype, values.dtype)
        ranking, auxiliary, rank, grad_positives, grad_per_fp = operators.terms(
            settings.loss, ranked.rows, ranked.groups, ranked.values, ranked.order, false_positives, settings.delta,
            settings.eps, dtype, settings.backend,
        )  # fmt: skip
        if local_index is not None:
            rank, grad_positives = rank.index_select(0, local_index), grad_positives.index_select(1, local_index)
        wants_logits, wants_values = ctx.needs_input_grad[:2]
        ctx.settings, ctx.num_classes = settings, num_classes
        ctx.save_for_backward(
            logits, values if wants_values else None, positives, ranked.rows, ranked.groups, grad_positives,
            grad_per_fp, flat, marks, groups, *tables,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        outputs: dict[str, tuple[Tensor, ...]] = {
            "alrp": (ranking, auxiliary, rank, ranked.order if local_order is None else local_order),
            "rank_sort": (ranking, auxiliary),
        }
        wanted = wants_logits, wants_values if settings.loss == "alrp" else wants_logits, False, False
        results = outputs.get(settings.loss, (ranking,))
        constant = [result for result, wants in zip(results, wanted[: len(results)], strict=True) if not wants]
        ctx.mark_non_differentiable(*constant)
        return results

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, values, positives, rows, row_groups, *saved = ctx.saved_tensors
        grad_positives, grad_per_fp, flat, marks, groups, *tables = saved
        settings: Settings = ctx.settings
        of_ranking, of_auxiliary = (*grad_outputs, None)[:2]
        of_alrp = settings.loss == "alrp"
        grad_logits = grad_values = None
        with torch.no_grad():
            ranking_scale, auxiliary_scale = (
                g if g is None or settings.gradient_scale == 1 else g * settings.gradient_scale
                for g in (of_ranking, of_auxiliary)
            )
            values_scale = auxiliary_scale if of_alrp and ctx.needs_input_grad[1] else None
            auxiliary_scale = None if of_alrp else auxiliary_scale  # that of the other losses is one of logits
            if not ctx.needs_input_grad[0]:
                ranking_scale = auxiliary_scale = None
            if ranking_scale is not None or auxiliary_scale is not None or values_scale is not None:
                grad_flat, grad_of_values = operators.spread(
                    rows, row_groups, grad_per_fp, grad_positives, positives, ranking_scale, auxiliary_scale,
                    values_scale, flat.dtype if values_scale is None else values.dtype, flat, marks, ctx.num_classes,
                    groups, tables, settings.delta, settings.backend,
                )  # fmt: skip
                if ranking_scale is not None or auxiliary_scale is not None:
                    grad_logits = grad_flat.reshape(logits.shape)
                grad_values = None if values_scale is None else grad_of_values
        # create_graph=True; what was compiled refuses it by itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            cause = [t for t in (logits, values, of_ranking, of_auxiliary) if t is not None and t.requires_grad]
            grad_logits, grad_values = (
                None if g is None else _NoSecondDerivative.apply(g, *cause) for g in (grad_logits, grad_values)
            )
        return grad_logits, grad_values, *(None for _ in ctx.needs_input_grad[2:])


def ranking_loss(
    logits: Tensor, targets: Tensor, form: TargetForm, known: Positives, groups: Tensor | None, settings: Settings
) -> tuple[Any, ...]:
    """The results of a loss: its parts that there are; for aLRP Loss also the ranks, and the order of the positives.

    All that processes tell each other is told here, outside of the autograd function.

    Args:
        logits: any shape; differentiable.
        targets: as :func:`alrp_triton.targets.check_form` found them.
        form: what it told.
        known: what the caller knows of the positives; values are differentiable if the loss says so.
        groups: integers, the group of each of so many equal runs of the logits; or None.
        settings: see there.
    """
    name, backend = settings.process_group, settings.backend
    targets, flat, values = targets.detach().contiguous(), logits.detach().reshape(-1).contiguous(), known.values
    if groups is not None:  # a copy: it is kept for the backward pass, and the caller may write on
        groups = groups.reshape(-1).to(torch.int64, copy=True)
    find = operators.find if known.number is not None else operators.of_unknown_size(operators.find)
    positives, marks, rows, row_values, row_groups, order = find(
        flat, targets, None if values is None else values.detach(), groups, *form, known.ious, known.number,
        known.count_argument, name, backend,
    )  # fmt: skip
    if form.num_classes is None and targets.dtype.itemsize == 1:
        marks = targets.reshape(-1).view(torch.uint8)
    row_groups = None if groups is None else row_groups
    local_index = local_order = None
    if name:
        local_order, gather = order, operators.of_unknown_size(operators.gather_positives)
        rows, row_values, row_groups, order, local_index = gather(
            rows, row_values, row_groups, order, COLLECTIVES, settings.call, name, backend
        )
        row_groups = None if groups is None else row_groups
    ranked, of_logits = Ranked(rows, row_values, row_groups, order), Logits(flat, marks, form.num_classes, groups)
    false_positives, tables = operators.count(ranked.rows, ranked.groups, *of_logits, settings.delta, backend)
    if name:
        false_positives = operators.sum_over_processes(false_positives, COLLECTIVES, name)
    return RankingLoss.apply(
        logits, values, settings, positives, local_order, local_index, false_positives, form.num_classes, *ranked, flat,
        marks, groups, *tables,
    )  # fmt: skip
