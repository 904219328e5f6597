"""Detection scenes composed from the handwritten digits that ship with scikit-learn, as a data set in COCO format."""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import trange

NUM_CLASSES = 10
SCENE_SIZE = 128
HELD_OUT_FRACTION = 0.25

_DIGITS_PER_SCENE = (3, 7)
_DIGIT_HEIGHT = (14, 44)
_INK = 0.25
"""Opacity above which a pixel counts as ink. Boxes are tight around the ink."""
_MAX_OVERLAP = 0.05
_PLACEMENT_TRIES = 30

Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels."""

Target = dict[str, Tensor]
"""torchvision's detection target: `boxes` (M, 4) as x1, y1, x2, y2 in pixels and `labels` (M,) in 0..9."""


class Digits(NamedTuple):
    """Scans of single digits.

    Attributes:
        scans: (n, 8, 8), opacity of the ink in 0..1.
        labels: (n,), the digit of each scan.
    """

    scans: np.ndarray
    labels: np.ndarray


class Scene(NamedTuple):
    """A grey image (1, 128, 128) in 0..1 and its ground truth."""

    image: Tensor
    target: Target


def split_digits(rng: np.random.Generator) -> tuple[Digits, Digits]:
    """Splits the scans into training and held-out ones, so that no scan is seen on both sides."""
    pixels, labels = load_digits(return_X_y=True)
    scans = pixels.reshape(-1, 8, 8) / 16
    held_out, training = np.split(rng.permutation(len(labels)), [round(HELD_OUT_FRACTION * len(labels))])
    return Digits(scans[training], labels[training]), Digits(scans[held_out], labels[held_out])


def compose_scene(digits: Digits, rng: np.random.Generator) -> Scene:
    """Draws 3 to 7 digits of varied size and contrast on a noisy background.

    Args:
        digits: the scans to draw from.
        rng: the source of all randomness.

    Returns:
        The scene. A digit for which no free place was found is left out; the first one always fits.
    """
    background = rng.uniform(0.2, 0.8)
    canvas = background + 0.1 * _smooth_noise(rng)
    boxes: list[Box] = []
    labels: list[int] = []
    for _ in range(rng.integers(*_DIGITS_PER_SCENE, endpoint=True)):
        index = rng.integers(len(digits.labels))
        opacity = _render(digits.scans[index], height=int(rng.integers(*_DIGIT_HEIGHT, endpoint=True)))
        box = _place(opacity.shape, boxes, rng)
        if box is None:
            continue
        # Light ink on a dark ground or dark ink on a light one, whichever has the room for the contrast.
        contrast = rng.uniform(0.25, 0.6) * (1 if background < 0.5 else -1)
        x1, y1, x2, y2 = box
        canvas[y1:y2, x1:x2] += contrast * opacity
        boxes.append(box)
        labels.append(int(digits.labels[index]))
    canvas += rng.normal(scale=rng.uniform(0.02, 0.08), size=canvas.shape)
    image = torch.from_numpy(canvas.clip(0, 1)).float()[None]
    return Scene(image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)})


def _render(scan: np.ndarray, height: int) -> np.ndarray:
    """Enlarges a scan smoothly and crops it to its ink, which is then `height` pixels high, give or take one."""
    rows = np.flatnonzero((scan > _INK).any(axis=1))
    side = round(height * len(scan) / (rows[-1] - rows[0] + 1))
    enlarged = interpolate(torch.from_numpy(scan)[None, None], size=(side, side), mode="bicubic")
    opacity = enlarged[0, 0].clamp(0, 1).numpy()
    rows, columns = (np.flatnonzero((opacity > _INK).any(axis=axis)) for axis in (1, 0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(shape: tuple[int, ...], taken: list[Box], rng: np.random.Generator) -> Box | None:
    """Finds a box of the given shape that hardly covers the boxes already taken, or None."""
    height, width = shape
    for _ in range(_PLACEMENT_TRIES):
        x1, y1 = int(rng.integers(SCENE_SIZE - width + 1)), int(rng.integers(SCENE_SIZE - height + 1))
        box = (x1, y1, x1 + width, y1 + height)
        if all(_overlap(box, other) <= _MAX_OVERLAP for other in taken):
            return box
    return None


def _overlap(a: Box, b: Box) -> float:
    """Intersection of two boxes over the area of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b))
    return max(width, 0) * max(height, 0) / smaller


def _smooth_noise(rng: np.random.Generator) -> np.ndarray:
    """Uneven lighting: a coarse random grid, enlarged to the size of a scene."""
    coarse = torch.from_numpy(rng.normal(size=(1, 1, 4, 4)))
    return interpolate(coarse, size=(SCENE_SIZE, SCENE_SIZE), mode="bicubic")[0, 0].numpy()


def write(folder: Path, training: int, held_out: int, seed: int) -> None:
    """Writes a data set in COCO's format and layout: PNG files and ``annotations/instances_{train,val}.json``.

    Args:
        folder: made if it is not there.
        training: number of scenes to train on.
        held_out: number of scenes of digits that no training scene shows.
        seed: the same seed writes the same bytes.
    """
    split, *of_parts = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(NUM_CLASSES)]
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    parts = zip(("train", "val"), (training, held_out), split_digits(split), of_parts, strict=True)
    for name, count, digits, rng in parts:
        (folder / name).mkdir(exist_ok=True)
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for image_id in trange(1, count + 1, desc=f"{name} scenes", unit="scene", leave=False):
            scene = compose_scene(digits, rng)
            file = f"{image_id:06d}.png"
            pixels = (scene.image[0] * 255).round().to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / file)
            images.append({"id": image_id, "file_name": file, "width": SCENE_SIZE, "height": SCENE_SIZE})
            boxes = zip(scene.target["boxes"].tolist(), scene.target["labels"].tolist(), strict=True)
            for (x1, y1, x2, y2), label in boxes:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": label + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content) + "\n")


def main() -> None:
    """Write the scenes."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write them")
    parser.add_argument("--train", type=int, default=1600, help="scenes to train on (default %(default)s)")
    parser.add_argument("--val", type=int, default=200, help="held-out scenes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of scans and scenes (default %(default)s)")
    options = parser.parse_args()
    if options.train < 1 or options.val < 1 or options.seed < 0:
        parser.error("--train and --val must be at least 1, --seed at least 0")
    write(options.folder, options.train, options.val, options.seed)


if __name__ == "__main__":
    main()
