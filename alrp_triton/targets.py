"""The forms of targets, which say who is a positive, a negative or ignored."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import operators
from .checks import INTEGER_DTYPES, check_integer, check_same_device, check_tensor, describe
from .dispatch import Backend

IGNORE_INDEX = -1


class TargetForm(NamedTuple):
    """How targets are written: dense (one value for each logit), or a class index for each anchor."""

    num_classes: int | None  # None: dense
    background: int
    ignore_index: int
    graded: bool  # dense, and positives are marked by their IoU


def check_indices(background: object, ignore_index: object) -> None:
    """Raise TypeError or ValueError unless both are int64 numbers that differ; ``background`` may be None."""
    bounds = torch.iinfo(torch.int64)
    ignored = check_integer("ignore_index", ignore_index, bounds.min, bounds.max)
    if background is not None and check_integer("background", background, bounds.min, bounds.max) == ignored:
        raise ValueError(f"background and ignore_index must differ, both are {background}")


def check_form(
    logits: Tensor, targets: Tensor, background: int | None, ignore_index: int, *, graded: bool = False
) -> TargetForm:
    """Tell the form of the targets from their shape; raise TypeError or ValueError if they fit neither form.

    ``graded``: there are no other IoUs, so dense targets have to hold them.
    """
    check_tensor("targets", targets, "target")
    check_same_device(logits=logits, targets=targets)
    check_indices(background, ignore_index)
    if graded and targets.shape == logits.shape and not targets.is_floating_point():
        raise TypeError(
            f"targets without ious hold the IoUs of the positives and must be floating, got {describe(targets)}"
        )
    if targets.shape == logits.shape:
        if background is not None or ignore_index != IGNORE_INDEX:
            raise ValueError(
                f"background and ignore_index belong to class-index targets; got background={background}, "
                f"ignore_index={ignore_index} with dense targets {tuple(targets.shape)}, which mark 1 positive, "
                "0 negative, -1 ignored"
            )
        return TargetForm(None, 0, IGNORE_INDEX, graded)
    if graded:
        raise ValueError(
            f"targets without ious must have the shape of logits, {tuple(logits.shape)}, and hold the IoUs of the "
            f"positives, got {tuple(targets.shape)}"
        )
    if logits.ndim < 2 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of logits, {tuple(logits.shape)} (dense), or that shape without its last "
            f"dimension (class indices; classes come last: permute (B, C, H, W) to (B, H, W, C)), got "
            f"{tuple(targets.shape)}"
        )
    if targets.dtype not in INTEGER_DTYPES:
        raise TypeError(f"class-index targets must have an integer dtype, got {describe(targets)}")
    num_classes = logits.shape[-1]
    background = num_classes if background is None else int(background)
    if background == ignore_index:
        raise ValueError(
            f"ignore_index must differ from the number of classes, which is background; both are {background}"
        )
    return TargetForm(num_classes, background, int(ignore_index), False)


def positives_of(
    logits: Tensor, targets: Tensor, form: TargetForm, count: int, count_argument: str, backend: Backend
) -> Tensor:
    """Flat indices of the positives in the logits, int64 ``(P,)``, ascending.

    Args:
        logits: any shape.
        targets: as :func:`check_form` found them.
        form: what it told.
        count: P, as the caller knows it.
        count_argument: the argument from which the caller knows it, for the error.
        backend: which one reads the targets.

    Raises:
        ValueError: values of targets that mean nothing, or another number of positives than ``count``. On a GPU an
            asynchronous device assertion, for the host does not wait for the device.
    """
    flat = logits.detach().reshape(-1)
    return operators.find(flat, targets.detach(), None, None, *form, False, count, count_argument, "", backend)[0]


def check_groups(logits: Tensor, groups: Tensor | None) -> None:
    """Raise TypeError or ValueError unless groups are None, or integers in a shape that the logits' begins with."""
    if groups is None:
        return
    check_tensor("groups", groups, "target")
    if groups.dtype not in INTEGER_DTYPES:
        raise TypeError(f"groups must have an integer dtype, got {describe(groups)}")
    check_same_device(logits=logits, groups=groups)
    if groups.shape != logits.shape[: groups.ndim]:
        raise ValueError(
            f"groups must have a shape that the shape of logits, {tuple(logits.shape)}, begins with, such as "
            f"{tuple(logits.shape[:1])}; got {tuple(groups.shape)}"
        )
