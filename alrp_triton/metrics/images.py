"""What users of torchmetrics pass for an image: checked, and in COCO's form."""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from ..checks import FLOAT_DTYPES, INTEGER_DTYPES, check_values, describe

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
Image = Mapping[str, Tensor]

BOX_FORMATS = ("xyxy", "xywh", "cxcywh")
_OPTIONAL = ("iscrowd", "area")  # zeros where not given: no crowd, and the area of the box
_DTYPES = {
    "boxes": ("floating", FLOAT_DTYPES),
    "scores": ("floating", FLOAT_DTYPES),
    "labels": ("integer", INTEGER_DTYPES),
    "iscrowd": ("integer or bool", (torch.bool, *INTEGER_DTYPES)),
    "area": ("floating or integer", (*FLOAT_DTYPES, *INTEGER_DTYPES)),
}


def state_dtype(key: str, device: torch.device) -> torch.dtype:
    """The dtype in which an entry is kept: one for all processes, those without an image included."""
    if key in ("labels", "iscrowd"):
        return torch.int64
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's MPS has no float64


def read_entry(name: str, image: object, key: str, box_format: BoxFormat, device: torch.device) -> Tensor:
    """The entry ``key`` of an image as it is kept, (N, 4) for boxes and (N,) for the others; ValueError or TypeError.

    Values are checked without making a GPU wait: there they are asserted on the device.
    """
    if not isinstance(image, Mapping):
        raise TypeError(f"{name} must be a dict of tensors, got {type(image).__name__}")
    entries = cast("Image", image)
    for needed in ("boxes", key):
        if needed not in entries and needed not in _OPTIONAL:
            raise ValueError(f"{name} must have the key {needed!r}, got {', '.join(map(str, entries)) or 'no key'}")
    boxes = _as_tensor(f"{name}['boxes']", entries["boxes"])
    if boxes.shape != (0,) and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise ValueError(f"{name}['boxes'] must have shape (N, 4), got {describe(boxes)}")
    count, dtype = len(boxes), state_dtype(key, device)
    shape = (count, 4) if key == "boxes" else (count,)
    if key not in entries:
        return torch.zeros(shape, dtype=dtype, device=device)
    title = f"{name}[{key!r}]"
    value = _as_tensor(title, entries[key])
    if count == 0 and value.shape == (0,):
        return torch.zeros(shape, dtype=dtype, device=device)
    if value.shape != shape:
        raise ValueError(f"{title} must have shape {shape}, one for each of {count} boxes, got {describe(value)}")
    kind, allowed = _DTYPES[key]
    if count and value.dtype not in allowed:
        raise TypeError(f"{title} must be {kind}, got {describe(value)}")
    if value.dtype == torch.uint64:
        _check(title, "be below 2**63", value, value.view(torch.int64) >= 0)
    value = value.detach().to(device, dtype, copy=True)  # the caller may go on to write into it
    if value.is_floating_point():
        _check(title, "be finite", value, value.isfinite())
    if key == "iscrowd":
        _check(title, "be 0 or 1", value, (value == 0) | (value == 1))
    if key == "boxes":
        has_size = (to_xywh(value, box_format)[:, 2:] >= 0).all(1)
        _check(title, f"be {box_format} and of no negative size", value, has_size)
    return value


def to_xywh(boxes: Tensor, box_format: BoxFormat) -> Tensor:
    """Boxes (N, 4) as COCO has them: least corner, width, height."""
    first, second = boxes.split(2, dim=1)
    if box_format == "xyxy":
        return torch.cat([first, second - first], dim=1)
    return boxes if box_format == "xywh" else torch.cat([first - second / 2, second], dim=1)


def annotations(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    areas: Sequence[Tensor] | None,
    key: str,
    values: Sequence[Tensor],
) -> list[dict[str, object]]:
    """COCO's list of boxes, with ids from 1.

    Args:
        boxes: for each image (N, 4), least corner, width, height.
        labels: for each image (N,).
        areas: for each image (N,), or None; where it is not positive it is that of the box.
        key: what else a box has.
        values: its values for each image (N,).
    """
    out: list[dict[str, object]] = []
    for image, box in enumerate(boxes):
        area = box[:, 2] * box[:, 3]
        if areas is not None:
            area = torch.where(areas[image] > 0, areas[image].to(area), area)
        columns = (box.tolist(), area.tolist(), labels[image].long().tolist(), values[image].tolist())
        for corner_and_size, size, label, value in zip(*columns, strict=True):
            known = {"id": len(out) + 1, "image_id": image, "category_id": label}
            out.append({**known, "bbox": corner_and_size, "area": size, key: value})
    return out


def _as_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def _check(name: str, what: str, value: Tensor, good: Tensor) -> None:
    def error() -> ValueError:
        first = int((~good).flatten().int().argmax())  # older versions of torch cannot index uint64 by a mask
        seen = value.reshape(good.numel(), *value.shape[good.ndim :])[first]
        return ValueError(f"{name} must {what}, got {seen.tolist()}")

    check_values(good.all(), error, f"{name} must {what}")
