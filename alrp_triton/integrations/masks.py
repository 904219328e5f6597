"""The mask loss of Rank & Sort Loss, and which masks it is computed on. Knows masks, no framework."""

import torch
from torch import Tensor

from ..checks import check_tensor, check_values

__all__ = ["dice_error"]

MAX_MASKS = 200
"""Masks that a process trains in a step, as published."""
_EPS = 1e-5  # published
_ROUNDING = 1e-3  # what resampling may add to 1


def dice_error(mask_logits: Tensor, targets: Tensor) -> Tensor:
    """How far predicted masks are from true ones: 1 - dice, of each by itself.

    With the sigmoids x of the logits and the targets t, summed over the pixels of a mask::

        error = 1 - 2 sum(x t) / (sum(x^2) + sum(t^2) + 1e-5)

    Squares make it least where x is t, for targets between 0 and 1, too. Computed in float32 at least.

    Args:
        mask_logits: ``(P, h, w)``, floating, pre-sigmoid.
        targets: ``(P, h, w)``, any real dtype, from 0 to 1. No gradient goes to them.

    Returns:
        ``(P,)``, from 0 to 1, float32 or float64; differentiable in ``mask_logits``.

    Raises:
        TypeError: an argument is no dense tensor of such a dtype.
        ValueError: shapes that differ or have not three dimensions; targets outside of 0..1 (on a GPU an asynchronous
            device assertion).

    Reference: Milletari, Navab, Ahmadi, "V-Net", 3DV 2016, with squares; Oksuz et al., "Rank & Sort Loss for Object
    Detection and Instance Segmentation", ICCV 2021, and its published implementation, which adds the 1e-5.
    """
    check_tensor("mask_logits", mask_logits, "floating")
    check_tensor("targets", targets, "target")
    if mask_logits.ndim != 3 or targets.shape != mask_logits.shape:
        shapes = f"{tuple(mask_logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"mask_logits and targets must both have shape (P, h, w), got {shapes}")
    dtype = torch.promote_types(mask_logits.dtype, torch.float32)
    predicted, true = mask_logits.to(dtype).sigmoid(), targets.detach().to(dtype)
    outside = (true < 0) | (true > 1 + _ROUNDING)  # NaN is let through, and shows in the loss

    def error() -> ValueError:
        seen = true[outside].unique()[:5].tolist()
        return ValueError(f"targets of masks must be in 0..1, got {seen}; masks of 0 and 255 have to be divided by 255")

    check_values(~outside.any(), error, "targets of masks must be in 0..1")
    overlap, squares = (predicted * true).sum((1, 2)), (predicted.square() + true.square()).sum((1, 2))
    return 1 - 2 * overlap / (squares + _EPS)


def draw_masks(positive: Tensor) -> Tensor:
    """Which positives train the mask branch, ``(N,)`` bool like ``positive``: all, or 200 of them at random.

    They are drawn before the branch runs, so that what it costs has a bound.
    """
    indices = positive.nonzero()[:, 0]
    if len(indices) <= MAX_MASKS:
        return positive
    drawn = torch.zeros_like(positive)
    drawn[indices[torch.randperm(len(indices), device=indices.device)[:MAX_MASKS]]] = True
    return drawn
