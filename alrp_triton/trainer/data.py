"""The pixels and targets of a data set in COCO format, in batches that a resumed run sees again."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from .coco import Coco, Part, find_part
from .errors import UserError

Target = dict[str, Tensor]


class Batch(NamedTuple):
    """Lists with an entry for each image.

    A target has what is trained on, ``boxes`` (M, 4), corners in pixels, and ``labels`` (M,) from 0, and what is
    evaluated against: ``truth`` (T, 4) float64 as x, y, width, height, ``truth_labels``, ``iscrowd`` and ``area``.
    """

    images: list[Tensor]  # (3, H, W) in 0..1
    targets: list[Target]
    indices: list[int]  # in the data set


class CocoDetection(Dataset[tuple[Tensor, Target, int]]):
    """Images of one part of a data set with their boxes, see :class:`Batch`.

    Crowds are not trained on, as they are no single object; evaluation treats them as COCO does. Images without boxes
    stay: they are full of negatives.

    Args:
        part: of :func:`alrp_triton.trainer.coco.find_part`.
        transform: of torchvision.transforms.v2. What is random in it depends on ``seed``, the epoch and the image, so
            that a resumed run sees the same.
        seed: for ``transform``.

    Raises:
        UserError: the file is not of COCO's format (here), an image is missing or unreadable (when it is asked for).
    """

    def __init__(self, part: Part, transform: Callable[..., Any] | None = None, seed: int = 0) -> None:
        self.part, self.transform, self.seed = part, transform, seed
        self.coco = Coco(part.annotations)
        self._paths: list[Path] = []  # of all images, once they have been looked for
        self._first = np.searchsorted(self.coco.image, np.arange(len(self.coco.image_ids) + 1))

    def __len__(self) -> int:
        return len(self.coco.image_ids)

    def path(self, index: int) -> Path:
        """The file of an image. UserError: there is none."""
        return self._paths[index] if self._paths else self._find(index)

    @property
    def is_checked(self) -> bool:
        """Whether all image files have been found and measured."""
        return bool(self._paths)

    def _find(self, index: int) -> Path:
        """Whole names come first in all folders: another part may have a file of the same last name."""
        name = self.coco.names[index]
        plain = name.replace("\\", "/")  # as Windows writes them
        for one, folder in itertools.product(dict.fromkeys((name, plain, Path(plain).name)), self.part.folders):
            if (folder / one).is_file():
                return folder / one
        folders = ", ".join(map(str, self.part.folders))
        raise UserError(f"there is no image {name} of {self.part.annotations} in {folders}")

    @property
    def sizes(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Width and height (I, 2)."""
        return self.coco.sizes

    def check_images(self) -> None:
        """Finds and measures all image files.

        UserError: one is missing, unreadable, of another size than stated, or that of two names, of which folders are
        gone.
        """

        def measure(index: int) -> Path:
            path, stated = self._find(index), self.coco.sizes[index].tolist()
            with opened(path) as file:
                if list(file.size) != stated:
                    raise UserError(f"{path} has {file.size} pixels, its annotation file says {stated}")
            return path

        name_of: dict[Path, str] = {}
        with ThreadPoolExecutor(8) as pool:
            paths = list(pool.map(measure, range(len(self))))
        for path, name in zip(paths, self.coco.names, strict=True):
            if name_of.setdefault(path, name) != name:
                raise UserError(f"{name_of[path]} and {name} of {self.part.annotations} would both be {path}")
        if len(name_of) < len(self):
            twice = len(self) - len(name_of)
            rank_zero_info(f"note: {self.part.annotations} lists {twice} image files once more, under other ids")
        self._paths = paths

    def target(self, index: int) -> Target:
        rows = slice(self._first[index], self._first[index + 1])
        columns = (self.coco.corners, self.coco.label, self.coco.xywh, self.coco.crowd, self.coco.area)
        corners, labels, xywh, crowd, area = (torch.from_numpy(column[rows]) for column in columns)
        of_truth = {"truth": xywh, "truth_labels": labels, "iscrowd": crowd, "area": area}
        return {"boxes": corners[~crowd], "labels": labels[~crowd], **of_truth}

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target, int]:
        """An image by index; by epoch and index it is transformed."""
        epoch, index = key if isinstance(key, tuple) else (None, key)
        image, target = read_image(self.path(index)), self.target(index)
        if epoch is not None and self.transform is not None:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(seed_of(self.seed, epoch, index))
                form: dict[str, Any] = {"format": "XYXY", "canvas_size": image.shape[-2:]}
                boxes = tv_tensors.BoundingBoxes(target["boxes"], **form)
                inputs = {"image": tv_tensors.Image(image), "boxes": boxes, "labels": target["labels"]}
                inputs = v2.ClampBoundingBoxes()(self.transform(inputs))
            # What a transform pushes over the border has less than a pixel there; what had less before stays.
            least = min([1.0, *(_sides(target["boxes"]) / 2).tolist()])
            kept = _sides(inputs["boxes"].as_subclass(Tensor)) >= least
            inputs |= {key: inputs[key].as_subclass(Tensor)[kept] for key in ("boxes", "labels")}
            image = inputs.pop("image").as_subclass(Tensor)
            target |= {name: value.as_subclass(Tensor) for name, value in inputs.items()}
        return image, target, index


def _sides(boxes: Tensor) -> Tensor:
    """The shorter one of each."""
    return (boxes[:, 2:] - boxes[:, :2]).amin(1)


def batches_had(trainer: Any) -> int:
    """How many batches a run has had, through all of its resumptions."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def seed_of(*numbers: int) -> int:
    """One number of several, for a generator of random numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class opened:  # noqa: N801
    """``with opened(path) as file``: PIL's image. What goes wrong in it is a UserError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Image.Image:
        try:
            self.file = Image.open(self.path)
        except Exception as error:
            raise self._named(error) from error
        if self.file.mode.startswith(("I", "F")) and not (
            self.file.mode.startswith("I;16") or self.file.format == "PNG"
        ):
            self.file.close()
            raise UserError(f"{self.path} has 32 bits a pixel, of which none knows what is white: store 8 or 16")
        return self.file

    def __exit__(self, _: object, error: BaseException | None, *trace: object) -> None:
        self.file.close()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise self._named(error) from error

    def _named(self, error: Exception) -> UserError:
        """PIL raises errors of many kinds for files that it cannot read."""
        return UserError(f"{self.path} cannot be read as an image: {error}")


def read_image(path: Path) -> Tensor:
    """Pixels ``(3, H, W)`` in 0..1, as they are stored: an orientation noted by a camera is not applied, as in COCO."""
    with opened(path) as file:
        if file.mode.startswith("I"):  # grey, 16 bits
            return torch.from_numpy(np.array(file, dtype=np.float32) / 65535).expand(3, -1, -1).clone()
        return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).float() / 255


class EpochSampler(Sampler[tuple[int, int]]):
    """This process' share of batches, as (epoch, index): an epoch is a permutation, less what does not fill a batch.

    Args:
        images: how many there are.
        batch: images a step, of all processes together.
        seed: of the permutations.
        rank: of this process.
        processes: how many share a batch.
        taken: gives the number of batches that the run has had: the sampler goes on from there.
        limit: Lightning's ``limit_train_batches``, after which an epoch ends: a number, or a share as a float.
    """

    def __init__(
        self,
        images: int,
        batch: int,
        seed: int,
        rank: int,
        processes: int,
        taken: Callable[[], int],
        limit: int | float = 1.0,
    ) -> None:
        if images < batch:
            raise UserError(f"a batch of {batch} images is more than the {images} there are")
        if batch % processes:
            raise UserError(f"a batch of {batch} images cannot be shared by {processes} processes")
        self.images, self.batch, self.seed, self.taken = images, batch, seed, taken
        self.share = slice(rank * batch // processes, (rank + 1) * batch // processes)
        self.steps = images // batch
        self.epoch = int(self.steps * limit) if isinstance(limit, float) else min(self.steps, limit)
        if self.epoch < 1:
            raise UserError(f"limit_train_batches {limit} leaves nothing of an epoch of {self.steps} batches")

    def __len__(self) -> int:
        return self.steps * (self.share.stop - self.share.start)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, first = divmod(self.taken(), self.epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
        for step in range(first, self.steps):
            for index in order[step * self.batch : (step + 1) * self.batch][self.share]:
                yield epoch, int(index)


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
        root: its folder, see :func:`alrp_triton.trainer.coco.find_part`.
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
        self.root, self.names, self.batch, self.workers, self.seed = Path(root), (train, val), batch, workers, seed
        self.transforms = transforms if transforms is not None else [v2.RandomHorizontalFlip()] * flip

    @cached_property
    def training(self) -> CocoDetection:
        transform = v2.Compose(self.transforms) if self.transforms else None
        return CocoDetection(find_part(self.root, self.names[0]), transform, self.seed)

    @cached_property
    def held_out(self) -> CocoDetection:
        return CocoDetection(find_part(self.root, self.names[1]))

    @property
    def categories(self) -> dict[int, str]:
        """Names by id, in the order of the labels."""
        return self.training.coco.categories

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
        both = set.intersection(*({part.path(index) for index in range(len(part))} for part in parts))
        if stage == "fit" and both:
            rank_zero_info(f"note: {len(both)} images are in both parts, among them {min(both)}")

    def _check_both(self) -> None:
        files = [part.part.annotations for part in (self.training, self.held_out)]
        if files[0].samefile(files[1]):
            raise UserError(
                f"the parts {' and '.join(map(repr, self.names))} to train and to evaluate on are both {files[0]}"
            )
        if self.training.coco.categories != self.held_out.coco.categories:
            raise UserError(f"{files[0]} and {files[1]} have other categories")
        if self.held_out.coco.annotated and self.held_out.coco.crowd.all():
            rank_zero_info(
                f"note: {files[1]} has no box to find, in {len(self.held_out)} images: AP and oLRP will be NaN"
            )
        if self.training.coco.crowd.all():
            raise UserError(f"{files[0]} has no box to train on, in {len(self.training)} images")
        self._sampler()

    def _sampler(self) -> EpochSampler:
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

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
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
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
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """UserError: the checkpoint is of other data, or of other batches."""
        for name, now in self.state_dict().items():
            if state_dict.get(name, now) != now:
                part = {"data": self.training, "data to evaluate on": self.held_out}.get(name)
                seen = f"than {part.part.annotations}" if part else f"{state_dict[name]} (now {now})"
                raise UserError(f"the checkpoint is of a run with other {name} {seen}")


def collate(samples: Sequence[tuple[Tensor, Target, int]]) -> Batch:
    """Samples as a :class:`Batch`."""
    return Batch(*(list(column) for column in zip(*samples, strict=True)))


class Images(Dataset[tuple[Tensor, Target, int]]):
    """Image files alone, to detect in."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.sizes = np.zeros((0, 2))

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return self.files[index]

    def check_images(self) -> None:
        """Measures them. UserError: one of the files is no image."""
        sizes: list[tuple[int, int]] = []
        for path in self.files:
            with opened(path) as file:
                sizes.append(file.size)
        self.sizes = np.array(sizes, np.float64)

    def __getitem__(self, index: int) -> tuple[Tensor, Target, int]:
        return read_image(self.files[index]), {}, index
