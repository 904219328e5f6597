"""The mask loss of Rank & Sort Loss, mask by mask and in float64, as a person would compute it."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def crop(mask: Array, box: list[float], size: int) -> Array:
    """RoIAlign of one mask, sample by sample, with pixels at whole coordinates as torchvision's models have it."""
    bins = [max(box[2] - box[0], 1) / size, max(box[3] - box[1], 1) / size]
    number = [math.ceil(side) for side in bins]
    out = np.zeros((size, size))
    last = [mask.shape[0] - 1, mask.shape[1] - 1]
    for row in range(size):
        for column in range(size):
            samples = list[float]()
            for j in range(number[1]):
                for i in range(number[0]):
                    y = min(max(box[1] + (row + (j + 0.5) / number[1]) * bins[1], 0), last[0])
                    x = min(max(box[0] + (column + (i + 0.5) / number[0]) * bins[0], 0), last[1])
                    top, left = int(y), int(x)
                    below, right = min(top + 1, last[0]), min(left + 1, last[1])
                    up, on = mask[top, left], mask[top, right]
                    upper = up + (x - left) * (on - up)
                    lower = mask[below, left] + (x - left) * (mask[below, right] - mask[below, left])
                    samples.append(upper + (y - top) * (lower - upper))
            out[row, column] = np.mean(samples)
    return out


def gradient_of_masks(logits: Array, truth: Sequence[Array], weights: Sequence[float], classification: float) -> Array:
    """By the logits ``(P, h, w)``, for a loss that is worth the classification loss, whatever the masks."""
    errors, slopes = list[float](), list[Array]()
    for own, t in zip(logits, truth, strict=True):
        x = 1 / (1 + np.exp(-own))
        overlap, squares = 0.0, 1e-5
        for predicted, of_target in zip(x.ravel(), t.ravel(), strict=True):
            overlap += predicted * of_target
            squares += predicted * predicted + of_target * of_target
        errors.append(1 - 2 * overlap / squares)
        slopes.append((-2 * t / squares + 4 * overlap * x / squares**2) * x * (1 - x))
    mean = sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
    return np.stack(
        [classification / mean * w / sum(weights) * slope for w, slope in zip(weights, slopes, strict=True)]
    )
