"""Images and targets: of one part of a data set in COCO format, or of files alone."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .coco import Coco, Part
from .errors import UserError
from .images import opened, read_image
from .sampling import seed_of

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


def collate(samples: Sequence[tuple[Tensor, Target, int]]) -> Batch:
    """Samples as a :class:`Batch`."""
    return Batch(*(list(column) for column in zip(*samples, strict=True)))
