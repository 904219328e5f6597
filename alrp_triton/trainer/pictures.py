"""Pictures of a run: its curves, and what it finds."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from torch import Tensor
from torchvision.ops import box_convert

_ON_ANY = [withStroke(linewidth=3, foreground="black", alpha=0.7)]
_TRUE, _FOUND = "#7CFC00", "#FFD400"
_MAX_DETECTIONS = 20  # detections in a picture
_TEXT = 0.036  # height of a label, of the longer side of a picture

Picture = tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor] | None]


def save_curves(history: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> None:
    """Draws losses, AP and oLRP, the weights of box losses beside their plain means, and the learning rate.

    Args:
        history: ``steps`` and ``evaluations``, as :class:`alrp_triton.trainer.callbacks.History` has them.
        file: a PNG to write.
    """
    figure, ((losses, boxes), (quality, rate)) = _figure(2, 2, 5)
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
            elif name != "total":
                losses.plot(x, y, label=name)
    losses.set(title="losses, as they are added up")
    boxes.set(title="box loss: its weight, and its mean before")
    for axes in (losses, boxes):
        if any(torch.as_tensor(line.get_ydata()).gt(0).any() for line in axes.lines):
            axes.set(yscale="log")
    quality.set(title="evaluation", ylim=(0, 1))
    rate.set(title="learning rate", xlabel="step")
    for axes in (losses, boxes, quality, rate):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def save_detections(pictures: Sequence[Picture], names: Sequence[str], file: Path) -> None:
    """Draws images with detections (solid, yellow, with scores) and ground truth (dashed, green; crowds hatched).

    A ranking loss fixes the order of scores, not their level: an image shows as many detections as it has objects, or
    the 20 best where its truth is not known.

    Args:
        pictures: image (3, H, W) in 0..1, detections, and a target as :class:`alrp_triton.trainer.Batch` has it,
            or None.
        names: of the categories, by label.
        file: a PNG to write.
    """
    columns = min(4, len(pictures))
    figure, grid = _figure(math.ceil(len(pictures) / columns), columns, 3.6)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (image, found, target) in zip(grid.flat, pictures, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy())
        taken: list[Bbox] = []
        count = _MAX_DETECTIONS
        if target is not None:
            count = int((~target["iscrowd"]).sum())
            boxes = box_convert(target["truth"], "xywh", "xyxy")
            for row, label in enumerate(map(int, target["truth_labels"])):
                _draw(axes, boxes[row], names[label], taken, truth=True, crowd=bool(target["iscrowd"][row]))
        for row in range(min(count, len(found["scores"]))):
            text = f"{names[int(found['labels'][row])]} {found['scores'][row]:.2f}"
            _draw(axes, found["boxes"][row], text, taken)
    if any(target is not None for _, _, target in pictures):
        figure.suptitle("green, dashed: truth, crowds hatched; yellow: detections")
    figure.savefig(file, dpi=110)


def _figure(rows: int, columns: int, side: float) -> tuple[Figure, Any]:
    """Without pyplot, whose backend belongs to the user."""
    figure = Figure(figsize=(columns * side, rows * side), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw(axes: Axes, box: Tensor, text: str, taken: list[Bbox], *, truth: bool = False, crowd: bool = False) -> None:
    """A box, and its label where no other is: of the truth below, of detections above, inside of the picture."""
    x1, y1, x2, y2 = (box - 0.5).tolist()
    colour = _TRUE if truth else _FOUND
    patch = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, path_effects=_ON_ANY)
    patch.set(linestyle="--" if truth else "-", hatch="xx" if crowd else None)
    axes.add_patch(patch)
    right, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
    height = max(right, bottom) * _TEXT
    width = 0.6 * height * len(text)
    x, step = min(x1, right - width), height if truth else -height
    y = min(y2, bottom - height) if truth else max(y1 - height, 0)
    # Where the way is blocked up to the border, it goes the other way.
    ways = sorted((y + step * times for times in range(-40, 41)), key=lambda at: (abs(at - y), (at - y) * step < 0))
    for at in (at for at in ways if 0 <= at <= bottom - height):
        label = Bbox.from_bounds(x, at, width, height)
        if not any(label.overlaps(other) for other in taken):
            taken.append(label.padded(-0.02 * height))
            y = at
            break
    axes.text(
        x,
        y,
        text,
        color=colour,
        fontsize=7,
        weight="bold",
        va="top",
        clip_on=True,
        path_effects=_ON_ANY,
        parse_math=False,
    )
