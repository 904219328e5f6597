"""A process group that is gone when the program ends.

``torch.distributed.destroy_process_group`` forgets a group; its threads go with the last reference to it. Where one
outlives Python, a thread of gloo that still holds something of the last backward aborts the process: "terminate called
without an active exception", rarely, on a busy machine, when all work is done.
"""

import gc
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

# DistributedDataParallel imports this, and what functions there have as a default is the group of that time: before
# there is a group that is none, later it would be held for good.
import torch.distributed.nn  # noqa: F401  # pyright: ignore[reportUnusedImport]


@contextmanager
def process_group(backend: str, **settings: Any) -> Generator[None]:
    """``init_process_group`` with these settings before the block; after it, the group and its threads end."""
    dist.init_process_group(backend, **settings)
    try:
        yield
    finally:
        gc.collect()  # DistributedDataParallel holds the group, and is in a cycle
        dist.destroy_process_group()
