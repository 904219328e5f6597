"""Training: one step after the other, logged, checkpointed so that a resumed run ends at the same weights."""

import csv
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from alrp_triton.integrations.head_loss import DetectorLoss
from alrp_triton.integrations.torchvision import use_ranking_loss

from .data import Batch, CocoDetection, StepSampler, make_loader, rank_and_processes
from .detectors import DETECTORS, Detector

CHECKPOINT = "checkpoint.pt"
STEPS_CSV = "steps.csv"
EVALUATIONS_CSV = "evaluations.csv"

LEARNING_RATES = {
    "retinanet": {"alrp": 0.008, "ap": 0.002, "rank_sort": 0.016, "torchvision": 0.02},
    "fcos": {"alrp": 0.008, "ap": 0.002, "rank_sort": 0.016, "torchvision": 0.02},
    "fasterrcnn": {"alrp": 0.012, "rank_sort": 0.024, "torchvision": 0.04},
}
"""Of SGD at 32 images a step, by detector and loss: those of the papers (docs/recipes.md; for FCOS those of FoveaBox
and ATSS), and torchvision's own."""


@dataclass(frozen=True)
class Settings:
    """What a run is. A checkpoint can be resumed with these settings and no others.

    Attributes:
        detector: name in ``DETECTORS``.
        loss: ``alrp``, ``ap``, ``rank_sort``, or ``torchvision`` for the detector's own.
        box_loss: None for that of the loss' paper; for ``torchvision`` ``l1`` or ``giou``, RetinaNet only.
        box_weight: None for the balance of the loss' paper.
        assignment: of RetinaNet's anchors, ``iou`` or ``atss``.
        size: shorter side of the images.
        batch: images a step, of all processes together.
        steps: of the whole run.
        optimizer: ``sgd`` or ``adamw``.
        lr: learning rate after the warm-up.
        warm_up: steps of linear warm-up.
        schedule: ``cosine``, or ``steps``: a tenth from 3/4 of the run on, a hundredth from 19/20 on, as published.
        period: steps of the self-balancing; None: an epoch.
        flip: flips every second image at random.
        amp: ``off``, ``bf16`` or ``fp16``.
        freeze_norm: BatchNorm normalises by the statistics that it has at the start, and does not change them.
        seed: of weights and batches.
        box_coder: of the ranking losses, ``published`` or ``model``, as checkpoints of before have it.
        initial_weight: of aLRP's box loss until the first period ends, or ``auto``.
    """

    detector: str
    loss: str
    box_loss: str | None
    box_weight: float | None
    assignment: str
    size: int
    batch: int
    steps: int
    optimizer: str
    lr: float
    warm_up: int
    schedule: str
    period: int | None
    flip: bool
    amp: str
    freeze_norm: bool
    seed: int
    box_coder: str = "model"
    initial_weight: float | str = 50.0


def box_coder_of(detector: str, loss: str) -> str:
    """The papers' deviations of the box deltas with a ranking loss, where the detector has any; else torchvision's."""
    return "model" if loss == "torchvision" or detector.startswith("fcos") else "published"


def check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError unless the settings of a checkpoint, ``before``, are those that are wanted now."""
    other = [f"{name} {before.get(name)} (now {value})" for name, value in now.items() if before.get(name) != value]
    if other:
        raise ValueError(f"the checkpoint is of a run with other settings: {', '.join(other)}")


class Run:
    """A detector in training: all of its state, which a checkpoint holds.

    Args:
        settings: what to do.
        data: to train on.
        device: where.
        init: weights to begin with, of the whole model, some of its parts, or its backbone alone; what has another
            shape is left out, and how much is taken is printed.
    """

    def __init__(
        self, settings: Settings, data: CocoDetection, device: torch.device, init: dict[str, Tensor] | None = None
    ) -> None:
        self.settings, self.data, self.device = settings, data, device
        self.rank, self.processes = rank_and_processes()
        torch.manual_seed(settings.seed)
        self.detector: Detector = DETECTORS[settings.detector](len(data.categories), settings.size)
        model = self.detector.model
        if init is not None:
            self._begin_with(model, init)
        self.model = model.to(device)
        self.losses = self._put_in_loss()
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.step = 0
        self.wrapped = self._wrap()

    def _begin_with(self, model: nn.Module, init: dict[str, Tensor]) -> None:
        """Takes what fits by name and shape; a backbone's weights may lack the prefix that they have in a detector."""
        own = model.state_dict()
        fits: dict[str, Tensor] = {}
        for prefix in ("", "backbone.", "backbone.body."):
            named = {prefix + name: value for name, value in init.items()}
            of_prefix = {name: value for name, value in named.items() if name in own and own[name].shape == value.shape}
            fits = max(fits, of_prefix, key=len)
        if not fits:
            raise ValueError("none of the initial weights has a name and shape of this detector")
        model.load_state_dict(own | fits)
        if self.rank == 0:
            print(f"begins with {len(fits)} of {len(init)} given tensors, of the detector's {len(own)}")

    def _put_in_loss(self) -> DetectorLoss:
        settings = self.settings
        if settings.loss != "torchvision":
            return use_ranking_loss(
                self.model,
                settings.loss,  # pyright: ignore[reportArgumentType]
                period=settings.period or max(len(self.data) // settings.batch, 1),
                assignment=settings.assignment,  # pyright: ignore[reportArgumentType]
                box_coder=settings.box_coder,  # pyright: ignore[reportArgumentType]
                initial_weight=settings.initial_weight,  # pyright: ignore[reportArgumentType]
                box_loss=settings.box_loss,  # pyright: ignore[reportArgumentType]
                box_weight=settings.box_weight,
                process_group="world" if self.processes > 1 else None,
            )
        if settings.box_loss is not None:
            if not settings.detector.startswith("retinanet"):
                raise ValueError(f"the box loss of {settings.detector} is torchvision's; got {settings.box_loss}")
            self.model.get_submodule("head.regression_head")._loss_type = settings.box_loss  # pyright: ignore[reportArgumentType, reportPrivateUsage]
        return DetectorLoss()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        lr = self.settings.lr
        if self.settings.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        warm = min(1.0, (self.step + 1) / (self.settings.warm_up + 1))
        done = self.step / self.settings.steps
        if self.settings.schedule == "cosine":
            return self.settings.lr * (warm * (1 + math.cos(math.pi * min(done, 1.0))) / 2)
        return self.settings.lr * warm * (0.1 if done >= 0.75 else 1.0) * (0.1 if done >= 0.95 else 1.0)

    def _wrap(self) -> nn.Module:
        if self.processes == 1:
            return self.model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=ids)

    def batches(self, until: int, workers: int) -> Any:
        """This process' share of the batches from here to step ``until``."""
        settings = self.settings
        steps = range(self.step, until)
        sampler = StepSampler(len(self.data), settings.batch, steps, settings.seed, self.rank, self.processes)
        return make_loader(self.data, sampler, workers)

    def take_step(self, batch: Batch) -> dict[str, float]:
        """Forward, backward, update. Returns the losses as they are added up, and the weights of the box losses.

        What is random in a step depends on the step alone, so a resumed run needs no state of random numbers.
        """
        torch.manual_seed(int(np.random.SeedSequence((self.settings.seed, self.step, self.rank)).generate_state(1)[0]))
        images = [image.to(self.device) for image in batch.images]
        targets = [
            {
                "boxes": target["boxes"].to(self.device),
                "labels": target["labels"].to(self.device) + self.detector.first_label,
            }
            for target in batch.targets
        ]
        dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.settings.amp]
        self.wrapped.train()
        if self.settings.freeze_norm:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        with torch.autocast(self.device.type, dtype) if dtype else nullcontext():
            losses: dict[str, Tensor] = self.wrapped(images, targets)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()  # no clipping of gradients
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        values = {name: loss.item() for name, loss in losses.items()} | {"total": total.item()}
        for name, part in self.losses.items():
            values |= {f"weight_{name}": part.box_weight.item(), f"box_error_{name}": part.box_error.item()}
        return values

    def share_buffers(self) -> None:
        """All processes take those of the first, as a checkpoint does. BatchNorm's statistics are each one's own."""
        if self.processes > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "settings": asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "losses": self.losses.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "data": self.data.fingerprint,
            "categories": self.data.categories,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            ValueError: it is of other settings or data; nothing has changed then.
        """
        check_same(state["settings"], asdict(self.settings))
        if state["data"] != self.data.fingerprint:
            raise ValueError(f"the checkpoint is of a run on other data than {self.data.split.annotations}")
        self.model.load_state_dict(state["model"])
        self.losses.load_state_dict(state["losses"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


class Log:
    """A CSV file with a row a step, which forgets the rows after the step that a run is resumed from."""

    def __init__(self, file: Path, resumed_at: int) -> None:
        self.file = file
        self.rows: list[dict[str, str]] = []
        if file.exists():
            with file.open(newline="") as stream:
                self.rows = [row for row in csv.DictReader(stream) if int(row["step"]) <= resumed_at]
        self.columns = list(self.rows[0]) if self.rows else []
        self._write(self.rows, "w")

    def add(self, values: dict[str, float]) -> None:
        row = {name: f"{value:.6g}" for name, value in values.items()}
        first = not self.rows
        self.columns = self.columns or list(row)
        self.rows.append(row)
        self._write([row], "w" if first else "a")

    def _write(self, rows: list[dict[str, str]], mode: str) -> None:
        with self.file.open(mode, newline="") as stream:
            writer = csv.DictWriter(stream, self.columns)
            if mode == "w" and self.columns:
                writer.writeheader()
            writer.writerows(rows)


def train(
    run: Run,
    out: Path,
    evaluate: Callable[[], dict[str, float]],
    *,
    every: int,
    workers: int,
    until: int | None = None,
    first: bool = False,
) -> dict[int, dict[str, float]]:
    """Trains to the end, with a progress bar: losses, AP and the self-balancing weight.

    Args:
        run: where it stands; changed in place.
        out: folder for ``checkpoint.pt``, ``steps.csv`` and ``evaluations.csv``.
        evaluate: gives AP and its like; called by all processes, its values are those of the first.
        every: steps between two evaluations and checkpoints; there is one at the end in any case.
        workers: processes that load images.
        until: the step to stop at, before the end of the run.
        first: whether to evaluate before the first step, too.

    Returns:
        The evaluations by step, those of before a resume included; on other processes than the first, none of these.

    Raises:
        FloatingPointError: the loss is NaN or infinite. The checkpoint is of before.
    """
    end = run.settings.steps if until is None else min(until, run.settings.steps)
    logs = [Log(out / name, run.step) for name in (STEPS_CSV, EVALUATIONS_CSV)] if run.rank == 0 else []
    found: dict[str, float] = {}

    def look() -> None:
        nonlocal found
        found = evaluate()
        if logs and str(run.step) not in {row["step"] for row in logs[1].rows}:
            logs[1].add({"step": run.step} | found)

    if run.step == 0 and first:
        look()
    waited_from = time.perf_counter()
    bar = tqdm(total=run.settings.steps, initial=run.step, desc="training", unit="step", disable=run.rank != 0)
    with bar:
        for batch in run.batches(end, workers) if run.step < end else ():
            loaded = time.perf_counter()
            lr = run.lr
            values = run.take_step(batch)
            if not math.isfinite(values["total"]):  # which no loss scaling causes: that may overflow gradients alone
                raise FloatingPointError(f"the loss of step {run.step} is {values['total']}: {values}")
            now = time.perf_counter()
            if logs:
                times = {"seconds": now - loaded, "seconds_loading": loaded - waited_from}
                logs[0].add({"step": run.step, "lr": lr} | values | times)
            if run.step % every == 0 or run.step == end:
                look()
                if logs:
                    save(run.state(), out / CHECKPOINT)
            shown = values | {name: value for name, value in found.items() if name == "AP"}
            bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items() if name != "total"}, refresh=False)
            bar.update()
            waited_from = time.perf_counter()
    if not found:  # there was nothing left to do
        look()
    if not logs:
        return {}
    return {
        int(row.pop("step")): {name: float(value) for name, value in row.items()} for row in map(dict, logs[1].rows)
    }


def save(state: dict[str, Any], file: Path) -> None:
    """Writes a checkpoint whole or not at all."""
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)
