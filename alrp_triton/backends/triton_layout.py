"""Programs and memory of a launch."""

import torch
from torch import Tensor


def blocks(size: int, block: int) -> int:
    """How many blocks it takes. (Triton's own ``cdiv`` takes a hundred times as long.)"""
    return -(-size // block)


def parts(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Empty vectors in one allocation, each at an address that 16 bytes divide.

    Triton compiles a kernel again where an address is no longer, or not yet, divisible so: sizes change with P.
    """
    step = 16 // dtype.itemsize
    lengths = [blocks(size, step) * step for size in sizes]
    whole = torch.empty(sum(lengths), dtype=dtype, device=device)
    return [part[:size] for part, size in zip(whole.split(lengths), sizes, strict=True)]
