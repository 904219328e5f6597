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
from .distributed import ORDER
from .formulas import at_zero


class Settings(NamedTuple):
    """What a loss is called with, beside tensors."""

    formula: "Formula"
    call: str
    """The loss and its settings, for the other processes to compare; "" where there are none."""
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
    """``(P,)``: gradient of the second loss in the values that it ranks: of all positives above, and of itself."""


# From the matrix, what is ranked, settings, dtype of the losses, and whether the logits want a gradient.
Formula = Callable[[SortedMatrix, "Ranked", Settings, torch.dtype, bool], Terms]


def alrp(matrix: SortedMatrix, ranked: "Ranked", settings: Settings, dtype: torch.dtype, _: bool) -> Terms:
    """ALRP Loss; the values are box errors."""
    classification, localisation, rank, update = operators.alrp_terms(
        ranked.false_positives,
        matrix.among_rows(ranked.values),
        ranked.values,
        ranked.order,
        at_zero(settings.delta),
        settings.eps,
        dtype,
        settings.backend,
    )
    own, share, of_rank = update
    return Terms(classification, localisation, rank, own, share, of_rank=of_rank)


def ap(
    matrix: SortedMatrix, ranked: "Ranked", settings: Settings, dtype: torch.dtype, _: bool, *, interpolate: bool
) -> Terms:
    """AP Loss; the positives have no values but 0."""
    above = matrix.among_rows(ranked.values)[0]
    loss, update = operators.ap_terms(
        ranked.false_positives, above, at_zero(settings.delta), interpolate, dtype, settings.backend, ranked.groups
    )
    return Terms(loss, None, None, *update)


def rank_sort(matrix: SortedMatrix, ranked: "Ranked", settings: Settings, dtype: torch.dtype, wanted: bool) -> Terms:
    """Rank & Sort Loss; the values are IoUs."""
    ranking, sorting, update = operators.rank_sort_terms(
        ranked.false_positives, matrix.among_grades(ranked.values), settings.eps, dtype, settings.backend
    )
    own, share, share_sorting, own_sorting = update
    if wanted:
        own_sorting = own_sorting + matrix.below_grades(ranked.values, share_sorting)
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


class Ranked(NamedTuple):
    """The positives in ascending order of their scores, group by group.

    With a process group these are the positives of all its processes.
    """

    scores: Tensor
    """float64 ``(P,)``"""
    values: Tensor
    """float64 ``(P,)``"""
    groups: Tensor | None
    """int64 ``(P,)``"""
    order: Tensor
    """int64 ``(P,)``, the place that each had before."""
    mine: Tensor | None
    """int64, the places before that those of this process had; None: all are of this process."""
    false_positives: Tensor
    """float64 ``(P,)``: FP, over the negatives of all processes."""


def _matrix(
    scores: Tensor,
    row_groups: Tensor | None,
    logits: Tensor,
    negatives: Tensor,
    groups: Tensor | None,
    settings: Settings,
) -> SortedMatrix:
    """Rows: the positives. Columns: the negatives among the logits of this process."""
    flat = logits.detach().reshape(-1)
    return SortedMatrix(scores, flat, negatives, settings.delta, settings.backend, row_groups, groups)


def rank(
    logits: Tensor, values: Tensor, negatives: Tensor, positives: Tensor, groups: Tensor | None, settings: Settings
) -> Ranked:
    """Compare the positives at flat indices ``positives``, and those of the other processes, with the negatives.

    All that processes tell each other is told here, outside of the autograd function.
    """
    scores, wide = logits.detach().reshape(-1).index_select(0, positives).double(), values.detach().double()
    row_groups = mine = None
    if groups is not None:
        run = max(logits.numel() // max(groups.numel(), 1), 1)
        row_groups = groups.index_select(0, positives // run)
    if settings.process_group:
        gather = operators.of_unknown_size(operators.gather_positives)
        scores, wide, of_all, mine = gather(scores, wide, row_groups, ORDER, settings.call, settings.process_group)
        row_groups = None if groups is None else of_all
    scores, order = operators.sort_rows(scores, settings.backend)
    if row_groups is not None:
        row_groups, by_group = row_groups.index_select(0, order).sort(stable=True)
        scores, order = scores.index_select(0, by_group), order.index_select(0, by_group)
    sums = _matrix(scores, row_groups, logits, negatives, groups, settings).matvec()
    if settings.process_group:
        sums = operators.sum_over_ranks(sums, ORDER, settings.process_group)
    return Ranked(scores, wide.index_select(0, order), row_groups, order, mine, sums)


class RankingLoss(torch.autograd.Function):
    """Forward and error-driven backward of a ranking loss; saves its inputs, the mask and O(P) numbers.

    Inside, all that belongs to the positives is in the order of :class:`Ranked`; ``own`` tells where among those of all
    processes those of this one are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        values: Tensor,
        negatives: Tensor,
        positives: Tensor,
        groups: Tensor | None,
        settings: Settings,
        *of_ranked: Any,  # its tensors one by one, for Dynamo of torch 2.10 passes them on in no other way
    ) -> tuple[Tensor, ...]:
        ranked = Ranked(*of_ranked)
        matrix = _matrix(ranked.scores, ranked.groups, logits, negatives, groups, settings)
        dtype = torch.promote_types(torch.promote_types(logits.dtype, values.dtype), torch.float32)
        terms = settings.formula(matrix, ranked, settings, dtype, ctx.needs_input_grad[0])
        own, order, ranks, pulls = None, ranked.order, terms.rank, (terms.own, terms.own_second)
        if ranked.mine is not None:
            own, order = order.argsort().index_select(0, ranked.mine).sort()
            ranks = None if ranks is None else ranks.index_select(0, ranked.mine)
            pulls = (None if pull is None else pull.index_select(0, own) for pull in pulls)

        ctx.settings = settings
        kept = values if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(
            logits, kept, negatives, ranked.scores, ranked.groups, groups, own, order, positives.index_select(0, order),
            terms.share, terms.of_rank, *pulls,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        wants_first, wants_values = ctx.needs_input_grad[:2]
        wants_second = wants_first if terms.of_rank is None else wants_values
        losses = (terms.first, wants_first), (terms.second, wants_second)
        still = [ranks, order, *(loss for loss, wanted in losses if not wanted)]
        ctx.mark_non_differentiable(*(tensor for tensor in still if tensor is not None))
        return tuple(tensor for tensor in (terms.first, terms.second, ranks, order) if tensor is not None)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        of_first, of_second = grad_outputs[:2]
        logits, values, negatives, scores, row_groups, groups, own, order, positives, *terms = ctx.saved_tensors
        share, of_rank, *pulls = terms
        settings: Settings = ctx.settings
        grad_logits = grad_values = None
        with torch.no_grad():
            matrix = _matrix(scores, row_groups, logits, negatives, groups, settings)
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
        return grad_logits, grad_values, *(None for _ in ctx.needs_input_grad[2:])


def ranking_loss(
    logits: Tensor,
    values: Tensor,
    negatives: Tensor,
    positives: Tensor,
    groups: Tensor | None,
    settings: Settings,
) -> tuple[Any, ...]:
    """Those of the formula's results that there are, of its two losses, the ranks, and the order of the positives.

    Args:
        logits: any shape; differentiable.
        values: ``(P,)``, what the formula wants of each positive; differentiable if it says so.
        negatives: bool ``(N,)``.
        positives: int64 ``(P,)``, flat indices, ascending.
        groups: integers, the group of each of so many equal runs of the logits; or None.
        settings: see there.
    """
    if groups is not None:  # a copy: it is kept for the backward pass, and the caller may write on
        groups = groups.reshape(-1).to(torch.int64, copy=True)
    ranked = rank(logits, values, negatives, positives, groups, settings)
    return RankingLoss.apply(logits, values, negatives, positives, groups, settings, *ranked)
