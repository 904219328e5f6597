"""`python -m bench gpu`: rehearsed as a whole; and each part of it that a GPU would have to be there for, by stand-ins."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench.gpu import results, runner, tables
from bench.gpu.processes import Job
from bench.gpu.work import Record
from bench.gpu.worker import POISONED, STEPS
from tests.conftest import ROOT

pytest.importorskip("triton")
pytest.importorskip("torchvision.ops", exc_type=ImportError)
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path, str]:
    """The report of a rehearsal of all steps, its folder, and what was printed. Where no Lightning is installed."""
    folder, missing = tmp_path_factory.mktemp("rehearsal"), tmp_path_factory.mktemp("missing")
    for name in ("lightning", "torchmetrics", "faster_coco_eval"):
        (missing / f"{name}.py").write_text("raise ImportError(f'{__name__} need not be there')\n")
    command = [sys.executable, "-m", "bench", "gpu", "--rehearse", "--out", str(folder), "--commit", "0123456789abcdef"]
    environment = os.environ | {"PYTHONPATH": str(missing)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (file,) = folder.glob("*.json")
    assert done.returncode == 0, done.stdout + done.stderr + file.with_suffix(".log").read_text()[-3000:]
    return results.load(file), folder, done.stdout


def test_a_rehearsal_has_every_part(rehearsal: tuple[Record, Path, str]) -> None:
    report, folder, printed = rehearsal
    assert tuple(report["steps"]) == STEPS
    assert report["finished"]
    assert report["wrong"] == []
    status = {name: step["status"] for name, step in report["steps"].items()}
    assert status == dict.fromkeys(STEPS, "done") | {"launches": "skipped", "counters": "skipped"}
    files = [path.name for path in folder.rglob("*")]
    assert len(files) == 2
    assert all(name.startswith("rehearsal_0123456789_") for name in files)
    for step in ("environment", "correctness", "times", "training"):
        assert f"| {step} | done |" in printed


def test_a_rehearsal_checks_every_kind(rehearsal: tuple[Record, Path, str]) -> None:
    report = rehearsal[0]
    checks = [one for one in results.records(report, "correctness") if "passed" in one]
    assert len(checks) > 50
    assert all(one["passed"] for one in checks)
    assert {one["backend"] for one in checks if "backend" in one} == {"triton_tiled", "triton_binned", "torch"}
    names = [one["check"] for one in checks]
    kinds = (
        "ties_at_knots",
        "focal loss compiled",
        "offset 3",
        "permuted",
        "groups",
        "classes uint8",
        "dense bool",
        "N 1600",
        "waits for nothing",
    )
    kinds += ("the same bits", "captured in a graph", "torch.compile", "process group of one", "an assertion", "logits")
    for kind in kinds:
        assert any(kind in name for name in names), kind
    assert results.records(report, "correctness", what="compilations")
    assert {one["what"] for one in results.records(report, "environment")} >= {"run", "copy", "launch", "nvidia-smi"}


def test_a_rehearsal_times_and_trains(rehearsal: tuple[Record, Path, str]) -> None:
    report = rehearsal[0]
    rows = results.records(report, "times")
    assert {row["group"] for row in rows} == {"cases", "distributions", "anchors", "positives", "crossover"}
    for row in rows:
        low, middle, high = row["device_ms"]
        assert 0 < low <= middle <= high
        assert row["host_ms"]
        assert row["graph_ms"] or row["no_graph"]
        assert row["difference"] is None or row["difference"] < 1e-2
        assert "wrong" not in row
    trained = results.records(report, "training")
    assert {one["loss"] for one in trained} == {"aLRP", "focal + GIoU"}
    assert all(0 < one["share"] < 1 and one["finite"] and one["falls"] for one in trained)


def as_gpu(report: Record) -> Record:
    """The report under the name of a card that does not exist, so that tables are made of it."""
    report = json.loads(json.dumps(report))
    report["run"] |= {"device": "Imaginary H100", "device_type": "cuda"}
    return report | {"rehearsal": False}


def test_every_table_of_a_report(rehearsal: tuple[Record, Path, str], tmp_path: Path) -> None:
    report = as_gpu(rehearsal[0])
    (tmp_path / "imaginary-h100_0123456789_20260101-000000.json").write_text(json.dumps(report))
    (tmp_path / "rehearsal_0123456789_20260102-000000.json").write_text(json.dumps(rehearsal[0]))
    wanted = {
        "run": "| triton_binned | float32 |",
        "cases": "| ATSS | 800 | 8 | **triton_tiled** |",
        "sizes": "| RetinaNet late | bfloat16 | int8 | 800 |",
        "crossover": "| N = 400 |",
        "launches": "Not measured in this run: single launches",
        "counters": "Not measured in this run: the counters (all: a rehearsal has no device",
        "training": "| focal + GIoU | 4 |",
    }
    assert set(wanted) == set(tables.TABLES)
    for name, part in wanted.items():
        text = tables.render(name, tmp_path)
        assert "Imaginary H100" in text
        assert "rehearsal" not in text.replace("a rehearsal has", "")
        assert part in text
        assert text.count("Imaginary H100") == 1  # the rehearsal has no table
    modelled = [line for line in tables.render("cases", tmp_path).splitlines() if "**triton_binned**" in line]
    assert modelled[0].split("|")[-2].strip()  # beside what was measured
    assert all(part in tables.markdown(report) for part in wanted.values())


def test_what_is_kept_of_a_report(
    rehearsal: tuple[Record, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = as_gpu(rehearsal[0])
    checks = [one for one in results.records(report, "correctness") if "passed" in one]
    report["steps"]["correctness"]["records"].append(checks[0] | {"passed": False})
    marked = [row for row in results.records(report, "times") if "device_ms" in row]
    for row in marked:
        row["wrong"] = True
    name = "imaginary-h100_0123456789_20260101-000000.json"
    file, folder = tmp_path / name, tmp_path / "kept"
    folder.mkdir()
    file.write_text(json.dumps(report))
    assert command._keep(file, "it rained", folder) == 0  # pyright: ignore[reportPrivateUsage]
    kept = results.load(folder / name)
    assert kept["cause"] == "it rained"
    assert not any(row.get("wrong") for row in results.records(kept, "times"))
    assert tables.failures(kept) == tables.failures(report) != []
    assert [one for one in results.records(kept, "correctness") if one.get("passed")] == []
    assert sum(one["checks"] for one in results.by_kind(kept)) == len(checks) + 1
    assert results.by_kind(kept) == results.by_kind(report)
    assert results.compact(kept) == kept
    assert "it rained" in tables.TABLES["run"](kept)
    assert "checks failed" not in tables.TABLES["cases"](kept)
    without = results.compact(report)
    assert all(row["wrong"] for row in results.records(without, "times") if "device_ms" in row)
    file.write_text(json.dumps(rehearsal[0]))
    assert command._keep(file, "", folder) == 2  # pyright: ignore[reportPrivateUsage]
    assert "is no run of a GPU" in capsys.readouterr().err


def test_plots_of_a_report(rehearsal: tuple[Record, Path, str], tmp_path: Path) -> None:
    from bench.gpu import plots

    drawn = plots.draw(as_gpu(rehearsal[0]), tmp_path)
    assert [path.name for path in drawn] == [
        f"imaginary-h100-{group}.png" for group in ("anchors", "positives", "cases")
    ]


def test_without_a_gpu_there_is_an_error_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert runner.main(runner.Options()) == 2
    assert "no GPU that torch can use" in capsys.readouterr().err
    assert runner.main(runner.Options(rehearse=True, minutes=-1.0)) == 2
    assert "--minutes must be more than 0, got -1" in capsys.readouterr().err


# A worker that does what its shard says, in the protocol of bench.gpu.worker, without torch.
FAKE = """
import json, os, signal, sys, time
step, shard, done, attempt = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
say = lambda line: print(json.dumps(line), flush=True)
units = ["one", "two", "three"]
for index, unit in list(enumerate(units))[done:]:
    say({"begin": unit, "index": index})
    if unit == "two" and shard == "crashes":
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if unit == "two" and shard == "raises":
        say({"error": unit, "text": "ValueError: x"})
        continue
    if unit == "two" and shard == "hangs":
        time.sleep(10_000)
    if unit == "two" and shard == "garbage":
        print("not a record", flush=True)
        print("[1, 2]", flush=True)
    if unit == "two" and shard == "stops":
        say({"left_out": units[index:]})
        break
    if shard == "skipped":
        say({"skipped": "for a reason"})
        break
    if step == "correctness":
        right = not (unit == "two" and shard == "triton_tiled float32")
        say({"record": {"check": unit, "backend": shard.split()[0], "dtype": "float32", "passed": right}})
    elif step == "times":
        size = {"group": "cases", "case": "ATSS", "anchors": 10, "positives": 2, "delta": 1.0, "scores": "late"}
        for name in ("auto", "triton_tiled", "triton_binned"):
            row = size | {"dtype": "float32", "targets": "classes", "contender": name, "samples": 1}
            row |= {"device_ms": [1, 2, 3], "graph_ms": None, "host_ms": [1, 2, 3], "backlog": True}
            say({"record": row | {"peak_mib": 1.0, "gb_per_s": 1.0, "difference": 0.0}})
    else:
        say({"record": {"what": unit, "shard": shard}})
    if unit == "two" and shard == "poisons":
        sys.exit(POISONED)
say({"end": True})
os._exit(0 if shard != "crashes at its end" else 9)
""".replace("POISONED", str(POISONED))


def fake(job: Job, seconds: float, done: int, attempt: int) -> list[str]:
    return [sys.executable, "-c", FAKE, job.step, job.shard, str(done), str(attempt)]


def run_fakes(folder: Path, shards: dict[str, list[str]], minutes: float = 60.0) -> tuple[int, Record]:
    steps = tuple(step for step in STEPS if step in shards)
    options = runner.Options(folder, minutes, rehearse=True, commit="abc", steps=steps)
    status = runner.main(options, fake, lambda step: shards[step])
    return status, results.load(max(folder.glob("*.json")))


def test_what_crashes_or_prints_garbage_leaves_the_rest(tmp_path: Path) -> None:
    status, report = run_fakes(tmp_path, {"environment": ["garbage"], "counters": ["crashes"], "training": ["good"]})
    assert status == 3
    for step, shard in (("environment", "garbage"), ("training", "good")):
        assert report["steps"][step]["status"] == "done"
        assert [one["what"] for one in results.records(report, step)] == ["one", "two", "three"]
        assert results.records(report, step)[0]["shard"] == shard
    crashed = report["steps"]["counters"]
    assert crashed["status"] == "failed"
    assert "two: signal 11" in crashed["reason"]
    assert "the last words" in crashed["reason"]
    assert crashed["shards"][0]["crashed"] == ["two"]
    # Another process went on behind the unit that crashed.
    assert [one.get("what", "error") for one in crashed["records"]] == ["one", "error", "three"]
    log = max(tmp_path.glob("*.log")).read_text()
    assert "printed what is no record: not a record" in log
    assert "printed what is no record: [1, 2]" in log


def test_what_hangs_is_killed_in_time_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hanging step has six seconds, the other all that is left of ten minutes."""
    monkeypatch.setattr(runner, "SHARES", {"environment": 1.0, "training": 99.0})
    status, report = run_fakes(tmp_path, {"environment": ["hangs"], "training": ["good"]}, minutes=10.0)
    assert status == 3
    hung = report["steps"]["environment"]
    assert hung["status"] == "out of time"
    assert "hangs: killed in " in hung["reason"]
    began = "killed in its start" not in hung["reason"]  # on a machine so busy that six seconds are not enough
    assert [one["what"] for one in results.records(report, "environment")] == ["one"] * began
    assert report["steps"]["training"]["status"] == "done"
    assert [one["what"] for one in results.records(report, "training")] == ["one", "two", "three"]


def test_what_stops_by_itself_says_what_it_left_out(tmp_path: Path) -> None:
    status, report = run_fakes(tmp_path, {"environment": ["stops"], "counters": ["skipped"]})
    assert status == 3
    assert report["steps"]["environment"]["status"] == "out of time"
    assert report["steps"]["environment"]["shards"][0]["left_out"] == ["two", "three"]
    assert report["steps"]["counters"] | {"shards": [], "records": []} == {
        "status": "skipped", "limit_s": report["steps"]["counters"]["limit_s"], "reason": "skipped: for a reason",
        "seconds": report["steps"]["counters"]["seconds"], "shards": [], "records": [],
    }  # fmt: skip


def test_a_device_left_with_errors_costs_no_more_than_a_process(tmp_path: Path) -> None:
    status, report = run_fakes(tmp_path, {"training": ["poisons", "crashes at its end"]})
    assert status == 0
    assert [one["what"] for one in results.records(report, "training", shard="poisons")] == ["one", "two", "three"]
    assert "crashed" not in report["steps"]["training"]["shards"][0]


def test_a_skipped_step_alone_is_no_failure(tmp_path: Path) -> None:
    assert run_fakes(tmp_path, {"counters": ["skipped"], "training": ["good"]})[0] == 0


def test_an_error_of_a_unit_is_told(tmp_path: Path) -> None:
    status, report = run_fakes(tmp_path, {"training": ["raises"]})
    assert status == 3
    assert report["steps"]["training"]["reason"] == "two: ValueError: x"


def test_a_wrong_result_marks_its_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = {"correctness": ["triton_tiled float32", "triton_binned float32", "crashes"], "times": ["all"]}
    status, report = run_fakes(tmp_path, shards)
    assert status == 1
    assert sorted(report["wrong"]) == ["two", "two triton_tiled float32"]
    crashed = results.records(report, "correctness", shard="crashes")
    assert [one["passed"] for one in crashed] == [False]
    assert "signal 11" in crashed[0]["error"]
    marked = {row["contender"]: row.get("wrong", False) for row in results.records(report, "times")}
    assert marked == {"auto": True, "triton_tiled": True, "triton_binned": False}
    printed = capsys.readouterr().out
    assert "2 checks failed: " in printed
    assert "triton_tiled WRONG" in printed
    table = tables.TABLES["cases"](as_gpu(report))
    assert table.count(tables.WRONG) == 6
    assert "**2 checks failed: " in table


def test_a_result_that_disagrees_is_marked() -> None:
    assert runner.marked({"contender": "auto", "disagrees": True}, set())["wrong"]
    assert "wrong" not in runner.marked({"contender": "published loop"}, {"triton_tiled"})
    assert runner.marked({"loss": "aLRP"}, {"triton_binned"})["wrong"]
    assert "wrong" not in runner.marked({"loss": "focal + GIoU"}, {"triton_binned"})


def wait_for(condition: Any) -> None:
    while not condition():
        time.sleep(0.05)


@pytest.fixture
def hanging_run(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A run in a process of its own, whose worker hangs in its second unit."""
    code = (
        "import sys, tests.bench.test_gpu as t\nfrom pathlib import Path\n"
        f"sys.exit(t.run_fakes(Path({str(tmp_path)!r}), {{'training': ['hangs']}})[0])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield process, tmp_path
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def children(pid: int) -> list[int]:
    """Of all threads."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def alive(pid: int) -> bool:
    """Whether it runs: one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_is_ended_keeps_what_it_had_and_leaves_nobody(
    hanging_run: tuple["subprocess.Popen[str]", Path],
) -> None:
    process, folder = hanging_run
    assert process.stdout is not None
    wait_for(lambda: "what=one" in process.stdout.readline())  # pyright: ignore[reportOptionalMemberAccess]
    workers = children(process.pid)
    assert workers
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait() == 3
    (file,) = folder.glob("*.json")
    report = results.load(file)
    assert not report["finished"]
    assert report["ended_by"] == "SIGTERM"
    assert report["steps"]["training"]["status"] == "cut short"
    assert [one["what"] for one in results.records(report, "training")] == ["one"]
    wait_for(lambda: not any(map(alive, workers)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_ends_soon_after_its_runner(tmp_path: Path) -> None:
    """One that is killed can end nobody."""
    code = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'bench.gpu.worker', 'correctness', 'graphs', '--until', '9e9']\n"
        "command += ['--rehearse', '--parent', str(os.getpid())]\n"
        "worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)\n"
        "worker.stdout.readline()\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(10_000)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    runner_process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)  # fmt: skip
    assert runner_process.stdout is not None
    worker = int(runner_process.stdout.readline())
    assert alive(worker)
    runner_process.kill()
    runner_process.wait()
    runner_process.stdout.close()
    wait_for(lambda: not alive(worker))


def test_the_time_is_shared_and_what_is_left_over_goes_on() -> None:
    assert runner.limits(STEPS, "environment", 480) == pytest.approx(480 * 10 / 110)
    assert runner.limits(STEPS, "correctness", 470) == pytest.approx(470 * 30 / 100)
    assert runner.limits(STEPS, "training", 100) == pytest.approx(100)
    assert set(runner.SHARES) == set(STEPS)
    assert runner.workers_for("correctness", 16, "Default") == 8
    assert runner.workers_for("correctness", 2, "") == 2
    assert runner.workers_for("correctness", 16, "Exclusive_Process") == 1
    assert runner.workers_for("times", 16, "Default") == 1
