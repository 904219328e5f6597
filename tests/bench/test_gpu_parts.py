"""Parts of `python -m bench gpu` by themselves: names, clock, counters, fit, oracles, problems, diff, command line."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench import diff
from bench.gpu import clock, counters, environment, launches, oracles, results, tables, times, worker
from bench.gpu.compiling import Compilations
from bench.gpu.fit import BINNED, TILED, Point, fit, points
from bench.gpu.work import Context, Record, Skipped, Unit, plain
from bench.report import fill
from bench.speed.problems import CASES, Size, as_dense, classes_of, draw_problem
from tests.conftest import ROOT
from tests.support import compare, losses
from tests.support.cases import draw

CPU = torch.device("cpu")
needs_torchvision = pytest.mark.skipif(not find_spec("torchvision"), reason="focal loss is torchvision's")


# Names and files


def test_names_of_files(tmp_path: Path) -> None:
    first = results.claim(tmp_path, "NVIDIA H100 80GB HBM3", "CE507C0E58EE69BB")
    assert re.fullmatch(r"nvidia-h100-80gb-hbm3_ce507c0e58_\d{8}-\d{6}\.json", first.name)
    second = results.claim(tmp_path, "NVIDIA H100 80GB HBM3", "CE507C0E58EE69BB")
    assert first != second  # no run writes into another's file
    assert results.claim(tmp_path, "x", None).name.startswith("x_nocommit_")
    for file in tmp_path.iterdir():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", file.name)


def test_the_newest_of_each_device_and_never_a_rehearsal(tmp_path: Path) -> None:
    names = (
        "a-1_abc_20260101-000000",
        "a-1_def_20260103-000000",
        "a-1_abc_20260102-235959",
        "b_nocommit_20250101-000000",
    )
    for name in (*names, "rehearsal_abc_20270101-000000", "cpu", "compiled"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert [file.stem for file in results.newest(tmp_path)] == [names[1], names[3]]


def test_a_report_is_whole_at_any_time(tmp_path: Path) -> None:
    report = results.Report(results.claim(tmp_path, "x", "a"), {"run": {}, "wrong": []})
    report.write()
    assert report.as_dict()["steps"] == {}
    state = report.begin("times")
    for k in range(3):
        report.add("times", {"k": k})
    report.begin("training")
    state["status"] = "done"
    report.write()
    read = results.load(report.file)
    assert read == report.as_dict()
    assert read["steps"]["times"] == {"status": "done", "records": [{"k": 0}, {"k": 1}, {"k": 2}]}
    assert read["steps"]["training"]["records"] == []
    assert len(list(tmp_path.iterdir())) == 1  # nothing partial is left
    report.file.write_text('{"run": ')
    with pytest.raises(ValueError, match="is no result file"):
        results.load(report.file)


def test_numbers_that_json_has_not() -> None:
    assert plain({"a": math.nan, "b": [math.inf, 1.5], 3: (1, "x")}) == {"a": None, "b": [None, 1.5], "3": [1, "x"]}


def test_no_run_says_so(tmp_path: Path) -> None:
    for name in tables.TABLES:
        assert tables.render(name, tmp_path) == tables.NOTHING
    page = "<!-- gpu cases -->\nold\n<!-- end -->\n"
    assert fill(page).startswith("<!-- gpu cases -->\n")
    assert "old" not in fill(page)
    assert fill(fill(page)) == fill(page)


# Workers and what they time


def said_by_a_worker(act: Callable[[], Iterator[Record]], monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    units = [Unit("first", act), Unit("second", lambda: iter([{"done": 1}]))]
    monkeypatch.setattr(counters, "units", MagicMock(return_value=units))
    said: list[Record] = []
    assert worker.work("counters", "all", 0, Context(True, 60), said.append) == 0
    return said


def raising(error: Exception) -> Callable[[], Iterator[Record]]:
    def act() -> Iterator[Record]:
        yield {"before": 1}
        raise error

    return act


def test_what_a_unit_may_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = [{"begin": "first", "index": 0}, {"record": {"before": 1}}]
    wrong = said_by_a_worker(raising(RuntimeError("bad")), monkeypatch)
    assert wrong[:3] == [*begun, {"error": "first", "text": "RuntimeError: bad"}]
    assert {"record": {"done": 1}} in wrong
    assert said_by_a_worker(raising(Skipped("not here")), monkeypatch) == [*begun, {"skipped": "not here"}]
    late = said_by_a_worker(raising(subprocess.TimeoutExpired("ncu", 1.0)), monkeypatch)
    assert late == [*begun, {"left_out": ["first", "second"]}]


@needs_torchvision
@pytest.mark.parametrize("turn", [0, 2])
def test_one_that_fails_leaves_the_times_of_the_others(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its first call, or when it has been timed already."""
    real, calls = times.take_step, []

    def step(loss: partial[Any], problem: Any) -> Any:
        if loss.keywords["backend"] == times.TORCH:
            calls.append(loss)
            if len(calls) > turn:
                raise RuntimeError("bad")
        return real(loss, problem)

    monkeypatch.setattr(times, "take_step", step)
    setup = times.Setup(Size("cases", 200, 4), (times.TORCH, times.FOCAL, times.FLOOR))
    measured = times.Session(Context(True, 60)).measure(setup)
    found = [next(measured) for _ in setup.contenders]
    with pytest.raises(RuntimeError, match="bad"):
        next(measured)
    rows = {one["contender"]: one for one in found}
    assert rows[times.TORCH]["missing"] == "RuntimeError: bad"
    assert all(rows[name]["device_ms"] for name in (times.FOCAL, times.FLOOR))


@needs_torchvision
def test_after_a_capture_that_failed_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def capture(self: clock.Clock, step: clock.Step) -> clock.Step:
        tried.append(step)
        raise RuntimeError("no capture")

    monkeypatch.setattr(clock.Clock, "capture", capture)
    session = times.Session(Context(True, 60))
    setup = times.Setup(Size("cases", 200, 4), (times.TORCH, times.FOCAL, times.FLOOR))
    reasons = {one["contender"]: one["no_graph"] for one in session.measure(setup)}
    assert len(tried) == 1
    assert reasons[times.TORCH] == "the host waits for the device"
    assert reasons[times.FOCAL] == "RuntimeError: no capture"
    assert "a capture had failed" in reasons[times.FLOOR]


# Clock


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


# Environment and counters


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


# Times


def row(contender: str, n: int, p: int, ms: float, expected: str = TILED) -> Record:
    return {"group": "crossover", "contender": contender, "anchors": n, "positives": p, "device_ms": [2 * ms] * 3, "graph_ms": [ms] * 3, "expected": expected}  # fmt: skip


def test_the_fit_finds_the_constants_that_made_the_times() -> None:
    rows: list[Record] = []
    for n in (100_000, 1_000_000, 16_000_000):
        for p in (10, 100, 1000):
            expected = BINNED if p > 50 else TILED
            rows += [row(TILED, n, p, 2e-10 * n * p + 0.02, expected), row(BINNED, n, p, 3e-8 * n + 0.1, expected)]
    of = points(rows)
    assert len(of) == 9
    found = fit(of)
    assert found is not None
    assert found == pytest.approx((2e-4, 20.0, 3e-2, 100.0), rel=1e-6)
    assert found.positives == pytest.approx(150)
    assert fit(of[:2]) is None
    assert [point.faster for point in of if point.positives == 100] == [TILED] * 3


def test_a_size_that_one_of_them_lacks_is_no_point() -> None:
    rows = [row(TILED, 10, 1, 1.0), row(BINNED, 10, 1, 1.0) | {"missing": "out of memory"}, row(TILED, 20, 1, 1.0)]
    assert points(rows) == []
    assert points([*rows, row(BINNED, 20, 1, 0.5)]) == [Point(20, 1, 1.0, 0.5, TILED)]


def test_problems_drawn_on_the_device() -> None:
    for size in (
        Size("x", 4000, 30),
        Size("x", 401, 20, 0.0, "late"),
        Size("cases", 1203 * 40, 9, 1.0, "late", "LVIS, ATSS"),
    ):
        problem = draw_problem(size, CPU, torch.bfloat16, 3)
        assert problem.logits.shape == (size.anchors // classes_of(size), classes_of(size))
        assert problem.logits.dtype == torch.bfloat16
        assert problem.box_errors.shape == (size.positives,)
        dense = as_dense(problem, torch.int8)
        assert (dense.targets == 1).sum() == size.positives == (problem.targets < problem.logits.shape[1]).sum()
        assert dense.logits.data_ptr() == problem.logits.data_ptr()
        where = dense.targets.reshape(problem.logits.shape).nonzero()
        assert torch.equal(where[:, 1], problem.targets[where[:, 0]])
        twin = draw_problem(size, CPU, torch.bfloat16, 3)
        assert all(torch.equal(a, b) for a, b in zip(problem[:3], twin[:3], strict=True))
    with pytest.raises(ValueError, match="are no anchors for 30 positives"):
        draw_problem(Size("cases", 800, 30, 1.0, "late", "ATSS"), CPU, torch.float32, 0)


@pytest.mark.parametrize("rehearse", [True, False])
def test_all_that_is_to_be_timed_can_be_drawn(rehearse: bool) -> None:
    wanted = times.setups(rehearse)
    assert len({setup.name for setup in wanted}) == len(wanted)
    for setup in wanted:
        size = setup.size
        assert size.anchors % classes_of(size) == 0
        assert size.anchors // classes_of(size) >= size.positives
    if not rehearse:
        assert {setup.size.case for setup in wanted} >= set(CASES)
        assert [setup.size.case for setup in wanted[:2]] == ["ATSS", "RetinaNet"]  # a short run has those
        assert {times.LOOP, times.BUCKETED} <= set(wanted[0].contenders)


def test_compilations_are_counted_by_tritons_hooks() -> None:
    """As the compiler calls them, before and after, by keyword."""
    triton = pytest.importorskip("triton")
    pytest.importorskip("triton.knobs", reason="hooks of older versions have other names")
    runtime = triton.knobs.runtime
    before = runtime.jit_cache_hook, runtime.jit_post_compile_hook
    info = SimpleNamespace(module="m", name="package.module.count_kernel")
    with Compilations() as counted:
        for _ in range(2):
            arguments = {"key": "k", "repr": "r", "fn": info, "compile": {}, "is_manual_warmup": False}
            assert not runtime.jit_cache_hook(**arguments, already_compiled=False)
            runtime.jit_post_compile_hook(**arguments, already_compiled=False)
    assert [name for name, _ in counted.found] == ["count_kernel"] * 2
    assert all(seconds >= 0 for _, seconds in counted.found)
    assert (runtime.jit_cache_hook, runtime.jit_post_compile_hook) == before


# Oracles


def test_a_thousandth_of_a_gradient_is_missed_by_no_comparison() -> None:
    case = draw(0, 2000, 40)
    sample = oracles.Sample(case.logits.astype(np.float64), case.targets, case.box_errors)
    for loss in oracles.LOSSES:
        values = torch.tensor(oracles.ious_of(case.box_errors) if loss == oracles.RANK_SORT else case.box_errors)
        x = torch.tensor(case.logits, requires_grad=True)
        values.requires_grad_(loss == oracles.ALRP)
        right = oracles.measured(loss, x, torch.tensor(case.targets), values, 1.0, backend="torch")
        wanted = oracles.expected(loss, sample)
        assert oracles.compare(right, wanted, torch.float32).passed
        for name in (name for name in wanted if name.startswith("grad")):
            gradient = right[name]
            active = torch.as_tensor(np.flatnonzero(wanted[name]))
            broken = gradient.clone()
            broken[active[len(active) // 2]] = 0
            for change in (broken, gradient * 1.001, gradient * torch.nan, gradient[:-1]):
                assert not oracles.compare(right | {name: change}, wanted, torch.float32).passed


def test_what_is_not_0_where_0_is_wanted_differs() -> None:
    assert oracles.difference(np.array([0.0, -3e-17]), np.zeros(2)) == math.inf
    assert oracles.difference(np.zeros(2), np.zeros(2)) == 0.0
    assert oracles.difference(np.array([1e-40]), np.zeros(1)) == 0.0  # below float32's normal numbers


def test_a_verdict_can_be_written_down() -> None:
    """Tolerances of float16 are NumPy's."""
    of = oracles.Comparison("x", 0.5, np.float64(1.0))  # pyright: ignore[reportArgumentType]
    assert json.loads(json.dumps({"passed": of.passed})) == {"passed": True}


def test_float16_loses_half_of_its_smallest_number_an_entry() -> None:
    """Gradients of 1e6 negatives, each below float16's normal numbers: their sum is off, and nothing is wrong."""
    n = 1_000_000
    wanted = np.full(n, -2.7e-7)
    wanted[:50] = 2.7e-7 * (n - 50) / 50
    found = torch.as_tensor(wanted).half()
    passed = oracles.compare({"grad_logits": found}, {"grad_logits": wanted}, torch.float16)
    assert oracles.imbalance(found) > 0.04
    assert passed.passed
    found[0] *= 1.5  # a row's gradient
    assert not oracles.compare({"grad_logits": found}, {"grad_logits": wanted}, torch.float16).passed
    single = torch.as_tensor(wanted).float()
    assert oracles.below_normal(wanted, torch.float32) == 0
    single[100:120_000] = 0  # negatives that were lost
    assert not oracles.compare({"grad_logits": single}, {"grad_logits": wanted}, torch.float32).passed


def test_groups_of_the_oracle() -> None:
    """One group is no group; and of two, each is by itself."""
    case = draw(1, 400, 30)
    sample = oracles.Sample(case.logits.astype(np.float64), case.targets, case.box_errors)
    groups = np.arange(400) % 2
    for loss in oracles.LOSSES:
        alone, one = (oracles.expected(loss, sample._replace(groups=g)) for g in (None, np.zeros(400, np.int64)))
        assert all(np.allclose(one[name], alone[name], rtol=1e-12) for name in one)
        values = torch.tensor(oracles.ious_of(case.box_errors) if loss == oracles.RANK_SORT else case.box_errors)
        values.requires_grad_(loss == oracles.ALRP)
        x = torch.tensor(case.logits, requires_grad=True)
        apart = oracles.measured(loss, x, torch.tensor(case.targets), values, 1.0, groups=torch.tensor(groups))
        wanted = oracles.expected(loss, sample._replace(groups=groups))
        assert oracles.compare(apart, wanted, torch.float32).passed
        assert not oracles.compare(apart, alone, torch.float32).passed


def test_tolerances_are_those_of_the_tests() -> None:
    assert losses.SMALL_FP == oracles.SMALL_FP
    assert compare.TOLERANCE == oracles.GRADIENT
    assert oracles.least_tolerance("below_eps", "torch", torch.float32, 1.0) == 0
    assert oracles.least_tolerance("below_eps", "torch", torch.float64, 1.0) == 1e-9
    assert oracles.least_tolerance("random", "triton_tiled", torch.float64, 0.5) == 0
    assert oracles.least_tolerance("odd_step", "triton_tiled", torch.float64, 0.3) == oracles.AMONG


def test_a_context_tells_the_time_that_is_left() -> None:
    context = Context(True, 1000.0)
    assert 0 < context.left <= 1000
    assert Context(True, 0.0).left <= 0
    assert (context.some([1, 2, 3], 2), Context(False, 1.0).some([1, 2, 3], 2)) == ([1, 2], [1, 2, 3])


# Diff and command line


def report_of(device: str, ms: float, passed: bool = True) -> Record:
    size = {"group": "cases", "case": "ATSS", "anchors": 1000, "positives": 8, "delta": 1.0, "scores": "late"}
    rows = [
        size | {"dtype": "float32", "targets": "classes", "contender": name, "device_ms": [0.9 * of, of, 1.1 * of], "graph_ms": None, "host_ms": [1, 1, 1]}
        for name, of in (("triton_binned", ms), ("sigmoid focal loss", 3.0))
    ]  # fmt: skip
    check = {"check": "aLRP: random", "backend": "triton_binned", "dtype": "float32", "passed": passed}
    steps = {"times": {"records": rows}, "correctness": {"records": [check]}}
    return {"run": {"device": device, "commit": "a" * 40, "dirty": False, "date": "today"}, "steps": steps}


def test_diff_of_two_runs() -> None:
    text = diff.diff(report_of("H100", 2.0), report_of("H100", 1.0, passed=False))
    lines = text.splitlines()
    (first,) = [line for line in lines if "triton_binned" in line and "| device |" in line]
    assert "| 2 (1.8 to 2.2) | 1 (0.9 to 1.1) | 0.500 | 0.409 to 0.611 |" in first
    assert lines.index(first) < next(k for k, line in enumerate(lines) if "sigmoid focal loss" in line)  # sorted
    assert "4 times in both; 0 in A alone, 0 in B alone." in text
    assert "- aLRP: random triton_binned float32: right in A, wrong in B" in text
    assert "none changed" in diff.diff(report_of("H100", 2.0), report_of("H100", 1.0))


def test_diff_refuses_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="times of two devices are not compared: A is of H100, B is of A100"):
        diff.diff(report_of("H100", 1.0), report_of("A100", 1.0))
    with pytest.raises(ValueError, match="B is a rehearsal"):
        diff.diff(report_of("H100", 1.0), report_of("H100", 1.0) | {"rehearsal": True})
    with pytest.raises(ValueError, match="A holds no times"):
        diff.diff({"run": {}, "kernels": []}, report_of("H100", 1.0))
    for name, device in (("a", "H100"), ("b", "A100")):
        (tmp_path / f"{name}.json").write_text(json.dumps(report_of(device, 1.0)))
    a, b = (str(tmp_path / f"{name}.json") for name in "ab")
    assert command.main(["diff", a, a]) == 0
    assert "| 1.000 |" in capsys.readouterr().out
    assert command.main(["diff", a, b]) == 2
    assert "two devices" in capsys.readouterr().err


def test_diff_of_cpu_runs() -> None:
    stored = results.load(command.RESULTS / "cpu.json")
    text = diff.diff(stored, stored)
    assert f"{len(stored['rows'])} times in both" in text
    assert "No checks to compare." in text


def parsed(*arguments: str) -> dict[str, Any]:
    return vars(command._parse(list(arguments)))  # pyright: ignore[reportPrivateUsage]


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed()["command"] == parsed("--quick")["command"] == parsed("run", "--seed", "3")["command"] == "run"
    gpu = parsed("gpu", "--minutes", "4", "--rehearse", "--steps", "times", "environment")
    assert (gpu["minutes"], gpu["rehearse"], gpu["steps"]) == (4.0, True, ["times", "environment"])
    assert command.main(["--device", "cuda"]) == 2
    assert "python -m bench gpu" in capsys.readouterr().err
    for wrong in (["gpus"], ["diff", "a.json"], ["show", "missing.json"], ["gpu", "--steps", "timing"]):
        with pytest.raises(SystemExit, match="2"):
            command.main(wrong)
    assert command.main(["show", str(command.RESULTS / "cpu.json")]) == 0
    assert "## anchors" in capsys.readouterr().out


@needs_torchvision
def test_the_training_asks_for_no_lightning() -> None:
    pytest.importorskip("sklearn")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('lightning', 'torchmetrics', 'faster_coco_eval')));"
        "from bench.gpu import training; from bench.gpu.work import Context;"
        "print([one['falls'] for one in training._train(Context(True, 60.0))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "[True, True]\n", done.stderr
