"""Ranking losses as one autograd function: a formula in the forward pass, its error-driven update in the backward pass.

The losses of the family differ in what they make of the comparisons of the positives, which is of size P. What is of
size N is the same for all: false positives are a product with the comparison matrix, the gradient of the negatives one
with its transpose.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import operators
from .comparison import SortedMatrix
from .dispatch import Backend


class Settings(NamedTuple):
    """What a loss is called with, beside tensors."""

    formula: "Formula"
    call: str
    """The loss and its settings, for the other processes to compare."""
    delta: float
    eps: float
    backend: Backend
    process_group: str
    """Name of the group that ranks together; "": this process by itself."""
    gradient_scale: float


class Terms(NamedTuple):
    """What a loss makes of the comparisons. The gradients are for an incoming gradient of 1, divided by P."""

    first: Tensor
    """0-d; the loss whose gradient reaches negatives, too."""
    second: Tensor | None
    """0-d; the other loss, if there is one."""
    rank: Tensor | None
    """``(P,)``, in the order of the input."""
    own: Tensor
    """``(P,)``: gradient of the first loss in the positive's logit."""
    share: Tensor
    """``(P,)``: what each of the positive's false positives is charged with."""
    own_second: Tensor | None = None
    """``(P,)``: gradient of the second loss in the positive's logit."""
    of_rank: Tensor | None = None
    """``(P,)``: gradient of the second loss in the values of all positives that are not below."""


# From the matrix, the positives' values, the order of the scores, settings, dtype of the losses, and whether the
# logits want a gradient.
Formula = Callable[[SortedMatrix, Tensor, Tensor, Settings, torch.dtype, bool], Terms]


def alrp(matrix: SortedMatrix, errors: Tensor, order: Tensor, settings: Settings, dtype: torch.dtype, _: bool) -> Terms:
    """ALRP Loss; the values are box errors."""
    classification, localisation, rank, update = operators.alrp_terms(
        matrix.matvec(),
        matrix.among_rows(errors),
        errors,
        order,
        matrix.at_zero,
        settings.eps,
        dtype,
        settings.backend,
    )
    own, share, of_rank = update
    return Terms(classification, localisation, rank, own, share, of_rank=of_rank)


def ap(
    matrix: SortedMatrix,
    nothing: Tensor,
    order: Tensor,
    settings: Settings,
    dtype: torch.dtype,
    _: bool,
    *,
    interpolate: bool,
) -> Terms:
    """AP Loss; the positives have no values but 0."""
    above = matrix.among_rows(nothing)[0]
    loss, update = operators.ap_terms(
        matrix.matvec(), above, matrix.at_zero, interpolate, dtype, settings.backend, matrix.row_groups
    )
    return Terms(loss, None, None, *update)


def rank_sort(
    matrix: SortedMatrix, ious: Tensor, order: Tensor, settings: Settings, dtype: torch.dtype, wanted: bool
) -> Terms:
    """Rank & Sort Loss; the values are IoUs."""
    ranking, sorting, update = operators.rank_sort_terms(
        matrix.matvec(), matrix.among_grades(ious), settings.eps, dtype, settings.backend
    )
    own, share, own_sorting, share_sorting = update
    if wanted:
        own_sorting = own_sorting + matrix.below_grades(ious, share_sorting)
    return Terms(ranking, sorting, None, own, share, own_sorting)


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


class Positives(NamedTuple):
    """What is ranked: the positives of this process, or with a process group those of all its processes."""

    scores: Tensor
    """float64 ``(P,)``"""
    values: Tensor
    """float64 ``(P,)``"""
    groups: Tensor | None
    """int64 ``(P,)``"""
    mine: Tensor | None
    """int64, where those of this process are; None: all are."""


def find_positives(
    logits: Tensor, values: Tensor, positives: Tensor, groups: Tensor | None, settings: Settings
) -> Positives:
    """The positives at flat indices ``positives``, and those of the other processes."""
    flat = logits.detach().reshape(-1)
    scores, wide, of_positives = flat.index_select(0, positives).double(), values.detach().double(), None
    if groups is not None:
        run = max(flat.numel() // max(groups.numel(), 1), 1)
        of_positives = groups.index_select(0, positives // run)
    if not settings.process_group:
        return Positives(scores, wide, of_positives, None)
    scores, wide, of_all, mine = operators.gather_positives(
        scores, wide, of_positives, settings.call, settings.process_group
    )
    return Positives(scores, wide, None if groups is None else of_all, mine)


class RankingLoss(torch.autograd.Function):
    """Forward and error-driven backward of a ranking loss; saves its inputs, the mask and O(P) numbers.

    Inside, all that belongs to the positives is in ascending order of their scores, group by group. With a process
    group these are the positives of all its processes; ``own`` then tells where among them those of this process are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        values: Tensor,
        negatives: Tensor,
        positives: Tensor,
        groups: Tensor | None,
        ranked: Positives,
        settings: Settings,
    ) -> tuple[Tensor | None, ...]:
        scores, wide, row_groups, mine = ranked
        scores, order = scores.sort(stable=True)
        if row_groups is not None:
            row_groups, by_group = row_groups.index_select(0, order).sort(stable=True)
            scores, order = scores.index_select(0, by_group), order.index_select(0, by_group)
        matrix = SortedMatrix(
            scores, logits.detach().reshape(-1), negatives, settings.delta, settings.backend, row_groups, groups,
            settings.process_group,
        )  # fmt: skip
        dtype = torch.promote_types(torch.promote_types(logits.dtype, values.dtype), torch.float32)
        terms = settings.formula(matrix, wide.index_select(0, order), order, settings, dtype, ctx.needs_input_grad[0])
        own, rank, pulls = None, terms.rank, (terms.own, terms.own_second)
        if mine is not None:
            own, order = order.argsort().index_select(0, mine).sort()
            rank = None if rank is None else rank.index_select(0, mine)
            pulls = (None if pull is None else pull.index_select(0, own) for pull in pulls)

        ctx.settings = settings
        kept = values if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(
            logits, kept, negatives, scores, row_groups, groups, own, order, positives.index_select(0, order),
            terms.share, terms.of_rank, *pulls,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        wants_first, wants_values = ctx.needs_input_grad[:2]
        wants_second = wants_first if terms.of_rank is None else wants_values
        losses = (terms.first, wants_first), (terms.second, wants_second)
        still = [rank, order, *(loss for loss, wanted in losses if not wanted)]
        ctx.mark_non_differentiable(*(tensor for tensor in still if tensor is not None))
        return terms.first, terms.second, rank, order

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        of_first, of_second = grad_outputs[:2]
        logits, values, negatives, scores, row_groups, groups, own, order, positives, *terms = ctx.saved_tensors
        share, of_rank, *pulls = terms
        settings: Settings = ctx.settings
        grad_logits = grad_values = None
        with torch.no_grad():
            matrix = SortedMatrix(
                scores, logits.detach().reshape(-1), negatives, settings.delta, settings.backend, row_groups, groups
            )
            incoming = [
                g if g is None or settings.gradient_scale == 1 else g * settings.gradient_scale
                for g in (of_first, of_second)
            ]
            # Each positive has an error, and shares it among the negatives that outrank it.
            pulls = [pull * g for pull, g in zip(pulls, incoming, strict=True) if pull is not None and g is not None]
            if ctx.needs_input_grad[0] and pulls:
                if incoming[0] is None:  # the second loss leaves the negatives alone
                    grad_logits = torch.zeros(logits.numel(), dtype=logits.dtype, device=logits.device)
                else:
                    grad_logits = matrix.rmatvec(share * incoming[0])
                pull = pulls[0] if len(pulls) == 1 else pulls[0] + pulls[1]
                grad_logits.index_copy_(0, positives, pull.to(logits.dtype))
                grad_logits = grad_logits.reshape(logits.shape)
            if ctx.needs_input_grad[1] and of_rank is not None and incoming[1] is not None:
                grads = matrix.below_rows(of_rank * incoming[1]).to(values.dtype)
                grads = grads if own is None else grads.index_select(0, own)
                grad_values = torch.empty_like(grads).index_copy_(0, order, grads)
        # create_graph=True; what was compiled refuses it by itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            cause = [t for t in (logits, values, of_first, of_second) if t is not None and t.requires_grad]
            grad_logits, grad_values = (
                None if g is None else _NoSecondDerivative.apply(g, *cause) for g in (grad_logits, grad_values)
            )
        return grad_logits, grad_values, None, None, None, None, None


def ranking_loss(
    logits: Tensor,
    values: Tensor,
    negatives: Tensor,
    positives: Tensor,
    groups: Tensor | None,
    settings: Settings,
) -> tuple[Any, ...]:  # which of them are None is the formula's affair
    """The two losses (the second may be None), the ranks (or None) and the order of the positives.

    Args:
        logits: any shape; differentiable.
        values: ``(P,)``, what the formula wants of each positive; differentiable if it says so.
        negatives: bool ``(N,)``.
        positives: int64 ``(P,)``, flat indices, ascending.
        groups: integers, the group of each of so many equal runs of the logits; or None.
        settings: see there.
    """
    groups = None if groups is None else groups.reshape(-1).long()
    ranked = find_positives(logits, values, positives, groups, settings)
    return RankingLoss.apply(logits, values, negatives, positives, groups, ranked, settings)
