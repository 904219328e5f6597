"""A data set in COCO format, in batches that a resumed run sees again."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from .coco import find_part
from .dataset import CocoDetection, collate
from .errors import UserError
from .sampling import EpochSampler, batches_had


class _Loader(DataLoader[Any]):
    """Says to Lightning that a resumed run sees what it would have seen. Its sampler asks the run where it is."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _leave_group(_: int) -> None:
    """Ctrl-C in a terminal, and a launcher's signals, go to all of a group; a run that stops needs its workers yet."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class CocoDataModule(LightningDataModule):
    """A data set in COCO format: ``root/annotations/instances_train2017.json``, ``root/train2017``, and so ``val``.

    Args:
        root: its folder, laid out like COCO, or as Roboflow does.
        train: name of the part to train on.
        val: name of the part to evaluate on.
        batch: images a step, of all processes together.
        workers: processes that load images.
        transforms: of torchvision.transforms.v2, one after the other, on images in 0..1 and boxes; None: a flip.
        flip: whether half of the images are flipped at random, where no ``transforms`` are given.
        seed: of batches and transforms.

    Raises:
        UserError: files that are missing or wrong; says which and what.
    """

    def __init__(
        self,
        root: Path,
        train: str = "train",
        val: str = "val",
        batch: int = 32,
        workers: int = 2,
        transforms: list[v2.Transform] | None = None,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch < 1 or workers < 0 or seed < 0:
            raise UserError(f"batch must be at least 1, workers and seed at least 0, got {batch}, {workers}, {seed}")
        self.root, self.parts, self.batch, self.workers, self.seed = Path(root), (train, val), batch, workers, seed
        self.transforms = transforms if transforms is not None else [v2.RandomHorizontalFlip()] * flip

    @cached_property
    def training(self) -> CocoDetection:
        transform = v2.Compose(self.transforms) if self.transforms else None
        return CocoDetection(find_part(self.root, self.parts[0]), transform, self.seed)

    @cached_property
    def held_out(self) -> CocoDetection:
        return CocoDetection(find_part(self.root, self.parts[1]))

    @property
    def categories(self) -> dict[int, str]:
        """Names by id, in the order of the labels."""
        return self.training.coco.categories

    @property
    def _place(self) -> tuple[int, int]:
        """The rank of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    @property
    def steps_per_epoch(self) -> int:
        return self._sampler().epoch

    def setup(self, stage: str) -> None:
        """Everything that can be wrong with the data is found here, before the first step."""
        parts = [self.training, self.held_out] if stage == "fit" else [self.held_out]
        if stage == "fit":
            self._check_both()
        for part, use in zip(reversed(parts), ("to evaluate on", "to train on"), strict=False):
            if part.is_checked:  # by an evaluation before training, or by training before one
                continue
            coco = part.coco
            counts = f"{len(part)} images, {(~coco.crowd).sum()} boxes, {len(coco.categories)} categories"
            rank_zero_info(f"{coco.file}: {counts} {use}")
            for note in coco.notes:
                rank_zero_info(f"note: {note}")
            if not coco.annotated:
                raise UserError(f"{coco.file} has no annotations {use}")
            part.check_images()
        _, processes = self._place
        if len(self.held_out) < processes:  # one without an image would not take part
            seen = f"{len(self.held_out)} images in {self.held_out.coco.file}"
            raise UserError(f"each of {processes} processes needs an image to evaluate on, got {seen}")
        both = set.intersection(*({part.path(index) for index in range(len(part))} for part in parts))
        if stage == "fit" and both:
            rank_zero_info(f"note: {len(both)} images are in both parts, among them {min(both)}")

    def _check_both(self) -> None:
        files = [part.part.annotations for part in (self.training, self.held_out)]
        if files[0].samefile(files[1]):
            raise UserError(
                f"the parts {' and '.join(map(repr, self.parts))} to train and to evaluate on are both {files[0]}"
            )
        if self.training.coco.categories != self.held_out.coco.categories:
            raise UserError(f"{files[0]} and {files[1]} have other categories")
        if self.held_out.coco.annotated and self.held_out.coco.crowd.all():
            rank_zero_info(
                f"note: {files[1]} has no box to find, in {len(self.held_out)} images: AP and oLRP will be NaN"
            )
        if self.training.coco.crowd.all():
            notes = "".join(f"; {note.removeprefix(f'{files[0]}: ')}" for note in self.training.coco.notes)
            raise UserError(f"{files[0]} has no box to train on, in {len(self.training)} images{notes}")
        self._sampler()

    def _sampler(self) -> EpochSampler:
        rank, processes = self._place

        def taken() -> int:
            return batches_had(self.trainer) if self.trainer else 0

        if getattr(self.trainer, "overfit_batches", 0):
            raise UserError("overfit_batches needs batches that are the same in each epoch: write a part of few images")
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        return EpochSampler(len(self.training), self.batch, self.seed, rank, processes, taken, limit)

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = self._sampler()
        return self._loader(self.training, sampler, sampler.share.stop - sampler.share.start)

    def val_dataloader(self) -> DataLoader[Any]:
        rank, processes = self._place
        share = range(rank, len(self.held_out), processes)
        return self._loader(self.held_out, share, max(self.batch // processes, 1))

    def _loader(self, data: CocoDetection, indices: Any, batch: int) -> DataLoader[Any]:
        """Draws no number from torch's global generator, whose state belongs to the run."""
        return _Loader(
            data,
            batch,
            sampler=indices,
            num_workers=self.workers,
            collate_fn=collate,
            worker_init_fn=_leave_group,
            generator=torch.Generator(),
        )

    def state_dict(self) -> dict[str, Any]:
        transforms = [" ".join(repr(one).split()) for one in self.transforms]
        return {
            "data": self.training.coco.fingerprint,
            "data to evaluate on": self.held_out.coco.fingerprint,
            "batch": self.batch,
            "seed": self.seed,
            "transforms": transforms,
            "number of batches an epoch": self.steps_per_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """UserError: the checkpoint is of other data, or of other batches."""
        for name, now in self.state_dict().items():
            if state_dict.get(name, now) != now:
                part = {"data": self.training, "data to evaluate on": self.held_out}.get(name)
                seen = f"than {part.part.annotations}" if part else f"{state_dict[name]} (now {now})"
                raise UserError(f"the checkpoint is of a run with other {name} {seen}")
