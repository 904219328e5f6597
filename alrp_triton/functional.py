"""Ranking losses as functions: check the input, apply the comparison matrix, combine, define the gradient."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import operators
from .checks import check_delta, check_number, check_same_device, check_tensor
from .comparison import ComparisonMatrix
from .operators import Backend, check_backend
from .targets import IGNORE_INDEX, check_form, classify

DELTA = 1.0
EPS = 1e-5


class ALRPLossOutput(NamedTuple):
    """What :func:`alrp_loss` returns. The total loss is ``classification + localisation``, self-balanced or not."""

    classification: Tensor
    """0-d; 1 - mean precision over the positives, in [0, 1]. Differentiable in ``logits``."""
    localisation: Tensor
    """0-d; mean ranked localisation error. Differentiable in ``box_errors``."""
    rank: Tensor
    """``(P,)``; rank of each positive among all logits that count, at least 1. Not differentiable."""
    order: Tensor
    """``(P,)`` int64; ascending, stable argsort of the positives' logits. Not differentiable."""


class _Settings(NamedTuple):
    delta: float
    eps: float
    backend: Backend


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on a gradient; differentiating it raises. ``cause`` ties the gradient to what it was made from."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *cause: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            "alrp_loss has no second derivative: its gradient is the error-driven update of the paper and not the "
            "derivative of a function. Leave the loss out of terms that differentiate gradients (gradient penalties)."
        )


class _ALRPLoss(torch.autograd.Function):
    """Forward and error-driven backward of aLRP Loss; saves its inputs, the mask and O(P) numbers.

    Inside, all that belongs to the positives is in ascending order of their scores.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, box_errors: Tensor, negatives: Tensor, positives: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        delta, eps, backend = settings
        flat = logits.reshape(-1)
        scores, order = flat.index_select(0, positives).double().sort(stable=True)
        errors = box_errors.double().index_select(0, order)
        # Rows: the positives. Columns: the negatives among all logits; then the positives themselves.
        matrix = ComparisonMatrix(scores, flat, mask=negatives, delta=delta, backend=backend, ascending=True)
        dtype = torch.promote_types(torch.promote_types(logits.dtype, box_errors.dtype), torch.float32)
        classification, localisation, rank, update = operators.alrp_terms(
            matrix.matvec(), matrix.among_rows(errors), errors, order, matrix.at_zero, eps, dtype, backend
        )
        ctx.settings = settings
        ctx.save_for_backward(logits, box_errors, negatives, scores, order, positives.index_select(0, order), update)
        ctx.set_materialize_grads(False)
        wanted = zip(ctx.needs_input_grad[:2], (classification, localisation), strict=True)
        ctx.mark_non_differentiable(rank, order, *(loss for needed, loss in wanted if not needed))
        return classification, localisation, rank, order

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_classification, grad_localisation = grad_outputs[:2]
        delta, _, backend = ctx.settings
        logits, box_errors, negatives, scores, order, positives, update = ctx.saved_tensors
        of_positive, of_false_positive, of_rank = update
        grad_logits = grad_errors = None
        with torch.no_grad():
            flat = logits.reshape(-1)
            matrix = ComparisonMatrix(scores, flat, mask=negatives, delta=delta, backend=backend, ascending=True)
            # The update of Theorem 1: each positive has an error, and shares it among the negatives that outrank it.
            if ctx.needs_input_grad[0] and grad_classification is not None:
                grad_logits = matrix.rmatvec(of_false_positive * grad_classification)
                grad_logits.index_copy_(0, positives, (of_positive * grad_classification).to(logits.dtype))
                grad_logits = grad_logits.reshape(logits.shape)
            if ctx.needs_input_grad[1] and grad_localisation is not None:
                grads = matrix.below_rows(of_rank * grad_localisation).to(box_errors.dtype)
                grad_errors = torch.empty_like(grads).index_copy_(0, order, grads)
        if torch.is_grad_enabled():  # create_graph=True
            cause = [t for t in (logits, box_errors, *grad_outputs[:2]) if t is not None and t.requires_grad]
            grad_logits, grad_errors = (
                None if g is None else _NoSecondDerivative.apply(g, *cause) for g in (grad_logits, grad_errors)
            )
        return grad_logits, grad_errors, None, None, None


def alrp_loss(
    logits: Tensor,
    targets: Tensor,
    box_errors: Tensor,
    *,
    delta: float = DELTA,
    eps: float = EPS,
    background: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    backend: Backend = "auto",
) -> ALRPLossOutput:
    r"""Average Localisation-Recall-Precision Loss over all anchors and classes of a batch.

    With the step h of half-width delta, H_ij = h(s_j - s_i), for each positive i, over negatives j and positives k::

        FP_i   = sum_j H_ij
        rank_i = 1 + sum_{k != i} H_ik + FP_i
        classification = mean_i FP_i / rank_i
        localisation   = mean_i (1 / rank_i) sum_{k: s_k >= s_i} E_k

    The gradient with respect to the logits is **the error-driven update** of the paper (Theorem 1), scaled by the
    incoming gradient; it is not the derivative of the value above, whose step has none worth using. It contains the
    localisation errors too: a positive is pushed up by (FP_i + sum_{k != i} H_ik E_k) / rank_i, and the negatives that
    outrank it are pushed down by as much in total (Theorem 2). It flows through ``classification``; the gradient with
    respect to ``box_errors`` flows through ``localisation``, the ranks being held constant.

    Args:
        logits: pre-sigmoid scores, N elements in any shape, contiguous or not; float16, bfloat16, float32 or float64
            (there, up to 1e300 in magnitude: beyond, sums overflow and the result is NaN).
        targets: on the device of the logits, in one of two forms.
            Dense: the shape of ``logits``, any integer, bool or floating dtype; 1 positive, 0 negative, -1 ignored.
            Class indices: ``logits.shape[:-1]`` for C = ``logits.shape[-1]`` classes, any integer dtype; the class of
            an anchor, in [0, C), makes that logit positive and the anchor's other logits negative; ``background`` makes
            all of them negative; ``ignore_index`` leaves all of them out.
        box_errors: localisation errors E of the positives, ``(P,)``, in the order of their flat index in ``logits``,
            floating; (1 - IoU) / (1 - tau), see :func:`alrp_triton.localisation_error`. May require no gradient.
        delta: half-width of the step, the loss' one hyperparameter; 0 (a hard step) or in [2**-126, 2**125].
        eps: a positive with FP_i <= eps is at its place already and causes no gradient.
        background: the class index that stands for background; default C.
        ignore_index: the class index that stands for an ignored anchor.
        backend: ``"auto"``: on a GPU ``"triton"`` where triton is installed, on a CPU ``"numba"`` where numba is
            installed, else ``"torch"``. ``"triton"``: ``"triton_tiled"`` or ``"triton_binned"``, whichever the model of
            :mod:`alrp_triton.cost` expects to be faster for P and N. ``"torch"`` runs on any device.

    Returns:
        ALRPLossOutput: ``classification`` and ``localisation`` (0-d), ``rank`` ``(P,)``, all in the widest dtype of
        logits, box_errors and float32; ``order`` ``(P,)`` int64.

    Defined behaviour:
        * No positives: both losses are 0 whatever the logits, each connected to the graph if its input requires a
          gradient; all gradients are 0.
        * No negatives, everything ignored, N = 0: as the formulas say, no NaN from finite input.
        * Ties: equal scores see each other with h(0), 1/2 for delta > 0 and 1 for delta = 0; in ``localisation`` equal
          positives count for each other both ways; ``order`` is stable. Values and gradients do not depend on the order
          of the input, but for rounding.
        * NaN in a positive's or negative's logit, +-inf in a positive's logit: both losses and the gradients of all
          logits that count are NaN. NaN or +-inf in a box error: ``localisation`` is NaN, and so is every update that
          contains it: those of positives with FP_i > eps and, if there is one, of the negatives. -inf and +inf
          negatives behave as the step says. Ignored logits are not looked at, and get gradient 0.
        * Second derivatives raise RuntimeError.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; values of targets that mean nothing; another number of box errors
            than of positives; delta or eps out of range; a backend that cannot run here. On a GPU the two checks that
            need the values of ``targets`` are asynchronous device assertions: the host never waits for the device.

    Reference:
        Oksuz, Cam, Akbas, Kalkan: "A Ranking-based, Balanced Loss Function Unifying Classification and Localisation in
        Object Detection", NeurIPS 2020, arXiv:2009.13592; Section 4, Theorems 1 and 2.
    """
    check_tensor("logits", logits, "floating")
    check_tensor("box_errors", box_errors, "floating")
    if box_errors.ndim != 1:
        raise ValueError(f"box_errors must have shape (P,), one value for each positive, got {tuple(box_errors.shape)}")
    check_same_device(logits=logits, box_errors=box_errors)
    delta, eps = check_delta(delta), check_number("eps", eps, 0.0, math.inf)
    check_backend(backend, logits.device)
    form = check_form(logits, targets, background, ignore_index)
    negatives, positives = classify(targets, form, box_errors, backend)
    settings = _Settings(delta, eps, backend)
    return ALRPLossOutput(*_ALRPLoss.apply(logits, box_errors, negatives, positives, settings))
