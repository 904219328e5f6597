"""Losses of a detector's head, box by box and in float64, as a person would compute them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from reference import dense

Box = Sequence[float]


class Positive(NamedTuple):
    """A positive's boxes: corners; deltas in units of the standard deviation; and the greatest score of its anchor."""

    predicted: Box
    true: Box
    deltas: Box
    true_deltas: Box
    score: float


class Head(NamedTuple):
    """What a head said and should have said: scores and marks (1, 0, -1), one an entry, and its positives."""

    logits: NDArray[np.float64]
    marks: NDArray[np.int64]
    positives: list[Positive]


class Losses(NamedTuple):
    """The two losses, the box loss before it is weighted, the gradient of the first, and the plain mean of box errors."""

    classification: float
    box: float
    unweighted: float
    gradient: NDArray[np.float64]
    box_error: float


def iou_and_giou(a: Box, b: Box) -> tuple[float, float]:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union, width * height / union - (hull - union) / hull


def decode(deltas: Box, anchor: Box, weights: Box) -> list[float]:
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas, weights, strict=True))
    x, y = anchor[0] + width * (0.5 + dx), anchor[1] + height * (0.5 + dy)
    w, h = (side * math.exp(min(d, math.log(1000 / 16))) for side, d in ((width, dw), (height, dh)))
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def encode(box: Box, anchor: Box, weights: Box) -> list[float]:
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    dx = ((box[0] + box[2]) - (anchor[0] + anchor[2])) / 2 / width
    dy = ((box[1] + box[3]) - (anchor[1] + anchor[3])) / 2 / height
    sizes = math.log((box[2] - box[0]) / width), math.log((box[3] - box[1]) / height)
    return [delta * weight for delta, weight in zip((dx, dy, *sizes), weights, strict=True)]


def losses(loss: str, head: Head, tau: float) -> Losses:
    """The losses with the balance of the paper, in the first step."""
    overlaps = [iou_and_giou(positive.predicted, positive.true) for positive in head.positives]
    ious, box_losses = [iou for iou, _ in overlaps], [1 - giou for _, giou in overlaps]
    plain = sum(box_losses) / len(box_losses)
    if loss == "alrp":
        out = dense.alrp_loss(head.logits, head.marks, [value / 2 / (1 - tau) for value in box_losses])
        return Losses(out.classification, 50 * out.localisation, out.localisation, out.grad_logits, plain)
    if loss == "ap":
        out = dense.ap_loss(head.logits, head.marks)
        off = np.abs([np.subtract(positive.deltas, positive.true_deltas) for positive in head.positives])
        mean = float(np.where(off < 1, off**2 / 2, off - 0.5).mean())  # over all numbers, as torch's own loss takes it
        return Losses(out.loss, mean, mean, out.grad_logits, mean)
    out = dense.rank_sort_loss(head.logits, head.marks, ious)
    total = out.ranking + out.sorting
    mean = float(np.average(box_losses, weights=[positive.score for positive in head.positives]))
    return Losses(total, total, mean, out.grad_ranking + out.grad_sorting, plain)


def differentiable(
    loss: str,
    logits: Tensor,
    marks: ArrayLike,
    giou_losses: Tensor,
    deltas_off: Tensor,
    ious: ArrayLike,
    scores: Tensor,
    tau: float = 0.5,
) -> tuple[float, NDArray[np.float64], Tensor]:
    """The same with a graph from the box loss to the boxes.

    Args:
        loss: which.
        logits: of all entries.
        marks: 1, 0, -1, of all entries.
        giou_losses: 1 - GIoU of the positives, ``(P,)``.
        deltas_off: predicted deltas less true ones, in units of their standard deviation, ``(P, 4)``.
        ious: of the positives.
        scores: the greatest of each positive's anchor.
        tau: of the localisation error.

    Returns:
        The classification loss, its gradient in the logits, and the box loss with its balance.
    """
    values = logits.detach().numpy()
    if loss == "alrp":
        errors = giou_losses / 2 / (1 - tau)
        of_alrp = dense.alrp_loss(values, marks, errors.detach().numpy())
        box = 50 * (errors * torch.from_numpy(of_alrp.grad_box_errors)).sum()
        return of_alrp.classification, of_alrp.grad_logits, box
    if loss == "ap":
        of_ap = dense.ap_loss(values, marks)
        return of_ap.loss, of_ap.grad_logits, smooth_l1_loss(deltas_off, torch.zeros_like(deltas_off))
    out = dense.rank_sort_loss(values, marks, ious)
    total, box = out.ranking + out.sorting, (giou_losses * scores).sum() / scores.sum()
    return total, out.grad_ranking + out.grad_sorting, box * (total / box.detach())
