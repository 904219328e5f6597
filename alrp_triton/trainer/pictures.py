"""Pictures of a run: its curves, and what it finds."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor
from torchvision.ops import box_convert

_ON_ANY = [withStroke(linewidth=3, foreground="black", alpha=0.7)]
_TRUE, _FOUND = "#7CFC00", "#FFD400"


def save_curves(history: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> None:
    """Draws losses, AP and oLRP, the weights of box losses beside their plain means, and the learning rate.

    Args:
        history: ``steps`` and ``evaluations``, as :class:`alrp_triton.trainer.callbacks.History` has them.
        file: a PNG to write.
    """
    figure, ((losses, boxes), (quality, rate)) = _figure(2, 2, (11, 7.5))
    for row_of, rows in (("steps", history["steps"]), ("evaluations", history["evaluations"])):
        for name in {name: None for row in rows for name in row if name != "step"}:
            x, y = zip(*((row["step"], row[name]) for row in rows if name in row), strict=True)
            if row_of == "evaluations":
                if name in ("AP", "AP50", "AP75", "oLRP"):
                    quality.plot(x, y, ".-", label=name)
            elif name == "lr":
                rate.plot(x, y)
            elif name.startswith(("weight_", "box_error_")):
                boxes.plot(x, y, "--" if name.startswith("box") else "-", label=name.replace("_", " "))
            elif name not in ("total", "epoch"):
                losses.plot(x, y, label=name)
    losses.set(title="losses, as they are added up", yscale="log")
    boxes.set(title="box loss: its weight, and its mean before", yscale="log")
    quality.set(title="evaluation", ylim=(0, 1))
    rate.set(title="learning rate", xlabel="step")
    for axes in (losses, boxes, quality, rate):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def save_detections(
    pictures: Sequence[tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor] | None]],
    names: Sequence[str],
    file: Path,
) -> None:
    """Draws images with detections (solid, yellow, with scores) and ground truth (dashed, green; crowds hatched).

    A ranking loss fixes the order of scores, not their level: an image shows as many detections as it has objects, or
    all that are given where its truth is not known.

    Args:
        pictures: image (3, H, W) in 0..1, detections, and a target as in :class:`alrp_triton.trainer.data.Batch`, or None.
        names: of the categories, by label.
        file: a PNG to write.
    """
    columns = min(4, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure, grid = _figure(rows, columns, (3.6 * columns, 3.6 * rows))
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (image, found, target) in zip(grid.flat, pictures, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy())
        placed: list[tuple[float, float]] = []
        count = len(found["scores"])
        if target is not None:
            boxes = box_convert(target["truth"], "xywh", "xyxy").tolist()
            for box, label, crowd in zip(
                boxes, target["truth_labels"].tolist(), target["iscrowd"].tolist(), strict=True
            ):
                _draw(axes, box, _TRUE, placed, names[label], crowd=bool(crowd), below=True)
            count = int((~target["iscrowd"]).sum())
        for box, label, score in zip(
            *(found[key][:count].tolist() for key in ("boxes", "labels", "scores")), strict=True
        ):
            _draw(axes, box, _FOUND, placed, f"{names[label]} {score:.2f}")
    figure.suptitle("ground truth: green, dashed; crowds hatched. Detections: yellow, with scores")
    figure.savefig(file, dpi=110)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Without pyplot, whose backend belongs to the user."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, np.reshape(figure.subplots(rows, columns, squeeze=False), (rows, columns))


def _draw(
    axes: Axes,
    box: Sequence[float],
    colour: str,
    placed: list[tuple[float, float]],
    text: str,
    *,
    crowd: bool = False,
    below: bool = False,
) -> None:
    """A box with its label, which goes where no other is."""
    x1, y1, x2, y2 = (side - 0.5 for side in box)
    style = {"linestyle": "--" if below else "-", "hatch": "xx" if crowd else None}
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, path_effects=_ON_ANY, **style))
    height = np.ptp(axes.get_ylim()) / 16
    y = y2 + height if below else y1
    while any(abs(y - other) < height and abs(x1 - at) < 3 * height for at, other in placed):
        y += height if below else -height
    placed.append((x1, y))
    axes.text(x1, y, text, color=colour, fontsize=7, weight="bold", clip_on=True, path_effects=_ON_ANY)
