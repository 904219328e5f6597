"""Small data sets in COCO format, and the trainer's command line in this process.

Where a part of the extra ``trainer`` is missing, importing this skips: ``pytest.importorskip("tests.support.coco_data")``.
"""

import io
import json
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image

for _module in (
    "torchvision.ops",
    "lightning",
    "torchmetrics",
    "jsonargparse",
    "faster_coco_eval",
    "matplotlib",
    "safetensors",
):
    pytest.importorskip(_module, reason=f"{_module} is the trainer's, not the package's", exc_type=ImportError)

Content = dict[str, Any]

# Of Lightning 2.6 with jsonargparse 4.49 and torch 2.14, and of runs as short as these.
MARKS = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        r"(?s).*JSONARGPARSE_DEPRECATION_WARNINGS:DeprecationWarning",
        r"(?s).*was deprecated in v4\.49:DeprecationWarning",
        r".*isinstance\(treespec, LeafSpec\).* is deprecated:FutureWarning",
        "Checkpoint directory .* exists and is not empty:UserWarning",
        "The number of training batches:UserWarning",
        "The '.*_dataloader' does not have many workers:UserWarning",
        "Starting from v1.9.0, `tensorboardX` has been removed:UserWarning",
    )
]


def content(images: int = 4, name: str = "im{}.png", **annotation: Any) -> Content:
    """Images of 64 x 48 pixels with one box each, two categories in turn; all annotations are changed alike."""
    numbers = range(1, images + 1)
    of_all = {"bbox": [9, 8, 20, 18], "area": 360, "iscrowd": 0} | annotation
    return {
        "images": [{"id": i, "file_name": name.format(i), "width": 64, "height": 48} for i in numbers],
        "annotations": [{"id": i, "image_id": i, "category_id": 1 + i % 2} | of_all for i in numbers],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def data_set(
    folder: Path,
    train: Content,
    val: Content | None = None,
    names: Sequence[str] = ("instances_train.json", "instances_val.json"),
    images: str = "images",
) -> Path:
    """Writes it, with the images that are not there yet; returns the folder."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / images).mkdir(parents=True, exist_ok=True)
    for part, name in zip((train, val if val is not None else content(2, "val{}.png")), names, strict=True):
        (folder / "annotations" / name).write_text(json.dumps(part))
        for image in part["images"]:
            file = folder / images / Path(image.get("file_name") or Path(image["coco_url"]).name).name
            if not file.exists():
                # Noise, so that what is cut off is missed; the same for the same name.
                rng = np.random.default_rng(crc32(file.name.encode()))
                shape = (image["height"], image["width"], 3)
                Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(file)
    return folder


def two_images(folder: Path, change: Callable[[Content], Any] = dict) -> Path:
    """What annotations may be: outside in part, a crowd, without area, of a category with a late id. The part is "val"."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    Image.new("L", (20, 10), 255).save(folder / "images" / "grey.png")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "images" / "red.jpg")
    boxes = [([-2, 1, 6, 5], 7, 0), ([0, 0, 9, 9], 7, 1), ([3, 3, 0, 4], 7, 0), ([10, 2, 30, 4], 3, 0)]
    part: Content = {
        "images": [
            {"id": 9, "file_name": "red.jpg", "width": 8, "height": 8},
            {"id": 4, "file_name": "grey.png", "width": 20, "height": 10},
        ],
        "annotations": [
            {"id": index, "image_id": 4, "bbox": box, "category_id": category, "iscrowd": crowd, "area": 1}
            for index, (box, category, crowd) in enumerate(boxes, 1)
        ],
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
    }
    change(part)
    (folder / "annotations" / "val.json").write_text(json.dumps(part))
    return folder


def cut_short(file: Path) -> bytes:
    """Cuts a file in two, so that its header can still be read; returns what it was."""
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    return whole


@contextmanager
def said() -> Generator[io.StringIO]:
    """What Lightning's loggers say, and the package through them."""
    text = io.StringIO()
    handler, logger = logging.StreamHandler(text), logging.getLogger("lightning")
    logger.addHandler(handler)
    try:
        yield text
    finally:
        logger.removeHandler(handler)


class Done(NamedTuple):
    """How a command ended: its status, what it printed, its errors, and what was logged."""

    status: int
    out: str
    err: str
    log: str

    @property
    def error(self) -> str:
        """What follows "error: ", which has to be all that is said of it, in a line."""
        assert self.err.startswith("error: "), self
        assert self.err.count("\n") == 1, self
        return self.err.removeprefix("error: ").strip()


def alrp_train(*words: object) -> Done:
    """The command line in this process. What it does not catch goes on: a traceback is a fault."""
    from alrp_triton.trainer.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), said() as log:
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:  # of the parser of arguments
            status = end.code
    assert isinstance(status, int)
    return Done(status, out.getvalue(), err.getvalue(), log.getvalue())


FAST = {"model__optimizer": "adamw", "model__lr": 3e-3, "trainer__max_epochs": 2}
"""For :func:`options`: two epochs in which something is learnt."""

SMALL: dict[str, object] = {
    "model.detector": "retinanet_small",
    "model.size": 48,
    "model.warm_up": 0,
    "data.batch": 2,
    "data.workers": 0,
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
}


def options(root: Path, out: Path, **changes: object) -> list[str]:
    """Words of ``fit`` for a run that is as small as can be; ``model__size=64`` changes ``--model.size``."""
    of_run: dict[str, object] = {"data.root": root, "out": out}
    given = SMALL | of_run | {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]


def fit(root: Path, out: Path, *words: object, **changes: object) -> Done:
    return alrp_train("fit", *options(root, out, **changes), *words)


class Lost(Exception):  # noqa: N818
    """What ends a run, and is no fault of its user."""


def same(a: Any, b: Any) -> bool:
    """Bit for bit, NaN as NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return a == b or (a != a and b != b)


def ignore(*_: Any) -> None:
    """In the place of what a test need not wait for."""


def read(file: Path) -> Any:
    return json.loads(file.read_text())
