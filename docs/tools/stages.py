"""The figure of docs/stages.md: the stages of a loss, what flows between them, where a process group speaks."""

from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

_STAGE, _TOLD, _SAVED, _OF_N = "#dbe7f5", "#fff1dc", "#eeeeee", "#1f77b4"
_LEFT, _RIGHT = 4.0, 8.0  # of the column of the stages
_INPUT, _KEPT = 1.7, 10.9  # the edges, towards the stages, of what is beside them
_WIDE = 1.7


class Stage(NamedTuple):
    """An operator, and what is written into its box."""

    name: str
    does: str
    top: float
    told: bool = False
    """Whether processes tell each other something here, which they do with a process group alone."""


STAGES = (
    Stage("find", "reads the targets, sorts the positives", 1.6),
    Stage("gather_positives", "the positives of all processes", 3.4, told=True),
    Stage("count", "positives against this process' negatives", 5.0),
    Stage("sum_over_processes", "adds up over the processes", 6.8, told=True),
    Stage("terms", "positives among themselves, formulas", 8.4),
    Stage("spread", "what each logit is pulled or pushed by", 11.0),
)
_HEIGHT = 0.9


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str = "black") -> None:
    arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, lw=1.2, shrinkA=0, shrinkB=0)
    axes.add_patch(arrow)


def _box(axes: Any, left: float, top: float, width: float, height: float, color: str, *, dashed: bool = False) -> None:
    style = "--" if dashed else "-"
    axes.add_patch(Rectangle((left, top), width, height, facecolor=color, edgecolor="#777777", lw=1, ls=style))


def _middle(stage: Stage) -> float:
    return stage.top + _HEIGHT / 2


def draw() -> Figure:
    """Time goes downwards. What is of size N is blue."""
    figure, axes = plt.subplots(figsize=(8.5, 8.6), layout="constrained")
    axes.set(xlim=(0, 12.6), ylim=(13.4, 0))
    axes.axis("off")
    middle = (_LEFT + _RIGHT) / 2
    by_name = {stage.name: stage for stage in STAGES}
    for stage in STAGES:
        _box(axes, _LEFT, stage.top, _RIGHT - _LEFT, _HEIGHT, _TOLD if stage.told else _STAGE, dashed=stage.told)
        axes.text(middle, stage.top + 0.3, stage.name, ha="center", va="center", weight="bold")
        axes.text(middle, stage.top + 0.63, stage.does, ha="center", va="center", size=8)

    # From stage to stage.
    flows = "rows, values, order (P,)", "the same, of all processes", "false_positives (P,)", "their sums (P,)"
    for before, after, what in zip(STAGES, STAGES[1:-1], flows, strict=False):
        _arrow(axes, (middle, before.top + _HEIGHT), (middle, after.top))
        axes.text(middle + 0.12, (before.top + _HEIGHT + after.top) / 2, what, va="center", size=8)

    # What comes in, on the left, and is of size N.
    begin, end = by_name["find"].top, by_name["spread"].top + _HEIGHT
    _box(axes, 0.1, begin, _INPUT - 0.1, end - begin, "white")
    held = "logits (N,)", "marks of what\nis no negative", "groups, where\nthere are some"
    text = "\n\n".join(("of this process,\nand saved, too:", *held))
    axes.text((0.1 + _INPUT) / 2, (begin + end) / 2, text, ha="center", va="center", size=8, color=_OF_N)
    for name, what in {"count": "logits, marks", "spread": "logits, marks"}.items():
        _arrow(axes, (_INPUT, _middle(by_name[name])), (_LEFT, _middle(by_name[name])), _OF_N)
        axes.text((_INPUT + _LEFT) / 2, _middle(by_name[name]) - 0.17, what, ha="center", size=8, color=_OF_N)
    at = by_name["find"].top
    _arrow(axes, (_INPUT, at + 0.3), (_LEFT, at + 0.3), _OF_N)
    axes.text((_INPUT + _LEFT) / 2, at + 0.13, "logits", ha="center", size=8, color=_OF_N)
    _arrow(axes, (_LEFT, at + 0.7), (_INPUT, at + 0.7), _OF_N)
    axes.text((_INPUT + _LEFT) / 2, at + 0.93, "marks", ha="center", size=8, color=_OF_N)
    _arrow(axes, (middle, 0.95), (middle, at))
    axes.text(middle, 0.72, "targets, (N,) or (A,);  box errors or IoUs, (P,)", ha="center", size=8)

    # What is kept, on the right.
    _box(axes, _KEPT, begin, _WIDE - 0.1, end - begin, _SAVED)
    axes.text(_KEPT + (_WIDE - 0.1) / 2, (begin + end) / 2, "saved for\nbackward", ha="center", va="center", size=8)
    kept = {
        "find": "positives (P,)",
        "count": "rows (P,), tables",
        "terms": "grad_per_fp (P,),\ngrad_positives (3, P)",
    }
    for name, what in kept.items():
        y = _middle(by_name[name])
        _arrow(axes, (_RIGHT, y), (_KEPT, y))
        axes.text((_RIGHT + _KEPT) / 2, y - 0.1, what, ha="center", va="bottom", size=8)
    y = _middle(by_name["spread"])
    _arrow(axes, (_KEPT, y), (_RIGHT, y))
    what = "rows, tables, positives,\ngrad_per_fp, grad_positives"
    axes.text((_RIGHT + _KEPT) / 2, y - 0.1, what, ha="center", va="bottom", size=8)

    # Results, and incoming gradients.
    out = by_name["terms"].top + _HEIGHT
    _arrow(axes, (5.0, out), (5.0, out + 0.45))
    axes.text(5.0, out + 0.67, "losses, 0-d; ranks (P,)", ha="center", size=8)
    border = (out + by_name["spread"].top) / 2 + 0.05
    axes.plot([2.0, 10.6], [border, border], color="#777777", lw=0.8, ls=":")
    axes.text(10.5, border - 0.1, "forward", ha="right", va="bottom", size=8, style="italic")
    axes.text(10.5, border + 0.1, "backward", ha="right", va="top", size=8, style="italic")
    _arrow(axes, (7.0, by_name["spread"].top - 0.42), (7.0, by_name["spread"].top))
    axes.text(7.0, by_name["spread"].top - 0.5, "gradients of the losses, 0-d", ha="center", size=8)
    bottom = by_name["spread"].top + _HEIGHT
    _arrow(axes, (middle, bottom), (middle, bottom + 0.55), _OF_N)
    axes.text(
        middle, bottom + 0.82, "gradients of the logits (N,), and of the values (P,)", ha="center", size=8, color=_OF_N
    )
    axes.text(0.1, 13.25, "dashed: with a process group alone", size=8)
    return figure
