"""Ranking losses in transformers' Trainer: a run that goes on is the uninterrupted one, and its logs have the parts."""

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is a user's, not the package's", exc_type=ImportError)
pytest.importorskip("accelerate", reason="Trainer needs accelerate", exc_type=ImportError)
pytest.importorskip("torchvision.ops", reason="the integrations need torchvision", exc_type=ImportError)

import transformers

from alrp_triton.integrations.transformers import load_ranking_loss, remove_ranking_loss, use_ranking_loss
from alrp_triton.integrations.transformers_trainer import RankingLossCallback
from tests.support.tiny_detr import LABELS, build

hf = cast("Any", transformers)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),  # where there is no GPU
]
IMAGES, BATCH = 8, 2


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": LABELS[index % len(LABELS)]}


def collate(pictures: list[dict[str, Any]]) -> dict[str, Any]:
    images = torch.stack([each["pixel_values"] for each in pictures])
    return {"pixel_values": images, "labels": [each["labels"] for each in pictures]}


class Report(hf.TrainerCallback):
    """As those of TensorBoard and others, it is told what is logged."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def train(folder: Path, model: Any, *, resume: Any = None, callbacks: Any = None, **settings: Any) -> Any:
    common: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "use_cpu": True,
        "report_to": [],
    }
    common |= {
        "max_grad_norm": 0,
        "save_strategy": "no",
        "logging_steps": 2,
        "learning_rate": 1e-4,
        "disable_tqdm": True,
    }
    common |= {"remove_unused_columns": False, "dataloader_pin_memory": False}
    arguments = hf.TrainingArguments(output_dir=str(folder), **{**common, **settings})
    trainer = hf.Trainer(model, arguments, train_dataset=Pictures(), data_collator=collate, callbacks=callbacks)
    if callbacks is None:
        RankingLossCallback.add_to(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(model: Any, other: Any) -> bool:
    state, others = model.state_dict(), other.state_dict()
    return set(state) == set(others) and all(torch.equal(value, others[key]) for key, value in state.items())


@pytest.mark.parametrize("name", ["Deimv2", "RTDetr"])
def test_a_run_that_goes_on_ends_as_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    """In the middle of a period, whose weight is not 50 anymore; with what Trainer saves by itself.

    Of models whose weights have other names in files Trainer resumes a part: they are built by from_pretrained.
    """
    model = build(name)
    use_ranking_loss(model, period=2)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trainer = train(tmp_path, model, **settings)
    checkpoint = str(tmp_path / "checkpoint-3")

    again = build(name) if name == "Deimv2" else hf.RTDetrForObjectDetection.from_pretrained(checkpoint)
    losses = use_ranking_loss(again, period=2)
    load_ranking_loss(again, checkpoint)  # to look at it; Trainer does it by itself
    state = {key: (int(each.balance.steps), float(each.balance.weight)) for key, each in losses.items() if each.balance}
    assert all(steps == 1 and weight != 50 for steps, weight in state.values())
    assert len(state) == len(losses)

    losses = use_ranking_loss(again, period=2)
    resumed = train(tmp_path, again, resume=checkpoint, **settings)
    assert same(again, model)
    assert "ranking_loss.denoising_1.balance.weight" in again.state_dict()
    logs = [[each["loss"] for each in run.state.log_history if "loss" in each] for run in (trainer, resumed)]
    assert logs[1][2:] == logs[0][2:]


def test_a_saved_model_detects_as_before_and_goes_on(tmp_path: Path) -> None:
    model = build("RTDetr")
    use_ranking_loss(model, period=2)
    train(tmp_path, model, num_train_epochs=1)
    model.save_pretrained(tmp_path / "saved")
    images = collate([Pictures()[0], Pictures()[2]])
    plain = hf.RTDetrForObjectDetection.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        found, expected = plain(images["pixel_values"]), model.eval()(images["pixel_values"])
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.pred_boxes, expected.pred_boxes)
    with pytest.raises(ValueError, match="RTDetrForObjectDetection has none: call use_ranking_loss"):
        load_ranking_loss(plain, tmp_path / "saved")
    losses = use_ranking_loss(plain, period=2)
    assert losses["last"].balance is not None
    assert losses["last"].balance.weight == 50
    load_ranking_loss(plain, tmp_path / "saved")
    assert same(plain, model)
    with pytest.raises(FileNotFoundError, match=r"folder must have a model in \*\.safetensors"):
        load_ranking_loss(plain, tmp_path / "nowhere")
    remove_ranking_loss(model)
    model.save_pretrained(tmp_path / "without")
    before = plain.state_dict()
    with pytest.raises(ValueError, match=r"without has 0 values, .* only one of them .*\.balance\.\w+, .* and others"):
        load_ranking_loss(plain, tmp_path / "without")
    other = build("RTDetr")
    for loss in ("rank_sort", "ap"):  # which have no state
        use_ranking_loss(other, loss)
        for folder in ("saved", "without"):
            with pytest.raises(
                ValueError, match=r"folder must have the state .* the model 0, .*: call use_ranking_loss as when it was"
            ):
                load_ranking_loss(other, tmp_path / folder)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_logs_have_the_parts(tmp_path: Path, accumulated: int) -> None:
    model, report, calls = build("RTDetr"), Report(), list[dict[str, Tensor]]()
    losses = use_ranking_loss(model, period="later")

    def hook(module: Any, inputs: Any, out: Any) -> None:
        if module.training:
            calls.append(dict(out.loss_dict))

    model.register_forward_hook(hook)
    common = {
        "gradient_accumulation_steps": accumulated,
        "logging_steps": 2,
        "eval_steps": 1,
        "prediction_loss_only": True,
        "eval_strategy": "steps",
    }
    arguments = hf.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=BATCH, num_train_epochs=2, use_cpu=True, report_to=[], max_grad_norm=0,
        save_strategy="no", remove_unused_columns=False, disable_tqdm=True, **common,
    )  # fmt: skip
    sets = {"train_dataset": Pictures(), "eval_dataset": Pictures()}
    trainer = hf.Trainer(model, arguments, **sets, data_collator=collate, callbacks=[report])
    RankingLossCallback.add_to(trainer)
    trainer.train()
    assert all(each.period == IMAGES // BATCH for each in losses.values())
    logs = [each for each in trainer.state.log_history if "loss" in each]
    assert len(logs) == 4 // accumulated
    for number, each in enumerate(logs):
        seen = [each for each in report.seen if "loss" in each][number]
        assert {key: value for key, value in each.items() if key != "step"} == seen
        since = calls[2 * accumulated * number : 2 * accumulated * (number + 1)]
        keys = {key for call in since for key in call}  # no denoising where there are no objects
        parts = {key: sum(float(call[key].detach()) for call in since if key in call) / len(since) for key in keys}
        assert {key: each[key] for key in parts} == pytest.approx(parts, rel=1e-5)
        assert sum(each[key] for key in parts) == pytest.approx(each["loss"], rel=1e-4)
        for name in losses:
            assert each[f"box_weight_{name}"] >= 1
            assert 0 < each[f"box_error_{name}"] < 2
    assert not any("loss_vfl" in each for each in trainer.state.log_history if "loss" not in each)
    assert accumulated == 2 or logs[0]["box_weight_last"] == 50
    assert model.loss_function.watch is None


def test_what_works_against_the_loss_is_warned_of(tmp_path: Path) -> None:
    model = build("RTDetr")
    with pytest.raises(ValueError, match="RTDetrForObjectDetection has none: call use_ranking_loss"):
        train(tmp_path, model)
    use_ranking_loss(model, "ap")
    with pytest.warns(UserWarning, match=r"max_grad_norm=1\.0 clips gradients[^5]*max_grad_norm=0"):  # no weight of 50
        train(tmp_path, model, max_grad_norm=1.0, max_steps=1)
    report = Report()
    with pytest.warns(
        UserWarning, match=r"callbacks that report to tensorboard.*RankingLossCallback\.add_to\(trainer\)"
    ):
        trainer = train(
            tmp_path, model, max_steps=2, report_to=["tensorboard"], callbacks=[report, RankingLossCallback()]
        )
    assert "loss_vfl" in trainer.state.log_history[0]
    assert "loss_vfl" not in report.seen[0]
    train(tmp_path, model, max_grad_norm=math.inf, max_steps=1)
    with pytest.raises(TypeError, match="must be a Trainer of transformers, got int"):
        RankingLossCallback.add_to(cast("Any", 3))
