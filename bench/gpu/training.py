"""A detector in training on the device, with a ranking loss and with focal loss in turn: the loss' share of a step.

The demo's small RetinaNet and its scenes of digits, bfloat16 autocast. Both runs take turns by blocks of steps, so that
they see the same clocks. In some steps of a block the loss is cut off from the network, so that its forward and
backward pass have a time of their own; the others are as they are in any training.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..training.probes import DeviceWatch, HostWatch, LossClock
from .clock import quantiles
from .work import Context, Record, Unit

LOSSES = ("aLRP", "focal + GIoU")
_SCENES, _BATCH, _STEPS, _SIZE = 256, 16, 1500, 128
_BLOCK, _ALONE = 12, 4  # steps of a block, and in so many of them the loss is taken apart
_FIRST = 20  # steps, whose mean loss the last are compared with; the time of the first block is not counted


def shards(rehearse: bool) -> list[str]:
    """One: nothing else may run beside it."""
    return ["all"]


def units(shard: str, context: Context) -> list[Unit]:
    """One: the two trainings belong together."""
    return [Unit("training", partial(_train, context))]


class _Training:
    """One of the two, and what was seen of it."""

    def __init__(self, name: str, context: Context) -> None:
        # These need torchvision, and what the demo's data needs.
        from alrp_triton.integrations.torchvision import use_ranking_loss
        from alrp_triton.trainer.detectors import SMALL, make_detector
        from examples.digits import NUM_CLASSES

        self.context = context
        self.watch = HostWatch if context.rehearse else DeviceWatch
        torch.manual_seed(0)
        self.model, _ = make_detector(SMALL, NUM_CLASSES, 64 if context.rehearse else _SIZE)
        self.model.to(context.device)
        self.head: Any = self.model.head
        if name == "aLRP":
            use_ranking_loss(self.model, "alrp", period=50, box_coder="published")
        else:
            self.head.regression_head._loss_type = "giou"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1, (step + 1) / 51) * (1 + math.cos(math.pi * step / _STEPS)) / 2
        )
        self.taken = 0
        plain = self.head.compute_loss
        self.alone = LossClock(self.model, self.watch())
        self.methods = {False: plain, True: self.alone.compute_loss}
        self.steps: list[float] = []
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.finite = True

    def take_step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, float]:
        with torch.autocast(self.context.device.type, torch.bfloat16):
            losses: dict[str, Tensor] = self.model(images, targets)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.schedule.step()
        self.taken += 1
        return {name: loss.item() for name, loss in losses.items()}

    def take_block(self, batches: list[Any], count: bool) -> None:
        alone = 1 if self.context.rehearse else _ALONE
        for k in range(2 if self.context.rehearse else _BLOCK):
            apart = k < alone
            self.head.compute_loss = self.methods[apart]
            watch = self.watch()
            watch.start()
            values = self.take_step(*batches[self.taken % len(batches)])
            watch.stop()
            self.finite &= math.isfinite(sum(values.values()))
            if not apart:  # of aLRP the total may rise with the weight of its second part
                self.scores.append(values["classification"])
            if count:
                (self.losses if apart else self.steps).append(1e3 * (self.alone.watch if apart else watch).seconds)


def _batches(scenes: int, size: int, device: torch.device) -> list[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Those that the demo's command writes, on the device already: what is timed is no loading of images."""
    from examples.digits import compose_scene, split_digits  # needs scikit-learn

    split, rng, _ = (np.random.default_rng(seed) for seed in np.random.SeedSequence(0).spawn(3))
    digits, _ = split_digits(split)
    images: list[Tensor] = []
    targets: list[dict[str, Tensor]] = []
    for image, target in (compose_scene(digits, rng) for _ in range(scenes)):
        images.append((255 * image).round().div(255).expand(3, -1, -1).to(device))
        targets.append({key: value.to(device) for key, value in target.items()})
    return [(images[k : k + size], targets[k : k + size]) for k in range(0, scenes, size)]


def _train(context: Context) -> Iterator[Record]:
    batch = 2 if context.rehearse else _BATCH
    batches = _batches(4 if context.rehearse else _SCENES, batch, context.device)
    trainings = {name: _Training(name, context) for name in LOSSES}
    for training in trainings.values():
        training.take_block(batches, count=False)
    most = 1 if context.rehearse else _STEPS // _BLOCK - 1
    for block in range(most):
        if context.left <= 0 and block:
            break
        for training in trainings.values():
            training.take_block(batches, count=True)
    for name, training in trainings.items():
        yield _record(name, training, batch)


def _record(name: str, training: _Training, batch: int) -> Record:
    step, loss, scores = quantiles(training.steps), quantiles(training.losses), training.scores
    few = min(_FIRST, max(len(scores) // 4, 1))
    first, last = (sum(of) / few for of in (scores[:few], scores[-few:]))
    marks = training.alone.positive
    return {
        "what": "training",
        "loss": name,
        "steps": training.taken,
        "batch": batch,
        "logits": marks.numel(),
        "positives": int(marks.sum()),
        "step_ms": step,
        "loss_ms": loss,
        "share": loss[1] / step[1],
        "images_per_s": 1e3 * batch / step[1],
        "first": first,
        "last": last,
        "falls": last < first,
        "finite": training.finite,
    }
