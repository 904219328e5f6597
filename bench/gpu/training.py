"""A detector in training on the device, with a ranking loss and with focal loss in turn: the loss' share of a step.

The demo's small RetinaNet and its scenes of digits, bfloat16 autocast. Both runs take turns by blocks of steps, so that
they see the same clocks. In some steps of a block the loss is cut off from the network, so that its forward and
backward pass have a time of their own; the others are as they are in any training.
"""

import math
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .clock import quantiles
from .work import Context, Record, Unit

LOSSES = {"aLRP": ("alrp", None), "focal + GIoU": ("torchvision", "giou")}
_SCENES, _BATCH, _STEPS, _SIZE = 256, 16, 1500, 128
_BLOCK, _ALONE = 12, 4  # steps of a block, and in so many of them the loss is taken apart
_FIRST = 20  # steps, whose mean loss the last are compared with; the time of the first block is not counted


def shards(rehearse: bool) -> list[str]:
    """One: nothing else may run beside it."""
    return ["all"]


def units(shard: str, context: Context) -> list[Unit]:
    """One: the two trainings belong together."""
    return [Unit("training", partial(_train, context))]


def _settings(name: str, context: Context) -> Any:
    from examples.coco.train import Settings, box_coder_of  # needs torchvision, and what the demo's data needs

    loss, box_loss = LOSSES[name]
    return Settings(
        detector="retinanet_small", loss=loss, box_loss=box_loss, box_weight=None, assignment="iou",
        size=64 if context.rehearse else _SIZE,
        batch=2 if context.rehearse else _BATCH, steps=_STEPS, optimizer="adamw", lr=3e-3, warm_up=50,
        schedule="cosine", period=50, flip=False, amp="bf16", freeze_norm=False, seed=0,
        box_coder=box_coder_of("retinanet_small", loss),
    )  # fmt: skip


class _Training:
    """One of the two, and what was seen of it."""

    def __init__(self, name: str, data: Any, context: Context) -> None:
        from examples.coco.train import Run

        from ..probes import DeviceWatch, HostWatch, LossClock

        self.context = context
        self.watch = HostWatch if context.rehearse else DeviceWatch
        self.run = Run(_settings(name, context), data, context.device)
        self.head: Any = self.run.model.get_submodule("head")
        plain = self.head.compute_loss
        self.alone = LossClock(self.run.model, self.watch())
        self.methods = {False: plain, True: self.alone.compute_loss}
        self.steps: list[float] = []
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.finite = True

    def take_block(self, batches: list[Any], count: bool) -> None:
        alone = 1 if self.context.rehearse else _ALONE
        for k in range(2 if self.context.rehearse else _BLOCK):
            apart = k < alone
            self.head.compute_loss = self.methods[apart]
            watch = self.watch()
            watch.start()
            values = self.run.take_step(batches[self.run.step % len(batches)])
            watch.stop()
            self.finite &= math.isfinite(values["total"])
            if not apart:  # of aLRP the total may rise with the weight of its second part
                self.scores.append(values["classification"])
            if count:
                (self.losses if apart else self.steps).append(1e3 * (self.alone.watch if apart else watch).seconds)


def _batches(data: Any, size: int, device: torch.device) -> list[Any]:
    """On the device already: what is timed is no loading of images."""
    from examples.coco.data import Batch

    found: list[Any] = []
    for begin in range(0, len(data) - size + 1, size):
        samples = [data[k] for k in range(begin, begin + size)]
        images = [sample.image.to(device) for sample in samples]
        targets = [{key: value.to(device) for key, value in sample.target.items()} for sample in samples]
        found.append(Batch(images, targets, [sample.image_id for sample in samples]))
    return found


def _train(context: Context) -> Iterator[Record]:
    from examples.coco.data import CocoDetection, find_split
    from examples.digits import write

    with tempfile.TemporaryDirectory() as folder:
        scenes = 4 if context.rehearse else _SCENES
        write(Path(folder), scenes, 1, seed=0)
        data = CocoDetection(find_split(Path(folder), "train"))
        batch = 2 if context.rehearse else _BATCH
        batches = _batches(data, batch, context.device)
        trainings = {name: _Training(name, data, context) for name in LOSSES}
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
        "steps": training.run.step,
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
