"""What the package is measured against: aLRP Loss as published, as a dense matrix, and bucketed.

All three share the frame of the published code: the gradient is made in the forward pass, and stored. They differ in
how the positives are compared with their rivals, the negatives that are not below all of them by more than delta.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Comparison(NamedTuple):
    """What comes of comparing every positive with every rival and every other positive."""

    false_positives: Tensor  # (P,)
    rank: Tensor  # (P,)
    pull: Tensor  # (P,) the error of each positive
    push: Tensor  # (rivals,) the errors that each rival is charged with


class _StoredGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None


def _step(difference: Tensor, delta: float) -> Tensor:
    if delta == 0:
        return (difference >= 0).to(difference.dtype)
    return torch.clamp(difference / (2 * delta) + 0.5, min=0, max=1)


def _compare_in_a_loop(scores: Tensor, rivals: Tensor, box_errors: Tensor, delta: float, eps: float) -> _Comparison:
    false_positives, rank, pull = (torch.zeros_like(scores) for _ in range(3))
    push = torch.zeros_like(rivals)
    for i in scores.argsort():
        among_positives = _step(scores - scores[i], delta)
        among_positives[i] = 0
        among_rivals = _step(rivals - scores[i], delta)
        false_positives[i] = among_rivals.sum()
        rank[i] = 1 + among_positives.sum() + false_positives[i]
        if false_positives[i] > eps:  # on a GPU the host waits here, once a positive, as in the published code
            pull[i] = (false_positives[i] + (among_positives * box_errors).sum()) / rank[i]
            push += among_rivals * (pull[i] / false_positives[i])
    return _Comparison(false_positives, rank, pull, push)


def _compare_matrices(
    scores: Tensor, of_rivals: Tensor, box_errors: Tensor, delta: float, eps: float
) -> tuple[_Comparison, Tensor]:
    """All but the push, and each positive's error by false positive, from a (P, ·) matrix for the rivals."""
    of_positives = _step(scores - scores[:, None], delta).fill_diagonal_(0)
    false_positives = of_rivals.sum(1)
    rank = 1 + of_positives.sum(1) + false_positives
    counts = false_positives > eps
    pull = torch.where(counts, (false_positives + of_positives @ box_errors) / rank, 0)
    share = torch.where(counts, pull / false_positives, 0)
    return _Comparison(false_positives, rank, pull, pull.new_empty(0)), share


def _compare_densely(scores: Tensor, rivals: Tensor, box_errors: Tensor, delta: float, eps: float) -> _Comparison:
    matrix = _step(rivals - scores[:, None], delta)
    result, share = _compare_matrices(scores, matrix, box_errors, delta, eps)
    return result._replace(push=share @ matrix)


def _compare_buckets(scores: Tensor, rivals: Tensor, box_errors: Tensor, delta: float, eps: float) -> _Comparison:
    """Sort everything; rivals that no positive separates are a bucket, and compared as their mean."""
    place = torch.cat([scores, rivals]).sort(stable=True).indices
    is_positive = place < len(scores)
    bucket = is_positive.cumsum(0)[~is_positive]  # of the rivals, in ascending order
    member = place[~is_positive] - len(scores)
    size = torch.bincount(bucket, minlength=len(scores) + 1).to(scores.dtype)
    mean = torch.zeros_like(size).scatter_add_(0, bucket, rivals[member]) / size.clamp(min=1)
    matrix = _step(mean - scores[:, None], delta)
    result, share = _compare_matrices(scores, matrix * size, box_errors, delta, eps)
    return result._replace(push=torch.empty_like(rivals).index_copy_(0, member, (share @ matrix)[bucket]))


_COMPARE = {"loop": _compare_in_a_loop, "dense": _compare_densely, "bucketed": _compare_buckets}


def alrp_loss(
    logits: Tensor, targets: Tensor, box_errors: Tensor, *, how: str, delta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """ALRP Loss by one of three known ways; exact in the first two, and in the third at ``delta = 0``.

    Args:
        logits: scores ``(N,)``, floating.
        targets: ``(N,)``, integer; 1 positive, 0 negative, -1 ignored. At least one positive.
        box_errors: localisation errors ``(P,)`` in the order of the positives' index.
        how: ``"loop"``, O(N) vector work for each positive, as published; ``"dense"``, one P x N matrix;
            ``"bucketed"``, a sort and a P x P matrix.
        delta: half-width of the step.
        eps: a positive with no more false positives than this causes no gradient.

    Returns:
        The classification and the localisation loss, 0-d. Equal scores of positives are left to an unstable sort.

    Reference: Oksuz et al., NeurIPS 2020, Theorem 1, and the structure of the authors' implementation; buckets: Yavuz
    et al., "Bucketed Ranking-based Losses for Efficient Training of Object Detectors", ECCV 2024, Section 4.
    """
    with torch.no_grad():
        is_positive = targets == 1
        scores = logits[is_positive]
        is_rival = (targets == 0) & (logits >= scores.min() - delta)
        result = _COMPARE[how](scores, logits[is_rival], box_errors, delta, eps)
        gradient = torch.zeros_like(logits)
        gradient[is_positive] = -result.pull
        gradient[is_rival] = result.push
        gradient /= len(scores)
        classification = (result.false_positives / result.rank).mean()
    from_best = scores.argsort(descending=True)
    localisation = (box_errors[from_best].cumsum(0) / result.rank[from_best]).mean()
    return _StoredGradient.apply(logits, gradient, classification), localisation
