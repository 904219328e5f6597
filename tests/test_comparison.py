"""The comparison of losses: what its probes see, which detections are true, and the tables and plots made of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tests.coco_data")
pytest.importorskip("sklearn", reason="the comparison's data are scikit-learn's")

from alrp_triton.trainer import Found
from bench import comparison, side_by_side
from examples import digits
from tests.coco_data import MARKS

pytestmark = MARKS

SCENES, HELD_OUT = 24, 3


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    digits.write(folder, SCENES, HELD_OUT, seed=1)
    return folder


@pytest.fixture(scope="module")
def report(scenes: Path, one_thread: None) -> dict[str, Any]:
    """A comparison of two losses and two seeds, a few steps long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "CONTENDERS", {name: comparison.CONTENDERS[name] for name in ("aLRP", "focal + L1")})
        patch.setattr(comparison, "_LOGGED", 2)
        runs = [
            comparison.train_one(name, 1e-3, seed, 4, scenes) for name in comparison.CONTENDERS for seed in range(2)
        ]
        times = comparison.time_all(scenes, 2)
    tuning = [
        {"contender": run["contender"], "lr": 1e-3, "end": run["evaluations"][-1]} for run in runs if run["seed"] == 0
    ]
    run = {"device": "x", "torch": "y", "commit": "z", "dirty": False, "date": "now"}
    return {"run": run, "command": "c", "comparison": runs, "tuning": tuning, "times": times}


def test_gradients_are_balanced_by_alrp_and_not_by_focal_loss(report: dict[str, Any]) -> None:
    for run in report["comparison"]:
        ratios = side_by_side.ratios(run)
        assert [entry["step"] for entry in run["log"]] == [2, 4]
        assert all(entry["positives"] > 0 and entry["boxes"] > 0 for entry in run["log"])
        balanced = [abs(ratio - 1) < 1e-5 for ratio in ratios]
        assert all(balanced) if run["contender"] == "aLRP" else not any(balanced)


def test_a_run(report: dict[str, Any]) -> None:
    for run in report["comparison"]:
        assert [entry["step"] for entry in run["evaluations"]] == [1, 2, 3, 4]
        assert {"AP", "AP50", "AP75", "oLRP", "oLRP_loc", "oLRP_FP", "oLRP_FN"} < set(run["evaluations"][-1])
    for of in report["times"]["losses"].values():
        assert 0 < of["share"] < 1
        assert of["loss_ms"] == sorted(of["loss_ms"])
    assert report["times"]["positives"] > 0
    first, second = (run["evaluations"][-1] for run in report["comparison"][:2])
    assert first != second  # of other seeds


def test_true_positives() -> None:
    boxes = [[0, 0, 10, 8], [0, 0, 10, 10], [50, 50, 60, 60], [50, 50, 60, 56], [0, 0, 4, 10]]
    detections = {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.tensor([0, 0, 0, 1, 0]),  # the third is of another class
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6, 0.95]),  # the last has an IoU of 0.4
    }
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]), "labels": torch.tensor([0, 1])}
    scores, ious = comparison.true_positives([Found(0, detections, truth)])
    assert np.allclose(scores, [0.9, 0.6])
    assert np.allclose(ious, [0.8, 0.6])


def test_tables_and_plots(report: dict[str, Any], tmp_path: Path) -> None:
    for name in ("results", "gradients", "correlation", "times", "tuning"):
        lines = side_by_side.render(report, name).splitlines()
        assert [line.split("|")[1].strip() for line in lines[2:]] == ["aLRP", "focal + L1"]
    assert "4 runs of 4 steps of 8 images" in side_by_side.render(report, "run")
    written = side_by_side.draw(report, tmp_path, "x")
    assert [path.name for path in written] == ["x-curves.png", "x-correlation.png", "x-times.png"]
    assert all(path.stat().st_size > 5000 for path in written)


def test_the_best_learning_rate_is_not_the_last_that_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"aLRP": 0.003, "RS": 0.03, "focal + L1": 0.0001}
    monkeypatch.setattr(comparison, "CONTENDERS", dict.fromkeys(best))

    def run(wanted: list[tuple[str, float]]) -> list[dict[str, Any]]:
        return [
            {"diverged": 7 if lr > 0.03 else None, "evaluations": [{"AP": 0.5 - abs(np.log10(lr / best[name])) / 10}]}
            for name, lr in wanted
        ]

    tuning = comparison._tune(run)  # pyright: ignore[reportPrivateUsage]
    tried = {name: [entry["lr"] for entry in tuning if entry["contender"] == name] for name in best}
    assert tried == {
        "aLRP": [0.001, 0.003, 0.01],
        "RS": [0.001, 0.003, 0.01, 0.03, 0.1],
        "focal + L1": [0.0001, 0.0003, 0.001, 0.003, 0.01],
    }
    lines = side_by_side.render({"tuning": tuning, "comparison": [{"contender": name} for name in best]}, "tuning")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
    assert rows[0][1:] == ["0.0001", "0.0003", "0.001", "0.003", "0.01", "0.03", "0.1"]
    assert rows[2:] == [
        ["aLRP", "", "", "45.2", "50.0", "44.8", "", ""],
        ["RS", "", "", "35.2", "40.0", "45.2", "50.0", "diverged"],
        ["focal + L1", "50.0", "45.2", "40.0", "35.2", "30.0", "", ""],
    ]


def test_a_run_that_diverges(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_step = comparison.RankingDetector.training_step

    def diverges(model: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        if model.global_step == 2:
            batch.images[0] *= np.nan
        return training_step(model, batch, batch_idx)

    monkeypatch.setattr(comparison.RankingDetector, "training_step", diverges)
    run = comparison.train_one("aLRP", 1e-3, 0, 4, scenes)
    assert run["diverged"] == 3
    assert [entry["step"] for entry in run["evaluations"]] == [1, 2]

    monkeypatch.setattr(comparison, "CONTENDERS", {"aLRP": comparison.CONTENDERS["aLRP"]})
    short = {"diverged": None, "evaluations": [{"AP": 0.5}]}

    def nothing(*arguments: Any) -> dict[str, Any]:
        return {"turns": 1}

    def run_apart(jobs: list[tuple[Any, ...]], *arguments: Any) -> list[dict[str, Any]]:
        return [run if job[3] == comparison.STEPS else short for job in jobs]

    monkeypatch.setattr(comparison, "_kept", nothing)
    monkeypatch.setattr(comparison, "write", nothing)
    monkeypatch.setattr(comparison, "_run_apart", run_apart)
    with pytest.raises(ValueError, match="not finite at the learning rate of the best short run: aLRP, seed 0, step 3"):
        comparison.compare(1, scenes, 1)
    with pytest.raises(ValueError, match=r"times\.json is of 1 turns, not of 2"):
        comparison.compare(1, scenes, 2)


def test_what_is_left_of_a_comparison_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    for _ in range(2):
        assert comparison._kept(tmp_path / "x.json", lambda: made.append(1) or {"a": 1}) == {"a": 1}  # pyright: ignore[reportPrivateUsage]
    assert made == [1]
    done = {"settings": comparison.settings_of("aLRP", 1e-3, 0, 4)}
    (tmp_path / "aLRP-0.001-0-4.json").write_text(json.dumps(done))
    monkeypatch.setattr("subprocess.run", None)  # it was done
    assert comparison._run_apart([("aLRP", 1e-3, 0, 4)], tmp_path, tmp_path) == [done]  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(comparison, "BATCH", 5)
    with pytest.raises(ValueError, match="is of a run with other settings"):
        comparison._run_apart([("aLRP", 1e-3, 0, 4)], tmp_path, tmp_path)  # pyright: ignore[reportPrivateUsage]


def test_a_result_file_is_checked_by_repeating(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run for run in report["comparison"] if run["seed"] == 0]

    def nothing(*arguments: Any) -> None:
        pass

    def repeated(*arguments: Any) -> list[dict[str, Any]]:
        return runs

    monkeypatch.setattr(comparison, "write", nothing)
    monkeypatch.setattr(comparison, "_run_apart", repeated)
    end = report["tuning"][1]["end"]
    report["tuning"][1]["end"] = {key: (1 + 1e-12) * end[key] for key in ("AP", "oLRP")}  # as in files of before
    (tmp_path / "x.json").write_text(json.dumps(report))
    assert comparison.check(tmp_path / "x.json", tmp_path)["checked"]["runs"] == 2
    monkeypatch.setitem(runs[0], "diverged", 3)
    with pytest.raises(ValueError, match="aLRP ended at None, the result file says"):
        comparison.check(tmp_path / "x.json", tmp_path)
    monkeypatch.setitem(runs[0], "diverged", None)
    report["tuning"][0]["end"] = {**report["tuning"][0]["end"], "AP": 0.123}
    (tmp_path / "x.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"aLRP ended at .*, the result file says .*0\.123"):
        comparison.check(tmp_path / "x.json", tmp_path)
