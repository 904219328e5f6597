"""Tiles of aerial pictures: boxes by hand, in a wheel of our own making."""

import json
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from examples import trees

SIZE = (300, 520)  # width, height
BOXES = [(1, 1, 40, 30), (200, 250, 300, 270), (251, 10, 270, 20)]  # of Pascal VOC: from 1 on, both ends included


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Each pixel's red is its column, its green its row, of each 256."""
    columns, rows = np.meshgrid(np.arange(SIZE[0]) % 256, np.arange(SIZE[1]) % 256)
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))
    objects = "".join(
        "<object><name>Tree</name><bndbox>"
        + "".join(f"<{name}>{side}</{name}>" for name, side in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for box in BOXES
    )
    image.save(tmp_path / "picture.png")
    with ZipFile(tmp_path / "deepforest.whl", "w") as opened:
        for names in trees.PARTS.values():
            for name in names:
                opened.write(tmp_path / "picture.png", f"deepforest/data/{name}.png")
                opened.writestr(f"deepforest/data/{name}.xml", f"<annotation>{objects}</annotation>")
    return tmp_path / "deepforest.whl"


def test_tiles(wheel: Path, tmp_path: Path) -> None:
    counts = trees.write(tmp_path / "data", wheel)
    # 300 x 520: to train from 0 and 44, and from 0, 128, 256 and 264; else 2 x 3 side by side.
    assert counts == {"train": 8, "val": 6, "test": 12}
    content = json.loads((tmp_path / "data" / "annotations" / "instances_val.json").read_text())
    assert [(one["width"], one["height"]) for one in content["images"]] == [(256, 256), (44, 256)] * 2 + [
        (256, 8),
        (44, 8),
    ]
    found = {(one["image_id"], *one["bbox"], one["iscrowd"]) for one in content["annotations"]}
    assert found == {
        (1, 0, 0, 40, 30, 0),
        (1, 199, 249, 57, 7, 1), (2, 0, 249, 44, 7, 1), (3, 199, 0, 57, 14, 1), (4, 0, 0, 44, 14, 1),  # a corner each
        (1, 250, 9, 6, 11, 1), (2, 0, 9, 14, 11, 0),
    }  # fmt: skip
    assert all(one["area"] == one["bbox"][2] * one["bbox"][3] for one in content["annotations"])
    corner = np.array(Image.open(tmp_path / "data" / "val" / "000004.png"))
    assert corner[0, 0].tolist() == [0, 0, 0]  # column 256, row 256
    assert corner.shape == (256, 44, 3)


def test_a_box_is_whole_in_some_tile_to_train_on(wheel: Path, tmp_path: Path) -> None:
    trees.write(tmp_path / "data", wheel)
    content = json.loads((tmp_path / "data" / "annotations" / "instances_train.json").read_text())
    whole = {(x2 - x1 + 1, y2 - y1 + 1) for x1, y1, x2, y2 in BOXES}
    assert whole <= {tuple(one["bbox"][2:]) for one in content["annotations"] if not one["iscrowd"]}
    assert all((one["width"], one["height"]) == (256, 256) for one in content["images"])
