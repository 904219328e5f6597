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
from .comparison import ComparisonMatrix
from .operators import Backend


class Settings(NamedTuple):
    """What a loss is called with, beside tensors."""

    formula: "Formula"
    delta: float
    eps: float
    backend: Backend


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
Formula = Callable[[ComparisonMatrix, Tensor, Tensor, Settings, torch.dtype, bool], Terms]


def alrp(
    matrix: ComparisonMatrix, errors: Tensor, order: Tensor, settings: Settings, dtype: torch.dtype, _: bool
) -> Terms:
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
    matrix: ComparisonMatrix,
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
    loss, update = operators.ap_terms(matrix.matvec(), above, matrix.at_zero, interpolate, dtype, settings.backend)
    return Terms(loss, None, None, *update)


def rank_sort(
    matrix: ComparisonMatrix, ious: Tensor, order: Tensor, settings: Settings, dtype: torch.dtype, wanted: bool
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


def _matrix(scores: Tensor, logits: Tensor, negatives: Tensor, settings: Settings) -> ComparisonMatrix:
    """Rows: the positives. Columns: the negatives among all logits."""
    flat, delta, backend = logits.reshape(-1), settings.delta, settings.backend
    return ComparisonMatrix(scores, flat, mask=negatives, delta=delta, backend=backend, ascending=True)


class RankingLoss(torch.autograd.Function):
    """Forward and error-driven backward of a ranking loss; saves its inputs, the mask and O(P) numbers.

    Inside, all that belongs to the positives is in ascending order of their scores.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, values: Tensor, negatives: Tensor, positives: Tensor, settings: Settings
    ) -> tuple[Tensor | None, ...]:
        scores, order = logits.reshape(-1).index_select(0, positives).double().sort(stable=True)
        matrix = _matrix(scores, logits, negatives, settings)
        dtype = torch.promote_types(torch.promote_types(logits.dtype, values.dtype), torch.float32)
        terms = settings.formula(
            matrix, values.double().index_select(0, order), order, settings, dtype, ctx.needs_input_grad[0]
        )
        ctx.settings = settings
        kept = values if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(logits, kept, negatives, scores, order, positives.index_select(0, order), *terms[3:])
        ctx.set_materialize_grads(False)
        wants_first, wants_values = ctx.needs_input_grad[:2]
        wants_second = wants_first if terms.of_rank is None else wants_values
        losses = (terms.first, wants_first), (terms.second, wants_second)
        still = [terms.rank, order, *(loss for loss, wanted in losses if not wanted)]
        ctx.mark_non_differentiable(*(tensor for tensor in still if tensor is not None))
        return terms.first, terms.second, terms.rank, order

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        of_first, of_second = grad_outputs[:2]
        logits, values, negatives, scores, order, positives, own, share, own_second, of_rank = ctx.saved_tensors
        settings: Settings = ctx.settings
        grad_logits = grad_values = None
        with torch.no_grad():
            matrix = _matrix(scores, logits, negatives, settings)
            # Each positive has an error, and shares it among the negatives that outrank it.
            of_own = (own, of_first), (own_second, of_second)
            pulls = [pull * g for pull, g in of_own if pull is not None and g is not None]
            if ctx.needs_input_grad[0] and pulls:
                if of_first is None:  # the second loss leaves the negatives alone
                    grad_logits = torch.zeros(logits.numel(), dtype=logits.dtype, device=logits.device)
                else:
                    grad_logits = matrix.rmatvec(share * of_first)
                pull = pulls[0] if len(pulls) == 1 else pulls[0] + pulls[1]
                grad_logits.index_copy_(0, positives, pull.to(logits.dtype))
                grad_logits = grad_logits.reshape(logits.shape)
            if ctx.needs_input_grad[1] and of_rank is not None and of_second is not None:
                grads = matrix.below_rows(of_rank * of_second).to(values.dtype)
                grad_values = torch.empty_like(grads).index_copy_(0, order, grads)
        if torch.is_grad_enabled():  # create_graph=True
            cause = [t for t in (logits, values, of_first, of_second) if t is not None and t.requires_grad]
            grad_logits, grad_values = (
                None if g is None else _NoSecondDerivative.apply(g, *cause) for g in (grad_logits, grad_values)
            )
        return grad_logits, grad_values, None, None, None
