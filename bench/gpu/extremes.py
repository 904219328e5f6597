"""More logits than 32 bits can count, on the device: a shard of correctness, where memory is enough."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..endurance import large
from .work import Context, Record, Skipped, Unit

_ELEMENTS = 2_200_000_000
# Logits and gradient in bfloat16, targets and mask in bytes, the chunks of drawing and checking, and what others use.
_BYTES = _ELEMENTS * (2 + 2 + 1 + 1) + (12 << 30)
# Ranks are float32; the partial sums of the tiled kernels are, too, here of 1e5 terms. Gradients are bfloat16.
_RANK, _GRADIENT = {"triton_binned": 1e-6, "triton_tiled": 1e-4}, 2**-7


def _large(context: Context, backend: str) -> Iterator[Record]:
    n = 20_000 if context.rehearse else _ELEMENTS
    positives = 20 if context.rehearse else 1000
    found = large(n, torch.bfloat16, backend, context.seed, positives, context.device.type)
    passed = found["rank_error"] <= _RANK[backend] and found["gradient_error"] <= _GRADIENT
    yield {"check": f"{n} logits, {backend}", "passed": passed, "dtype": "bfloat16", **found}


def _units(context: Context) -> list[Unit]:
    if not context.rehearse:
        free = torch.cuda.mem_get_info()[0]
        if free < _BYTES:
            raise Skipped(f"{_BYTES >> 30} GiB of memory are wanted, {free >> 30} are free")
    return [
        Unit(f"2**31 logits, {backend}", partial(_large, context, backend))
        for backend in ("triton_binned", "triton_tiled")
    ]


SHARDS: dict[str, Callable[[Context], list[Unit]]] = {"2**31 logits": _units}
