"""Real photographs as a data set in COCO format: tree crowns from the air, which the wheel of deepforest ships.

Four aerial pictures with the crowns marked by hand, published with DeepForest (MIT licence). pip fetches the wheel; it
is read, and neither installed nor imported. Tiles of the first picture are to train on, those of the second one, of the
same park, to evaluate on; the two others, of other places, are a second test.
"""

import argparse
import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from zipfile import ZipFile

from PIL import Image

WHEEL = "deepforest==2.1.0"
PARTS = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2",),
    "val": ("2019_YELL_2_541000_4977000_image_crop",),
    "test": ("OSBS_029", "SOAP_061"),
}
TILE = 256
_STRIDES = {"train": 128, "val": TILE, "test": TILE}
_VISIBLE = 0.5
"""A crown of which less is in a tile is a crowd: not trained on, and neither right nor wrong to find."""

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels."""


class Picture(NamedTuple):
    """An aerial picture with the boxes of its crowns."""

    image: Image.Image
    boxes: list[Box]


def fetch(folder: Path) -> Path:
    """The wheel, by pip."""
    words = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    return next(folder.glob("*.whl"))


def read(wheel: ZipFile, name: str) -> Picture:
    """A picture of the wheel, with the boxes of its Pascal VOC file, which counts pixels from 1, both ends included."""
    image = Image.open(io.BytesIO(wheel.read(f"deepforest/data/{name}.png"))).convert("RGB")
    root = ElementTree.fromstring(wheel.read(f"deepforest/data/{name}.xml"))
    boxes: list[Box] = []
    for one in root.iter("bndbox"):
        x1, y1, x2, y2 = (float(one.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append((x1 - 1, y1 - 1, x2, y2))
    return Picture(image, boxes)


def tiles(picture: Picture, stride: int) -> Iterator[tuple[Image.Image, list[tuple[Box, bool]]]]:
    """Parts of a picture, with the boxes in each of them, cut at its border, and whether too little of them is there.

    Those side by side end with the picture, and are smaller there; those that overlap are all of one size.
    """
    width, height = picture.image.size
    for top, bottom in _sides(height, stride):
        for left, right in _sides(width, stride):
            inside: list[tuple[Box, bool]] = []
            for x1, y1, x2, y2 in picture.boxes:
                cut = max(x1, left) - left, max(y1, top) - top, min(x2, right) - left, min(y2, bottom) - top
                if cut[0] < cut[2] and cut[1] < cut[3]:
                    visible = (cut[2] - cut[0]) * (cut[3] - cut[1]) / ((x2 - x1) * (y2 - y1))
                    inside.append((cut, visible < _VISIBLE))
            yield picture.image.crop((left, top, right, bottom)), inside


def _sides(length: int, stride: int) -> list[tuple[int, int]]:
    if stride == TILE:
        return [(start, min(start + TILE, length)) for start in range(0, length, TILE)]
    return [(start, start + TILE) for start in (*range(0, length - TILE, stride), length - TILE)]


def write(folder: Path, wheel: Path) -> dict[str, int]:
    """Writes ``PART/*.png`` and ``annotations/instances_PART.json``; returns how many tiles each part has."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    with ZipFile(wheel) as opened:
        for part, names in PARTS.items():
            (folder / part).mkdir(exist_ok=True)
            images: list[dict[str, object]] = []
            annotations: list[dict[str, object]] = []
            for tile, inside in (each for name in names for each in tiles(read(opened, name), _STRIDES[part])):
                number = len(images) + 1
                file = f"{number:06d}.png"
                tile.save(folder / part / file)
                images.append({"id": number, "file_name": file, "width": tile.width, "height": tile.height})
                for (x1, y1, x2, y2), crowd in inside:
                    width, height = x2 - x1, y2 - y1
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": number,
                            "category_id": 1,
                            "bbox": [x1, y1, width, height],
                            "area": width * height,
                            "iscrowd": int(crowd),
                        }
                    )
            content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "tree"}]}
            (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content) + "\n")
            counts[part] = len(images)
    return counts


def main() -> None:
    """Fetch the wheel, write the tiles."""
    parser = argparse.ArgumentParser(prog="python -m examples.trees", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write them")
    parser.add_argument("--wheel", type=Path, help=f"of {WHEEL}, where it has been fetched already")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        counts = write(options.folder, options.wheel or fetch(Path(temporary)))
    print(", ".join(f"{count} tiles to {part}" for part, count in counts.items()))


if __name__ == "__main__":
    main()
