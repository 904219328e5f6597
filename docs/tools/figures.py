"""The figures of docs/how_it_works.md and docs/stages.md: ``python -m docs.tools.figures`` writes them to docs/plots/.

What the former show is computed by :class:`alrp_triton.ComparisonMatrix`; the tiles are as small as it takes to see
them. The latter is drawn in :mod:`.stages`.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from alrp_triton import ComparisonMatrix

from . import stages

Floats = NDArray[np.float64]

PLOTS = Path(__file__).resolve().parent.parent / "plots"
DELTA = 1.0
ROWS, COLUMNS = 6, 24
"""A tile of the figure. Those of the kernels are in ``alrp_triton/backends/triton_tiled.py``."""

_BLUE, _RED, _GREEN, _ORANGE, _GREY = "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#777777"
# The same bytes in each run.
_STYLE = {"svg.hashsalt": "alrp_triton", "font.size": 9, "axes.titlesize": 10}


class Scene(NamedTuple):
    """Scores of positives and negatives as a detector in training may have them."""

    positives: Floats
    """Ascending."""
    negatives: Floats
    """As they lie in memory: anchors near objects, which score high, are neighbours."""


def make_scene() -> Scene:
    """18 positives, 192 negatives."""
    rng = np.random.default_rng(5)
    near = np.array([False, True, False, False, False, True, True, False])
    negatives = rng.normal(np.where(near, -0.8, -5.5), np.where(near, 1.5, 0.7), (COLUMNS, len(near))).T
    return Scene(np.sort(rng.normal(0.5, 1.7, 3 * ROWS)), negatives.ravel())


def matrix(positives: Floats, negatives: Floats) -> Floats:
    """H itself, one column after the other, by the operator."""
    h = ComparisonMatrix(torch.tensor(positives), torch.tensor(negatives), delta=DELTA)
    return np.stack([h.rmatvec(row).numpy() for row in torch.eye(len(positives), dtype=torch.float64)])


def skipped(scene: Scene) -> NDArray[np.bool_]:
    """For each tile, row block by column block: all its columns are below all that its rows compare with."""
    least = scene.positives[::ROWS] - DELTA
    top = scene.negatives.reshape(-1, COLUMNS).max(1)
    return top[None, :] < least[:, None]


def _heat(axes: Any, h: Floats) -> Any:
    axes.set(ylabel="positives, by score", yticks=[])
    return axes.imshow(h, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")


def draw_matrix(scene: Scene) -> Figure:
    """H with sorted columns, and H as the tiled kernels go through it."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8.5, 5.6), layout="constrained")
    order = np.argsort(scene.negatives)
    h = matrix(scene.positives, scene.negatives)
    image = _heat(above, h[:, order])
    above.set(title="H with its columns sorted, which no backend does: 0, a band of width 2δ, 1", xticks=[])
    above.set_xlabel("logits, by value")
    edges = np.arange(len(scene.positives) + 1) - 0.5
    for shift in (-DELTA, DELTA):
        at = np.searchsorted(scene.negatives[order], scene.positives + shift, "right") - 0.5
        above.step(np.append(at[0], at), edges, where="pre", color=_ORANGE, lw=1.4)
    _heat(below, h)
    below.set(title="As it lies in memory, in tiles; hatched: skipped, for h is 0 in all of the tile", xticks=[])
    below.set_xlabel("logits, in place")
    for (row, column), is_skipped in np.ndenumerate(skipped(scene)):
        corner = column * COLUMNS - 0.5, row * ROWS - 0.5
        face, hatch = ("#eeeeee", "////") if is_skipped else ("none", None)
        below.add_patch(Rectangle(corner, COLUMNS, ROWS, edgecolor=_GREY, facecolor=face, hatch=hatch, lw=0.8))
    figure.colorbar(image, ax=(above, below), label="h(x - s)", shrink=0.6)
    return figure


class Small(NamedTuple):
    """Three positives with weights, and some logits, few enough to be seen one by one."""

    scores: Floats
    weights: Floats
    logits: Floats

    @property
    def operator(self) -> ComparisonMatrix:
        """Their comparison matrix."""
        return ComparisonMatrix(torch.tensor(self.scores), torch.tensor(self.logits), delta=DELTA)

    @property
    def knots(self) -> Floats:
        """Ascending, two for each positive."""
        return np.sort(np.concatenate([self.scores - DELTA, self.scores + DELTA]))

    @property
    def bins(self) -> tuple[Floats, Floats]:
        """Of the logits in each bin between knots: their number, and the sum of their values ``(2P + 1,)``."""
        bins = np.searchsorted(self.knots, self.logits, "right")
        count, moment = np.zeros((2, len(self.knots) + 1))
        np.add.at(count, bins, 1)
        np.add.at(moment, bins, self.logits)
        return count, moment

    def false_positives(self, row: int) -> float:
        """FP of a positive, from the bins alone."""
        count, moment = self.bins
        score = self.scores[row]
        rise, done = np.searchsorted(self.knots, (score - DELTA, score + DELTA)) + 1
        inside = count[rise:done].sum()
        return float(count[done:].sum() + inside / 2 + (moment[rise:done].sum() - score * inside) / (2 * DELTA))


def make_small() -> Small:
    """As in the figures."""
    logits = np.random.default_rng(3).normal(-0.6, 1.4, 40).clip(-3.4, 3.4)
    return Small(np.array([-1.3, 0.2, 0.9]), np.array([0.5, 0.2, 0.3]), logits)


def _steps(axes: Any, small: Small) -> Floats:
    """The step of each positive; returns the values of x."""
    x = np.sort(np.concatenate([np.linspace(-3.5, 3.5, 281), small.knots]))
    for score, colour in zip(small.scores, (_BLUE, _GREEN, _RED), strict=False):
        axes.plot(x, np.clip((x - score) / (2 * DELTA) + 0.5, 0, 1), color=colour, label=f"s = {score:g}")
        axes.plot([score - DELTA, score + DELTA], [0, 1], "o", color=colour, ms=4)
    for knot in small.knots:
        axes.axvline(knot, color=_GREY, lw=0.6, ls=":")
    axes.set(ylabel="h(x - s)", xlim=(-3.5, 3.5))
    axes.legend(loc="upper left", frameon=False)
    return x


def draw_step(small: Small) -> Figure:
    """The steps of three positives, and the one function that rmatvec makes of them."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.5, 5), sharex=True, layout="constrained")
    x = _steps(above, small)
    above.set_title("The step of each of P = 3 positives: two knots each, s - δ and s + δ")
    at_x = ComparisonMatrix(torch.tensor(small.scores), torch.tensor(x), delta=DELTA)
    below.plot(x, at_x.rmatvec(torch.tensor(small.weights)).numpy(), color="black", lw=1.4)
    at_knots = ComparisonMatrix(torch.tensor(small.scores), torch.tensor(small.knots), delta=DELTA)
    of_knots = at_knots.rmatvec(torch.tensor(small.weights)).numpy()
    below.plot(small.knots, of_knots, "o", color=_ORANGE, ms=6, label="its 2P knots")
    of_logits = small.operator.rmatvec(torch.tensor(small.weights)).numpy()
    below.plot(small.logits, of_logits, "|", color="black", ms=9, label="logits: a look-up each")
    for knot in small.knots:
        below.axvline(knot, color=_GREY, lw=0.6, ls=":")
    below.set(title="g(x) = Σ w h(x - s), the gradient of a negative as a function of its logit", xlabel="logit x")
    below.set(ylabel="g(x)")
    below.legend(loc="upper left", frameon=False)
    return figure


def draw_bins(small: Small) -> Figure:
    """What the forward pass keeps of the logits, and what one positive reads of it."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.5, 5), sharex=True, layout="constrained")
    count, moment = small.bins
    edges = np.concatenate([[-3.5], small.knots, [3.5]])
    for index, (low, high) in enumerate(pairwise(edges)):
        above.bar(low, count[index], high - low, align="edge", color=(_BLUE, "#8fb8de")[index % 2], alpha=0.6)
        above.text((low + high) / 2, count[index] + 0.4, f"{count[index]:.0f}", ha="center")
    filled = count > 0
    above.plot(moment[filled] / count[filled], np.full(filled.sum(), 0.6), "v", color=_ORANGE, label="mean of a bin")
    above.plot(small.logits, np.full_like(small.logits, -0.7), "|", color="black", ms=7, label="logits")
    above.set(title="Forward: of each bin, the number of its logits and the sum of their values", ylabel="logits")
    above.set_ylim(-1.6, count.max() + 2)
    above.legend(loc="upper right", frameon=False)
    score = small.scores[1]
    _steps(below, small._replace(scores=small.scores[1:2]))
    for knot in small.knots:
        below.axvline(knot, color=_GREY, lw=0.6, ls=":")
    below.axvspan(score - DELTA, score + DELTA, color=_ORANGE, alpha=0.2, lw=0)
    below.axvspan(score + DELTA, 3.5, color=_GREEN, alpha=0.2, lw=0)
    below.text(score, 1.08, "by number and sum", ha="center")
    below.text((score + DELTA + 3.5) / 2, 1.08, "by number", ha="center")
    below.text(-2.2, 1.08, "not at all", ha="center")
    below.set_ylim(-0.1, 1.25)
    below.legend(loc="center left", frameon=False)
    found, dense = small.false_positives(1), float(small.operator.matvec()[1])
    below.set(title=f"How they enter FP of the positive at {score:g}: {found:.4f}; one by one {dense:.4f}")
    below.set_xlabel("logit x")
    return figure


def draw(folder: Path) -> list[Path]:
    """Draw all figures; return the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        small = make_small()
        for name, figure in {
            "how-matrix": draw_matrix(make_scene()),
            "how-step": draw_step(small),
            "how-bins": draw_bins(small),
            "stages": stages.draw(),
        }.items():
            written.append(folder / f"{name}.svg")
            figure.savefig(written[-1], metadata={"Date": None})
            plt.close(figure)
    return written


def main() -> None:
    """Write the figures, and say where."""
    parser = argparse.ArgumentParser(description="The figures of docs/how_it_works.md and docs/stages.md.")
    parser.add_argument("--out", type=Path, default=PLOTS, help="folder (default: docs/plots)")
    for path in draw(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
