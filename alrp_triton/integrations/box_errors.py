"""The boxes of a head's positives, and what is wrong with each of them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from ..checks import check_tensor
from ..distributed import ProcessGroup, propagates_errors

try:
    from torchvision.ops import generalized_box_iou_loss
except ImportError as missing:
    raise ImportError("the integrations need torchvision, in the version that fits your torch") from missing

BoxLoss = Literal["giou", "smooth_l1"]

STANDARD = (10.0, 10.0, 5.0, 5.0)  # 1 / standard deviation of the four deltas, as the published heads have them
# The IoU loss adds 1e-7 to areas: nothing for pixels, but much for a small object in units of the image.
_UNIT = 1024.0  # a power of 2, so that pixels give the same bits with it and without


class Boxes(NamedTuple):
    """The boxes of a head's positives, in the order of their flat index in the logits; ``(P, 4)`` each.

    ``predicted`` and ``target``: corners x1, y1, x2, y2, in pixels or in any other unit that both share, for overlaps
    do not depend on it. ``deltas`` and ``target_deltas``: the same in the encoding of the head, in units of their
    standard deviation; needed for the box loss ``"smooth_l1"`` alone.
    """

    predicted: Tensor
    target: Tensor
    deltas: Tensor | None = None
    target_deltas: Tensor | None = None


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision made float32: it would round the corners of boxes to whole pixels, and worse."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def in_deviations(deltas: Tensor, weights: Sequence[float]) -> Tensor:
    """Deltas in units of their standard deviation, from those of a coder that multiplies by ``weights``."""
    return deltas * (deltas.new_tensor(STANDARD) / deltas.new_tensor(weights))


@propagates_errors
def checked(boxes: Boxes, box_loss: BoxLoss, *, process_group: ProcessGroup | None) -> Boxes:
    """The boxes in one dtype, float32 at least."""
    dtype, shape = torch.float32, boxes.predicted.shape
    for name, value in zip(Boxes._fields, boxes, strict=True):
        if value is not None:
            check_tensor(name, value, "floating")
            if value.ndim != 2 or value.shape[1] != 4 or value.shape != shape:
                raise ValueError(f"{name} must have shape (P, 4) for P positives, got {tuple(value.shape)}")
            dtype = torch.promote_types(dtype, value.dtype)
    if box_loss == "smooth_l1" and (boxes.deltas is None or boxes.target_deltas is None):
        raise ValueError("box_loss 'smooth_l1' needs deltas and target_deltas of the positives, got None")
    predicted, target, *deltas = (None if value is None else value.to(dtype) for value in boxes)
    return Boxes(cast("Tensor", predicted), cast("Tensor", target), *deltas)


def box_errors(boxes: Boxes, box_loss: BoxLoss, beta: float) -> Tensor:
    """The box loss of each positive, ``(P,)``; smooth L1 is the mean over its four deltas, as published."""
    if box_loss == "giou":
        return generalized_box_iou_loss(boxes.predicted * _UNIT, boxes.target.detach() * _UNIT)
    assert boxes.deltas is not None
    assert boxes.target_deltas is not None
    off = smooth_l1_loss(boxes.deltas, boxes.target_deltas.detach(), beta=beta, reduction="none")
    return off.mean(-1)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each box with the one in the same place of the other list, ``(P,)``; of two empty boxes 0."""
    low, high = torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    areas = [(each[:, 2:] - each[:, :2]).clamp(min=0).prod(-1) for each in (boxes, others)]
    union = areas[0] + areas[1] - intersection
    return (intersection / torch.where(union > 0, union, 1.0)).clamp(0, 1)
