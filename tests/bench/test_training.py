"""The comparison of losses: what its probes see, which detections are true, and the tables and plots made of it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tests.support.coco_data")
pytest.importorskip("sklearn", reason="the comparison's data are scikit-learn's")

import yaml
from torchvision.transforms import v2

from alrp_triton.trainer import Found
from bench.training import command, one, studies, tables
from bench.training import runs as running
from examples import digits
from tests.conftest import ROOT
from tests.support.coco_data import MARKS

pytestmark = MARKS

SCENES, HELD_OUT = 24, 3
_DIGITS = studies.STUDIES["digits"]
# With a period of an epoch, which nobody knows before the data are there.
TINY = _DIGITS._replace(
    model={**_DIGITS.model, "period": None}, losses=("aLRP", "focal + L1"), steps=4, seeds=2, turns=2
)


def nothing(*arguments: Any, **named: Any) -> None:
    pass


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    digits.write(folder, SCENES, HELD_OUT, seed=1)
    (folder / "annotations" / "instances_test.json").symlink_to(folder / "annotations" / "instances_val.json")
    (folder / "test").symlink_to(folder / "val")
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(studies.STUDIES, "digits", TINY)
    monkeypatch.setattr(one, "_LOGGED", 2)


@pytest.fixture(scope="module")
def report(scenes: Path, one_thread: None) -> dict[str, Any]:
    """A comparison of two losses and two seeds, a few steps long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(studies.STUDIES, "digits", TINY)
        patch.setitem(studies.DATA, "digits", studies.DATA["digits"]._replace(has_test=True))
        patch.setattr(one, "_LOGGED", 2)
        runs = [one.train_one("digits", loss, 1e-3, seed, 4, scenes) for loss in TINY.losses for seed in range(2)]
        times = one.time_all("digits", scenes)
    tuning = [{"loss": run["loss"], "lr": 1e-3, "end": run["evaluations"][-1]} for run in runs if run["seed"] == 0]
    run = {"device": "x", "torch": "y", "commit": "z", "dirty": False, "date": "now"}
    return {"run": run, "command": "c digits", "comparison": runs, "tuning": tuning, "times": times}


def test_gradients_are_balanced_by_alrp_and_not_by_focal_loss(report: dict[str, Any]) -> None:
    for run in report["comparison"]:
        ratios = tables.ratios(run)
        assert [entry["step"] for entry in run["log"]] == [2, 4]
        assert all(entry["positives"] > 0 and entry["boxes"] > 0 for entry in run["log"])
        balanced = [abs(ratio - 1) < 1e-5 for ratio in ratios]
        assert all(balanced) if run["loss"] == "aLRP" else not any(balanced)


def test_a_run(report: dict[str, Any]) -> None:
    for run in report["comparison"]:
        assert [entry["step"] for entry in run["evaluations"]] == [1, 2, 3, 4]
        end = run["evaluations"][-1]
        assert {"AP", "AP50", "AP75", "oLRP", "oLRP_loc", "oLRP_FP", "oLRP_FN"} < set(end)
        # The second test's pictures are the held-out ones here.
        assert {key: run["test"][key] for key in ("AP", "oLRP")} == {key: end[key] for key in ("AP", "oLRP")}
        assert run["test"]["true_positives"] == run["true_positives"]
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
    scores, ious = one.true_positives([Found(0, detections, truth)])
    assert np.allclose(scores, [0.9, 0.6])
    assert np.allclose(ious, [0.8, 0.6])


def test_tables_and_plots(report: dict[str, Any], tmp_path: Path) -> None:
    for name in ("results", "test", "course", "gradients", "correlation", "times", "tuning", "choice"):
        lines = tables.render(report, name).splitlines()
        assert [line.split("|")[1].strip() for line in lines[2:]] == ["aLRP", "focal + L1"]
    assert "4 runs of 4 steps of 8 images" in tables.render(report, "run")
    assert '`python -m bench train repeat digits --loss "aLRP" --seed 0`' in tables.render(report, "run")
    written = tables.draw(report, tmp_path, "x")
    assert [path.name for path in written] == ["x-curves.png", "x-correlation.png", "x-times.png"]
    assert all(path.stat().st_size > 5000 for path in written)
    untimed = {key: value for key, value in report.items() if key != "times"}
    assert [path.name for path in tables.draw(untimed, tmp_path, "y")] == ["y-curves.png", "y-correlation.png"]
    assert "Times" not in tables.render(untimed, "run")


def test_losses_are_compared_seed_by_seed() -> None:
    values = {"A": (0.5, 0.25), "B": (0.25, 0.75)}
    runs: list[dict[str, Any]] = [
        {
            "loss": loss,
            "seed": seed,
            "score_iou_correlation": ap,
            "evaluations": [{"AP": 0.0}, {"AP": ap, "oLRP": 1 - ap}],
        }
        for loss, aps in values.items()
        for seed, ap in enumerate(aps)
    ]
    runs.reverse()
    runs.sort(key=lambda run: run["loss"])
    line = tables.render({"comparison": runs}, "paired").splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "B",
        "+12.5 (-25.0 to +50.0)",
        "-12.5 (-50.0 to +25.0)",
        "+0.125 (-0.250 to +0.500)",
    ]
    for run in runs:
        run["test"] = {"AP": run["score_iou_correlation"] / 2, "score_iou_correlation": -run["score_iou_correlation"]}
    line = tables.render({"comparison": runs}, "paired").splitlines()[-1]
    of_test = "+6.2 (-12.5 to +25.0)", "-0.125 (-0.500 to +0.250)"
    assert [cell.strip() for cell in line.split("|")[-3:-1]] == [*of_test]


@pytest.mark.parametrize("name", ["digits", "trees"])
def test_examples_are_trained_on_as_the_studies_do(name: str) -> None:
    """``make demo`` and ``make trees``."""
    settings = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())
    study = {**studies.STUDIES, "digits": _DIGITS}[name]  # here digits are TINY
    assert settings["trainer"]["max_steps"] == study.steps
    if name == "trees":
        assert settings["trainer"]["val_check_interval"] == study.steps // study.evaluations
    model, data = settings["model"], settings["data"]
    assert {"period": None, **{key: value for key, value in model.items() if key != "lr"}} == study.model
    assert (data["batch"], data["workers"]) == (study.batch, 0)
    asked = [
        getattr(v2, one["class_path"].rpartition(".")[2])(**one.get("init_args", {}))
        for one in data.get("transforms", [])
    ]
    assert asked or data["flip"] is False
    assert list(map(repr, asked)) == list(map(repr, studies.DATA[study.data].transforms))


def test_data_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whole: what an interrupted call left is written anew."""
    written: list[tuple[str, int]] = []

    def write(folder: Path, training: int, held_out: int, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        written.append((folder.name, seed))
        if len(written) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(digits, "write", write)
    with pytest.raises(KeyboardInterrupt):
        studies.data_of("digits", tmp_path)
    for _ in range(2):
        assert studies.data_of("digits", tmp_path) == tmp_path / "data" / "digits"
        assert studies.data_of("digits", tmp_path, tuning=True) == tmp_path / "data" / "digits-to-tune"
    assert written == [("digits.partial", 0), ("digits.partial", 0), ("digits-to-tune.partial", 1)]
    monkeypatch.setattr(studies.trees, "fetch", nothing)
    monkeypatch.setattr(studies.trees, "write", lambda folder, wheel: folder.mkdir())  # pyright: ignore[reportUnknownLambdaType, reportUnknownMemberType]
    # The second test is what no rate is chosen on.
    assert studies.data_of("trees", tmp_path, tuning=True) == studies.data_of("trees", tmp_path)


def test_the_best_learning_rate_is_not_the_last_that_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"aLRP": 0.003, "RS": 0.03, "focal + L1": 0.0001}
    monkeypatch.setitem(studies.STUDIES, "digits", TINY._replace(losses=tuple(best)))

    def run(jobs: Sequence[running.Job]) -> list[dict[str, Any]]:
        assert {(job.seed, job.steps) for job in jobs} == {(100, 200)}
        return [
            {
                "diverged": 7 if job.lr > 0.03 else None,
                "evaluations": [{"AP": 0.5 - abs(np.log10(job.lr / best[job.loss])) / 10}],
            }
            for job in jobs
        ]

    tuning = running.tune("digits", run)
    assert running.best_rates(tuning) == best
    tried = {loss: [entry["lr"] for entry in tuning if entry["loss"] == loss] for loss in best}
    assert tried == {
        "aLRP": [0.001, 0.003, 0.01],
        "RS": [0.001, 0.003, 0.01, 0.03, 0.1],
        "focal + L1": [0.0001, 0.0003, 0.001, 0.003, 0.01],
    }
    lines = tables.render({"tuning": tuning, "comparison": [{"loss": loss} for loss in best]}, "tuning")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
    assert rows[0][1:] == ["0.0001", "0.0003", "0.001", "0.003", "0.01", "0.03", "0.1"]
    assert rows[2:] == [
        ["aLRP", "", "", "45.2", "50.0", "44.8", "", ""],
        ["RS", "", "", "35.2", "40.0", "45.2", "50.0", "diverged"],
        ["focal + L1", "50.0", "45.2", "40.0", "35.2", "30.0", "", ""],
    ]


def test_a_run_that_diverges(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_step = studies.RankingDetector.training_step

    def diverges(model: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        if model.global_step == 2:
            batch.images[0] *= np.nan
        return training_step(model, batch, batch_idx)

    monkeypatch.setattr(studies.RankingDetector, "training_step", diverges)
    run = one.train_one("digits", "aLRP", 1e-3, 0, 4, scenes)
    assert run["diverged"] == 3
    assert [entry["step"] for entry in run["evaluations"]] == [1, 2]

    monkeypatch.setitem(studies.STUDIES, "digits", TINY._replace(losses=("aLRP",)))
    short = {"diverged": None, "evaluations": [{"AP": 0.5}]}

    def kept(*arguments: Any) -> dict[str, Any]:
        return {"turns": 2}

    def run_apart(jobs: Sequence[running.Job], *arguments: Any) -> list[dict[str, Any]]:
        return [run if job.steps == 4 else short for job in jobs]

    monkeypatch.setattr(running, "kept", kept)
    monkeypatch.setattr(running, "data_of", nothing)
    monkeypatch.setattr(running, "run_apart", run_apart)
    with pytest.raises(ValueError, match="not finite at the learning rate of the best short run: aLRP, seed 0, step 3"):
        running.compare("digits", tmp_path)
    monkeypatch.setitem(studies.STUDIES, "digits", TINY._replace(turns=3))
    with pytest.raises(ValueError, match=r"times\.json is of 2 turns, not of 3"):
        running.compare("digits", tmp_path)


def test_what_is_left_of_a_comparison_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    for _ in range(2):
        assert running.kept(tmp_path / "x.json", lambda: made.append(1) or {"a": 1}) == {"a": 1}
    assert made == [1]
    job = running.Job("digits", "aLRP", 1e-3, 0, 4)
    done = {"settings": studies.settings_of(*job)}
    (tmp_path / "aLRP-0.001-0-4.json").write_text(json.dumps(done))
    monkeypatch.setattr("subprocess.run", None)  # it was done
    assert running.run_apart([job], tmp_path, tmp_path) == [done]
    monkeypatch.setitem(studies.STUDIES, "digits", TINY._replace(batch=5))
    with pytest.raises(ValueError, match="is of a run with other settings"):
        running.run_apart([job], tmp_path, tmp_path)


def test_learning_rates_of_another_study(
    tmp_path: Path, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[running.Job] = []

    def run_apart(wanted: Sequence[running.Job], *arguments: Any) -> list[dict[str, Any]]:
        jobs.extend(wanted)
        return []

    monkeypatch.setattr(running, "RESULTS", tmp_path)
    monkeypatch.setattr(running, "data_of", nothing)
    monkeypatch.setattr(running, "run_apart", run_apart)
    with pytest.raises(ValueError, match=r"long takes the learning rates of digits: run that first, .* is missing"):
        running.compare("long", tmp_path)
    (tmp_path / "comparison_digits.json").write_text(json.dumps(report))
    monkeypatch.setitem(studies.STUDIES, "long", TINY._replace(rates="digits", seeds=1, turns=0))
    assert "times" not in running.compare("long", tmp_path)
    assert jobs == [("long", "aLRP", 1e-3, 0, 4), ("long", "focal + L1", 1e-3, 0, 4)]


def test_a_result_file_is_checked_by_repeating(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repeated = {run["loss"]: json.loads(json.dumps(run)) for run in report["comparison"] if run["seed"] == 1}
    asked: list[running.Job] = []

    def run_apart(jobs: Sequence[running.Job], *arguments: Any) -> list[dict[str, Any]]:
        asked.extend(jobs)
        return [repeated[job.loss] for job in jobs]

    monkeypatch.setattr(running, "RESULTS", tmp_path)
    monkeypatch.setattr(running, "data_of", nothing)
    monkeypatch.setattr(running, "run_apart", run_apart)
    file = tmp_path / "comparison_digits.json"
    file.write_text(json.dumps(report))
    words = ["--work", str(tmp_path), "repeat", "digits", "--seed", "1"]
    assert command.main(words) == 0
    assert asked == [("digits", loss, 1e-3, 1, 4) for loss in TINY.losses]
    assert "aLRP, seed 1: the same figures" in capsys.readouterr().out
    stored = json.loads(file.read_text())
    assert (stored["repeated"]["losses"], stored["repeated"]["seed"]) == (list(TINY.losses), 1)
    assert "The 2 runs of seed 1 repeated at" in tables.render(stored, "run")

    def complaint(*words: str) -> str:
        assert command.main(list(words)) == 1
        return capsys.readouterr().err

    repeated["focal + L1"]["evaluations"][-1]["AP"] = 0.123
    assert command.main([*words, "--loss", "aLRP"]) == 0
    assert re.search(r"focal \+ L1 ended at .*0\.123.*, the result file says", complaint(*words))
    repeated["aLRP"]["diverged"] = 3
    assert "aLRP ended at None, the result file says" in complaint(*words)
    assert "has no run of aLRP with seed 2" in complaint(*words[:-1], "2", "--loss", "aLRP")
    with pytest.raises(SystemExit):
        command.main(["run", "x"])
    assert "must be one of digits, sgd, long, trees, got x" in capsys.readouterr().err
