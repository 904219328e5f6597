"""What the package is measured against: aLRP Loss computed the way it was published, a Python loop over positives."""

from typing import Any

import torch
from torch import Tensor


def _step(difference: Tensor, delta: float) -> Tensor:
    return torch.clamp(difference / (2 * delta) + 0.5, min=0, max=1)


class _LoopOverPositives(torch.autograd.Function):
    """Classification part; the gradient is formed in the forward pass and stored, N numbers, as published."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, box_errors: Tensor, delta: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        is_positive = targets == 1
        scores = logits[is_positive]
        # A negative more than delta below the least positive compares as 0 with all of them.
        is_rival = (targets == 0) & (logits >= scores.min() - delta)
        rivals = logits[is_rival]
        rank, precision, score_update = (torch.zeros_like(scores) for _ in range(3))
        rival_update = torch.zeros_like(rivals)
        order = scores.argsort()
        for i in order:
            among_positives = _step(scores - scores[i], delta)
            among_positives[i] = 0
            among_rivals = _step(rivals - scores[i], delta)
            rank_among_positives = 1 + among_positives.sum()
            false_positives = among_rivals.sum()
            rank[i] = rank_among_positives + false_positives
            precision[i] = rank_among_positives / rank[i]
            if false_positives > eps:  # on a GPU the host waits here, once a positive, as in the published code
                error = (false_positives + (among_positives * box_errors).sum()) / rank[i]
                score_update[i] = -error
                rival_update += among_rivals * (error / false_positives)
        gradient = torch.zeros_like(logits)
        gradient[is_positive] = score_update
        gradient[is_rival] = rival_update
        gradient /= len(scores)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(rank, order)
        return 1 - precision.mean(), rank, order

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None, None, None


def published_loop(
    logits: Tensor, targets: Tensor, box_errors: Tensor, *, delta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """The aLRP Loss as published: O(N) vector work for each positive, O(P N) in all.

    Args:
        logits: scores ``(N,)``, floating.
        targets: ``(N,)``, integer; 1 positive, 0 negative, -1 ignored. At least one positive.
        box_errors: localisation errors ``(P,)`` in the order of the positives' index.
        delta: half-width of the step, greater than 0.
        eps: a positive with no more false positives than this causes no gradient.

    Returns:
        The classification and the localisation loss, 0-d. Equal scores of positives are left to an unstable sort.

    Reference: Oksuz et al., NeurIPS 2020, Theorem 1, and the structure of the authors' implementation.
    """
    classification, rank, order = _LoopOverPositives.apply(logits, targets, box_errors.detach(), delta, eps)
    from_best = order.flip(0)
    return classification, (box_errors[from_best].cumsum(0) / rank[from_best]).mean()
