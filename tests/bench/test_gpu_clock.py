"""`python -m bench gpu`: the clock, nvidia-smi, the counters of ncu."""

import pytest
import torch

from bench.gpu import clock, counters, environment, launches, tables

CPU = torch.device("cpu")


class FakeDevice:
    """Works off what it is given by a clock of its own, which the host's calls move on."""

    def __init__(self, host_ms: float, device_ms: float, waits: bool = False) -> None:
        self.now, self.free_at, self.host_ms, self.device_ms, self.waits = 0.0, 0.0, host_ms, device_ms, waits
        self.held: list[int] = []
        self.flushed = 0

    def enqueue(self, ms: float) -> None:
        self.free_at = max(self.free_at, self.now) + ms

    def hold(self, cycles: int) -> None:
        self.held.append(cycles)
        self.enqueue(cycles / 2e6)

    def flush(self) -> None:
        self.flushed += 1

    def wait(self) -> None:
        self.now = max(self.now, self.free_at)

    def step(self) -> None:
        self.now += self.host_ms
        if self.waits:
            self.wait()
        self.enqueue(self.device_ms)

    def event(self) -> "FakeEvent":
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = max(self.device.free_at, self.device.now)

    def query(self) -> bool:
        return self.at <= self.device.now

    def elapsed_time(self, end_event: "FakeEvent") -> float:
        return end_event.at - self.at


def timer(device: FakeDevice, waits: bool = False) -> clock.DeviceTimer:
    return clock.DeviceTimer(clock.Device(device.event, device.hold, device.flush, device.wait), device.step, waits)


def test_a_backlog_hides_the_host() -> None:
    device = FakeDevice(host_ms=0.5, device_ms=0.125)
    timing = timer(device).take()
    assert timing.backlog
    assert timing.device_ms == pytest.approx(0.125)
    assert len(device.held) == device.flushed == 1


def test_a_backlog_that_was_too_short_is_doubled_and_stays() -> None:
    device = FakeDevice(host_ms=5.0, device_ms=0.125)
    mine = timer(device)
    timing = mine.take()
    assert timing.backlog
    assert timing.device_ms == pytest.approx(0.125)
    assert device.held == [device.held[0] * 2**k for k in range(len(device.held))]
    assert len(device.held) == 4  # of 1, 2, 4 and 8 ms
    mine.take()
    assert device.held[-1] == device.held[-2]


def test_a_step_that_waits_is_timed_without_a_backlog() -> None:
    known = FakeDevice(host_ms=5.0, device_ms=0.125, waits=True)
    timing = timer(known, waits=True).take()
    assert not timing.backlog
    assert known.held == []
    assert timing.device_ms == pytest.approx(5.125)  # the host's time is in it
    unknown = FakeDevice(host_ms=5.0, device_ms=0.125, waits=True)
    timing = timer(unknown).take()
    assert not timing.backlog
    assert len(unknown.held) < 10  # it was not tried for ever


def test_the_clock_of_a_rehearsal_is_the_hosts() -> None:
    timing = clock.Clock(CPU).median(lambda: torch.ones(10), 5)
    assert timing.device_ms == timing.host_ms > 0
    assert not timing.backlog


def test_the_answer_of_nvidia_smi() -> None:
    text = "name, driver_version, clocks.current.sm [MHz], power.draw [W]\nNVIDIA H100, 580.1, 345 MHz, [N/A]\n"
    wanted = {"name": "NVIDIA H100", "driver_version": "580.1", "clocks.current.sm [MHz]": "345 MHz"}
    assert environment.parse_answer(text) == wanted | {"power.draw [W]": "[N/A]"}


NCU = """==PROF== Connected to process 77 (/usr/bin/python3.12)
==PROF== Profiling "count_kernel" - 0: 0%....50%....100% - 4 passes
"ID","Process ID","Kernel Name","Grid Size","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum","launch__registers_per_thread","sm__throughput.avg.pct_of_peak_sustained_elapsed","device__attribute_architecture"
"","","","","byte","Kbyte","nsecond","register/thread","%",""
"0","77","count_kernel","(30690, 1, 1)","125,706,240","1.5","412,345","48","51.25","384"
"1","77","void at::native::vectorized(int, float)","(3, 1, 1)","n/a","0","1,000","16","","384"
"2","77","evaluate_kernel","(30690, 1, 1)","251412480","125,706","620.5","38","12","384"
==PROF== Disconnected from process 77
"""


def test_counters_as_ncu_prints_them() -> None:
    found = counters.parse(NCU)
    assert [one["kernel"] for one in found] == ["count_kernel", "void at::native::vectorized", "evaluate_kernel"]
    first = found[0]
    assert first["dram__bytes_read.sum"] == 125_706_240
    assert first["dram__bytes_write.sum"] == 1500
    assert first[counters.TIME] == pytest.approx(412.345e-6)
    assert first["launch__registers_per_thread"] == 48
    assert all(set(one) <= {"kernel", "grid", *counters.METRICS} for one in found)  # ncu adds some hundred attributes
    assert found[1]["dram__bytes_read.sum"] is None
    assert found[1]["sm__throughput.avg.pct_of_peak_sustained_elapsed"] is None
    assert found[2]["dram__bytes_write.sum"] == 125_706_000
    assert counters.parse("==ERROR== Failed to find metric x\n") == []
    assert counters.parse("") == []


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [("1,234.5", "us", 1.2345e-3), ("2", "Gbyte", 2e9), ("3", "msecond", 3e-3), ("1e3", "B", 1000.0), ("7", "sector/request", 7.0)],
)  # fmt: skip
def test_numbers_of_ncu(text: str, unit: str, value: float) -> None:
    assert counters.number(text, unit) == pytest.approx(value)
    for missing in ("n/a", "", "-", "nan"):
        assert counters.number(missing, unit) is None


def test_tables_of_counters() -> None:
    kernels = [{"what": "kernel", "setting": "RetinaNet, binned", **one} for one in counters.parse(NCU)]
    steps = {"counters": {"status": "done", "records": kernels}}
    run = {"device": "x", "torch": "2", "triton": "3", "python": "3.12", "commit": None, "dirty": None, "date": "today"}
    text = tables.TABLES["counters"]({"run": run, "finished": True, "steps": steps})
    assert "| RetinaNet, binned | count_kernel | (30690, 1, 1) | 412 | 126 | 0.0015 |" in text


def test_launches_of_replays_are_read_one_by_one() -> None:
    """Flush, a, b of three replays; b comes before a in what the profiler lists."""
    found: list[launches.Launch] = []
    for replay, longer in enumerate((0.0, 8.0, 1.0)):
        at = 1000.0 * replay
        found += [
            launches.Launch("fill", at, at + 60),
            launches.Launch("b", at + 75, at + 80 + longer),
            launches.Launch("a", at + 70, at + 72),
        ]
    records = list(launches.read(found, 3))
    assert records == [
        {"what": "launch", "index": 0, "kernel": "a", "us": 2},
        {"what": "launch", "index": 1, "kernel": "b", "us": 6},
        {"what": "step", "launches": 2, "us": 11},
    ]
    with pytest.raises(RuntimeError, match="8 launches were traced, which are no 3 replays"):
        list(launches.read(found[1:], 3))
    with pytest.raises(RuntimeError, match="0 launches"):
        list(launches.read([], 3))


def test_tables_of_launches() -> None:
    of = {"setting": "ATSS", "anchors": 800, "positives": 8}
    names = ["void at::native::(anonymous namespace)::fill<float>(int)", "count_kernel", "count_kernel"]
    records = [of | {"what": "launch", "kernel": name, "us": us} for name, us in zip(names, (2, 9, 4), strict=True)]
    records.append(of | {"what": "step", "launches": 3, "us": 17})
    run = {"device": "x", "torch": "2", "triton": "3", "python": "3.12", "commit": None, "dirty": None, "date": "today"}
    steps = {"launches": {"status": "done", "records": records}}
    text = tables.TABLES["launches"]({"run": run, "finished": True, "steps": steps})
    assert "| ATSS | 800 | 8 | 3 | 17 | count_kernel 13, others 2 |" in text
