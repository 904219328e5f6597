"""`python -m bench gpu`: files of results, and the workers that fill them."""

import math
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from bench.gpu import clock, counters, results, tables, times, worker
from bench.gpu.work import Context, Record, Skipped, Unit, plain
from bench.report import fill
from bench.speed.problems import Size

needs_torchvision = pytest.mark.skipif(not find_spec("torchvision"), reason="focal loss is torchvision's")


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
