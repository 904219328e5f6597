"""Plots of a run, as PNG files in docs/plots/."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from ..report import own, rows_of
from .contenders import BUCKETED, DENSE, FLOOR, FOCAL, FOCAL_COMPILED, LOOP
from .timing import Row

# One colour for each contender on all plots.
_COLOURS = {
    "torch": "#1f77b4", "numba": "#d62728", "triton_tiled": "#2ca02c", "triton_binned": "#9467bd", LOOP: "#7f7f7f",
    "auto": "#d62728", DENSE: "#bcbd22", BUCKETED: "#ff7f0e", FOCAL: "#17becf", FOCAL_COMPILED: "#e377c2",
    FLOOR: "#000000",
}  # fmt: skip


def _lines(axes: Any, rows: list[Row], by: str) -> None:
    for name in dict.fromkeys(row.contender for row in rows):
        mine = [row for row in rows if row.contender == name]
        x = [getattr(row, by) for row in mine]
        style: dict[str, Any] = {"color": _COLOURS[name], "lw": 2.2 if own(mine[0]) else 1.2}
        axes.plot(x, [row.p50_ms for row in mine], "-o" if own(mine[0]) else "--o", ms=3, label=name, **style)
        axes.fill_between(x, [r.p20_ms for r in mine], [r.p80_ms for r in mine], color=_COLOURS[name], alpha=0.15)
    axes.set(xscale="log", yscale="log", ylabel="ms, forward + backward")
    axes.grid(alpha=0.3, which="both", lw=0.4)


def _bars(axes: Any, rows: list[Row], label: str) -> None:
    names = [name for name in _COLOURS if any(row.contender == name for row in rows)]
    labels = list(dict.fromkeys(getattr(row, label) for row in rows))
    for index, name in enumerate(names):
        mine = {getattr(row, label): row.p50_ms for row in rows if row.contender == name}
        where = [labels.index(key) + (index - len(names) / 2 + 0.5) * 0.8 / len(names) for key in mine]
        axes.bar(where, list(mine.values()), 0.8 / len(names), color=_COLOURS[name], label=name)
    axes.set(yscale="log", ylabel="ms, forward + backward")
    texts = [str(text).replace(", ", ",\n") for text in labels]  # or they run into each other
    axes.set_xticks(range(len(labels)), texts, fontsize=8)
    axes.grid(alpha=0.3, axis="y", lw=0.4)


def draw(report: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Draw the plots of a run; return the files written. Groups that the run has not are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    run = report["run"]
    device = f"{run['device']}, {run['threads']} threads" if run["device_type"] == "cpu" else run["device"]
    many = {row.anchors for row in rows_of(report, "positives")}
    kinds = {
        "anchors": ("anchors", f"P = 1,000 ({device})", "logits N"),
        "positives": ("positives", f"N = {max(many, default=0):,} ({device})", "positives P"),
        "delta": ("delta", f"N = 1,000,000, P = 300 ({device})", "delta"),
        "scores": ("scores", f"N = 1,000,000, P = 300 ({device})", "distribution of the scores"),
        "cases": ("case", f"sizes of known detectors ({device})", ""),
    }
    for group, (by, title, xlabel) in kinds.items():
        rows = rows_of(report, group)
        if not rows:
            continue
        figure, axes = plt.subplots(figsize=(9, 4.5), dpi=110, layout="constrained")
        (_lines if by in ("anchors", "positives") else _bars)(axes, rows, by)
        axes.set(title=title, xlabel=xlabel)
        figure.legend(fontsize=8, loc="outside right upper")
        written.append(folder / f"{name}-{group}.png")
        figure.savefig(written[-1])
        plt.close(figure)
    return written
