"""The demo's pictures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from .evaluate import Detections
from .scenes import Scene
from .train import Step

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

_SMOOTHING = 20  # steps
_SHOWN = 12  # scenes


def save_losses(log: Sequence[Step], file: Path) -> None:
    """Draws both losses, smoothed, and the self-balancing weight over the steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    kernel = np.ones(min(_SMOOTHING, len(log))) / min(_SMOOTHING, len(log))
    classification, localisation, weight = (np.array(values) for values in zip(*log, strict=True))
    curves = {
        "classification": classification,
        "localisation, raw": localisation,
        "localisation, weighted": localisation * weight,
    }
    for name, values in curves.items():
        left.plot(np.convolve(values, kernel, mode="valid"), label=name)
    left.set(title="aLRP Loss", xlabel="step", yscale="log")
    left.legend()
    right.plot(weight)
    right.set(title="self-balancing weight of the localisation part", xlabel="step", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def save_detections(scenes: Sequence[Scene], detections: Sequence[Detections], file: Path) -> None:
    """Draws held-out scenes with their ground truth (green, dashed) and as many best detections (red, with scores).

    A ranking loss fixes the order of scores, not their level, so each scene shows as many detections as it has digits.
    """
    figure, grid = plt.subplots(3, _SHOWN // 3, figsize=(12, 9.4), layout="constrained")
    for axes, scene, found in zip(grid.flat, scenes, detections, strict=False):
        axes.imshow(scene.image[0], cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()
        count = len(scene.target["labels"])
        for box in scene.target["boxes"].tolist():
            _draw(axes, box, "limegreen", "--")
        rows = zip(*(found[key][:count].tolist() for key in ("boxes", "labels", "scores")), strict=True)
        for box, label, score in rows:
            _draw(axes, box, "red", "-")
            axes.text(box[0], box[1] - 1, f"{label} {score:.2f}", color="red", fontsize=8, weight="bold")
    figure.suptitle("Held-out scenes: ground truth (green, dashed) and as many best detections (red, label and score)")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw(axes: Axes, box: Sequence[float], colour: str, style: str) -> None:
    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=colour, linestyle=style))
