"""The trainer: data in COCO format, batches by step, a resumed run, several processes, evaluation, errors."""

# pyright: reportPrivateUsage=false
import csv
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision.ops", reason="torchvision is the examples', not the package's", exc_type=ImportError)
pytest.importorskip("sklearn", reason="scikit-learn is the examples', not the package's")
pytest.importorskip("matplotlib", reason="matplotlib is the examples', not the package's")
pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is the examples', not the package's")
pytest.importorskip("pycocotools", reason="pycocotools is the tests', not the package's")

from PIL import Image
from pycocotools.coco import COCO

from examples import digits
from examples.coco import __main__ as command_line
from examples.coco.data import CocoDetection, Split, StepSampler, find_split, make_loader
from examples.coco.evaluate import as_results, detect, evaluate
from examples.coco.train import Run, Settings, train
from tests.processes import TORCHRUN, run_together

CPU = torch.device("cpu")
SMALL = Settings(
    detector="retinanet_small", loss="alrp", box_loss=None, box_weight=None, assignment="iou", size=64, batch=4, steps=6,
    optimizer="adamw", lr=3e-3, warm_up=2, schedule="cosine", period=2, flip=True, amp="off", freeze_norm=False,
    seed=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    digits.write(folder, training=14, held_out=3, seed=5)
    return folder


def test_scenes_are_a_data_set(scenes: Path, tmp_path: Path) -> None:
    """pycocotools reads it; the same seed writes the same bytes; boxes lie in the images."""
    digits.write(tmp_path, training=14, held_out=3, seed=5)
    files = sorted(path.relative_to(scenes) for path in scenes.rglob("*.*"))
    assert len(files) == 14 + 3 + 2
    assert all((scenes / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)
    truth = COCO(str(scenes / "annotations" / "instances_train.json"))
    assert len(truth.getImgIds()) == 14
    assert [category["name"] for category in truth.loadCats(truth.getCatIds())] == list("0123456789")
    data = CocoDetection(find_split(scenes, "train"))
    for sample in (data[index] for index in range(14)):
        boxes = sample.target["boxes"]
        assert sample.image.shape == (3, digits.SCENE_SIZE, digits.SCENE_SIZE)
        assert 1 <= len(boxes) == len(sample.target["labels"]) <= 7
        assert ((boxes >= 0) & (boxes <= digits.SCENE_SIZE)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_digits_are_held_out() -> None:
    training, held_out = digits.split_digits(np.random.default_rng(0))
    assert len(training.labels) + len(held_out.labels) == 1797
    assert len(held_out.labels) > 400


def data_set(folder: Path, change: Callable[[dict[str, Any]], Any] = dict) -> Split:
    """Two images and what annotations may be: outside in part, a crowd, without area, of a category with a late id."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    Image.new("L", (20, 10), 255).save(folder / "images" / "grey.png")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "images" / "red.jpg")
    boxes = [([-2, 1, 6, 5], 7, 0), ([0, 0, 9, 9], 7, 1), ([3, 3, 0, 4], 7, 0), ([10, 2, 30, 4], 3, 0)]
    content: dict[str, Any] = {
        "images": [
            {"id": 9, "file_name": "red.jpg", "width": 8, "height": 8},
            {"id": 4, "file_name": "grey.png", "width": 20, "height": 10},
        ],
        "annotations": [
            {"id": index, "image_id": 4, "bbox": box, "category_id": category, "iscrowd": crowd, "area": 1}
            for index, (box, category, crowd) in enumerate(boxes, 1)
        ],
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
    }
    change(content)
    (folder / "annotations" / "val.json").write_text(json.dumps(content))
    return find_split(folder, "val")


def test_data(tmp_path: Path) -> None:
    data = CocoDetection(data_set(tmp_path))
    assert data.categories == ["three", "seven"]
    assert data.category_ids == [3, 7]
    grey, red = data[0], data[1]
    assert (grey.image_id, red.image_id) == (4, 9)
    assert grey.image.shape == (3, 10, 20)
    assert grey.target["boxes"].tolist() == [[0, 1, 4, 6], [10, 2, 20, 6]]
    assert grey.target["labels"].tolist() == [1, 0]
    assert red.target["boxes"].shape == (0, 4)
    assert (red.image[0] > 0.9).all()
    assert (red.image[1:] < 0.1).all()


def test_boxes_that_look_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """What stays to train on, and a hint where most boxes are no x, y, width, height in pixels."""
    data = CocoDetection(data_set(tmp_path))
    assert (data.boxes, data.odd) == (2, 2)
    command = ["train", "--data", str(tmp_path), "--train", "val", "--out", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--detector", "retinanet_small", "--size", "32", "--batch", "2", "--steps", "1", "--workers", "0"]
    for scale, hint in ((1.0, True), (0.01, True), (0.5, False)):

        def scaled(content: dict[str, Any], scale: float = scale) -> None:
            for one in content["annotations"]:
                one["bbox"] = [scale * number for number in one["bbox"]]

        data_set(tmp_path, scaled)
        assert cli(monkeypatch, *command) == 0
        seen = capsys.readouterr()
        assert "2 images, 2 boxes, 2 categories to train on" in seen.out
        assert ("note: 2 boxes reach out of their image or are smaller than a pixel" in seen.err) == hint
        rmtree(tmp_path / "out")
    data_set(tmp_path, lambda content: content.update(annotations=[]))
    assert cli(monkeypatch, *command) == 2
    assert "val.json has no box to train on, in 2 images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pixels(tmp_path: Path) -> None:
    """16 bits a pixel, palettes, transparency; an image of another size than the file says."""
    data = CocoDetection(data_set(tmp_path))
    steps = np.linspace(0, 65535, 200).round().astype(np.uint16).reshape(10, 20)
    Image.fromarray(steps).save(tmp_path / "images" / "grey.png")
    assert torch.equal(data[0].image, torch.from_numpy(steps.astype(np.float32) / 65535).expand(3, -1, -1))
    for mode in ("P", "RGBA", "LA", "1", "CMYK"):
        Image.new(mode, (20, 10)).save(tmp_path / "images" / "grey.png", format="PNG" if mode != "CMYK" else "JPEG")
        assert data[0].image.shape == (3, 10, 20)
    Image.new("L", (10, 20)).save(tmp_path / "images" / "grey.png")
    with pytest.raises(ValueError, match=r"grey\.png has \(10, 20\) pixels, its annotation file says \(20, 10\)"):
        data[0]


def test_data_sets_are_told_apart(tmp_path: Path) -> None:
    first = CocoDetection(data_set(tmp_path)).fingerprint
    assert CocoDetection(data_set(tmp_path)).fingerprint == first
    other = data_set(tmp_path, lambda content: content["annotations"][0].update(bbox=[0, 0, 1, 1]))
    assert CocoDetection(other).fingerprint != first


def test_flips_are_those_of_the_step(tmp_path: Path) -> None:
    """About half of the images; the same for the same seed, epoch and image."""
    split = data_set(tmp_path)
    data, again, other = (CocoDetection(split, flip=True, seed=seed) for seed in (0, 0, 1))
    boxes = [[one[epoch, 0].target["boxes"].tolist() for epoch in range(40)] for one in (data, again, other)]
    assert boxes[0] == boxes[1] != boxes[2]
    flipped = [one for one in boxes[0] if one == [[16, 1, 20, 6], [0, 2, 10, 6]]]
    assert 10 < len(flipped) < 30
    assert all(one in flipped or one == [[0, 1, 4, 6], [10, 2, 20, 6]] for one in boxes[0])


def test_batches_are_those_of_the_step() -> None:
    """Taken up again at any step; shared by processes; every image once an epoch."""
    whole = list(StepSampler(11, 4, range(6), seed=3))
    assert whole[4:] == list(StepSampler(11, 4, range(4, 6), seed=3))
    shares = [list(StepSampler(11, 4, range(6), 3, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    assert [epoch for batch in whole for epoch, _ in batch] == [0] * 8 + [1] * 8 + [2] * 8
    assert all(len({index for _, index in whole[step] + whole[step + 1]}) == 8 for step in (0, 2, 4))
    with pytest.raises(ValueError, match="a batch of 12 images is more than the 11 there are"):
        StepSampler(11, 12, range(1), 0)
    with pytest.raises(ValueError, match="a batch of 4 images cannot be shared by 3 processes"):
        StepSampler(11, 4, range(1), 0, 0, 3)


def test_workers_load_the_same(scenes: Path) -> None:
    data = CocoDetection(find_split(scenes, "train"), flip=True)
    before = torch.get_rng_state()
    one, two = (list(make_loader(data, StepSampler(14, 4, range(3), 0), workers)) for workers in (0, 1))
    assert [batch.image_ids for batch in one] == [batch.image_ids for batch in two]
    assert all(
        torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x.images, y.images, strict=True)
    )
    assert torch.equal(before, torch.get_rng_state())


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(stream)]


@pytest.mark.parametrize(
    ("loss", "amp"), [("alrp", "off"), ("rank_sort", "bf16"), ("torchvision", "off"), ("alrp", "fp16")]
)
def test_a_resumed_run_ends_at_the_same_weights(loss: str, amp: str, scenes: Path, tmp_path: Path) -> None:
    """Weights, self-balancing and log, bitwise; interrupted between two checkpoints, too."""
    data = CocoDetection(find_split(scenes, "train"), flip=True)
    settings = replace(SMALL, loss=loss, amp=amp)

    def go(out: Path, until: int | None) -> Run:
        run = Run(settings, data, CPU)
        if (out / "checkpoint.pt").exists():
            run.load(torch.load(out / "checkpoint.pt", weights_only=True))
        out.mkdir(exist_ok=True)
        train(run, out, lambda: {"AP": 0.5}, every=2, workers=0, until=until)
        return run

    whole = go(tmp_path / "whole", None)
    torch.manual_seed(99)
    interrupted = go(tmp_path / "parts", 4)
    state = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    interrupted.take_step(next(iter(interrupted.batches(6, 0))))  # lost
    resumed = go(tmp_path / "parts", None)
    assert state["step"] == 4
    assert resumed.step == 6
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    for key, value in whole.losses.state_dict().items():
        assert torch.equal(value, resumed.losses.state_dict()[key]), key
    assert whole.scaler.state_dict() == resumed.scaler.state_dict()
    assert (1 < whole.scaler.get_scale() < 2**16) == (amp == "fp16")  # the first steps overflow
    for name in ("steps.csv", "evaluations.csv"):
        assert rows(tmp_path / "whole" / name) == rows(tmp_path / "parts" / name)
    assert [row["step"] for row in rows(tmp_path / "whole" / "steps.csv")] == list("123456")
    other = CocoDetection(find_split(scenes, "val"))
    with pytest.raises(ValueError, match=r"the checkpoint is of a run on other data than .*instances_val\.json"):
        Run(replace(SMALL, loss=loss, amp=amp), other, CPU).load(state)
    with pytest.raises(ValueError, match=r"other settings: lr 0.003 \(now 1.0\)"):
        Run(replace(SMALL, loss=loss, amp=amp, lr=1.0), data, CPU).load(state)


def test_random_numbers_are_those_of_the_step(scenes: Path) -> None:
    """So that a detector that draws some is resumed like any other."""
    data = CocoDetection(find_split(scenes, "train"))
    drawn: list[float] = []
    for seed in (1, 2):
        run = Run(SMALL, data, CPU)
        torch.manual_seed(seed)
        run.take_step(next(iter(run.batches(1, 0))))
        drawn += torch.rand(1).tolist()
    assert drawn[0] == drawn[1]


def test_processes_train_as_one(scenes: Path, tmp_path: Path) -> None:
    """Two processes started by torchrun end at the weights of one with the same batch; evaluation is gathered."""
    options = ["train", "--data", str(scenes), "--detector", "retinanet_small", "--size", "64", "--batch", "4"]
    options += ["--steps", "3", "--optimizer", "adamw", "--warm-up", "0", "--workers", "0", "--device", "cpu"]
    runs = run_together(
        ["-m", "examples.coco", *options, "--out", str(tmp_path / "one")],
        [*TORCHRUN, "-m", "examples.coco", *options, "--out", str(tmp_path / "two")],
    )
    assert all(run.returncode == 0 for run in runs), [run.stderr for run in runs]
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    begin = Run(Settings(**one["settings"]), CocoDetection(find_split(scenes, "train")), CPU).model.state_dict()
    moved = max((value - begin[key]).abs().max().item() for key, value in one["model"].items())
    off = max((value - two["model"][key]).abs().max().item() for key, value in one["model"].items())
    assert off < 0.02 * moved
    logs = [rows(tmp_path / name / "steps.csv") for name in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert float(a["classification"]) == pytest.approx(float(b["classification"]), rel=1e-3)
        assert float(a["bbox_regression"]) == pytest.approx(float(b["bbox_regression"]), rel=1e-2)
    found = [json.loads((tmp_path / name / "detections.json").read_text()) for name in ("one", "two")]
    assert {row["image_id"] for row in found[0]} == {row["image_id"] for row in found[1]} == {1, 2, 3}


WITH_BATCH_NORM = """
import sys
sys.path.insert(0, ".")
from torch import nn
from examples.coco import __main__ as command_line, detectors
detectors._norm = nn.BatchNorm2d
sys.exit(command_line.main())
"""


def test_processes_evaluate_the_checkpoint(scenes: Path, tmp_path: Path) -> None:
    """Each normalises by its own images in training; what is evaluated is what is stored."""
    script, out = tmp_path / "with_batch_norm.py", tmp_path / "run"
    script.write_text(WITH_BATCH_NORM)
    common = ["--data", str(scenes), "--workers", "0", "--device", "cpu", "--out", str(out)]
    options = ["--detector", "retinanet_small", "--size", "64", "--batch", "4", "--steps", "3", "--warm-up", "0"]
    found: list[list[dict[str, Any]]] = []
    for command in ([*TORCHRUN, str(script), "train", *common, *options], [str(script), "evaluate", *common]):
        (done,) = run_together(command)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((out / "detections.json").read_text()))
    scores = [np.array([row["score"] for row in rows]) for rows in found]
    assert {row["image_id"] for row in found[0]} == {1, 2, 3}
    assert np.abs(scores[0] - scores[1]).max() < 1e-6


@pytest.mark.parametrize("freeze", [True, False])
def test_batch_norm_is_frozen(freeze: bool, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its statistics, with --init or --freeze-norm; its scale is trained in any case."""
    monkeypatch.setattr("examples.coco.detectors._norm", torch.nn.BatchNorm2d)
    run = Run(replace(SMALL, freeze_norm=freeze), CocoDetection(find_split(scenes, "train")), CPU)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.take_step(next(iter(run.batches(1, 0))))
    changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("running_var" in name for name in before)
    assert any("running" in name or "num_batches" in name for name in changed) != freeze
    assert "backbone.stages.0.0.1.weight" in changed
    assert run.model.training


def test_evaluation(scenes: Path) -> None:
    data = CocoDetection(find_split(scenes, "val"))
    perfect = [
        {"image_id": i, **data.targets[i], "scores": torch.ones(len(data.targets[i]["labels"]))} for i in data.image_ids
    ]
    found = evaluate(as_results(perfect, data), data)
    assert found["AP"] == found["AP50"] == pytest.approx(1)
    assert found["oLRP"] == pytest.approx(0, abs=1e-6)
    nothing = evaluate([], data)
    assert (nothing["AP"], nothing["oLRP"], nothing["oLRP_FN"]) == (0, 1, 1)
    run = Run(SMALL, data, CPU)
    run.model.train()
    assert evaluate(as_results(detect(run.model, data, 0, CPU, 2, 0), data), data)["AP50"] < 0.1
    assert run.model.training
    data.annotations.clear()
    for results in ([], as_results(perfect, data)):
        assert all(np.isnan(value) for name, value in evaluate(results, data).items() if name in ("AP", "AP50", "oLRP"))


@pytest.mark.parametrize("detector", ["fcos_resnet50", "fasterrcnn_resnet50"])
def test_every_detector_takes_a_step(detector: str, scenes: Path) -> None:
    """Labels begin at 0, or at 1 after a background."""
    data = CocoDetection(find_split(scenes, "train"))
    run = Run(replace(SMALL, detector=detector, batch=1, steps=1), data, CPU)
    (batch,) = run.batches(1, 0)
    values = run.take_step(batch)
    assert all(np.isfinite(value) for value in values.values())
    assert values["total"] > 0
    found = detect(run.model, CocoDetection(find_split(scenes, "val")), run.detector.first_label, CPU, 3, 0)
    assert all(((one["labels"] >= 0) & (one["labels"] < 10)).all() for one in found)


def test_mixed_precision(scenes: Path) -> None:
    data = CocoDetection(find_split(scenes, "train"))
    values = [
        run.take_step(next(iter(run.batches(1, 0))))
        for run in (Run(replace(SMALL, amp=amp), data, CPU) for amp in ("off", "bf16"))
    ]
    assert values[0] != values[1]
    assert values[0]["classification"] == pytest.approx(values[1]["classification"], rel=0.01)
    assert values[0]["bbox_regression"] == pytest.approx(values[1]["bbox_regression"], rel=0.2)


def cli(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["coco", *options])
    return command_line.main()


def test_command_line(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = tmp_path / "run"
    common = ["--data", str(scenes), "--out", str(out), "--workers", "0", "--device", "cpu"]
    small = ["--detector", "retinanet_small", "--size", "64", "--batch", "4", "--steps", "2", "--every", "1"]
    assert cli(monkeypatch, "train", *common, *small, "--evaluate-first", "--goal", "0.99") == 1
    shown = capsys.readouterr()
    assert "below 0.99" in shown.err
    assert "before training" in shown.out
    for name in ("losses.png", "detections.png", "metrics.json", "checkpoint.pt", "detections.json"):
        assert (out / name).stat().st_size > 0
    assert cli(monkeypatch, "evaluate", *common) == 0
    assert "step 2" in capsys.readouterr().out
    assert cli(monkeypatch, "train", *common, *small) == 2
    assert "--resume it, or take another --out" in capsys.readouterr().err
    # What is resumed has its settings from the checkpoint; the first evaluation is not forgotten.
    assert cli(monkeypatch, "train", *common, "--resume", "--batch", "4") == 0
    assert {"before training", "after training"} < set(json.loads((out / "metrics.json").read_text()))
    assert cli(monkeypatch, "train", *common, "--resume", "--batch", "8", "--no-flip") == 2
    assert "other settings: batch 4 (now 8), flip True (now False)" in capsys.readouterr().err
    assert cli(monkeypatch, "train", *common, "--resume", "--epochs", "7") == 2
    assert "other settings: steps 2 (now 21)" in capsys.readouterr().err
    assert cli(monkeypatch, "train", *common, "--resume", "--init", "x.pt") == 2
    assert "--init and --resume" in capsys.readouterr().err
    assert [row["step"] for row in rows(out / "evaluations.csv")] == ["0", "1", "2"]
    # Weights to begin with, in a file: those of a run are a detector's.
    torch.save(torch.load(out / "checkpoint.pt", weights_only=True)["model"], tmp_path / "weights.pt")
    other = [*common[:2], "--out", str(tmp_path / "other"), *common[4:], *small]
    assert cli(monkeypatch, "train", *other, "--init", str(tmp_path / "weights.pt")) == 0
    assert re.search(r"begins with (\d+) of \1 given tensors, of the detector's \1\n", capsys.readouterr().out)
    frozen = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (out, tmp_path / "other")]
    assert [state["settings"]["freeze_norm"] for state in frozen] == [False, True]
    # A run's checkpoint is one, too.
    other[3] = str(tmp_path / "of_a_run")
    assert cli(monkeypatch, "train", *other, "--init", str(out / "checkpoint.pt"), "--lr", "1e30") == 1
    seen = capsys.readouterr()
    assert re.search(r"begins with (\d+) of \1 given tensors, of the detector's \1\n", seen.out)
    assert re.search(r"error: the loss of step \d is .*: try a lower --lr or a longer --warm-up\n", seen.err)
    # The backbone's alone, as a classifier has them.
    whole = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    prefix = "backbone."
    torch.save(
        {key[len(prefix) :]: value for key, value in whole.items() if key.startswith(prefix)}, tmp_path / "weights.pt"
    )
    other[3] = str(tmp_path / "backbone")
    assert cli(monkeypatch, "train", *other, "--init", str(tmp_path / "weights.pt")) == 0
    assert re.search(r"begins with (\d+) of \1 given tensors", capsys.readouterr().out)
    (out / "checkpoint.pt").write_bytes(b"")
    assert cli(monkeypatch, "evaluate", *common) == 2
    assert "holds no weights" in capsys.readouterr().err
    torch.save({"other": torch.zeros(2)}, tmp_path / "weights.pt")
    other[3] = str(tmp_path / "third")
    assert cli(monkeypatch, "train", *other, "--init", str(tmp_path / "weights.pt")) == 2
    assert "none of the initial weights" in capsys.readouterr().err


def test_the_deviations_of_boxes_are_those_of_the_weights(scenes: Path, tmp_path: Path) -> None:
    """The papers' from the beginning; weights that were trained with others keep theirs."""
    data = CocoDetection(find_split(scenes, "train"))
    own = Run(SMALL, data, CPU).model.state_dict()
    backbone = {name.removeprefix("backbone."): value for name, value in own.items() if name.startswith("backbone.")}
    files = {
        "detector": own,
        "backbone": backbone,
        "old": {"model": own, "settings": {}},
        "new": {"model": own, "settings": {"box_coder": "published"}},
    }
    for name, state in files.items():
        torch.save(state, tmp_path / name)

    def chosen(*words: str) -> tuple[str, float | str]:
        options = command_line._parser().parse_args(["train", "--data", str(scenes), "--out", str(tmp_path), *words])
        begin = command_line._load(options.init) if options.init else None
        settings = command_line._settings(options, data, begin)
        return settings.box_coder, settings.initial_weight

    assert chosen("--batch", "4") == ("published", 50)
    assert chosen("--batch", "4", "--initial-weight", "auto") == ("published", "auto")
    assert chosen("--batch", "4", "--loss", "torchvision")[0] == "model"
    assert chosen("--batch", "4", "--detector", "fcos_resnet50")[0] == "model"
    found = {name: chosen("--batch", "4", "--init", str(tmp_path / name))[0] for name in files}
    assert found == {"detector": "model", "backbone": "published", "old": "model", "new": "published"}
    assert chosen("--batch", "4", "--init", str(tmp_path / "old"), "--box-coder", "published")[0] == "published"
    with pytest.raises(ValueError, match="--box-coder published is not for --detector fcos_resnet50"):
        chosen("--batch", "4", "--detector", "fcos_resnet50", "--box-coder", "published")
    before = {name: value for name, value in asdict(SMALL).items() if name != "box_coder"}
    options = command_line._parser().parse_args(["train", "--data", "x", "--out", "y", "--box-coder", "published"])
    with pytest.raises(ValueError, match=r"box_coder model \(now published\)"):
        command_line._resumed(options, {"box_coder"}, before, 4)


def test_errors_of_options(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Each before anything is written."""
    common = ["train", "--data", str(scenes), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for options, words in (
        (["--batch", "99"], "a batch of 99 images is more than the 14 there are"),
        (["--loss", "torchvision", "--assignment", "atss", "--batch", "2"], "--assignment atss needs a ranking loss"),
        (["--loss", "torchvision", "--box-weight", "2", "--batch", "2"], "--box-weight 2.0 needs a ranking loss"),
        (["--box-loss", "l1", "--batch", "2"], "--box-loss l1 is of --loss torchvision; --loss alrp takes giou"),
        (["--loss", "ap", "--detector", "fasterrcnn_resnet50", "--batch", "2"], "give --lr"),
        (["--resume"], "there is none to --resume"),
        (["--init", str(tmp_path / "none.pt"), "--batch", "2"], "there is no file"),
    ):
        assert cli(monkeypatch, *common, *options) == 2
        assert words in capsys.readouterr().err
    for options in (
        ["--steps", "0"],
        ["--epochs", "0"],
        ["--every", "-1"],
        ["--until", "0"],
        ["--batch", "x"],
        ["--seed", "-1"],
    ):
        with pytest.raises(SystemExit):
            cli(monkeypatch, *common, *options)
    assert cli(monkeypatch, "evaluate", *common[1:]) == 2
    assert "there is no file" in capsys.readouterr().err
    common[2] = str(tmp_path / "nowhere")
    assert cli(monkeypatch, *common) == 2
    assert f"there is no folder {tmp_path}/nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    if not torch.cuda.is_available():
        assert cli(monkeypatch, *common[:-1], "cuda") == 2
        assert "torch sees no GPU here" in capsys.readouterr().err


def test_errors_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(monkeypatch, "train", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu") == 2
    assert f"want one file {tmp_path}/annotations/*val*.json, found none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda content: content.pop("categories"), r"val.json is no COCO annotation file: KeyError\('categories'\)"),
        (lambda content: content["annotations"][0].pop("bbox"), "bbox"),
        (lambda content: content["annotations"][0].update(bbox=[1, 2, 3]), "val.json is no COCO annotation file"),
        (lambda content: content["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "bbox"),
        (lambda content: content["images"][0].update(id=0.5), "the id of an image is 0.5 and no whole number"),
        (lambda content: content["images"][0].update(id=4), "two images have one id"),
        (lambda content: content["categories"][0].update(id="7"), "the id of a category is '7' and no whole number"),
        (lambda content: content["categories"][0].update(id=3), "two categories have one id"),
        (lambda content: content["annotations"][0].update(category_id=99), "annotation 1 has the category_id 99"),
        (
            lambda content: content["annotations"][1].update(image_id="4"),
            "annotation 2 has the image_id '4', which the",
        ),
        (lambda content: content.update(images=[], annotations=[]), "lists no images"),
    ]
    for change, words in changes:
        with pytest.raises(ValueError, match=words):
            CocoDetection(data_set(tmp_path, change))
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{")
    (tmp_path / "val2017").mkdir()
    assert find_split(tmp_path, "val").images == tmp_path / "val2017"
    with pytest.raises(ValueError, match="is no COCO annotation file: JSONDecodeError"):
        CocoDetection(find_split(tmp_path, "val"))
    (tmp_path / "annotations" / "instances_val2014.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"found instances_val2014\.json, instances_val2017\.json"):
        find_split(tmp_path, "val")


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_loss_that_is_not_finite_stops_the_run(amp: str, scenes: Path, tmp_path: Path) -> None:
    run = Run(replace(SMALL, amp=amp), CocoDetection(find_split(scenes, "train")), CPU)
    with torch.no_grad():
        next(run.model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        train(run, tmp_path, lambda: {"AP": 0.0}, every=1, workers=0)
    assert not (tmp_path / "checkpoint.pt").exists()
