"""Parts of the trainer: detectors, their steps, weights to begin with, pictures."""

# pyright: reportPrivateUsage=false
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch

pytest.importorskip("tests.support.coco_data")

from lightning.pytorch import Callback, Trainer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from alrp_triton.integrations.torchvision import plain_copy
from alrp_triton.trainer import CocoDataModule, RankingDetector, UserError, fitting
from alrp_triton.trainer.detectors import load_weights, read_weights
from alrp_triton.trainer.pictures import save_curves, save_detections
from tests.support.coco_data import MARKS, Lost, content, data_set, fit, same

pytestmark = [*MARKS, pytest.mark.usefixtures("one_thread")]
CATEGORIES = {1: "cat", 2: "dog"}
QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_set(tmp_path_factory.mktemp("scenes"), content(6))


def make(detector: str = "retinanet_small", **settings: Any) -> RankingDetector:
    own: dict[str, Any] = {"size": 48, "warm_up": 0, "lr": 1e-3}
    return RankingDetector(CATEGORIES, detector, **own | settings)


def train(model: RankingDetector, scenes: Path, batch: int = 2, *callbacks: Callback, **options: Any) -> Trainer:
    """Without a command line: as a library."""
    own: dict[str, Any] = dict.fromkeys(QUIET, False) | {"accelerator": "cpu", "limit_val_batches": 0, "max_steps": 1}
    trainer = Trainer(**own | options, callbacks=list(callbacks), use_distributed_sampler=False)
    trainer.fit(model, datamodule=CocoDataModule(scenes, batch=batch, workers=0))
    return trainer


@pytest.mark.parametrize("detector", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn"])
def test_every_detector_takes_a_step(detector: str, scenes: Path) -> None:
    """Labels begin at 0, or at 1 after a background."""
    model = make(detector)
    train(model, scenes, batch=1)
    assert all(value.isfinite() for value in model.values.values())
    assert model.values["total"] > 0
    with torch.no_grad():
        (found,) = model.eval()([torch.rand(3, 48, 64)])
    assert ((found["labels"] >= 0) & (found["labels"] < 2)).all()
    assert len(found["labels"])


@pytest.mark.parametrize("freeze", [True, False])
def test_batch_norm_is_frozen(freeze: bool, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its statistics; its scale is trained in any case."""
    monkeypatch.setattr("alrp_triton.trainer.detectors._norm", nn.BatchNorm2d)
    model = make(freeze_norm=freeze)
    before = {name: value.clone() for name, value in model.detector.state_dict().items()}
    train(model, scenes)
    changed = {name for name, value in model.detector.state_dict().items() if not torch.equal(value, before[name])}
    assert any("running_var" in name for name in before)
    assert any("running" in name or "num_batches" in name for name in changed) != freeze
    assert "backbone.stages.0.0.1.weight" in changed


def test_random_numbers_are_those_of_the_step(scenes: Path) -> None:
    """So that a detector that draws some is resumed like any other."""
    drawn: list[float] = []

    class Draw(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            drawn.append(torch.rand(()).item())

    for seed in (1, 2):
        torch.manual_seed(seed)
        train(make(), scenes, 2, Draw(), max_steps=2)
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


def test_weights_are_those_of_the_seed() -> None:
    state = torch.get_rng_state()
    one, two, other = (make(seed=seed).state_dict() for seed in (3, 3, 4))
    assert same(one, two)
    assert not same(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_mixed_precision(scenes: Path) -> None:
    values: list[dict[str, Tensor]] = []
    for precision in ("32-true", "bf16-mixed"):
        model = make()
        train(model, scenes, precision=precision)
        values.append(model.values)
    assert values[0]["total"] != values[1]["total"]
    assert values[0]["classification"].item() == pytest.approx(values[1]["classification"].item(), rel=0.01)
    assert values[0]["bbox_regression"].item() == pytest.approx(values[1]["bbox_regression"].item(), rel=0.2)


def test_accumulated_gradients(scenes: Path) -> None:
    """Steps are the optimizer's, of the images of all batches together; the period of the self-balancing is in batches."""
    model = make(loss="alrp", lr=None, schedule="cosine")
    rates: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            rates.append(model.values["lr"].item())

    trainer = train(model, scenes, 2, Watch(), max_steps=-1, max_epochs=2, accumulate_grad_batches=2)
    assert trainer.global_step == 4  # 3 batches an epoch, of which the last is alone
    assert model.total_steps == 4
    assert model.images_per_step == 4
    assert rates == pytest.approx([0.008 * 4 / 32 * share for share in (1, 1, 0.8535534, 0.5, 0.5, 0.1464466)])
    ((_, part),) = model.losses.items()
    assert part.balance is not None
    assert part.balance.period == 3
    assert part.balance.steps == 0  # twice round
    assert part.balance.weight != 50


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"detector": "yolo"}, "detector must be one of retinanet_small, "),
        (
            {"loss": "torchvision", "assignment": "atss"},
            "assignment, box_weight, box_coder and warm_start need a ranking loss",
        ),
        (
            {"loss": "torchvision", "box_weight": 2.0},
            "assignment, box_weight, box_coder and warm_start need a ranking loss",
        ),
        (
            {"loss": "torchvision", "box_coder": "published"},
            "assignment, box_weight, box_coder and warm_start need a ranking loss",
        ),
        ({"box_loss": "l1"}, "box_loss l1 is of loss torchvision; alrp takes giou or smooth_l1"),
        ({"loss": "torchvision", "box_loss": "smooth_l1"}, "the box loss of retinanet_small is torchvision's"),
        ({"detector": "fcos_resnet50_fpn", "box_coder": "published"}, "box_coder 'published' is for models with"),
        ({"detector": "fasterrcnn_resnet50_fpn", "assignment": "atss"}, "assignment"),
        ({"box_weight": -1.0}, "box_weight"),
        ({"initial_weight": -3.0}, "initial_weight"),
        ({"size": 0}, "size and period must be at least 1, warm_up and seed at least 0, got 0, "),
        ({"period": -1}, "size and period must be at least 1"),
        ({"period": 0}, "size and period must be at least 1"),
        ({"seed": -1}, "size and period must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(**settings)


def test_a_model_and_data_that_do_not_go_together(scenes: Path) -> None:
    for model, options, words in (
        (RankingDetector({1: "cat"}, "retinanet_small", size=48, lr=1.0), {}, r"categories \{1: 'cat'\}, the data \{1: 'cat', 2:"),
        (make("fasterrcnn_resnet50_fpn", loss="ap", lr=None), {}, "no learning rate is published for fasterrcnn_resnet50_fpn and ap"),
        (make(), {"max_steps": -1, "max_epochs": -1}, "the schedule needs an end of the run"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            train(model, scenes, **options)


@pytest.mark.parametrize(("width", "height"), [(1, 400), (400, 1)])
def test_images_that_are_too_thin(width: int, height: int, tmp_path: Path) -> None:
    """None of their pixels is left at the size of training: said before the first step, and which one it is."""
    part = content(2)
    part["images"][1] |= {"width": width, "height": height}
    part["annotations"][1]["bbox"] = [0, 0, width, height]
    data_set(tmp_path, part)
    with pytest.raises(UserError, match=r"im2\.png, \[.*\], is too thin"):
        train(make(), tmp_path)
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "im2.png")
    with pytest.raises(UserError, match=r"im2\.png has \(64, 48\) pixels, its annotation file says"):
        train(make(), tmp_path)


# Weights to begin with.


def as_stored(kind: str, own: dict[str, Tensor], file: Path) -> None:
    content: Any = {
        "alone": lambda: own,
        "model": lambda: {"model": own, "epoch": 3},
        "state_dict": lambda: {"state_dict": {f"model.{name}": value for name, value in own.items()}, "optimizer": {}},
        "module.": lambda: {"state_dict": {f"module.{name}": value for name, value in own.items()}},
        "_orig_mod.": lambda: {f"_orig_mod.{name}": value for name, value in own.items()},
        "both": lambda: {"model_state_dict": {f"module._orig_mod.{name}": value for name, value in own.items()}},
        "other way": lambda: {f"_orig_mod.module.{name}": value for name, value in own.items()},
        "detector.": lambda: {"state_dict": {f"detector.{name}": value for name, value in own.items()}},
        "backbone": lambda: {n.removeprefix("backbone."): v for n, v in own.items() if n.startswith("backbone.")},
        "safetensors": lambda: own,
    }[kind]()
    (save_file if kind == "safetensors" else torch.save)(content, str(file))


@pytest.mark.parametrize("kind", ["alone", "model", "state_dict", "module.", "_orig_mod.", "both", "other way", "detector.",
                                  "backbone", "safetensors"])  # fmt: skip
def test_weights(kind: str, tmp_path: Path) -> None:
    """Whatever they are wrapped in."""
    source, model = make(seed=1).detector, make(seed=2).detector
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    as_stored(kind, source.state_dict(), file)
    own = model.state_dict()
    count = sum(name.startswith("backbone.") for name in own) if kind == "backbone" else len(own)
    said = load_weights(model, read_weights(str(file))[0])
    assert said == f"begins with {count} of {count} given tensors, of the detector's {len(own)}"
    taken = [name for name, value in model.state_dict().items() if torch.equal(value, source.state_dict()[name])]
    assert len(taken) >= count
    assert all(name in taken for name in own if kind != "backbone" or name.startswith("backbone."))


def test_weights_of_another_shape_are_left_out(tmp_path: Path) -> None:
    """As of a detector for other categories."""
    source = RankingDetector({1: "cat"}, "retinanet_small", size=48, seed=1).detector
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    said = load_weights(make().detector, read_weights(str(tmp_path / "weights.pt"))[0])
    total, last = len(source.state_dict()), "head.classification_head.cls_logits"
    counts = f"begins with {total - 2} of {total} given tensors, of the detector's {total}"
    assert said == f"{counts}; left out, for want of a place or of its shape: {last}.weight, {last}.bias"


def test_weights_of_another_detector_are_a_question() -> None:
    model = make().detector
    some = dict(list(model.state_dict().items())[:6])
    said = load_weights(model, some | {f"decoder.{name}": value for name, value in some.items()})
    assert "begins with 6 of 12 given tensors" in said
    assert said.endswith(", ... (are these weights of another detector?)")


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is right, and the message says from where to fetch them."""

    def no_network(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(
        UserError, match=r"cannot be downloaded; fetch https://\S+\.pth by other means.*no route"
    ) as seen:
        read_weights("RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1")
    assert "none of this name" not in str(seen.value)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.* always returns a .* in scripting")
def test_the_small_detector_is_exported_as_those_of_torchvision() -> None:
    """As docs/trainer.md has it."""
    model = make().train(False)
    images = [torch.rand(3, 60, 48), torch.rand(3, 40, 64)]
    scripted: Any = torch.jit.script(plain_copy(model.detector))
    with torch.no_grad():
        for ours, theirs in zip(model(images), scripted(images)[1], strict=True):
            assert len(ours["scores"]) > 0
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("what", ["nothing", "empty", "text", "a list", "no tensors", "other names", "broken"])
def test_what_is_no_file_of_weights(what: str, tmp_path: Path) -> None:
    file, model = tmp_path / "weights.pt", make().detector
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if what in ("a list", "no tensors", "other names"):
        torch.save({"a list": [1, 2], "no tensors": {"a": 1}, "other names": {"a": torch.zeros(2)}}[what], file)
    elif what == "broken":
        torch.save(before, file)
        file.write_bytes(file.read_bytes()[:1000])
    elif what != "nothing":
        file.write_text("" if what == "empty" else "weights")
    words = r"none of 1 weights, such as 'a'," if what == "other names" else r"weights .*weights\.pt: "
    with pytest.raises(UserError, match=words) as seen:
        load_weights(model, read_weights(str(file))[0])
    assert len(str(seen.value).splitlines()[-1]) > 20
    assert same(before, model.state_dict())


def test_the_deviations_of_boxes_are_those_of_the_weights(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The papers' from the beginning; weights that were trained with others keep theirs."""
    own = make().detector.state_dict()
    backbone = {name.removeprefix("backbone."): value for name, value in own.items() if name.startswith("backbone.")}
    files = {
        "detector": own,
        "backbone": backbone,
        "old": {"state_dict": own, "hyper_parameters": {}},
        "new": {"state_dict": own, "hyper_parameters": {"box_coder": "published"}},
    }
    for name, state in files.items():
        torch.save(state, tmp_path / name)
    models: list[RankingDetector] = []

    def lose(_: object, model: RankingDetector, **__: Any) -> None:
        models.append(model)
        raise Lost

    monkeypatch.setattr(fitting.Trainer, "fit", lose)

    def chosen(*words: str, **changes: Any) -> tuple[str, float | str]:
        with pytest.raises(Lost):
            fit(scenes, tmp_path / "out", *words, **changes)
        return models[-1].settings.box_coder, models[-1].settings.initial_weight

    assert chosen() == ("published", 50)
    assert chosen("--model.initial_weight", "auto") == ("published", "auto")
    assert chosen("--model.loss", "torchvision")[0] == "model"
    assert chosen(model__detector="fcos_resnet50_fpn")[0] == "model"
    found = {name: chosen("--weights", str(tmp_path / name))[0] for name in files}
    assert found == {"detector": "model", "backbone": "published", "old": "model", "new": "published"}
    assert chosen("--weights", str(tmp_path / "old"), "--model.box_coder", "published")[0] == "published"
    refused = fit(scenes, tmp_path / "out", "--model.box_coder", "published", model__detector="fcos_resnet50_fpn")
    assert refused.status == 2
    assert "box_coder 'published' is for models with deviations" in refused.error


# Pictures.


@pytest.mark.filterwarnings("ignore:Data has no positive values:UserWarning")
def test_curves(tmp_path: Path) -> None:
    """Of any run: of one step, of none, without evaluation, with what is NaN, zero or infinite."""
    nan, inf = float("nan"), float("inf")
    steps = [{"step": step, "classification": value, "weight_boxes": nan, "box_error_boxes": 0.0, "lr": 1.0, "total": inf}
             for step, value in ((1, 0.5), (2, nan), (3, 0.0))]  # fmt: skip
    for number, history in enumerate((
        {"steps": [], "evaluations": []},
        {"steps": steps[:1], "evaluations": []},
        {"steps": steps, "evaluations": [{"step": 3, "AP": nan, "oLRP": 1.0}]},
    )):  # fmt: skip
        save_curves(history, tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as picture:
            assert picture.size[0] > 500


@pytest.mark.parametrize("count", [1, 5])
def test_detections_are_drawn(count: int, tmp_path: Path) -> None:
    """With crowds, with nothing found or nothing to find, in images of one pixel, under names in any alphabet."""

    def one(count: int) -> dict[str, Tensor]:
        labels = torch.zeros(count, dtype=torch.int64)
        return {"boxes": torch.rand(count, 4) * 40, "labels": labels, "scores": torch.rand(count)}

    truth = {"truth": torch.rand(3, 4).double(), "truth_labels": torch.zeros(3, dtype=torch.int64), "iscrowd": torch.tensor([True, False, False])}  # fmt: skip
    pictures = [(torch.rand(3, 30, 40), one(4), truth), (torch.rand(3, 1, 1), one(0), truth), (torch.rand(3, 4, 400), one(2), None)]  # fmt: skip
    for name in ("$x_1$", "$$", "a$b_{$", "\n"):
        save_detections((pictures * 2)[:count], [name], tmp_path / "detections.png")
    assert (tmp_path / "detections.png").stat().st_size > 1000


def test_what_is_long_and_large_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    """32 images of 500 x 667 took 3.71 - 2.11 GiB for two more: 26 in all. The kernel kills what takes too much."""
    caplog.set_level("INFO")
    data, model = SimpleNamespace(batch=32), SimpleNamespace(detector="retinanet_resnet50_fpn_v2", size=500)
    config: Any = SimpleNamespace(weights="some", resume=False, data=data, model=model)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    fitting._advise(config, trainer)
    assert "32 images of size 500 are a long step on a CPU, and take some 25 GiB of memory: " in caplog.text
    caplog.clear()
    data.batch = 2
    fitting._advise(config, trainer)
    assert caplog.text == ""
