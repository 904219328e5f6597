"""What a loss makes of its positives' sums, in one launch: the formulas of :mod:`alrp_triton.formulas`, compiled."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

from types import FunctionType

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import formulas

BLOCK = 1024
WARPS = 4

# Triton's interpreter wants to see the language among what a function sees.
_alrp = triton.jit(FunctionType(formulas.alrp.__code__, vars(formulas) | {"tl": tl}))


@triton.jit
def _where(condition, this, that):
    return tl.where(condition, this, that)


@triton.jit(do_not_specialize=["P"])
def alrp_kernel(
    false_positives_ptr, among_ptr, box_errors_ptr, order_ptr, classification_ptr, localisation_ptr, rank_ptr,
    update_ptr, P, at_zero: tl.float64, eps: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the sums over the positives come in one order only."""
    dtype = rank_ptr.dtype.element_ty
    classification = tl.zeros([BLOCK], tl.float64)
    localisation = tl.zeros([BLOCK], tl.float64)
    count = tl.maximum(P, 1).to(tl.float64)
    for begin in range(0, P, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < P
        rank, precision_error, box, error, share = _alrp(
            tl.load(false_positives_ptr + index, mask=inside, other=0.0),
            tl.load(among_ptr + index, mask=inside, other=1.0),
            tl.load(among_ptr + P + index, mask=inside, other=0.0),
            tl.load(among_ptr + 2 * P + index, mask=inside, other=0.0),
            tl.load(box_errors_ptr + index, mask=inside, other=0.0),
            at_zero, eps, _where,
        )  # fmt: skip
        classification += precision_error  # 0 outside
        localisation += box
        tl.store(rank_ptr + tl.load(order_ptr + index, mask=inside, other=0), rank.to(dtype), mask=inside)
        tl.store(update_ptr + index, -error / count, mask=inside)
        tl.store(update_ptr + P + index, share / count, mask=inside)
        tl.store(update_ptr + 2 * P + index, 1 / rank / count, mask=inside)
    tl.store(classification_ptr, (tl.sum(classification, axis=0) / count).to(dtype))
    tl.store(localisation_ptr, (tl.sum(localisation, axis=0) / count).to(dtype))


def alrp_terms(
    false_positives: Tensor,
    among: Tensor,
    box_errors: Tensor,
    order: Tensor,
    at_zero: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, ranks and what the gradients are made of; contract in :mod:`alrp_triton.operators`."""
    classification, localisation, rank = (
        false_positives.new_empty(shape, dtype=dtype) for shape in ((), (), false_positives.shape)
    )
    update = torch.empty_like(among)
    with torch.cuda.device_of(false_positives):
        alrp_kernel[(1,)](
            false_positives, among, box_errors, order, classification, localisation, rank, update, rank.numel(),
            at_zero, eps, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return classification, localisation, rank, update
