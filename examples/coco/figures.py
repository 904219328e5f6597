"""Pictures of a run: its losses, and what it finds."""

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from .data import CocoDetection
from .evaluate import Detections

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

_SMOOTHING = 20  # steps
_SHOWN = 12  # images


def save_losses(steps: Path, file: Path) -> None:
    """Draws the losses of a log, smoothed, and the weights of the box losses beside their plain means.

    Args:
        steps: ``steps.csv`` of a run.
        file: where to write a PNG.
    """
    with steps.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    kernel = np.ones(min(_SMOOTHING, len(rows))) / min(_SMOOTHING, len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, values in columns.items():
        if name.startswith("weight_"):
            right.plot(columns["step"], values, label=f"weight, {name.removeprefix('weight_')}")
        elif name.startswith("box_error_"):
            right.plot(columns["step"], values, "--", label=f"mean error, {name.removeprefix('box_error_')}")
        elif name not in ("step", "lr", "total", "seconds", "seconds_loading"):
            left.plot(columns["step"][len(kernel) - 1 :], np.convolve(values, kernel, mode="valid"), label=name)
    left.set(title="losses, as they are added up", xlabel="step", yscale="log")
    left.legend()
    right.set(title="box loss: its weight, and its mean before", xlabel="step", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def save_detections(data: CocoDetection, detections: Sequence[Detections], file: Path) -> None:
    """Draws images with their ground truth (green, dashed) and as many best detections (red, with scores).

    A ranking loss fixes the order of scores, not their level, so each image shows as many detections as it has objects,
    crowds not counted.
    """
    figure, grid = plt.subplots(3, _SHOWN // 3, figsize=(12, 9.4), layout="constrained")
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (axes, found) in enumerate(zip(grid.flat, detections, strict=False)):
        sample = data[index]
        assert sample.image_id == found["image_id"]
        axes.imshow(sample.image.permute(1, 2, 0).numpy())
        boxes = sample.target["boxes"].tolist()
        for box in boxes:
            _draw(axes, box, "limegreen", "--")
        count = len(boxes)
        rows = zip(*(found[key][:count].tolist() for key in ("boxes", "labels", "scores")), strict=True)
        for box, label, score in rows:
            _draw(axes, box, "red", "-")
            text = f"{data.categories[label]} {score:.2f}"
            axes.text(box[0], box[1] - 1, text, color="red", fontsize=8, weight="bold")
    figure.suptitle("Held-out images: ground truth (green, dashed) and as many best detections (red, label and score)")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw(axes: Axes, box: Sequence[float], colour: str, style: str) -> None:
    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=colour, linestyle=style))
