"""Tables and plots of a study, from its result file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..tables import commit, mean_and_range, number, table

_METRICS = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "oLRP": "oLRP",
    "oLRP_loc": "Loc",
    "oLRP_FP": "FP",
    "oLRP_FN": "FN",
}

Runs = list[dict[str, Any]]


def _by_loss(report: dict[str, Any]) -> dict[str, Runs]:
    runs: Runs = report["comparison"]
    return {name: [run for run in runs if run["loss"] == name] for name in dict.fromkeys(r["loss"] for r in runs)}


def _mean_and_spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean, and the range over the seeds."""
    return mean_and_range([scale * value for value in values], digits)


def _results(report: dict[str, Any]) -> str:
    lines = [
        [name, f"{runs[0]['settings']['lr']:g}"]
        + [_mean_and_spread([run["evaluations"][-1][key] for run in runs], 100) for key in _METRICS]
        for name, runs in _by_loss(report).items()
    ]
    return table(["loss", "lr", *_METRICS.values()], lines)


def _test(report: dict[str, Any]) -> str:
    lines = [
        [
            name,
            *(_mean_and_spread([run["test"][key] for run in runs], 100) for key in _METRICS),
            _mean_and_spread([run["test"]["score_iou_correlation"] for run in runs], digits=3),
        ]
        for name, runs in _by_loss(report).items()
    ]
    return table(["loss", *_METRICS.values(), "correlation of score and IoU"], lines)


def _paired(report: dict[str, Any]) -> str:
    """Against the first loss, seed by seed: same weights at the start, same batches."""
    (first, base), *others = _by_loss(report).items()
    quantities: dict[str, Callable[[dict[str, Any]], float]] = {
        "AP": lambda run: 100 * run["evaluations"][-1]["AP"],
        "oLRP": lambda run: 100 * run["evaluations"][-1]["oLRP"],
        "correlation of score and IoU": lambda run: run["score_iou_correlation"],
    }
    if "test" in base[0]:
        quantities |= {
            "second test: AP": lambda run: 100 * run["test"]["AP"],
            "second test: correlation": lambda run: run["test"]["score_iou_correlation"],
        }
    lines: list[list[str]] = []
    for name, runs in others:
        pairs = [(one, next(b for b in base if b["seed"] == one["seed"])) for one in runs]
        line = [name]
        for key, of in quantities.items():
            differences = [of(one) - of(other) for one, other in pairs]
            line.append(mean_and_range(differences, 3 if "correlation" in key else 1, "+"))
        lines.append(line)
    return table([f"less {first}, seed by seed", *quantities], lines)


def _course(report: dict[str, Any]) -> str:
    by_loss = _by_loss(report)
    steps = [entry["step"] for entry in next(iter(by_loss.values()))[0]["evaluations"]]
    lines = [
        [
            name,
            *(f"{100 * np.mean([run['evaluations'][index]['AP'] for run in runs]):.1f}" for index in range(len(steps))),
        ]
        for name, runs in by_loss.items()
    ]
    return table(["AP, mean of the seeds, at step", *map(str, steps)], lines)


def ratios(run: dict[str, Any]) -> list[float]:
    """Sum of the gradients' magnitudes of negatives over that of positives, at every logged step."""
    return [entry["negatives"] / entry["positives"] for entry in run["log"]]


def _gradients(report: dict[str, Any]) -> str:
    lines: list[list[str]] = []
    for name, runs in _by_loss(report).items():
        of_all = [ratio for run in runs for ratio in ratios(run)]
        boxes = [entry["boxes"] / (entry["positives"] + entry["negatives"]) for run in runs for entry in run["log"]]
        line = [f"{quantile:.4g}" for quantile in np.percentile(of_all, (0, 50, 100))]
        lines.append([name, *line, f"{np.median(boxes):.3g}"])
    head = ["loss", "negatives / positives, least", "median", "greatest", "boxes / scores, median"]
    return table(head, lines)


def _correlation(report: dict[str, Any]) -> str:
    lines = [
        [
            name,
            _mean_and_spread([run["score_iou_correlation"] for run in runs], digits=3),
            _mean_and_spread([run["mean_iou"] for run in runs], digits=3),
            f"{np.mean([run['true_positives'] for run in runs]):.0f}",
        ]
        for name, runs in _by_loss(report).items()
    ]
    return table(["loss", "rank correlation of score and IoU", "mean IoU", "true positives"], lines)


def _times(report: dict[str, Any]) -> str:
    def milliseconds(quantiles: Sequence[float]) -> str:
        low, middle, high = quantiles
        return f"{number(middle)} ({number(low)} to {number(high)})"

    lines = [
        [name, milliseconds(of["step_ms"]), milliseconds(of["loss_ms"]), f"{100 * of['share']:.1f} %"]
        for name, of in report["times"]["losses"].items()
    ]
    return table(["loss", "step ms (p20 to p80)", "of it the loss, forward + backward, ms", "share"], lines)


def _choice(report: dict[str, Any]) -> str:
    """What somebody who chooses a loss looks at."""
    lines = [
        [
            name,
            _mean_and_spread([run["evaluations"][-1]["AP"] for run in runs], 100),
            _mean_and_spread([run["evaluations"][-1]["oLRP"] for run in runs], 100),
            _mean_and_spread([run["score_iou_correlation"] for run in runs], digits=2),
            f"{100 * report['times']['losses'][name]['share']:.1f} %",
        ]
        for name, runs in _by_loss(report).items()
    ]
    return table(["loss", "AP", "oLRP, less is better", "score with IoU", "share of a step"], lines)


def _tuning(report: dict[str, Any]) -> str:
    rates = sorted({entry["lr"] for entry in report["tuning"]})
    of = {
        (entry["loss"], entry["lr"]): f"{100 * end['AP']:.1f}" if (end := entry["end"]) else "diverged"
        for entry in report["tuning"]
    }
    lines = [[name, *(of.get((name, rate), "") for rate in rates)] for name in _by_loss(report)]
    return table(["AP after the short run, by learning rate", *(f"{rate:g}" for rate in rates)], lines)


def _conditions(report: dict[str, Any]) -> str:
    run, runs = report["run"], report["comparison"]
    settings = runs[0]["settings"]
    seeds, total = sorted({one["seed"] for one in runs}), sum(one["seconds"] for one in runs)
    period = "an epoch" if settings["period"] is None else f"{settings['period']} steps"
    text = (
        f"`{report['command']}`: {len(runs)} runs of {settings['steps']} steps of {settings['batch']} images, "
        f"{settings['optimizer']}, {settings['warm_up']} steps of warm-up, schedule `{settings['schedule']}`, "
        f"self-balancing period {period}, seeds {', '.join(map(str, seeds))}; {total / 60:.0f} minutes of one core in "
        f"all. {run['device']}, torch {run['torch']}, {commit(run)}."
    )
    if "times" in report:
        times = report["times"]
        text += (
            f" Times: {times['turns']} steps of each loss in turn, at the start of training, 2 threads, "
            f"{times['logits']:,} logits, {times['positives']} positives in the last step."
        )
    if "repeated" in report:
        of = report["repeated"]
        runs_of = f"The {len(of['losses'])} runs of seed {of['seed']}"
        text += f" {runs_of} repeated at {commit(of)}: the same figures, bit for bit."
    first = runs[0]["loss"]
    study = report["command"].split()[-1]
    return f'{text} One run once more: `python -m bench train repeat {study} --loss "{first}" --seed {seeds[0]}`.'


_TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "results": _results,
    "test": _test,
    "paired": _paired,
    "course": _course,
    "gradients": _gradients,
    "correlation": _correlation,
    "times": _times,
    "choice": _choice,
    "tuning": _tuning,
    "run": _conditions,
}


def render(report: dict[str, Any], name: str) -> str:
    """A table by its name."""
    return _TABLES[name](report)


def draw(report: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """AP and gradients through training, correlation of scores and IoUs, times if taken; returns the files written."""
    import matplotlib as mpl  # tables do without

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    by_loss = _by_loss(report)
    colours = dict(zip(by_loss, plt.colormaps["tab10"].colors, strict=False))  # pyright: ignore[reportAttributeAccessIssue]
    written: list[Path] = []

    def save(figure: Any, what: str) -> None:
        written.append(folder / f"{name}-{what}.png")
        figure.savefig(written[-1], dpi=110, metadata={"Software": None})
        plt.close(figure)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for loss, runs in by_loss.items():
        style: dict[str, Any] = {"color": colours[loss], "lw": 2.2 if loss == "aLRP" else 1.2, "label": loss}
        for axes, series in (
            (left, [[(entry["step"], 100 * entry["AP"]) for entry in run["evaluations"]] for run in runs]),
            (right, [[(entry["step"], r) for entry, r in zip(run["log"], ratios(run), strict=True)] for run in runs]),
        ):
            values = np.array(series)  # [seed, entry, step and value]
            steps, of_seeds = values[0, :, 0], values[:, :, 1]
            axes.plot(steps, of_seeds.mean(0), **style)
            axes.fill_between(steps, of_seeds.min(0), of_seeds.max(0), color=colours[loss], alpha=0.12)
    left.set(xlabel="step", ylabel="AP on held-out images", title="AP, mean and range of the seeds")
    right.set(xlabel="step", yscale="log", title="gradients: sum of negatives / sum of positives")
    right.axhline(1, color="black", lw=0.6)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both", lw=0.4)
    save(figure, "curves")

    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for loss, runs in by_loss.items():
        x, y = ([run[key] for run in runs] for key in ("score_iou_correlation", "mean_iou"))
        axes.plot(x, y, "o", color=colours[loss], label=loss)
    axes.set(xlabel="rank correlation of score and IoU of true positives", ylabel="their mean IoU")
    axes.grid(alpha=0.3, lw=0.4)
    axes.legend(fontsize=8)
    save(figure, "correlation")

    if "times" not in report:
        return written
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    times = report["times"]["losses"]
    whole, part = ([of[key][1] for of in times.values()] for key in ("step_ms", "loss_ms"))
    axes.barh(list(times), whole, color="lightgrey", label="step")
    bars = axes.barh(list(times), part, color=[colours[loss] for loss in times], label="of it the loss")
    axes.bar_label(bars, [f"{100 * of['share']:.1f} %" for of in times.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms, median", title="a step, and the share of it that the loss takes, forward + backward")
    axes.grid(alpha=0.3, axis="x", lw=0.4)
    save(figure, "times")
    return written
