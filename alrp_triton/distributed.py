"""One ranking over the processes of a group: what they tell each other, which is of the size of the positives.

Each process knows its own logits. For the joint ranking every process needs the scores of all positives, with which it
compares its own negatives, and the sum over all processes of what that gives. All else is made from these P numbers by
every process for itself, and its part of the gradient from its own logits.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, get_args
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

ProcessGroup = Any
"""``torch.distributed.ProcessGroup``, a name that builds of torch without it do not have."""
GradientReduction = Literal["mean", "sum"]
_REDUCTIONS: tuple[str, ...] = get_args(GradientReduction)

_HEADER = 256  # bytes: how many positives, and what was called
_AT = 8
_FAILED = -1
_TOLD = "_alrp_triton_told"  # of an error that the other processes know
_calls = WeakKeyDictionary[ProcessGroup, int]()  # of each group, so that a call is never taken for the next one

with torch.inference_mode(False):  # whoever imports this: no later step could write to a tensor made in it
    COLLECTIVES = torch.zeros((), dtype=torch.int64, device="cpu")
"""``gather_positives`` reads it, and ``sum_over_processes`` writes to it. So a compiler can neither drop a call nor let
two of them change places: other processes wait for them, in their order."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def check_process_group(process_group: object) -> None:
    """Raise TypeError or ValueError unless it is None, ``"world"``, or a group that this process is a member of."""
    if process_group is None or (isinstance(process_group, str) and process_group == "world"):
        return
    if not dist.is_available():
        raise ValueError("process_group needs torch.distributed, which this build of torch lacks")
    if isinstance(process_group, int) and process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must be one that this process is a member of, got NON_GROUP_MEMBER")
    if not isinstance(process_group, dist.ProcessGroup):
        seen = repr(process_group) if isinstance(process_group, str) else type(process_group).__name__
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, 'world' or None, got {seen}")


def check_gradient_reduction(gradient_reduction: object) -> None:
    """Raise ValueError unless it is ``"mean"`` or ``"sum"``."""
    if gradient_reduction not in _REDUCTIONS:
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


def _carried(device: torch.device, group: ProcessGroup) -> torch.device:
    """The device, if the group carries tensors of it; NCCL carries none of a CPU, so then the GPU at hand."""
    if device.type == "cpu" and "cpu:" not in dist.get_backend_config(group):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _all_gather(tensor: Tensor, group: ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor, group=group)
    return parts


class ProcessesDisagreeError(ValueError):
    """The processes of a group did not call the same; raised on all of them."""


def _counts(count: int, call: str, group: ProcessGroup, device: torch.device) -> list[int]:
    """How many positives each process has; ValueError on all of them if one gave up, or did not call the same."""
    number = _calls[group] = _calls.get(group, 0) + 1
    said = call if count == _FAILED else f"{call} as its call {number}"
    text = said.encode()[: _HEADER - _AT].ljust(_HEADER - _AT)
    header = torch.frombuffer(bytearray(count.to_bytes(_AT, "little", signed=True) + text), dtype=torch.uint8)
    heard = [bytes(part) for part in torch.stack(_all_gather(header.to(device), group)).tolist()]
    counts = [int.from_bytes(part[:_AT], "little", signed=True) for part in heard]
    calls = [part[_AT:].decode(errors="replace").rstrip() for part in heard]
    for rank, other in enumerate(calls):
        if counts[rank] == _FAILED:
            raise ProcessesDisagreeError(f"rank {rank} of process_group gave up with an error: {other}")
    for rank, other in enumerate(calls):
        if other != calls[0]:
            raise ProcessesDisagreeError(
                f"all processes of process_group must call the same loss with the same settings, as often, but its "
                f"rank 0 called {calls[0]} and its rank {rank} {other}"
            )
    return counts


def propagates_errors(loss: Callable[_P, _R]) -> Callable[_P, _R]:
    """A loss whose errors of input, on one process, are errors on all processes of its process group.

    Otherwise those would wait until the timeout of the group, or take part in the next call of that process.
    """

    @wraps(loss)
    def call(*arguments: _P.args, **settings: _P.kwargs) -> _R:
        try:
            return loss(*arguments, **settings)
        except (TypeError, ValueError, Warning) as error:
            tensors = (value for value in (*arguments, *settings.values()) if isinstance(value, Tensor))
            device = next((tensor.device for tensor in tensors), torch.device("cpu"))  # that of the logits, mostly
            with suppress(TypeError, ValueError):  # of the group: this is the error, and there is nobody to tell
                send_failure(name_and_size(settings.get("process_group"))[0], error, device)
            raise

    return call


def send_failure(process_group: str, error: Exception, device: torch.device) -> None:
    """Tells the other processes of the group of this name, if there is one, of an error; of each error once.

    An operator tells of its own ones, for what is compiled into one graph has no wrapper that would see them.
    """
    if not process_group or isinstance(error, ProcessesDisagreeError) or hasattr(error, _TOLD):
        return
    setattr(error, _TOLD, True)
    # What is heard is no news here; and where the others are gone, this process' error says more than theirs.
    with suppress(ProcessesDisagreeError, RuntimeError):
        group = _group(process_group)
        _counts(_FAILED, f"{type(error).__name__}: {error}", group, _carried(device, group))


def gather(
    scores: Tensor, values: Tensor, groups: Tensor | None, call: str, process_group: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What all processes know of their positives, rank after rank.

    On the wire, from each process to all others: 256 bytes, then 16 bytes for each positive of the process that has
    most, 24 with groups. The host has to learn how many there are: it waits for the device.

    Args:
        scores: float64 ``(local P,)``.
        values: float64 ``(local P,)``.
        groups: int64 ``(local P,)``, or None.
        call: what was called, with its settings; has to be the same everywhere.
        process_group: name of the group.

    Returns:
        Scores, values and groups, ``(P,)`` each; and int64 ``(local P,)``, where among them those of this process are.

    Raises:
        ValueError: the processes did not call the same.
        RuntimeError: a process died or did not call within the timeout of the group; by torch.distributed.
    """
    group, local = _group(process_group), scores.numel()
    counts = _counts(local, call, group, scores.device)
    parts = [scores.view(torch.int64), values.view(torch.int64), *([] if groups is None else [groups])]
    sent = scores.new_zeros(len(parts), max(counts), dtype=torch.int64)
    sent[:, :local] = torch.stack(parts)
    received = _all_gather(sent, group) if max(counts) else [sent] * len(counts)
    numbers = torch.cat([part[:, :count] for part, count in zip(received, counts, strict=True)], 1)
    first = sum(counts[: group.rank()])
    local_index = torch.arange(first, first + local, device=scores.device)
    scores, values = numbers[:2].view(torch.float64).unbind()
    return scores, values, None if groups is None else numbers[2], local_index


def sum_over_processes(numbers: Tensor, collectives: Tensor, process_group: str) -> Tensor:
    """The sum over all processes, the same on each of them; 8 bytes a number and process on the wire, or twice that."""
    collectives.add_(1)
    total = numbers.clone()
    if total.numel():
        dist.all_reduce(total, group=_group(process_group))
    return total
