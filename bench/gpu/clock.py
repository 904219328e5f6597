"""Time of a step on the device and on the host, apart; by the rules of those who do it well.

Before a step the device is given work that holds it back, so that the host is ahead and the device never waits for a
launch; the last of it writes more than the L2 cache holds, so that the step finds none of its input there. Between two
events lies then what the device does alone. A step that waits for the device cannot be ahead of it: its time is from
event to event, and contains the host's.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

Step = Callable[[], object]

_FLUSH_BYTES = 256 << 20
# Cycles that hold the device back: a millisecond or two of an H100, doubled where the host was slower.
_FIRST_CYCLES, _MAX_CYCLES = 1 << 21, 1 << 26


class Timing(NamedTuple):
    """Of one step, in milliseconds."""

    device_ms: float
    host_ms: float  # to enqueue it
    backlog: bool  # the device had not begun when all was enqueued


class Timer(Protocol):
    """Takes the time of one contender."""

    def take(self) -> Timing: ...


class Event(Protocol):
    """As torch has it."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end_event: Any) -> float: ...


class Device(NamedTuple):
    """What is asked of a GPU."""

    event: Callable[[], Event]
    hold: Callable[[int], None]  # by so many cycles
    flush: Callable[[], object]
    wait: Callable[[], None]


class DeviceTimer:
    """By events, with a backlog.

    Args:
        device: where.
        step: what.
        waits: the step is known to wait for the device.
    """

    def __init__(self, device: Device, step: Step, waits: bool) -> None:
        self.device, self.step, self.waits, self.cycles = device, step, waits, _FIRST_CYCLES

    def take(self) -> Timing:
        """One sample; where the backlog was too short, a new one with a longer backlog, up to a bound."""
        while True:
            device = self.device
            device.wait()
            start, end = device.event(), device.event()
            if not self.waits:
                device.hold(self.cycles)
            device.flush()
            start.record()
            begin = time.perf_counter()
            result = self.step()
            host = time.perf_counter() - begin
            end.record()
            behind = not self.waits and not start.query()
            device.wait()
            del result  # not before the clocks have stopped
            timing = Timing(start.elapsed_time(end), 1e3 * host, behind)
            if behind or self.waits or self.cycles >= _MAX_CYCLES:
                return timing
            self.cycles *= 2


class HostTimer:
    """By the clock of the host, where all is done when a call returns."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def take(self) -> Timing:
        begin = time.perf_counter()
        result = self.step()
        elapsed = 1e3 * (time.perf_counter() - begin)
        del result
        return Timing(elapsed, elapsed, False)


class Clock:
    """Makes timers and graphs for the device of a run."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            buffer = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
            self.device = Device(
                partial(torch.cuda.Event, enable_timing=True),
                torch.cuda._sleep,  # pyright: ignore[reportPrivateUsage]
                buffer.zero_,
                torch.cuda.synchronize,
            )

    def timer(self, step: Step, waits: bool = False) -> Timer:
        return DeviceTimer(self.device, step, waits) if self.cuda else HostTimer(step)

    def capture(self, step: Step) -> Step:
        """The step as a CUDA graph, whose replay has no launches by the host; on a CPU the step itself."""
        return capture(step) if self.cuda else step

    def median(self, step: Step, times: int) -> Timing:
        """Medians of so many samples after a step that is not counted."""
        step()
        timer = self.timer(step)
        samples = [timer.take() for _ in range(times)]
        device, host = (sorted(of)[times // 2] for of in list(zip(*samples, strict=True))[:2])
        return Timing(device, host, all(sample.backlog for sample in samples))


def capture(step: Step) -> Step:
    """The step as a CUDA graph, after some on a side stream, where all that it needs is compiled and allocated.

    A call replays it and gives its results, in the same memory each time.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            results = step()
    except BaseException:
        torch.cuda.set_stream(current)  # torch leaves that of the capture where to end it fails, too
        raise

    return partial(_replay, graph, results, step)


def _replay(graph: torch.cuda.CUDAGraph, results: object, step: Step) -> object:
    """``step`` is here only to live as long: it has the memory that the graph reads."""
    graph.replay()
    return results


def quantiles(values: list[float]) -> list[float]:
    """p20, p50, p80."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
