"""`python -m bench gpu`: two runs compared, the command line, what it imports."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import diff
from bench.gpu import results
from bench.gpu.work import Record


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
