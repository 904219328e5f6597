"""The gradients of the positives, times the incoming ones: beside what a kernel of ``spread`` does for negatives."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _store(array_ptr, index, x, inside):
    """A float64 in the dtype of the array; to half precision by way of float32, as torch does it."""
    dtype: tl.constexpr = array_ptr.dtype.element_ty
    if dtype != tl.float64:
        x = x.to(tl.float32)
    tl.store(array_ptr + index, x.to(dtype), mask=inside)


@triton.jit
def scale_positives(
    grad_positives_ptr, ranking_scale_ptr, auxiliary_scale_ptr, values_scale_ptr, grad_scores_ptr, grad_values_ptr,
    positives, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores and of the values of the positives, in the dtypes of the arrays that they go to."""
    if grad_positives_ptr is not None:
        for begin in range(0, positives, BLOCK):
            index = begin + tl.arange(0, BLOCK)
            inside = index < positives
            grad = tl.zeros([BLOCK], tl.float64)
            if ranking_scale_ptr is not None:
                of_ranking = tl.load(grad_positives_ptr + index, mask=inside, other=0.0)
                grad += of_ranking * tl.load(ranking_scale_ptr).to(tl.float64)
            if auxiliary_scale_ptr is not None:
                of_auxiliary = tl.load(grad_positives_ptr + positives + index, mask=inside, other=0.0)
                grad += of_auxiliary * tl.load(auxiliary_scale_ptr).to(tl.float64)
            _store(grad_scores_ptr, index, grad, inside)
            if values_scale_ptr is not None:
                grad = tl.load(grad_positives_ptr + 2 * positives + index, mask=inside, other=0.0)
                _store(grad_values_ptr, index, grad * tl.load(values_scale_ptr).to(tl.float64), inside)


class PositiveGradients(NamedTuple):
    """What :func:`scale_positives` reads and writes."""

    grad_positives: Tensor | None = None
    ranking_scale: Tensor | None = None
    auxiliary_scale: Tensor | None = None
    values_scale: Tensor | None = None
    grad_scores: Tensor | None = None
    grad_values: Tensor | None = None

    @property
    def positives(self) -> int:
        """How many."""
        return 0 if self.grad_scores is None else self.grad_scores.numel()


def gradients_of(
    grad_positives: Tensor,
    ranking_scale: Tensor | None,
    auxiliary_scale: Tensor | None,
    values_scale: Tensor | None,
    dtype: torch.dtype,
    logits: Tensor,
) -> PositiveGradients:
    """Those of arguments of ``spread`` (:mod:`alrp_triton.operators`), with room for what becomes of them."""
    p = grad_positives.shape[1]
    grad_values = grad_positives.new_empty(0 if values_scale is None else p, dtype=dtype)
    return PositiveGradients(
        grad_positives, ranking_scale, auxiliary_scale, values_scale, logits.new_empty(p), grad_values
    )
