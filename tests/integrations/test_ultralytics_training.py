# pyright: reportMissingImports=false
"""Ranking losses in the trainer of Ultralytics: real trainings of small models, their checkpoints and exports."""

import copy
import csv
import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.support.compare import assert_near
from tests.support.processes import ROOT, TORCHRUN, run_together
from tests.support.ultralytics_models import CLASSES, GAIN, SIDE

# Imported there first, with settings.
# isort: split
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer

from alrp_triton.integrations import ultralytics_criterion
from alrp_triton.integrations.ultralytics import ranking_loss_of, remove_ranking_loss, use_ranking_loss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures to train on, four to validate: coloured rectangles."""
    folder, rng = tmp_path_factory.mktemp("rectangles"), np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 4)):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for each in range(count):
            pixels, lines = rng.integers(0, 80, (SIDE, SIDE, 3), dtype=np.uint8), list[str]()
            for label in rng.integers(0, CLASSES, 3):
                (w, h), x, y = rng.integers(14, 30, 2), *rng.integers(0, SIDE - 30, 2)
                pixels[y : y + h, x : x + w] = 255 * np.eye(3)[label]
                lines.append(f"{label} {(x + w / 2) / SIDE} {(y + h / 2) / SIDE} {w / SIDE} {h / SIDE}")
            Image.fromarray(pixels).save(folder / "images" / part / f"{each}.png")
            (folder / "labels" / part / f"{each}.txt").write_text("\n".join(lines))
    names = [f"  {label}: name{label}" for label in range(CLASSES)]
    (folder / "data.yaml").write_text(
        "\n".join([f"path: {folder}", "train: images/train", "val: images/val", "names:", *names])
    )
    return folder / "data.yaml"


def settings(data: Path, folder: Path, **extra: Any) -> dict[str, Any]:
    """Of a training in three steps an epoch."""
    small = {"imgsz": SIDE, "batch": 2, "epochs": 3, "workers": 0, "plots": False, "device": "cpu", "verbose": False}
    return {"data": str(data), "project": str(folder), "name": "run", "exist_ok": True, "mosaic": 0.0, **small, **extra}


def pickle_in(checkpoint: Path) -> bytes:
    with zipfile.ZipFile(checkpoint) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(name)


def copied(losses: Any) -> dict[str, Tensor]:
    return copy.deepcopy(losses.state_dict())


def assert_equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in state.items())


def watched(yolo: Any, losses: Any) -> dict[str, list[Any]]:
    """The states when a run starts, and after each epoch; and the criteria that train and that validate."""
    seen: dict[str, list[Any]] = {"start": [], "epochs": [], "criteria": []}

    def starts(trainer: Any) -> None:
        seen["start"].append(copied(losses))

    def ends(trainer: Any) -> None:
        models = [vars(model) for model in (trainer.model, trainer.ema.ema)]
        seen["criteria"].append([model["criterion"] for model in models if "criterion" in model])
        seen["epochs"].append(copied(losses))

    yolo.add_callback("on_train_epoch_start", starts)
    yolo.add_callback("on_train_epoch_end", ends)
    return seen


def test_a_training_its_checkpoints_and_its_resume(data: Path, tmp_path: Path) -> None:
    yolo = YOLO("yolo26n.yaml")
    losses = use_ranking_loss(yolo, "alrp", backend="torch")
    empty, seen = copied(losses), watched(yolo, losses)
    yolo.train(**settings(data, tmp_path, save_period=1))
    assert_equal(seen["start"][0], empty)
    assert [losses[name].period for name in losses] == [3, 3]
    weights = [float(state["one2one.balance.weight"]) for state in seen["epochs"]]
    assert len({50.0, *weights}) == 4  # at the end of each epoch it is another
    for trained, validated in seen["criteria"]:
        assert list(ultralytics_criterion.losses_in(trained).values()) == list(losses.values())
        assert list(ultralytics_criterion.losses_in(validated).values()) == list(losses.values())
    assert_equal(copied(losses), seen["epochs"][-1])  # nothing of a validation
    with (tmp_path / "run" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(0 < float(row["train/cls_loss"]) < GAIN for row in rows)
    assert all(0 < float(row["val/cls_loss"]) < GAIN for row in rows)
    assert all(math.isfinite(float(row["val/box_loss"])) for row in rows)

    weights_of = tmp_path / "run" / "weights"
    shipped, on_the_way = [weights_of / "last.pt", weights_of / "best.pt"], weights_of / "epoch1.pt"
    assert b"alrp_triton" not in pickle_in(on_the_way)
    assert b"ranking_loss" in pickle_in(on_the_way)
    assert all(b"ranking_loss" not in pickle_in(path) for path in shipped)
    code = (
        f"import sys; sys.modules['alrp_triton'] = None; from ultralytics import YOLO; import numpy as np\n"
        f"for path in {list(map(str, [*shipped, on_the_way]))}:\n"
        f"    print(YOLO(path).predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, device='cpu')[0].boxes.shape)"
    )
    (done,) = run_together(["-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size") == 3

    resumed = YOLO(on_the_way)
    again = use_ranking_loss(resumed, "alrp", backend="torch")
    after = watched(resumed, again)
    resumed.train(resume=True, device="cpu")
    assert len(after["epochs"]) == 1
    assert_equal(after["start"][0], seen["epochs"][1])
    for key, value in copied(again).items():  # weights of the model are resumed in half precision
        assert_near(value, seen["epochs"][-1][key], 0.1 if key.endswith("weight") else 0.0, key)
    assert after["criteria"][0][0].updates == 3

    plain = YOLO("yolo26n.yaml")  # cross entropy in one run, and a ranking in the next
    plain.train(**settings(data, tmp_path, name="plain", epochs=2, save_period=1))
    other = YOLO(on_the_way)
    use_ranking_loss(other, "rank_sort")
    with pytest.raises(ValueError, match=r"loss of the checkpoint is 'alrp' with .* and that of this run 'rank_sort'"):
        other.train(resume=True, device="cpu")

    other = YOLO(tmp_path / "plain" / "weights" / "epoch0.pt")
    again = use_ranking_loss(other, "alrp", initial_weight=20.0, backend="torch")
    after = watched(other, again)
    other.train(resume=True, device="cpu")
    assert {float(after["start"][0][f"{name}.balance.weight"]) for name in again} == {20.0}

    # A new run of the same YOLO, from its weights; then one without.
    yolo.train(**settings(data, tmp_path, epochs=1))
    assert_equal(seen["start"][3], empty)
    remove_ranking_loss(yolo)
    yolo.train(**settings(data, tmp_path, epochs=1))
    assert not any(ultralytics_criterion.losses_in(each) for each in seen["criteria"][-1])
    assert not ranking_loss_of(yolo)


def forget(trainer: Any) -> None:
    if trainer.epoch == 0:
        trainer.optimizer.param_groups[0].pop("ranking_loss", None)


def test_the_balance_goes_back_with_the_model(data: Path, tmp_path: Path) -> None:
    """After NaN the trainer loads its last checkpoint, and makes a new average; before it a new optimizer was made.

    Older versions do so where a batch is too large for the memory.
    """
    yolo = YOLO("yolo11n.yaml")
    yolo.add_callback("on_train_epoch_start", forget)
    losses = use_ranking_loss(yolo, "alrp", backend="torch")
    seen = watched(yolo, losses)

    def spoil(trainer: Any) -> None:
        if len(seen["epochs"]) == 2:
            trainer.loss = trainer.loss * math.nan

    yolo.add_callback("on_train_epoch_end", spoil)
    yolo.train(**settings(data, tmp_path))
    assert len(seen["epochs"]) == 4
    assert_equal(seen["start"][2], seen["epochs"][0])
    validated = seen["criteria"][-1][1]
    assert validated is not seen["criteria"][0][1]
    assert list(ultralytics_criterion.losses_in(validated).values()) == list(losses.values())


def test_a_training_with_a_warm_start(data: Path, tmp_path: Path) -> None:
    """Its first epoch is that of a training without a ranking loss; the count is in checkpoints, and goes on from them."""

    def rows(name: str) -> list[dict[str, float]]:
        with (tmp_path / name / "results.csv").open() as file:
            return [{key: float(value) for key, value in row.items() if "loss" in key} for row in csv.DictReader(file)]

    def counts(states: list[dict[str, Tensor]]) -> list[int]:
        return [int(state["head.warm_start.steps"]) for state in states]

    YOLO("yolo11n.yaml").train(**settings(data, tmp_path, name="plain"))
    yolo = YOLO("yolo11n.yaml")
    losses = use_ranking_loss(yolo, "alrp", backend="torch", warm_start=3)
    seen = watched(yolo, losses)
    yolo.train(**settings(data, tmp_path, save_period=1))
    plain, ours = rows("plain"), rows("run")
    for part in ("box", "cls", "dfl"):
        key = f"train/{part}_loss"
        assert ours[0][key] == plain[0][key]
        assert part == "dfl" or ours[1][key] != plain[1][key], key
    assert counts(seen["start"]) == [0, 3, 6]
    assert counts(seen["epochs"]) == [3, 6, 9]  # validations are no steps
    assert ours[2]["train/cls_loss"] < GAIN < ours[0]["train/cls_loss"]  # the ranking alone, and their own

    resumed = YOLO(tmp_path / "run" / "weights" / "epoch1.pt")
    after = watched(resumed, use_ranking_loss(resumed, "alrp", backend="torch", warm_start=3))
    resumed.train(resume=True, device="cpu")
    assert counts(after["start"] + after["epochs"]) == [6, 9]
    other = YOLO(tmp_path / "run" / "weights" / "epoch1.pt")
    use_ranking_loss(other, "alrp")
    with pytest.raises(ValueError, match=r"warm_start.steps.*call use_ranking_loss as before"):
        other.train(resume=True, device="cpu")
    yolo.train(**settings(data, tmp_path, epochs=1))
    assert counts(seen["start"][3:]) == [0]


def test_callbacks_reach_other_processes(data: Path, tmp_path: Path) -> None:
    """As a trainer on several GPUs sends them: pickled."""
    yolo = YOLO("yolov8n.yaml")
    use_ranking_loss(yolo, "alrp", period=5, box_weight=1.0, backend="torch")
    callbacks = pickle.loads(pickle.dumps(yolo.callbacks))
    overrides = settings(data, tmp_path, epochs=1, model="yolov8n.yaml")
    trainer: Any = DetectionTrainer(overrides=overrides, _callbacks=callbacks)
    trainer.train()
    (loss,) = ultralytics_criterion.losses_in(trainer.model.criterion).values()
    assert loss.box_weight == 1
    assert loss is not ranking_loss_of(yolo)["head"]


def test_class_weights_are_refused_in_training(data: Path, tmp_path: Path) -> None:
    yolo = YOLO("yolo11n.yaml")
    use_ranking_loss(yolo)
    with pytest.raises(ValueError, match="cls_pw must be 0"):
        yolo.train(**settings(data, tmp_path, cls_pw=0.5))


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning"
)
def test_what_is_shipped_does_not_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, exported and saved, with the loss in the model itself."""
    monkeypatch.chdir(tmp_path)
    yolo = YOLO("yolo11n.yaml")
    inner: Any = yolo.model
    args, inner.args = inner.args, get_cfg()
    use_ranking_loss(inner, backend="torch")
    inner.args = args
    pixels = torch.rand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        said = inner.eval()(pixels)[0]
    path = yolo.export(format="torchscript", imgsz=SIDE, device="cpu")
    assert_near(torch.jit.load(path)(pixels), said, 1e-4)
    with zipfile.ZipFile(path) as archive:
        assert not any(b"alrp" in archive.read(name) for name in archive.namelist())
    yolo.save(tmp_path / "saved.pt")
    assert b"alrp_triton" not in pickle_in(tmp_path / "saved.pt")
    with torch.no_grad():
        assert_near(copy.deepcopy(inner).fuse(verbose=False)(pixels)[0], said, 1e-4)
    assert ranking_loss_of(inner)


def test_two_processes_rank_together() -> None:
    (done,) = run_together([*TORCHRUN, "-m", "tests.support.ultralytics_processes"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ranked together") == 2


def test_the_example_of_the_docs_runs(data: Path, tmp_path: Path) -> None:
    section = (ROOT / "docs" / "integrations.md").read_text().split("\n## Ultralytics\n")[1]
    code = section.split("```py\n")[1].split("```")[0]
    small = settings(data, tmp_path, epochs=1)
    del small["data"]
    for ours, toy in (('"coco8.yaml"', repr(str(data))), ("epochs=100, imgsz=640", "**small")):
        assert ours in code
        code = code.replace(ours, toy)
    names: dict[str, Any] = {"small": small}
    exec(code, names)
    losses, trained = names["loss"], names["model"].trainer.model
    assert list(ultralytics_criterion.losses_in(trained.criterion).values()) == list(losses.values())
    greatest = max(float(level[-1].bias.detach().max()) for level in trained.model[-1].cv3)
    assert greatest == pytest.approx(math.log(0.01 / 0.99), abs=0.1)  # after three steps


def test_the_table_of_the_docs_is_that_of_its_results() -> None:
    pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
    from examples.yolo import table

    page, results = ((ROOT / name).read_text() for name in ("docs/integrations.md", "examples/yolo.json"))
    assert page.split("<!-- examples/yolo.json -->\n")[1].split("<!-- end -->")[0] == table(json.loads(results))
