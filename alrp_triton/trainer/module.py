"""A detector of torchvision, in training with a ranking loss or with its own."""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ..integrations.head_loss import DetectorLoss
from ..integrations.torchvision import use_ranking_loss
from ..metrics import Calibration
from .dataset import Batch, CocoDetection, Images
from .detectors import make_detector
from .errors import UserError, refuse_others
from .evaluation import Evaluation, Found, evaluate
from .sampling import batches_had, seed_of

LEARNING_RATES = {
    "retinanet": {"alrp": 0.008, "ap": 0.002, "rank_sort": 0.016, "torchvision": 0.02},
    "fcos": {"alrp": 0.008, "ap": 0.002, "rank_sort": 0.016, "torchvision": 0.02},
    "fasterrcnn": {"alrp": 0.012, "rank_sort": 0.024, "torchvision": 0.04},
}
"""Of SGD at 32 images a step, by detector and loss: those of the papers (docs/recipes.md; for FCOS those of FoveaBox
and ATSS), and torchvision's own."""


class RankingDetector(LightningModule):
    """A detector with its loss, optimizer and schedule, and its evaluation.

    ``self.detector`` is the model of torchvision; its labels begin at ``first_label``.

    Args:
        categories: names by id, in the order of the labels; with ``alrp-train`` those of the data.
        detector: one of torchvision's RetinaNet, FCOS and Faster R-CNN, by its name there, or ``retinanet_small``.
        loss: by its name; ``torchvision`` is the detector's own.
        box_loss: other than that of the loss' paper; ``l1`` or ``giou`` with torchvision's RetinaNet.
        box_weight: a constant in place of the balance of the loss' paper.
        box_coder: deviations of the box deltas, the papers' or torchvision's; None: the papers' with a ranking loss,
            where the detector has any.
        warm_start: steps with torchvision's own loss, from which a ranking loss takes over in as many more.
        initial_weight: of aLRP's box loss until its balance is known; ``auto`` to fine-tune.
        assignment: of RetinaNet's anchors, by IoU or by ATSS.
        size: shorter side that images are resized to.
        optimizer: SGD with momentum, as published, or AdamW.
        lr: learning rate after the warm-up; None: the published one times images a step / 32, 1e-3 for ``adamw``.
        warm_up: steps of linear warm-up.
        schedule: ``steps``: a tenth from 3/4 of the run on, a hundredth from 19/20 on, as published; or ``cosine``.
        period: of the self-balancing, in batches; None: an epoch.
        freeze_norm: BatchNorm keeps the statistics that it begins with, as published for pretrained weights; None: if
            ``alrp-train`` has read some from ``--weights``.
        seed: of weights, and of what a detector draws in a step.

    Attributes:
        evaluation: the last one; ``found`` are its detections.
        thresholds: of each category by name the score from which on detections give the least LRP, by the last
            evaluation, which may be that of the checkpoint; empty before the first.
        calibration: by the same, from scores and labels to the share of detections that are right; None before.
        values: losses, weights and learning rate of the last step.

    Raises:
        UserError: arguments that do not go together; categories that are not those of the data.
    """

    def __init__(
        self,
        categories: dict[int, str],
        detector: str = "retinanet_resnet50_fpn_v2",
        loss: Literal["alrp", "ap", "rank_sort", "torchvision"] = "alrp",
        box_loss: Literal["giou", "smooth_l1", "l1"] | None = None,
        box_weight: float | None = None,
        box_coder: Literal["published", "model"] | None = None,
        warm_start: int = 0,
        initial_weight: float | Literal["auto"] = 50.0,
        assignment: Literal["iou", "atss"] = "iou",
        size: int = 500,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float | None = None,
        warm_up: int = 500,
        schedule: Literal["steps", "cosine"] = "steps",
        period: int | None = None,
        freeze_norm: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        box_coder = box_coder or ("model" if loss == "torchvision" or detector.startswith("fcos") else "published")
        self.save_hyperparameters(
            {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        )
        self.settings: Any = self.hparams
        if min(size, warm_up + 1, seed + 1, 1 if period is None else period) < 1:
            seen = f"{size}, {period}, {warm_up}, {seed}"
            raise UserError(f"size and period must be at least 1, warm_up and seed at least 0, got {seen}")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.detector, self.first_label = make_detector(detector, len(categories), size)
        self.evaluation: Evaluation | None = None
        self.thresholds: dict[str, float] = {}
        self.calibration: Calibration | None = None
        self.found: list[Found] = []
        self.values: dict[str, Tensor] = {}
        self.batches_per_epoch = 1
        self.losses = self._put_in_loss()

    def _put_in_loss(self) -> DetectorLoss:
        of = self.settings
        if of.loss != "torchvision":
            if of.box_loss == "l1":
                raise UserError(f"box_loss l1 is of loss torchvision; {of.loss} takes giou or smooth_l1")
            try:
                return use_ranking_loss(
                    self.detector,
                    of.loss,
                    period=of.period or "later",
                    assignment=of.assignment,
                    box_coder=of.box_coder,
                    warm_start=of.warm_start,
                    initial_weight=of.initial_weight,
                    box_loss=of.box_loss,
                    box_weight=of.box_weight,
                )
            except (TypeError, ValueError) as error:  # what does not go together, by name
                raise UserError(str(error)) from error
        if of.assignment != "iou" or of.box_weight is not None or of.box_coder != "model" or of.warm_start:
            raise UserError("assignment, box_weight, box_coder and warm_start need a ranking loss")
        if of.box_loss is not None:
            if not of.detector.startswith("retinanet") or of.box_loss == "smooth_l1":
                raise UserError(f"the box loss of {of.detector} is torchvision's; got {of.box_loss}")
            self.detector.get_submodule("head.regression_head")._loss_type = of.box_loss
        return DetectorLoss()

    def set_epoch(self, batches: int) -> None:
        """How long one is, and so the period of the self-balancing, where ``period`` does not say it."""
        self.batches_per_epoch = batches
        self.losses.set_period(self.settings.period or batches)

    def setup(self, stage: str) -> None:
        """Checks the data, and tells the loss how long an epoch is, and which processes rank together."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            seen = (data.training if stage == "fit" else data.held_out).coco.categories
            if seen != self.settings.categories:
                raise UserError(f"the model has the categories {self.settings.categories}, the data {seen}")
            for part in (data.training, data.held_out) if stage == "fit" else (data.held_out,):
                self.check_sizes(part)
        if stage != "fit":
            return
        if data is None:
            raise UserError("RankingDetector is trained on a CocoDataModule, which says how long an epoch is")
        self.set_epoch(data.steps_per_epoch)
        self.images_per_step = data.batch * self.trainer.accumulate_grad_batches
        self.losses.set_process_group("world" if self.trainer.world_size > 1 else None)

    def check_sizes(self, data: CocoDetection | Images) -> None:
        """UserError: an image vanishes when it is resized."""
        transform: Any = self.detector.transform
        sizes = torch.from_numpy(data.sizes)  # (I, 2)
        scale = torch.minimum(min(transform.min_size) / sizes.amin(1), transform.max_size / sizes.amax(1))
        for index in (sizes.amin(1) * scale < 1).nonzero().flatten().tolist():
            raise UserError(
                f"{data.path(index)}, {data.sizes[index].tolist()}, is too thin: resized it has no pixel left"
            )

    @property
    def total_steps(self) -> int:
        """Of the whole run; the learning rate depends on it."""
        trainer = self.trainer
        per_epoch = math.ceil(self.batches_per_epoch / trainer.accumulate_grad_batches)
        ends = [end for end in (trainer.max_steps, (trainer.max_epochs or 0) * per_epoch) if end > 0]  # -1: none
        if not ends:
            raise UserError("the schedule needs an end of the run: give max_epochs or max_steps")
        return min(ends)

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        of, lr = self.settings, self.settings.lr
        if lr is None and of.optimizer == "adamw":
            lr = 1e-3
        elif lr is None:
            published = LEARNING_RATES[of.detector.split("_")[0]]
            if of.loss not in published:
                raise UserError(f"no learning rate is published for {of.detector} and {of.loss}: give lr")
            lr = published[of.loss] * self.images_per_step / 32
        optimizer = (
            torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
            if of.optimizer == "adamw"
            else torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_lr)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _share_of_lr(self, step: int) -> float:
        warm, done = min(1.0, (step + 1) / (self.settings.warm_up + 1)), step / self.total_steps
        if self.settings.schedule == "cosine":
            return warm * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return warm * (0.1 if done >= 0.75 else 1.0) * (0.1 if done >= 0.95 else 1.0)

    def train(self, mode: bool = True) -> "RankingDetector":
        super().train(mode)
        if self.settings.freeze_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.train(False)
        return self

    def on_train_start(self) -> None:
        """Lightning leaves modules as they are: those that stay in evaluation are put there.

        Where a run is lengthened its first learning rate is that of the longer run, too.
        """
        self.train()
        warm_up, steps = self.settings.warm_up, self.total_steps
        if 2 * warm_up > steps:
            rank_zero_info(
                f"note: the learning rate rises for {warm_up} steps, and the run has {steps}: it will learn little; "
                "lower model.warm_up or lengthen the run"
            )
        for scheduler in (one.scheduler for one in self.trainer.lr_scheduler_configs):
            if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                columns = (scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas)
                for group, rate, share in zip(*columns, strict=True):
                    group["lr"] = rate * share(scheduler.last_epoch)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detections of images (3, H, W) in 0..1: ``boxes`` as corners, ``scores``, and ``labels`` from 0."""
        found: list[dict[str, Tensor]] = self.detector(images)
        return [one | {"labels": one["labels"] - self.first_label} for one in found]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """What is random in it depends on the batch alone, so a resumed run needs no state of random numbers."""
        torch.manual_seed(seed_of(self.settings.seed, batches_had(self.trainer), self.global_rank))
        targets = [{"boxes": one["boxes"], "labels": one["labels"] + self.first_label} for one in batch.targets]
        losses: dict[str, Tensor] = self.detector(batch.images, targets)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        if not math.isfinite(total.item()):  # which no loss scaling causes: that may overflow gradients alone
            values = {name: loss.item() for name, loss in losses.items()}
            raise FloatingPointError(f"the loss of step {self.global_step + 1} is {total.item()}: {values}")
        self.values = {"total": total.detach(), "lr": torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"])}
        for name, part in self.losses.items():
            self.values |= {f"weight_{name}": part.box_weight, f"box_error_{name}": part.box_error}
        self.log_dict(self.values)
        self.log_dict(losses, prog_bar=True)
        self.values |= {name: loss.detach() for name, loss in losses.items()}
        return total

    def on_validation_start(self) -> None:
        """All processes evaluate what a checkpoint holds: the first one's buffers. BatchNorm's are each one's own."""
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)

    def on_validation_epoch_start(self) -> None:
        self.found = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for index, target, one in zip(batch.indices, batch.targets, self(batch.images), strict=True):
            cpu = [{key: value.cpu() for key, value in values.items()} for values in (one, target)]
            self.found.append(Found(index, *cpu))

    def on_validation_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            dist.all_gather_object(gathered, self.found)
            self.found = [one for part in gathered for one in part]
        self.found.sort(key=lambda one: one.index)
        if self.evaluation is None:  # the first: without a bar it may look as if nothing happened
            rank_zero_info(f"computing AP and oLRP of {len(self.found)} images")
        self.evaluation = evaluate(self.found, self.settings.categories)
        self.thresholds = {name: values["threshold"] for name, values in self.evaluation.by_category.items()}
        self.calibration = self.evaluation.calibration
        for name, value in self.evaluation.overall.items():
            self.log(name, value, prog_bar=name == "AP", sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["thresholds"] = self.thresholds
        checkpoint["calibration"] = None if self.calibration is None else self.calibration.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """UserError: the checkpoint is of a run with other settings."""
        refuse_others(dict(self.settings), checkpoint["hyper_parameters"])
        self.thresholds = checkpoint.get("thresholds", {})
        calibration = checkpoint.get("calibration")
        self.calibration = None if calibration is None else Calibration.from_state_dict(calibration)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Tensor]]:
        return [{key: value.cpu() for key, value in one.items()} for one in self(batch.images)]
