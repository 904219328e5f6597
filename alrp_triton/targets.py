"""Who is a positive, a negative or ignored: the two forms of targets, turned into flat indices and a mask."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import INTEGER_DTYPES, check_integer, check_same_device, check_tensor, check_values, describe

IGNORE_INDEX = -1


class TargetForm(NamedTuple):
    """How targets are written: dense (one value for each logit), or a class index for each anchor."""

    num_classes: int | None  # None: dense
    background: int
    ignore_index: int


def check_indices(background: object, ignore_index: object) -> None:
    """Raise TypeError or ValueError unless both are int64 numbers that differ; ``background`` may be None."""
    bounds = torch.iinfo(torch.int64)
    ignored = check_integer("ignore_index", ignore_index, bounds.min, bounds.max)
    if background is not None and check_integer("background", background, bounds.min, bounds.max) == ignored:
        raise ValueError(f"background and ignore_index must differ, both are {background}")


def check_form(logits: Tensor, targets: Tensor, background: int | None, ignore_index: int) -> TargetForm:
    """Tell the form of the targets from their shape; raise TypeError or ValueError if they fit neither form."""
    check_tensor("targets", targets, "target")
    check_same_device(logits=logits, targets=targets)
    check_indices(background, ignore_index)
    if targets.shape == logits.shape:
        if background is not None or ignore_index != IGNORE_INDEX:
            raise ValueError(
                f"background and ignore_index belong to class-index targets; got background={background}, "
                f"ignore_index={ignore_index} with dense targets {tuple(targets.shape)}, which mark 1 positive, "
                "0 negative, -1 ignored"
            )
        return TargetForm(None, 0, IGNORE_INDEX)
    if logits.ndim < 2 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of logits, {tuple(logits.shape)} (dense), or that shape without its last "
            f"dimension (class indices), got {tuple(targets.shape)}"
        )
    if targets.dtype not in INTEGER_DTYPES:
        raise TypeError(f"class-index targets must have an integer dtype, got {describe(targets)}")
    num_classes = logits.shape[-1]
    background = num_classes if background is None else int(background)
    if background == ignore_index:
        raise ValueError(
            f"ignore_index must differ from the number of classes, which is background; both are {background}"
        )
    return TargetForm(num_classes, background, int(ignore_index))


def _flatten(targets: Tensor, form: TargetForm) -> Tensor:
    """Targets as a vector. Class indices are widened: a number of classes would wrap around in a narrow dtype."""
    return targets.reshape(-1) if form.num_classes is None else targets.reshape(-1).long()


def find_positives(targets: Tensor, form: TargetForm, box_errors: Tensor) -> Tensor:
    """Flat indices of the positives in the logits, int64 ``(P,)`` ascending, P being the number of ``box_errors``.

    Raises:
        ValueError: values of targets that mean nothing, or another number of positives than of box errors. On a GPU an
            asynchronous device assertion, for the host does not wait for the device.
    """
    count = box_errors.numel()
    targets = _flatten(targets, form)
    if form.num_classes is None:
        positive = targets == 1
        valid = positive | (targets == 0)
        if targets.dtype.is_signed:  # -1 would wrap around to the largest value of an unsigned dtype
            valid |= targets == IGNORE_INDEX
        meaning = "dense targets must be 1 (positive), 0 (negative) or -1 (ignored)"
    else:
        background = targets == form.background
        ignored = targets == form.ignore_index
        in_range = (targets >= 0) & (targets < form.num_classes)
        positive = in_range & ~background & ~ignored
        valid = in_range | background | ignored
        meaning = (
            f"class-index targets must be a class from 0 to {form.num_classes - 1}, {form.background} (background) or "
            f"{form.ignore_index} (ignored)"
        )

    def bad_values() -> ValueError:
        seen = targets[~valid]
        return ValueError(
            f"{meaning}, got {seen.unique()[:5].tolist()} among {len(seen)} values that are none of these"
        )

    def bad_count() -> ValueError:
        return ValueError(
            f"box_errors must have one value for each positive, in the order of their flat index: "
            f"got {count} box_errors, but targets mark {int(positive.sum())} positives"
        )

    check_values(valid.all(), bad_values, f"alrp_triton: {meaning}")
    check_values(positive.sum() == count, bad_count, f"alrp_triton: targets do not mark {count} positives")
    index = torch.nonzero_static(positive, size=count).reshape(-1)
    if form.num_classes is None:
        return index
    return index * form.num_classes + targets[index]


def negative_mask(targets: Tensor, form: TargetForm, positives: Tensor) -> Tensor:
    """Bool ``(N,)``, True where a logit is a negative."""
    targets = _flatten(targets, form)
    if form.num_classes is None:
        return targets == 0
    counted = targets != form.ignore_index
    mask = counted.unsqueeze(-1).repeat(1, form.num_classes).reshape(-1)
    mask[positives] = False
    return mask
