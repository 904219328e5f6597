"""Data sets in COCO format: where they lie, images and targets, and batches that a resumed run sees again."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Target = dict[str, Tensor]
"""torchvision's: ``boxes`` (M, 4), corners in pixels, and ``labels`` (M,), 0 for the first category."""


class Sample(NamedTuple):
    """An image (3, H, W) in 0..1, its ground truth, and its id in the data set."""

    image: Tensor
    target: Target
    image_id: int


class Batch(NamedTuple):
    """Lists with an entry for each image, as torchvision's detectors take them."""

    images: list[Tensor]
    targets: list[Target]
    image_ids: list[int]


class Split(NamedTuple):
    """One part of a data set: its annotation file, and the folder that its file names are relative to."""

    annotations: Path
    images: Path


def find_split(root: Path, name: str) -> Split:
    """Finds a part of a data set that is laid out like COCO.

    That is ``annotations/*NAME*.json``, of several the one that begins with ``instances``. Images are in the folder
    that the file's name ends with (``instances_train2017.json``: ``train2017``), in ``NAME``, or in ``images``.

    Raises:
        FileNotFoundError: there is no such file or folder, or more than one file; says what was seen.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    found = sorted((root / "annotations").glob(f"*{name}*.json"))
    found = [path for path in found if path.name.startswith("instances")] or found
    if len(found) != 1:
        seen = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"want one file {root}/annotations/*{name}*.json, found {seen}")
    folders = [root / found[0].stem.split("_")[-1], root / name, root / "images"]
    for folder in folders:
        if folder.is_dir():
            return Split(found[0], folder)
    raise FileNotFoundError(f"no images for {found[0]}: none of {', '.join(map(str, folders))} is a folder")


class CocoDetection(Dataset[Sample]):
    """Images and boxes of one part of a data set, whole in memory but for the pixels.

    Crowds are left out, as they are no single object, and so are boxes that have no area inside of their image. Images
    without boxes stay: they are full of negatives.

    Args:
        split: files.
        flip: whether to flip every second image at random; which ones is decided by ``seed``, the epoch and the image,
            so that a resumed run sees the same.
        seed: for ``flip``.

    Attributes:
        categories: names by label; ``category_ids`` their ids in the file.
        boxes: how many there are to train on; ``odd`` of them reach out of their image or are smaller than a pixel.
        fingerprint: of images, categories and annotations; two data sets that differ have two of them.

    Raises:
        ValueError: the file is not of this format, says what is wrong; an image of another size than it says (when that
            is read).
    """

    def __init__(self, split: Split, *, flip: bool = False, seed: int = 0) -> None:
        self.split, self.flip, self.seed = split, flip, seed
        try:
            content: dict[str, list[dict[str, Any]]] = json.loads(split.annotations.read_text())
            images, annotations, categories = (content[key] for key in ("images", "annotations", "categories"))
            self._read_categories(categories)
            self._read_images(images)
            self._read_annotations(annotations)
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{split.annotations} is no COCO annotation file: {error!r}") from error
        if not self.files:
            raise ValueError(f"{split.annotations} lists no images")
        self.image_ids = sorted(self.files)
        files = [str(self.files[image_id].relative_to(split.images)) for image_id in self.image_ids]
        described = json.dumps([self.image_ids, files, self.categories, self.annotations])
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    def _read_categories(self, categories: list[dict[str, Any]]) -> None:
        by_id = {_whole(category["id"], "id of a category"): str(category["name"]) for category in categories}
        if len(by_id) < len(categories):
            raise ValueError("two categories have one id")
        self.category_ids = sorted(by_id)
        self.categories = [by_id[category_id] for category_id in self.category_ids]

    def _read_images(self, images: list[dict[str, Any]]) -> None:
        ids = [_whole(image["id"], "id of an image") for image in images]
        self.files = {key: self.split.images / one["file_name"] for key, one in zip(ids, images, strict=True)}
        if len(self.files) < len(images):
            raise ValueError("two images have one id")
        self.sizes = {image["id"]: (int(image["width"]), int(image["height"])) for image in images}

    def _read_annotations(self, annotations: list[dict[str, Any]]) -> None:
        labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        boxes: dict[int, list[list[float]]] = {image_id: [] for image_id in self.files}
        of_boxes: dict[int, list[int]] = {image_id: [] for image_id in self.files}
        self.annotations: list[dict[str, Any]] = []
        self.boxes = self.odd = 0
        for annotation in annotations:
            image_id, category_id = annotation["image_id"], annotation["category_id"]
            for name, key, known in (("image_id", image_id, self.sizes), ("category_id", category_id, labels)):
                if key not in known:
                    raise ValueError(f"annotation {annotation.get('id')} has the {name} {key!r}, which the file lacks")
            width, height = self.sizes[image_id]
            x, y, w, h = (float(number) for number in annotation["bbox"])
            if not all(map(math.isfinite, (x, y, w, h))):
                raise ValueError(f"bbox {annotation['bbox']}")
            crowd = int(annotation.get("iscrowd", 0))
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,  # what counts annotations from 0 would take the first for none
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [x, y, w, h],
                    "area": float(annotation.get("area", w * h)),
                    "iscrowd": crowd,
                }
            )
            box = [max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)]
            if not crowd and box[2] > box[0] and box[3] > box[1]:
                boxes[image_id].append(box)
                of_boxes[image_id].append(labels[category_id])
                self.boxes += 1
                # A pixel over the border is rounding.
                self.odd += x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1 or max(w, h) < 1
        self.targets: dict[int, Target] = {
            image_id: {
                "boxes": torch.tensor(boxes[image_id], dtype=torch.float32).reshape(-1, 4),
                "labels": torch.tensor(of_boxes[image_id], dtype=torch.int64),
            }
            for image_id in self.files
        }

    @property
    def truth(self) -> dict[str, list[dict[str, Any]]]:
        """What to evaluate against: the content of the file, crowds included, with annotations numbered from 1."""
        images = [{"id": one, "width": width, "height": height} for one, (width, height) in self.sizes.items()]
        pairs = zip(self.category_ids, self.categories, strict=True)
        categories = [{"id": category_id, "name": name} for category_id, name in pairs]
        return {"images": images, "annotations": self.annotations, "categories": categories}

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """A sample by index, or by epoch and index."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image_id = self.image_ids[index]
        image = _read_image(self.files[image_id], self.sizes[image_id])
        target = dict(self.targets[image_id])
        if self.flip and np.random.default_rng((self.seed, epoch, index)).random() < 0.5:
            image = image.flip(-1)
            x1, y1, x2, y2 = target["boxes"].unbind(1)
            width = image.shape[-1]
            target["boxes"] = torch.stack([width - x2, y1, width - x1, y2], 1)
        return Sample(image, target, image_id)


def _whole(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"the {what} is {value!r} and no whole number")
    return value


def _read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """Pixels ``(3, H, W)`` in 0..1, as they are stored: an orientation noted by a camera is not applied, as in COCO."""
    with Image.open(path) as file:
        if file.size != size:
            raise ValueError(f"{path} has {file.size} pixels, its annotation file says {size}")
        if file.mode.startswith("I"):  # grey, 16 bits
            grey = torch.from_numpy(np.array(file, dtype=np.float32) / 65535)
            return grey.expand(3, -1, -1).clone()
        pixels = torch.from_numpy(np.array(file.convert("RGB")))  # (H, W, 3)
    return pixels.permute(2, 0, 1).float() / 255


def rank_and_processes() -> tuple[int, int]:
    """Which process this is, and of how many; 0 and 1 without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches by step: step s of a run is the same images whether the run was interrupted before or not.

    Every epoch is a permutation of its own, less what does not fill a batch.

    Args:
        images: how many there are.
        batch: images a step, of all processes together.
        steps: where to begin and where to end.
        seed: of the permutations.
        rank: of this process, whose share it yields.
        processes: how many share a batch.
    """

    def __init__(self, images: int, batch: int, steps: range, seed: int, rank: int = 0, processes: int = 1) -> None:
        if images < batch:
            raise ValueError(f"a batch of {batch} images is more than the {images} there are")
        if batch % processes:
            raise ValueError(f"a batch of {batch} images cannot be shared by {processes} processes")
        self.images, self.batch, self.steps, self.seed = images, batch, steps, seed
        self.share = slice(rank * batch // processes, (rank + 1) * batch // processes)
        self.steps_per_epoch = images // batch

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_of = np.empty(0, np.int64), -1
        for step in self.steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_of:
                order, order_of = np.random.default_rng((self.seed, epoch)).permutation(self.images), epoch
            indices = order[place * self.batch : (place + 1) * self.batch][self.share]
            yield [(epoch, int(index)) for index in indices]


def make_loader(
    data: CocoDetection, batches: Sampler[list[Any]] | Sequence[list[int]], workers: int
) -> DataLoader[Any]:
    """Loads batches. Draws no number from torch's global generator, whose state belongs to the run."""
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),
        persistent_workers=workers > 0,
    )


def _collate(samples: Sequence[Sample]) -> Batch:
    return Batch(*(list(column) for column in zip(*samples, strict=True)))
