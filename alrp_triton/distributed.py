"""One ranking over the processes of a group: what they tell each other, which is of the size of the positives.

Each process knows its own logits. For the joint ranking every process needs the scores of all positives, with which it
compares its own negatives, and the sum over all processes of what that gives. All else is made from these P numbers by
every process for itself, and its part of the gradient from its own logits.
"""

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

ProcessGroup = Any
"""``torch.distributed.ProcessGroup``, a name that builds of torch without it do not have."""
GradientReduction = Literal["mean", "sum"]

_HEADER = 256  # bytes: how many positives, and what was called
_AT = 8


def check_process_group(process_group: object) -> None:
    """Raise TypeError or ValueError unless it is None, ``"world"``, or a group that this process is a member of."""
    if process_group is None or process_group == "world":
        return
    if not dist.is_available():
        raise ValueError("process_group needs torch.distributed, which this build of torch lacks")
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must be one that this process is a member of, got NON_GROUP_MEMBER")
    if not isinstance(process_group, dist.ProcessGroup):
        seen = repr(process_group) if isinstance(process_group, str) else type(process_group).__name__
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, 'world' or None, got {seen}")


def check_gradient_reduction(gradient_reduction: object) -> None:
    """Raise ValueError unless it is ``"mean"`` or ``"sum"``."""
    if gradient_reduction not in get_args(GradientReduction):
        raise ValueError(f"gradient_reduction must be 'mean' or 'sum', got {gradient_reduction!r}")


def name_and_size(process_group: ProcessGroup | None) -> tuple[str, int]:
    """The name by which an operator finds the group, and its number of processes; ``""`` and 1 for None.

    Raises:
        TypeError, ValueError: see :func:`check_process_group`; ``"world"`` before ``init_process_group``.
    """
    check_process_group(process_group)
    if process_group is None:
        return "", 1
    if process_group == "world":
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("process_group='world' needs torch.distributed.init_process_group to be called before")
        process_group = dist.distributed_c10d._get_default_group()  # pyright: ignore[reportPrivateUsage]
    return process_group.group_name, process_group.size()


def _group(name: str) -> ProcessGroup:
    # As torch's own functional collectives find it, for an operator takes no object.
    return dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage, reportArgumentType]


def _all_gather(tensor: Tensor, group: ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor, group=group)
    return parts


def _counts(count: int, call: str, group: ProcessGroup, device: torch.device) -> list[int]:
    """How many positives each process has; ValueError on all of them if they did not call the same."""
    said = call.encode()[: _HEADER - _AT].ljust(_HEADER - _AT)
    header = torch.frombuffer(bytearray(count.to_bytes(_AT, "little") + said), dtype=torch.uint8)
    heard = [bytes(part.tolist()) for part in _all_gather(header.to(device), group)]
    calls = [part[_AT:].decode(errors="replace").rstrip() for part in heard]
    for rank, other in enumerate(calls):
        if other != calls[0]:
            raise ValueError(
                f"all processes of process_group must call the same loss with the same settings, but rank 0 called "
                f"{calls[0]} and rank {rank} {other}"
            )
    return [int.from_bytes(part[:_AT], "little") for part in heard]


def gather_positives(
    scores: Tensor, values: Tensor, groups: Tensor | None, call: str, process_group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What all processes know of their positives, rank after rank.

    On the wire, from each process to all others: 256 bytes, then 16 bytes for each positive of the process that has
    most, 24 with groups. The host has to learn how many there are: it waits for the device.

    Args:
        scores: float64 ``(own P,)``.
        values: float64 ``(own P,)``.
        groups: int64 ``(own P,)``, or None.
        call: what was called, with its settings; has to be the same everywhere.
        process_group: name of the group.

    Returns:
        Scores, values and groups (empty if there are none), ``(P,)`` each; and int64 ``(own P,)``, where among them
        those of this process are.

    Raises:
        ValueError: the processes did not call the same.
        RuntimeError: a process died or did not call within the timeout of the group; by torch.distributed.
    """
    group, own = _group(process_group), scores.numel()
    counts = _counts(own, call, group, scores.device)
    parts = [scores.view(torch.int64), values.view(torch.int64), *([] if groups is None else [groups])]
    sent = scores.new_zeros(len(parts), max(counts), dtype=torch.int64)
    sent[:, :own] = torch.stack(parts)
    received = _all_gather(sent, group) if max(counts) else [sent] * len(counts)
    numbers = torch.cat([part[:, :count] for part, count in zip(received, counts, strict=True)], 1)
    first = sum(counts[: group.rank()])
    mine = torch.arange(first, first + own, device=scores.device)
    everybodys = [row.clone() for row in numbers] + ([numbers.new_empty(0)] if groups is None else [])
    return everybodys[0].view(torch.float64), everybodys[1].view(torch.float64), everybodys[2], mine


def sum_over_ranks(numbers: Tensor, process_group: str) -> Tensor:
    """The sum over all processes, the same on each of them; 8 bytes a number and process on the wire, or twice that."""
    total = numbers.clone()
    if total.numel():
        dist.all_reduce(total, group=_group(process_group))
    return total
