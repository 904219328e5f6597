"""The trainer's command line: fit, validate, predict; what goes wrong in it; its processes."""

# pyright: reportPrivateUsage=false
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tests.support.coco_data")

from PIL import Image

from alrp_triton.trainer import RankingDetector, cli, detecting, fitting
from tests.support.coco_data import (
    FAST,
    MARKS,
    Lost,
    alrp_train,
    content,
    cut_short,
    data_set,
    fit,
    ignore,
    options,
    read,
    same,
)
from tests.support.processes import ROOT

pytestmark = [*MARKS, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_set(tmp_path_factory.mktemp("scenes"), content(6))


@pytest.fixture(scope="module")
def finished(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, with an average of weights; read only."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert fit(scenes, out, "--ema", 0.5, **FAST).status == 0
    return out


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "save_curves", ignore)
    monkeypatch.setattr(fitting, "save_detections", ignore)


# jsonargparse looks into all modules of the process: that of an adapter whose test has put a library's twin in its place.
@pytest.mark.filterwarnings("ignore:\\s*Hit failing import")
def test_help() -> None:
    assert (alrp_train("--help").status, alrp_train("-h").status) == (0, 0)
    assert "alrp-train fit --data.root DIR --out RUN" in alrp_train("--help").out
    assert (alrp_train().status, alrp_train("train").status) == (2, 2)
    assert "alrp-train fit --data.root DIR --out RUN" in alrp_train("train").err
    for command in ("fit", "validate", "predict"):
        done = alrp_train(command, "--help")
        assert done.status == 0
        assert "--config" in done.out
        assert done.out.startswith(f"usage: alrp-train {command} [--OPTION VALUE ...]\n")
        assert not re.search(r":\w+:`|``", done.out)  # marks of docstrings
    ours, lightnings = (
        done.out.index(one)
        for done in [alrp_train("fit", "--help")]
        for one in ("--data.root", "--trainer.max_epochs MAX")
    )
    assert ours < lightnings


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.* always returns a .* in scripting")
@pytest.mark.usefixtures("without_pictures")
def test_the_examples_of_the_docs_run(finished: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """In Python: to detect, to ship, and, with a smaller detector for an epoch, to train."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(finished)
    (tmp_path / "DIR").symlink_to(scenes)
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "trainer.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for code in blocks:
        smaller = code.replace("retinanet_resnet50_fpn_v2", "retinanet_small").replace("=12", "=1").replace("=8", "=2")
        assert (code is blocks[-1]) == (smaller != code)
        exec(smaller, names)
    assert len(names["kept"]) == len(names["share"]) > 0
    assert names["trainer"].global_step > 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "TimeoutError"),
        (ConnectionResetError(104, "reset by peer"), "[Errno 104] reset by peer"),
        (OSError("\n"), "OSError"),
    ],
)
def test_errors_of_few_words(error: OSError, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fit", fail)
    done = alrp_train("fit")
    assert done.status == 2
    assert done.err == f"error: {words}\n"


# Validate and predict.


def test_validate_gives_what_fit_ended_with(finished: Path, scenes: Path, tmp_path: Path) -> None:
    """Of the last checkpoint what the last evaluation gave, to the bit; of a folder the best one's."""
    metrics = read(finished / "metrics.json")
    data = ["--data.root", scenes, "--data.workers", 0, "--data.batch", 2, "--accelerator", "cpu"]
    done = alrp_train("validate", "--run", finished / "last.ckpt", *data, "--out", tmp_path / "last.json")
    assert done.status == 0
    last = read(tmp_path / "last.json")
    assert same({"step": 6} | last["overall"], metrics["evaluations"][-1])
    assert same(last["by_category"], metrics["by_category"])
    assert re.search(r"\ncat +0\.\d{3} ", done.out)
    assert alrp_train("validate", "--run", finished, *data, "--out", tmp_path / "best.json").status == 0
    best = max(metrics["evaluations"], key=lambda row: row["AP"])
    assert same({"step": best["step"]} | read(tmp_path / "best.json")["overall"], best)
    # Without data it is the run's.
    own = ["validate", "--run", finished, "--accelerator", "cpu", "--out", tmp_path / "own.json"]
    assert alrp_train(*own).status == 0
    assert (tmp_path / "own.json").read_bytes() == (tmp_path / "best.json").read_bytes()


def test_predict_keeps_what_is_worth_keeping(finished: Path, scenes: Path, tmp_path: Path) -> None:
    """From the threshold of the last evaluation on, of each category, exactly; of one without, nothing."""
    out = tmp_path / "found.json"
    where = [
        "--run",
        finished / "last.ckpt",
        "--root",
        scenes,
        "--part",
        "val",
        "--accelerator",
        "cpu",
        "--batch",
        2,
        "--out",
        out,
    ]
    thresholds = {name: row["threshold"] for name, row in read(finished / "metrics.json")["by_category"].items()}
    least = {category: thresholds[name] for category, name in ((1, "cat"), (2, "dog"))}
    assert any(value == value for value in least.values())
    assert alrp_train("predict", *where).status == 0
    everything = read(out)
    assert [{key: one[key] for key in ("image_id", "category_id", "bbox", "score")} for one in everything] == read(finished / "detections.json")  # fmt: skip
    kept = [one for one in everything if one["score"] >= least[one["category_id"]]]
    assert 0 < len(kept) < len(everything)
    done = alrp_train("predict", *where, "--threshold", "optimal")
    assert read(out) == kept
    assert done.out.splitlines()[-1] == f"{len(kept)} detections in 2 images: {out}"
    middle = sorted(one["score"] for one in everything)[len(everything) // 2]
    assert alrp_train("predict", *where, "--threshold", repr(middle)).status == 0
    assert read(out) == [one for one in everything if one["score"] >= middle]
    # The same, in the same order within a category, with scores that are shares of right ones.
    calibration = RankingDetector.load_from_checkpoint(finished / "last.ckpt", map_location="cpu").calibration
    assert calibration is not None
    assert alrp_train("predict", *where, "--threshold", "optimal", "--calibrate").status == 0
    levels = read(out)
    for category in (1, 2):
        before, after = ([one for one in part if one["category_id"] == category] for part in (kept, levels))
        assert [one["bbox"] for one in after] == [one["bbox"] for one in before]
        scores = torch.tensor([one["score"] for one in before], dtype=torch.float32)
        labels = torch.full((len(before),), category - 1)
        assert [one["score"] for one in after] == calibration(scores, labels).tolist()
    assert alrp_train("predict", *where, "--threshold", "0.001", "--calibrate").status == 0
    assert all(one["score"] >= 0.001 for one in read(out))


def test_predict_in_images(finished: Path, scenes: Path, tmp_path: Path) -> None:
    """Files and folders, and a part without annotations; the same is found in the same pixels."""
    images = [scenes / "images" / f"val{i}.png" for i in (1, 2)]
    folder = tmp_path / "folder"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.mkdir()
    (folder / "deep").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "folder.png").mkdir()
    (folder / "notes.txt").write_text("no image")
    with Image.open(images[1]) as image:
        image.save(folder / "deep" / "IMAGE.PNG")
    common = ["predict", "--run", finished, "--accelerator", "cpu", "--out", tmp_path / "found.json", "--batch", 2]
    assert alrp_train(*common, "--images", images[0], folder, "--pictures", tmp_path / "pictures").status == 0
    found = read(tmp_path / "found.json")
    assert {one["file_name"] for one in found} == {str(images[0]), str(folder / "deep" / "IMAGE.PNG")}
    assert {one["image_id"] for one in found} == {1, 2}
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    part = {key: value for key, value in content(2, "val{}.png").items() if key != "annotations"}
    for image in part["images"]:
        image["id"] += 2**60
    (scenes / "annotations" / "image_info_test.json").write_text(json.dumps(part))
    assert alrp_train(*common, "--root", scenes).status == 0
    tested = read(tmp_path / "found.json")
    assert [(one["bbox"], one["score"]) for one in tested] == [(one["bbox"], one["score"]) for one in found]
    assert {one["image_id"] for one in tested} == {2**60 + 1, 2**60 + 2}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "give --images, or --root and --part"),
        (["--images", "SCENES/images", "--root", "SCENES"], "give --images, or --root and --part"),
        (["--images", "SCENES/nowhere"], "there is no SCENES/nowhere"),
        (["--images", "SCENES/annotations"], "no image in SCENES/annotations"),
        (["--images", "SCENES/annotations/instances_val.json"], "instances_val.json cannot be read as an image"),
        (["--root", "SCENES", "--part", "nothing"], "want one file annotations/*nothing*.json in SCENES, found "),
        (["--root", "SCENES/nowhere"], "there is no folder SCENES/nowhere"),
        (["--run", "SCENES", "--images", "SCENES/images"], "there is no checkpoint SCENES/best.ckpt"),
        (["--run", "SCENES/images/im1.png", "--images", "SCENES/images"], "im1.png is no checkpoint of alrp-train"),
        (["--images", "SCENES/images", "--accelerator", "gpu"], "No supported gpu backend found"),
        (["--images", "SCENES/images", "--accelerator", "abacus"], "abacus"),
        (["--images", "SCENES/images", "--threshold", "best"], "threshold"),
        (["--images", "SCENES/images", "--threshold", "30"], "--threshold must be in 0..1, or optimal, got 30"),
        (["--images", "SCENES/images", "--batch", "0"], "batch"),
        (["--images", "SCENES/images", "--out", "SCENES"], "SCENES"),
    ],
)
def test_errors_of_predict(words: list[str], error: str, finished: Path, scenes: Path, tmp_path: Path) -> None:
    if "gpu" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    given = [word.replace("SCENES", str(scenes)) for word in words]
    done = alrp_train("predict", "--run", finished, "--out", tmp_path / "out.json", "--accelerator", "cpu", *given)
    assert done.status == 2
    assert error.replace("SCENES", str(scenes)) in done.err
    assert "usage: " in done.err or len(done.error) < 1000


def test_what_cannot_be_written_is_found_first(finished: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Folders are made; and nothing is detected for a file that cannot be."""
    common = ["--run", finished, "--accelerator", "cpu"]
    for words in (["predict", "--images", scenes / "images"], ["validate"]):
        assert alrp_train(*words, *common, "--out", tmp_path / words[0] / "deep" / "out.json").status == 0
        assert read(tmp_path / words[0] / "deep" / "out.json")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(detecting, "read_model", None)
    for words in (["predict", "--images", scenes], ["validate"], ["predict", "--images", scenes, "--pictures", tmp_path / "file"]):  # fmt: skip
        out = tmp_path / ("out.json" if "--pictures" in words else "file/out.json")
        assert "file" in alrp_train(*words, *common, "--out", out).error


def test_images_that_are_too_thin(finished: Path, tmp_path: Path) -> None:
    part = content(2, "val{}.png")
    part["images"][1] |= {"width": 1000, "height": 1}
    data_set(tmp_path / "data", content(6), part | {"annotations": part["annotations"][:1]})
    thin = tmp_path / "data" / "images" / "val2.png"
    for words in (["predict", "--images", thin], ["predict", "--root", tmp_path / "data", "--part", "val"], ["validate", "--data.root", tmp_path / "data"]):  # fmt: skip
        out = ["--out", tmp_path / "out.json"]
        assert "val2.png, [1000.0, 1.0], is too thin" in alrp_train(*words, *out, "--run", finished, "--accelerator", "cpu").error  # fmt: skip


@pytest.mark.parametrize("state", [b"", b"PK\x03\x04", {"state_dict": {}}, [1], {"model": Path("x")}, "cut", "other"])
def test_checkpoints_that_are_none(state: Any, finished: Path, tmp_path: Path) -> None:
    """In a line that names the file, to resume or to validate."""
    file = tmp_path / "last.ckpt"
    file.write_bytes(whole := (finished / "last.ckpt").read_bytes())
    (tmp_path / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    if state == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif state == "other":
        known = torch.load(file, weights_only=True)
        known["hyper_parameters"]["categories"] = {1: "cat"}
        torch.save(known, file)
    elif isinstance(state, bytes):
        file.write_bytes(state)
    else:
        torch.save(state, file)
    commands: list[list[object]] = [["validate", "--run", tmp_path]]
    for words in commands + [["fit", "--resume", "--out", tmp_path]] * (state != "other"):
        done = alrp_train(*words)
        assert done.status == 2
        assert re.match(r"\S*last\.ckpt is no checkpoint of alrp-train: \w", done.error)


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    """Is what is said, and not that its data are missing."""
    for words in (["validate", "--run", tmp_path / "no"], ["fit", "--resume", "--out", tmp_path / "no"]):
        done = alrp_train(*words)
        assert (done.status, done.error.startswith(f"there is no checkpoint {tmp_path / 'no'}")) == (2, True)


def test_configurations_of_runs(finished: Path, scenes: Path, tmp_path: Path) -> None:
    """``validate`` takes that of the folder in which a checkpoint is, however --run is written."""
    for run in (["--run", finished / "last.ckpt"], [f"--run={finished}"]):
        assert alrp_train("validate", *run, "--accelerator", "cpu").status == 0
    (tmp_path / "best.ckpt").write_bytes((finished / "best.ckpt").read_bytes())
    for text in ("", "[]", "a: [1, {", "model: {}", "data: 1"):
        (tmp_path / "config.yaml").write_text(text)
        assert "config.yaml has no settings of data: " in alrp_train("validate", "--run", tmp_path).error


@pytest.mark.usefixtures("without_pictures")
def test_the_configuration_of_a_resumed_run_is_of_new_runs(finished: Path, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("last.ckpt", "config.yaml"):
        (tmp_path / "run" / name).write_bytes((finished / name).read_bytes())
    config = tmp_path / "run" / "config.yaml"
    assert alrp_train("fit", "--out", tmp_path / "run", "--resume", "--trainer.max_epochs", 3).status == 0
    assert "max_epochs: 3" in config.read_text()
    assert alrp_train("fit", "--config", config, "--out", tmp_path / "new").status == 0


def test_other_categories_are_not_validated(finished: Path, scenes: Path, tmp_path: Path) -> None:
    part = content(2) | {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cow"}]}
    data_set(tmp_path, part, part)
    done = alrp_train(
        "validate", "--run", finished, "--data.root", tmp_path, "--data.workers", 0, "--accelerator", "cpu"
    )
    assert done.status == 2
    noted = alrp_train("predict", "--run", finished, "--root", tmp_path, "--part", "val", "--accelerator", "cpu", "--out", tmp_path / "found.json")  # fmt: skip
    assert "instances_val.json has other categories; results have the ids of the model's" in noted.err
    assert "the model has the categories {1: 'cat', 2: 'dog'}, the data {1: 'cat', 2: 'cow'}" in done.error
    state = torch.load(finished / "last.ckpt", weights_only=True) | {"thresholds": {}, "calibration": None}
    torch.save(state, tmp_path / "early.ckpt")
    settings = {name: value for name, value in state["hyper_parameters"].items() if name != "warm_start"}
    torch.save(state | {"hyper_parameters": settings}, tmp_path / "older.ckpt")  # of before there was one
    older = ["--run", tmp_path / "older.ckpt", "--images", scenes, "--accelerator", "cpu", "--out", tmp_path / "o.json"]
    assert alrp_train("predict", *older).status == 0
    for words in (["--threshold", "optimal"], ["--calibrate"]):
        done = alrp_train("predict", "--run", tmp_path / "early.ckpt", "--images", scenes, *words)
        assert done.status == 2
        assert "this checkpoint is of before the first evaluation" in done.error


# Fit.


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--data.batch", "99"], "a batch of 99 images is more than the 6 there are"),
        (["--data.batch", "0"], "batch must be at least 1"),
        (["--data.batch", "x"], "data.batch"),
        (["--data.train", "trainval"], "want one file "),
        (["--data.root", "SCENES/nowhere"], "there is no folder SCENES/nowhere"),
        (["--data.roof", "SCENES"], "data.roof"),
        (["--model.siz", "48"], "model.siz"),  # no options in part
        (["--model.loss", "focal"], "focal"),
        (["--model.detector", "yolo"], "detector must be one of "),
        (["--model.loss", "torchvision", "--model.assignment", "atss"], "assignment, box_weight, box_coder and warm_start need a ranking"),
        (["--model.box_loss", "l1"], "box_loss l1 is of loss torchvision"),
        (["--model.warm_start", "-1"], "warm_start must be at least 0"),
        (["--model.box_weight", "-1"], "box_weight must be at least 0"),
        (["--model.size", "0"], "size and period must be at least 1"),
        (["--out"], "out"),
        (["--resume", "--out"], "out"),
        (["--resume"], "out/last.ckpt"),
        (["--weights", "SCENES/none.pt"], "there is no such file, and none of this name at torchvision"),
        (["--weights", "SCENES/annotations/instances_val.json"], "instances_val.json: cannot be read: "),
        (["--out", "SCENES/annotations/instances_val.json"], "instances_val.json is no folder"),
        (["--out", "SCENES/annotations/instances_val.json/run"], "instances_val.json"),
        (["--trainer.accelerator", "gpu"], "No supported gpu backend found"),
        (["--trainer.accelerator", "abacus"], "abacus"),
        (["--trainer.devices", "0"], "devices"),
        (["--trainer.max_epochs", "-1"], "the schedule needs an end of the run"),
        (["--trainer.precision", "3"], "precision"),
        (["--trainer.val_check_interval", "99"], "val_check_interval"),
        (["--config", "SCENES/annotations/none.yaml"], "none.yaml"),
        (["--ema", "2"], "ema"),
        (["--patience", "-1"], "patience"),
    ],
)  # fmt: skip
def test_errors_of_options(words: list[str], error: str, scenes: Path, tmp_path: Path) -> None:
    """Each in a line, or as the parser of arguments does, and before anything of a run is written but its folder."""
    if "gpu" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = fit(scenes, tmp_path / "out", *(word.replace("SCENES", str(scenes)) for word in words))
    assert done.status == 2
    assert error.replace("SCENES", str(scenes)) in done.err
    assert "usage: " in done.err or len(done.error) < 1000
    assert not list((tmp_path / "out").glob("*.*"))


WRONG: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: (folder / "annotations" / "instances_val.json").unlink(), "want one file "),
    (
        lambda folder: (folder / "annotations" / "instances_val.json").write_text("[" + "1, " * 10**5 + "1]"),
        "is no COCO",
    ),
    (
        lambda folder: (folder / "annotations" / "instances_train.json").write_text(json.dumps("x" * 10**6)),
        "is no COCO",
    ),
    (lambda folder: data_set(folder, content(6, id=7654321, bbox=[1, 2, 3])), "annotations, id 7654321: bbox is"),
    (lambda folder: (folder / "images" / "val1.png").unlink(), "there is no image val1.png of "),
    (lambda folder: (folder / "images" / "val2.png").write_bytes(b""), "val2.png cannot be read as an image"),
    (lambda folder: cut_short(folder / "images" / "im3.png"), "im3.png cannot be read as an image"),
    (lambda folder: Image.new("F", (64, 48)).save(folder / "images" / "im3.png", "TIFF"), "im3.png has 32 bits"),
]


@pytest.mark.parametrize(("change", "error"), WRONG)
@pytest.mark.usefixtures("without_pictures")
def test_errors_of_data(change: Callable[[Path], Any], error: str, tmp_path: Path) -> None:
    change(data_set(tmp_path / "data", content(6)))
    done = fit(tmp_path / "data", tmp_path / "out")
    assert done.status == 2
    assert error in done.error
    assert len(done.error) < 1000


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_cut_short_is_named(workers: int, tmp_path: Path) -> None:
    """In a line, and not with the whole traceback of the process that has read it."""
    folder = data_set(tmp_path / "data", content(2, "im{}.jpg"))
    cut_short(folder / "images" / "im2.jpg")
    done = fit(folder, tmp_path / "out", data__workers=workers)
    assert done.status == 2
    assert re.match(r"\S*im2\.jpg cannot be read as an image: .*truncated", done.error)


def test_boxes_that_all_are_left_out_are_counted(tmp_path: Path) -> None:
    """As where there are masks alone."""
    part = content(2)
    for annotation in part["annotations"]:
        del annotation["bbox"]
    done = fit(data_set(tmp_path / "data", part), tmp_path / "out")
    assert done.status == 2
    assert re.search(r"no box to train on, in 2 images; left out 2 annotations without a box \(id 1, 2\)$", done.error)


@pytest.mark.usefixtures("without_pictures")
def test_boxes_that_are_left_out_are_counted(tmp_path: Path) -> None:
    part = content(4)
    for annotation in part["annotations"][:3]:
        annotation["bbox"] = [29, 26, -20, -18]
    part["annotations"][3] |= {"bbox": [63.9, 10, 5, 10], "area": -360}
    part["annotations"].append({"id": 9, "image_id": 4, "category_id": 1, "bbox": [63.9999999, 10, 5, 10]})
    part["annotations"].append({"id": 10, "image_id": 4, "category_id": 1, "bbox": [10, 10, 5, 10]})
    done = fit(data_set(tmp_path / "data", part), tmp_path / "out")
    assert done.status == 0
    assert "4 images, 2 boxes, 2 categories to train on" in done.log
    assert "cut 1 annotations at the border of their image, in training alone (id 4)" in done.log
    assert "left out 4 annotations with a box that has no area inside of its image (id 1, 2, 3, …)" in done.log
    assert "took the area of the box for 1 annotations with an area below 0 or beyond 1e10 (id 4)" in done.log


@pytest.mark.parametrize("drawing", ["save_curves", "save_detections"])
def test_what_is_drawn_does_not_decide(drawing: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """How a run ends."""

    def fail(*_: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(fitting, "save_curves", ignore)
    monkeypatch.setattr(fitting, "save_detections", ignore)
    monkeypatch.setattr(fitting, drawing, fail)
    (tmp_path / "run").mkdir()
    for name in ("last.ckpt", "config.yaml"):
        (tmp_path / "run" / name).write_bytes((finished / name).read_bytes())
    done = alrp_train("fit", "--out", tmp_path / "run", "--resume", "--goal", 0)
    assert done.status == 0
    assert "could not be drawn: RuntimeError: no font" in done.err
    done = alrp_train("fit", "--out", tmp_path / "run", "--resume", "--goal", 0.999)
    assert done.status == 1
    assert re.search(r"AP50 ended at 0\.\d{3}, below 0\.999", done.err)


@pytest.mark.usefixtures("without_pictures")
def test_names_in_any_alphabet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the terminal has but one: a run does not end at its last lines."""
    part = content(2) | {"categories": [{"id": 1, "name": "Löwe"}, {"id": 2, "name": "狮子"}]}
    data_set(
        tmp_path / "data",
        part,
        part | {"images": [one | {"file_name": f"val{one['id']}.png"} for one in part["images"]]},
    )
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    words = options(tmp_path / "data", tmp_path / "out")
    assert cli.main(["fit", *words]) == 0
    assert read(tmp_path / "out" / "metrics.json")["by_category"].keys() == {"Löwe", "狮子"}


@pytest.mark.usefixtures("without_pictures")
def test_a_folder_of_a_run_that_died(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first checkpoint: what another leaves there is its own."""

    def lose(*_: Any) -> None:
        raise Lost

    with monkeypatch.context() as patch:
        patch.setattr(RankingDetector, "training_step", lose)
        with pytest.raises(Lost):
            fit(scenes, tmp_path / "old", "--evaluate_first", seed=1, **FAST)
    for out in ("old", "fresh"):
        assert fit(scenes, tmp_path / out, "--evaluate_first", seed=2, **FAST).status == 0
    old, fresh = (read(tmp_path / out / "metrics.json") for out in ("old", "fresh"))
    assert same(old, fresh)
    assert [row["step"] for row in old["evaluations"]] == [0, 3, 6]


@pytest.mark.usefixtures("without_pictures")
def test_a_run_begins_with_weights(finished: Path, scenes: Path, tmp_path: Path) -> None:
    """A checkpoint of another run is a file of them, too; resumed it goes on without the file."""
    weights = tmp_path / "weights.ckpt"
    weights.write_bytes((finished / "best.ckpt").read_bytes())
    done = fit(scenes, tmp_path / "run", "--weights", weights, **FAST)
    assert done.status == 0
    assert re.search(r"weights\.ckpt: begins with (\d+) of \1 given tensors, of the detector's \1\n", done.log)
    weights.unlink()
    done = alrp_train("fit", "--out", tmp_path / "run", "--resume", "--trainer.max_epochs", 3)
    assert done.status == 0
    assert read(tmp_path / "run" / "metrics.json")["step"] == 9


@pytest.mark.usefixtures("without_pictures")
def test_a_run_that_is_warm_up_alone(scenes: Path, tmp_path: Path) -> None:
    done = fit(scenes, tmp_path / "run", model__warm_up=500, trainer__max_epochs=2)
    assert done.status == 0
    assert "note: the learning rate rises for 500 steps, and the run has 6: it will learn little" in done.log


@pytest.mark.usefixtures("without_pictures")
def test_patience(scenes: Path, tmp_path: Path) -> None:
    """The run ends after evaluations without a better AP, which a rate of 0 gives."""
    assert fit(scenes, tmp_path / "run", "--patience", 2, model__lr=0, trainer__max_epochs=9).status == 0
    assert [row["step"] for row in read(tmp_path / "run" / "metrics.json")["evaluations"]] == [3, 6, 9]
