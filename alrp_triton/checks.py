"""What may be passed in: checks that name the argument and what was seen, made before any work is done."""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral, Real
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from .formulas import MAX_GRADE

_P = ParamSpec("_P")
_R = TypeVar("_R")

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
TARGET_DTYPES = (torch.bool, *INTEGER_DTYPES, *FLOAT_DTYPES)

_FROM_ONE = (
    "; labels from 1 to {0}, with 0 for background, are torch.where(labels > 0, labels - 1, torch.where(labels == 0, "
    "{0}, labels)) here, without background="
)

# Between these, delta and 1/(2 delta) are normal float32 numbers.
_DELTA_MIN, _DELTA_MAX = 2.0**-126, 2.0**125


def describe(tensor: Tensor) -> str:
    """A tensor's dtype, shape and device, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"


def check_tensor(name: str, value: object, kind: Literal["floating", "bool", "integer", "target"]) -> None:
    """Raise TypeError unless ``value`` is a dense tensor whose dtype is of the kind asked for."""
    if isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
        raise TypeError(
            f"{name} must be one torch.Tensor, of all levels and images, which are one ranking; got a "
            f"{type(value).__name__} of {len(value)}: concatenate them, as by torch.cat(levels, 1) for (B, A, C)"
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        kind_seen = "a nested tensor" if value.is_nested else f"layout {value.layout}, dtype {value.dtype}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind_seen}")
    if kind == "target" and value.dtype not in TARGET_DTYPES:
        raise TypeError(f"{name} must be integer, bool, float16, bfloat16, float32 or float64, got {describe(value)}")
    if kind == "floating" and value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {describe(value)}")
    if kind == "integer" and value.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must be integer, got {describe(value)}")
    if kind == "bool" and value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {describe(value)}")


def check_same_device(**tensors: Tensor) -> None:
    """Raise ValueError unless all the named tensors are on one device."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        seen = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"tensors must be on one device, got {seen}")


def check_number(name: str, value: object, low: float, high: float, *, high_open: bool = False) -> float:
    """The number as a float. TypeError unless real, ValueError unless finite and in [low, high] (or [low, high))."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be within the range of a float, got a larger number") from error
    inside = low <= number < high if high_open else low <= number <= high
    if not inside or number == math.inf:  # NaN is inside nothing
        bound = "finite" if high == math.inf else f"{'less than' if high_open else 'at most'} {high:g}"
        raise ValueError(f"{name} must be at least {low:g} and {bound}, got {number}")
    return number


def check_integer(name: str, value: object, low: int, high: int, *, such_as: str = "") -> int:
    """The number as an int. TypeError unless it is an integer, ValueError unless it is in [low, high].

    ``such_as``: what the caller may have wanted to pass, for the error.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int{such_as and f', {such_as}'}, got {type(value).__name__}")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be at least {low} and at most {high}, got {number}")
    return number


def no_reduction(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that says, in words that help, that it lacks an argument that all losses of torch have."""

    @wraps(function)
    def call(*arguments: _P.args, **settings: _P.kwargs) -> _R:
        if "reduction" in settings:
            raise TypeError(
                f"a ranking has no reduction, got reduction={settings['reduction']!r}: each loss is the mean over its "
                "positives; multiply it by their number for the sum, and see groups= for images that are ranked apart"
            )
        return function(*arguments, **settings)

    return call


def check_bool(name: str, value: object) -> None:
    """Raise TypeError unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_delta(delta: object) -> float:
    """Delta as a float. TypeError or ValueError unless it is 0 or a number that float32 can divide by."""
    number = check_number("delta", delta, 0.0, math.inf) + 0.0  # which makes 0 of -0
    if number != 0 and not _DELTA_MIN <= number <= _DELTA_MAX:
        raise ValueError(f"delta must be 0 or between 2**-126 and 2**125, got {delta}")
    return number


def check_values(condition: Tensor | bool, error: Callable[[], ValueError], message: str) -> None:
    """Raise ``error()`` if the condition is False.

    Where it is a tensor on a GPU (bool, 0-d), to know it would cost a synchronisation of the host: so it is asserted on
    the device, asynchronously, and an error surfaces at the next synchronising call, with ``message``.
    """
    if isinstance(condition, Tensor) and condition.device.type == "cuda":
        torch._assert_async(condition, message)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    elif not condition:
        raise error()


def check_ious(ious: Tensor, sound: Tensor | bool | None = None) -> None:
    """Raise ValueError unless IoUs are in [0, 1], or above by rounding. NaN is let through, and shows in the loss.

    ``sound``: whether they are, if it is known.
    """
    if sound is None:
        sound = ~((ious < 0) | (ious > MAX_GRADE)).any()

    def error() -> ValueError:
        outside = (ious < 0) | (ious > MAX_GRADE)
        return ValueError(
            f"ious must be in [0, 1], got {ious[outside][:5].tolist()} among {int(outside.sum())} values that are not"
        )

    check_values(sound, error, "alrp_triton: ious must be in [0, 1]")


def check_marks(
    targets: Tensor,
    num_classes: int | None,
    background: int,
    ignore_index: int,
    graded: bool,
    count: int,
    count_argument: str,
    found: Tensor | int,
    sound: Sequence[Tensor | bool],
) -> None:
    """Raise ValueError if values of targets mean nothing, or mark another number of positives than ``count``.

    Args:
        targets: as :func:`alrp_triton.targets.check_form` found them.
        num_classes: that and the next three: what it told.
        background: see there.
        ignore_index: see there.
        graded: see there.
        count: the number of positives, as the caller knows it.
        count_argument: the argument from which the caller knows it, for the error.
        found: the number of positives that the targets mark.
        sound: whether all values mean something, and whether that number is right.
    """
    if graded:
        meaning = "dense targets must be an IoU above 0 and up to 1 (positive), 0 (negative) or -1 (ignored)"
    elif num_classes is None:
        meaning = "dense targets must be 1 (positive), 0 (negative) or -1 (ignored)"
    else:
        meaning = (
            f"class-index targets must be a class from 0 to {num_classes - 1}, {background} (background) or "
            f"{ignore_index} (ignored)"
        )

    def bad_values() -> ValueError:
        known = {background, ignore_index, *range(2 if num_classes is None else num_classes)}
        values, counts = targets.unique(return_counts=True)
        seen = [
            (value, n)
            for value, n in zip(values.tolist(), counts.tolist(), strict=True)
            if value not in known and not (graded and 0 < value <= MAX_GRADE)
        ]
        # The classes of a head count from 0, those of COCO's files, and of some of torchvision's targets, from 1.
        from_one = background == 0 and any(value == num_classes for value, _ in seen)
        return ValueError(
            f"{meaning}, got {[value for value, _ in seen[:5]]} among {sum(n for _, n in seen)} values that are none "
            f"of these{_FROM_ONE.format(num_classes) if from_one else ''}"
        )

    def bad_count() -> ValueError:
        if count_argument == "num_positives":
            return ValueError(f"num_positives is {count}, but targets mark {int(found)} positives")
        return ValueError(
            f"{count_argument} must have one value for each positive, in the order of their flat index: "
            f"got {count} {count_argument}, but targets mark {int(found)} positives"
        )

    check_values(sound[0], bad_values, f"alrp_triton: {meaning}")
    check_values(sound[1], bad_count, f"alrp_triton: targets do not mark {count} positives")
