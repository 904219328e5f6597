"""What may be passed in: checks that name the argument and what was seen, made before any work is done."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
TARGET_DTYPES = (torch.bool, *INTEGER_DTYPES, *FLOAT_DTYPES)

# Between these, delta and 1/(2 delta) are normal float32 numbers.
_DELTA_MIN, _DELTA_MAX = 2.0**-126, 2.0**125


def describe(tensor: Tensor) -> str:
    """A tensor's dtype, shape and device, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"


def check_tensor(name: str, value: object, kind: Literal["floating", "bool", "target"]) -> None:
    """Raise TypeError unless ``value`` is a dense tensor whose dtype is of the kind asked for."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        kind_seen = "a nested tensor" if value.is_nested else f"layout {value.layout}, dtype {value.dtype}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind_seen}")
    if kind == "target" and value.dtype not in TARGET_DTYPES:
        raise TypeError(f"{name} must be integer, bool, float16, bfloat16, float32 or float64, got {describe(value)}")
    if kind == "floating" and value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {describe(value)}")
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
    if not inside or math.isinf(number):  # NaN is inside nothing
        bound = "finite" if high == math.inf else f"{'less than' if high_open else 'at most'} {high:g}"
        raise ValueError(f"{name} must be at least {low:g} and {bound}, got {number}")
    return number


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """The number as an int. TypeError unless it is an integer, ValueError unless it is in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be at least {low} and at most {high}, got {number}")
    return number


def check_bool(name: str, value: object) -> None:
    """Raise TypeError unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_delta(delta: object) -> float:
    """Delta as a float. TypeError or ValueError unless it is 0 or a number that float32 can divide by."""
    number = check_number("delta", delta, 0.0, math.inf)
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
