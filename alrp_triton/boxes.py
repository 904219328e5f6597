"""From overlaps to localisation errors E. The box arithmetic itself is torchvision's."""

from torch import Tensor

from .checks import check_number, check_tensor

TAU = 0.5


def localisation_error(iou: Tensor, tau: float = TAU) -> Tensor:
    """E = (1 - IoU) / (1 - tau): 0 for a perfect box, 1 for one at the threshold that makes a detection true.

    Args:
        iou: overlaps in [0, 1], any shape, floating. Of an IoU loss, which is 1 - IoU, pass ``1 - loss``.
        tau: IoU threshold of a true positive, in [0, 1); published: 0.5 for detection heads, 0.7 for an RPN.

    Returns:
        Shape and dtype of ``iou``, differentiable.

    Raises:
        TypeError: ``iou`` is no floating tensor, ``tau`` no number.
        ValueError: ``tau`` out of range.

    Reference: Oksuz et al., NeurIPS 2020, Section 2 (LRP) and Equation 9.
    """
    check_tensor("iou", iou, "floating")
    check_number("tau", tau, 0.0, 1.0, high_open=True)
    return (1 - iou) / (1 - tau)


def giou_localisation_error(giou_loss: Tensor, tau: float = TAU) -> Tensor:
    """E = (1 - GIoU) / 2 / (1 - tau), from the loss 1 - GIoU that lies in [0, 2].

    Args:
        giou_loss: ``torchvision.ops.generalized_box_iou_loss(boxes, targets)`` (its default, no reduction), or another
            loss in [0, 2] of its kind, such as ``distance_box_iou_loss``; any shape, floating.
        tau: as in :func:`localisation_error`.

    Returns:
        Shape and dtype of ``giou_loss``, differentiable.

    Raises:
        TypeError: ``giou_loss`` is no floating tensor, ``tau`` no number.
        ValueError: ``tau`` out of range.

    Reference: Oksuz et al., NeurIPS 2020, Section 5 (aLRP with GIoU), and the published implementation.
    """
    check_tensor("giou_loss", giou_loss, "floating")
    check_number("tau", tau, 0.0, 1.0, high_open=True)
    return giou_loss / 2 / (1 - tau)
