"""The trainer's runs: resumed, interrupted and lengthened; their evaluation, weights, checkpoints and pictures."""

# pyright: reportPrivateUsage=false
import csv
import errno
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any, cast

import numpy as np
import pytest
import torch

pytest.importorskip("tests.support.coco_data")


from alrp_triton.trainer import (
    CocoDetection,
    RankingDetector,
    as_results,
    evaluate,
    find_part,
    fitting,
)
from alrp_triton.trainer.callbacks import KeepBest
from alrp_triton.trainer.evaluation import Found
from alrp_triton.trainer.sampling import batches_had
from tests.support.coco_data import FAST, MARKS, Done, Lost, alrp_train, content, cut_short, data_set, fit, ignore, same

pytestmark = [*MARKS, pytest.mark.usefixtures("one_thread")]
CATEGORIES = {1: "cat", 2: "dog"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps an epoch, and two images that are held out."""
    return data_set(tmp_path_factory.mktemp("scenes"), content(6))


@pytest.fixture(scope="module")
def finished(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A run of six steps that nobody interrupts; read only."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, fit(scenes, out, "--evaluate_first", **FAST)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than such a run."""
    monkeypatch.setattr(fitting, "save_curves", ignore)
    monkeypatch.setattr(fitting, "save_detections", ignore)


def last(out: Path) -> dict[str, Any]:
    return torch.load(out / "last.ckpt", weights_only=True)


def assert_ends_alike(one: Path, other: Path) -> None:
    """Weights, averages, self-balancing, optimizer, schedule, and all that was recorded on the way."""
    a, b = last(one), last(other)
    for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "thresholds"):
        assert same(a[key], b[key]), key
    assert a["callbacks"].keys() == b["callbacks"].keys()
    for key, state in a["callbacks"].items():
        if key.startswith("KeepBest"):  # which names folders
            assert same(state["best_model_score"], b["callbacks"][key]["best_model_score"])
        else:
            assert same(state, b["callbacks"][key]), key
    metrics = [json.loads((out / "metrics.json").read_text()) for out in (one, other)]
    assert same(*metrics)


@pytest.fixture
def at_batch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Callable[[], Any]], None]]:
    """Does something once in the step of a batch, counted from 0 through a run; after its losses."""
    before, interrupt = RankingDetector.training_step, signal.getsignal(signal.SIGINT)

    def do(when: int, what: Callable[[], Any]) -> None:
        def step(self: RankingDetector, batch: Any, batch_idx: int) -> Any:
            loss = before(self, batch, batch_idx)
            if batches_had(self.trainer) == when:
                monkeypatch.setattr(RankingDetector, "training_step", before)
                what()
            return loss

        monkeypatch.setattr(RankingDetector, "training_step", step)

    yield do
    signal.signal(signal.SIGINT, interrupt)


def lose() -> None:
    raise Lost


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("when", "changes"),
    [
        (4, {}),
        (3, {"model__loss": "rank_sort", "trainer__precision": "bf16-mixed"}),
        (2, {"model__loss": "torchvision", "model__schedule": "cosine"}),
        (4, {"ema": 0.9, "model__period": 2}),
        (4, {"trainer__accumulate_grad_batches": 2}),
        (5, {"trainer__accumulate_grad_batches": 2, "data__workers": 1}),
    ],
)
def test_a_run_that_is_stopped_goes_on(when: int, changes: dict[str, Any], scenes: Path, tmp_path: Path, at_batch: Any) -> None:  # fmt: skip
    """By SIGTERM in an epoch; ends as one that was not, whatever drew random numbers meanwhile."""
    changes = FAST | changes
    assert fit(scenes, tmp_path / "whole", **changes).status == 0
    at_batch(when, lambda: signal.raise_signal(signal.SIGTERM))
    assert fit(scenes, tmp_path / "parts", **changes).status == 143
    torch.manual_seed(99)
    assert alrp_train("fit", "--out", tmp_path / "parts", "--resume").status == 0
    assert_ends_alike(tmp_path / "whole", tmp_path / "parts")
    assert [row["step"] for row in history(tmp_path / "parts")["steps"]] == list(range(1, last(tmp_path / "whole")["global_step"] + 1))  # fmt: skip


def history(out: Path) -> dict[str, list[dict[str, float]]]:
    return last(out)["callbacks"]["History"]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("how", ["interrupt", "error"])
def test_a_step_that_is_broken_off_is_taken_once(how: str, scenes: Path, tmp_path: Path, at_batch: Any, finished: tuple[Path, Done]) -> None:  # fmt: skip
    """By Ctrl-C, or by what fails: after the losses, whose self-balancing has counted the step already."""
    at_batch(4, lose if how == "error" else lambda: signal.raise_signal(signal.SIGINT))
    if how == "error":
        with pytest.raises(Lost):
            fit(scenes, tmp_path / "run", "--evaluate_first", **FAST)
    else:
        assert fit(scenes, tmp_path / "run", "--evaluate_first", **FAST).status not in (0, 2)
    assert last(tmp_path / "run")["global_step"] >= 3
    assert alrp_train("fit", "--out", tmp_path / "run", "--resume").status == 0
    assert_ends_alike(finished[0], tmp_path / "run")


@pytest.mark.usefixtures("without_pictures")
def test_a_run_that_is_stopped_in_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-C, between two batches: it says from where."""
    scenes = data_set(tmp_path / "scenes", content(6), content(4, "val{}.png"))
    assert fit(scenes, tmp_path / "whole", **FAST).status == 0
    interrupt, before = signal.getsignal(signal.SIGINT), RankingDetector.validation_step

    def step(self: RankingDetector, batch: Any, batch_idx: int) -> None:
        before(self, batch, batch_idx)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RankingDetector, "validation_step", step)
        done = fit(scenes, tmp_path / "run", **FAST)
    signal.signal(signal.SIGINT, interrupt)
    assert done.status == 143
    assert f"stopped at step 3: {tmp_path / 'run' / 'last.ckpt'} goes on from there with --resume" in done.log
    assert alrp_train("fit", "--out", tmp_path / "run", "--resume").status == 0
    assert_ends_alike(tmp_path / "whole", tmp_path / "run")


@pytest.mark.usefixtures("without_pictures")
def test_a_run_that_dies_in_evaluation_goes_on(scenes: Path, tmp_path: Path) -> None:
    """A held-out image whose header can be read: the epoch before is not lost, and the file is named."""
    folder = copytree(scenes, tmp_path / "scenes")
    assert fit(folder, tmp_path / "whole", **FAST).status == 0
    whole = cut_short(folder / "images" / "val2.png")
    died = fit(folder, tmp_path / "parts", **FAST)
    assert died.status == 2
    assert "val2.png cannot be read as an image" in died.error
    assert last(tmp_path / "parts")["global_step"] == 3
    (folder / "images" / "val2.png").write_bytes(whole)
    assert alrp_train("fit", "--out", tmp_path / "parts", "--resume").status == 0
    assert_ends_alike(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("without_pictures")
def test_a_disk_that_is_full(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a checkpoint is written, on another file system than the system's temporary folder: that of before stays."""
    assert fit(scenes, tmp_path / "run", **FAST | {"trainer__max_epochs": 1}).status == 0
    before = [(tmp_path / "run" / name).read_bytes() for name in ("last.ckpt", "best.ckpt")]

    def half(source: str, target: Any, *_: Any, **__: Any) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:999])
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.move", half)
        done = alrp_train("fit", "--out", tmp_path / "run", "--resume", "--trainer.max_epochs", 2)
    assert done.status == 2
    assert "No space left on device" in done.error
    assert [(tmp_path / "run" / name).read_bytes() for name in ("last.ckpt", "best.ckpt")] == before
    assert alrp_train("fit", "--out", tmp_path / "run", "--resume").status == 0
    assert last(tmp_path / "run")["global_step"] == 6


@pytest.mark.usefixtures("without_pictures")
def test_a_loss_that_is_not_finite_stops_the_run(scenes: Path, tmp_path: Path) -> None:
    """With status 1; the checkpoint stays that of before."""
    wild = fit(scenes, tmp_path / "wild", **FAST | {"model__lr": 1e30})
    assert wild.status == 1
    assert re.search(
        r"the loss of step [23] is (nan|inf).*: try a lower --model\.lr or a longer --model\.warm_up", wild.error
    )
    assert not (tmp_path / "wild" / "last.ckpt").exists()
    folder, out = copytree(scenes, tmp_path / "scenes"), tmp_path / "run"
    assert fit(folder, out, **FAST | {"trainer__max_epochs": 1}).status == 0
    before = (out / "last.ckpt").read_bytes()
    state = last(out)
    state["state_dict"][next(iter(state["state_dict"]))].fill_(torch.nan)
    torch.save(state, out / "last.ckpt")
    spoilt = (out / "last.ckpt").read_bytes()
    assert alrp_train("fit", "--out", out, "--resume", "--trainer.max_epochs", 2).status == 1
    assert (out / "last.ckpt").read_bytes() == spoilt != before


@pytest.mark.usefixtures("without_pictures")
def test_a_finished_run(finished: tuple[Path, Done], scenes: Path, tmp_path: Path) -> None:
    """Is evaluated when it is resumed, even where its logs are gone; is made longer; is not begun anew."""
    out, done = finished
    assert done.status == 0
    (tmp_path / "kept").mkdir()
    for name in ("last.ckpt", "config.yaml"):
        (tmp_path / "kept" / name).write_bytes((out / name).read_bytes())
    again = alrp_train("fit", "--resume", f"--out={tmp_path / 'kept'}")
    assert again.status == 0
    assert again.out.splitlines()[:-2] == done.out.splitlines()[:-2]
    found, instead = again.out.splitlines()[-2:]
    assert found.startswith(f"in {tmp_path / 'kept'}/: last.ckpt, metrics.json, ")  # best.ckpt was not kept
    assert instead == f"to detect: alrp-train predict --run {tmp_path / 'kept'} --threshold optimal --images FOLDER"
    assert same(*(json.loads((one / "metrics.json").read_text()) for one in (out, tmp_path / "kept")))
    # The learning rate depends on the length: what is lengthened is not what was long from the beginning.
    assert alrp_train("fit", "--out", tmp_path / "kept", "--resume", "--trainer.max_epochs", 3).status == 0
    assert last(tmp_path / "kept")["global_step"] == 9
    assert [row["step"] for row in history(tmp_path / "kept")["evaluations"]] == [0, 3, 6, 9]
    (tmp_path / "kept" / "config.yaml").unlink()  # settings may be said again in its place
    assert fit(scenes, tmp_path / "kept", "--resume", **FAST | {"trainer__max_epochs": 4}).status == 0
    assert last(tmp_path / "kept")["global_step"] == 12
    refused = fit(scenes, out, **FAST)
    assert refused.status == 2
    assert refused.error.endswith("last.ckpt: take another --out, or --resume its run")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "best.ckpt").write_bytes((out / "best.ckpt").read_bytes())
    best = tmp_path / "half" / "best.ckpt"  # alone: what --resume goes on from is last.ckpt
    assert fit(scenes, tmp_path / "half", "--resume", **FAST).error.endswith(
        f"no checkpoint {best.with_name('last.ckpt')}"
    )
    refused = fit(scenes, tmp_path / "half", **FAST)
    assert refused.error.endswith(f"checkpoint {best}: take another --out, or begin with it: --weights {best}")
    assert fit(scenes, tmp_path / "another", "--weights", best, **FAST).status == 0


def test_a_run_that_was_stopped_before_it_knew_a_best_one(tmp_path: Path) -> None:
    """Between best.ckpt and last.ckpt: the last one is of before the first evaluation, and the next is the best so far."""
    (tmp_path / "best.ckpt").touch()
    keeper = KeepBest(tmp_path)
    keeper.load_state_dict(KeepBest(tmp_path).state_dict())
    assert keeper.best_k_models == {}
    assert keeper.check_monitor_top_k(cast("Any", None), torch.tensor(0.1))


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    "words",
    [
        ["--evaluate_first", "--trainer.check_val_every_n_epoch", 5],
        ["--trainer.num_sanity_val_steps", "1", "--trainer.check_val_every_n_epoch", 5],
        ["--trainer.max_epochs", 9, "--trainer.max_steps", 5],
        ["--trainer.max_steps", 2, "--trainer.accumulate_grad_batches", 2],
    ],
)
def test_a_run_ends_with_an_evaluation_of_its_end(words: list[str], scenes: Path, tmp_path: Path) -> None:
    """Between the epochs that are evaluated, or in one; and what it leaves is of there, too."""
    out = tmp_path / "run"
    assert fit(scenes, out, *words, **FAST).status == 0
    metrics = json.loads((out / "metrics.json").read_text())
    end = {"--trainer.max_epochs": 5, "--trainer.max_steps": 2}.get(words[0], 6)
    assert metrics["evaluations"][-1]["step"] == metrics["step"] == end
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = torch.load(out / name, weights_only=True)
        assert checkpoint["global_step"] == end
        assert checkpoint["thresholds"].keys() == metrics["by_category"].keys()
        assert (
            alrp_train("validate", "--run", out / name, "--accelerator", "cpu", "--out", tmp_path / "again").status == 0
        )
        assert same(json.loads((tmp_path / "again").read_text())["by_category"], metrics["by_category"])


@pytest.mark.usefixtures("without_pictures")
def test_short_epochs(scenes: Path, tmp_path: Path) -> None:
    """The learning rate falls at their end, and each has its own permutation."""
    words = ["--trainer.limit_train_batches", 2, "--trainer.limit_val_batches", 1]
    assert fit(scenes, tmp_path / "run", *words, **FAST | {"trainer__max_epochs": 4}).status == 0
    found = history(tmp_path / "run")
    assert [row["step"] for row in found["evaluations"]] == [2, 4, 6, 8]
    assert [round(row["lr"] / 3e-3, 3) for row in found["steps"]] == [1] * 6 + [0.1] * 2
    for wrong, error in (("limit_val_batches", "leaves nothing to evaluate on"), ("limit_train_batches", "leaves nothing of an epoch"), ("overfit_batches", "overfit_batches")):  # fmt: skip
        refused = fit(scenes, tmp_path / wrong, f"--trainer.{wrong}", 0.3 if "val" not in wrong else 0, **FAST)
        assert refused.status == 2
        assert error in refused.error


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
@pytest.mark.usefixtures("without_pictures")
def test_an_average_of_weights_is_not_gone_on_from_as_weights(scenes: Path, tmp_path: Path) -> None:
    """Nor where the file of the settings was lost."""
    out = tmp_path / "run"
    assert fit(scenes, out, **FAST | {"ema": 0.9}).status == 0
    (out / "config.yaml").unlink()
    lost = fit(scenes, out, "--resume", **FAST | {"trainer__max_epochs": 3})
    assert (lost.status, "other settings: ema 0.9 (now None)" in lost.error) == (2, True)


@pytest.mark.usefixtures("without_pictures")
def test_a_run_that_is_but_tried_leaves_no_checkpoint(scenes: Path, tmp_path: Path) -> None:
    assert fit(scenes, tmp_path / "run", "--trainer.fast_dev_run", "true", **FAST).status == 0
    assert fit(scenes, tmp_path / "run", **FAST).status == 0


@pytest.mark.usefixtures("without_pictures")
def test_the_learning_rate_of_a_lengthened_run(scenes: Path, tmp_path: Path) -> None:
    """Is that of the longer one from its first step on."""
    assert fit(scenes, tmp_path / "run", **FAST | {"trainer__max_epochs": 1}).status == 0
    assert alrp_train("fit", "--out", tmp_path / "run", "--resume", "--trainer.max_epochs", 4).status == 0
    assert fit(scenes, tmp_path / "whole", **FAST | {"trainer__max_epochs": 4}).status == 0
    rates = [[row["lr"] for row in history(tmp_path / run)["steps"]][3:] for run in ("run", "whole")]
    assert rates[0] == rates[1]


@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")
@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--model.lr", "1"], "the checkpoint is of a run with other settings: lr 0.003 (now 1.0)"),
        (["--model.size", "64", "--seed", "1"], "other settings: size 48 (now 64), seed 0 (now 1)"),
        (["--data.batch", "3"], "the checkpoint is of a run with other batch 2 (now 3)"),
        (
            ["--trainer.limit_train_batches", "2"],
            "the checkpoint is of a run with other number of batches an epoch 3 (now 2)",
        ),
        (["--data.root", "OTHER_VAL"], "the checkpoint is of a run with other data to evaluate on than "),
        (["--data.root", "OTHER"], "the checkpoint is of a run with other data than "),
        (["--ema", "0.9"], "of a run with other settings: ema None (now 0.9)"),
        (["--trainer.accumulate_grad_batches", "2"], "other settings: accumulate_grad_batches 1 (now 2)"),
        (["--trainer.precision", "bf16-mixed"], "other settings: precision 32-true (now bf16-mixed)"),
        (["--trainer.gradient_clip_val", "1"], "other settings: gradient_clip_val None (now 1)"),
        (["--data.flip", "false"], "of a run with other transforms ['RandomHorizontalFlip(p=0.5)'] (now [])"),
    ],
)
def test_other_settings_are_refused(words: list[str], error: str, finished: tuple[Path, Done], scenes: Path, tmp_path: Path) -> None:  # fmt: skip
    """In a line, and the checkpoint and the configuration stay as they are."""
    out = copytree(finished[0], tmp_path / "run")
    if "OTHER" in words:
        words = ["--data.root", str(data_set(tmp_path / "other", content(6, area=100)))]
    if "OTHER_VAL" in words:
        words = ["--data.root", str(data_set(tmp_path / "other", content(6), content(2, "val{}.png", area=100)))]
    before = (out / "last.ckpt").read_bytes(), (out / "config.yaml").read_bytes()
    done = alrp_train("fit", "--out", out, "--resume", "--trainer.max_epochs", 3, *words)
    assert done.status == 2
    assert error in done.error
    assert ((out / "last.ckpt").read_bytes(), (out / "config.yaml").read_bytes()) == before


def test_what_a_run_leaves(finished: tuple[Path, Done]) -> None:
    out, done = finished
    for name in (
        "best.ckpt",
        "last.ckpt",
        "config.yaml",
        "metrics.json",
        "detections.json",
        "curves.png",
        "detections.png",
    ):
        assert (out / name).stat().st_size > 0
    assert "before training" in done.out
    assert re.search(r"\ncat  .*\ndog  ", done.out)
    (log,) = out.glob("logs/version_0/metrics.csv")
    with log.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns = {name for row in rows for name, value in row.items() if value}
    assert {"classification", "bbox_regression", "total", "lr", "AP", "oLRP"} <= columns
    assert any(name.startswith("weight_") for name in columns)
    assert list(out.glob("tensorboard/version_0/events.*"))
    metrics = json.loads((out / "metrics.json").read_text())
    assert [row["step"] for row in metrics["evaluations"]] == [0, 3, 6]
    assert metrics["settings"]["loss"] == "alrp"
    assert {one["image_id"] for one in json.loads((out / "detections.json").read_text())} == {1, 2}


# Evaluation.


def as_found(
    data: CocoDetection, detections: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> list[Found]:
    return [Found(index, detections(data.target(index)), data.target(index)) for index in range(len(data))]


def perfect(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["labels"]))}


def nothing(_: object) -> dict[str, torch.Tensor]:
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}


def something(_: object) -> dict[str, torch.Tensor]:
    one = torch.zeros(1, dtype=torch.int64)
    return {"boxes": torch.tensor([[9.0, 8, 29, 26]]), "labels": one, "scores": torch.ones(1)}


def test_evaluation(scenes: Path, tmp_path: Path) -> None:
    data = CocoDetection(find_part(scenes, "val"))
    overall, by_category, _ = evaluate(as_found(data, perfect), data.coco.categories)
    assert overall["AP"] == overall["AP50"] == pytest.approx(1)
    assert overall["oLRP"] == pytest.approx(0, abs=1e-6)
    assert by_category == {name: {"AP": pytest.approx(1), "oLRP": pytest.approx(0, abs=1e-6), "threshold": 1} for name in ("cat", "dog")}  # fmt: skip
    missed = evaluate(as_found(data, nothing), data.coco.categories)
    assert [missed.overall[name] for name in ("AP", "oLRP", "oLRP_FN")] == [0, 1, 1]
    assert missed.by_category["cat"]["AP"] == 0
    assert missed.by_category["cat"]["oLRP"] == 1
    assert np.isnan(missed.by_category["cat"]["threshold"])
    bare = CocoDetection(find_part(data_set(tmp_path, content(2) | {"annotations": []}), "train"))
    for found in (nothing, something):
        overall, *_ = evaluate(as_found(bare, found), bare.coco.categories)
        assert all(np.isnan(overall[name]) for name in ("AP", "AP50", "oLRP"))


def test_average_precision_of_a_recall_that_is_a_threshold() -> None:
    """Of five objects three are found, all true: precision is 1 at the recalls 0, 0.01 … 0.60, of COCO's 101."""
    box, one, none = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0]), torch.zeros(0, dtype=torch.int64)
    truth = {
        "truth": box.double(),
        "truth_labels": one,
        "iscrowd": torch.tensor([False]),
        "area": torch.tensor([100.0]),
    }
    hit = {"boxes": box, "labels": one, "scores": torch.tensor([0.9])}
    miss = {"boxes": box[:0], "labels": none, "scores": torch.zeros(0)}
    found = [Found(index, hit if index < 3 else miss, truth) for index in range(5)]
    overall, by_category, _ = evaluate(found, {1: "cat"})
    assert [overall["AP"], overall["AP50"], by_category["cat"]["AP"]] == pytest.approx([61 / 101] * 3, abs=1e-6)


def test_images_are_told_apart_by_ids_beyond_2_to_53(tmp_path: Path) -> None:
    """Each object is detected where the other image's is: nothing is found where it is."""
    part = content(2)
    for image, annotation in zip(part["images"], part["annotations"], strict=True):
        image["id"] = annotation["image_id"] = image["id"] + 20210406123456784
        annotation |= {"category_id": 1, "bbox": [5 if image["id"] % 2 else 35, 5, 20, 20]}
    data = CocoDetection(find_part(data_set(tmp_path, part), "train"))
    swapped = [Found(index, perfect(data.target(1 - index)), data.target(index)) for index in range(2)]
    assert evaluate(swapped, data.coco.categories).overall["AP"] == 0
    ids = [one["image_id"] for one in as_results(swapped, data.coco.image_ids, data.coco.categories)]
    assert ids == data.coco.image_ids == [20210406123456785, 20210406123456786]


@pytest.mark.parametrize("area", [-360.0, None, 1e12, float("nan")])
def test_objects_do_not_vanish_from_evaluation(area: float | None, tmp_path: Path) -> None:
    data = CocoDetection(find_part(data_set(tmp_path, content(2, area=area)), "train"))
    overall, *_ = evaluate(as_found(data, perfect), data.coco.categories)
    assert overall["AP"] == overall["AP_small"] == pytest.approx(1)
    assert evaluate(as_found(data, nothing), data.coco.categories).overall["AP_small"] == 0


def test_crowds_are_evaluated_as_coco_does(tmp_path: Path) -> None:
    """Detections inside of one are neither right nor wrong, and it need not be found."""
    part = content(2, category_id=1)
    part["annotations"].append({"id": 9, "image_id": 1, "category_id": 1, "bbox": [30, 0, 30, 40], "iscrowd": 1})
    data = CocoDetection(find_part(data_set(tmp_path, part), "train"))

    def with_some_inside(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inside = torch.tensor([[32.0, 5, 40, 15], [45, 20, 55, 30]])
        return {"boxes": torch.cat([inside, target["boxes"]]), "labels": torch.zeros(3, dtype=torch.int64), "scores": torch.tensor([0.9, 0.8, 0.7])}  # fmt: skip

    first, second = as_found(data, with_some_inside)
    found = [first, second._replace(detections=perfect(second.target))]
    assert evaluate(found, data.coco.categories).overall["AP"] == pytest.approx(1)
    assert evaluate([first, second], data.coco.categories).overall["AP"] < 0.9
