"""The losses side by side: one small detector, one data set, one budget, several seeds. ``python -m bench.comparison``.

Learning rates are chosen for each loss by short runs on other scenes: of three, then of greater or smaller ones for as
long as the best is at an end of what was tried. What is left of an interrupted comparison is taken up again: each run
leaves a file in ``--work``, to be removed when the code has changed. The result file is what tables and plots are made
from. ``python -m bench.comparison check`` repeats the short runs of the chosen learning rates and compares what they
ended at with the result file, bit for bit.
"""

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from scipy.stats import rankdata
from torchvision.ops import box_iou
from tqdm import tqdm

from alrp_triton.trainer import CocoDataModule, Found, RankingDetector
from alrp_triton.trainer.callbacks import History
from examples.digits import write

from .probes import LossClock, Probe
from .run import RESULTS, describe_run, store


class Contender(NamedTuple):
    """A loss as the trainer takes it."""

    loss: str
    box_loss: str | None = None
    box_weight: float | None = None


CONTENDERS = {
    "aLRP": Contender("alrp"),
    "aLRP, weight 1": Contender("alrp", None, 1.0),
    "AP + smooth L1": Contender("ap"),
    "AP + GIoU": Contender("ap", "giou"),
    "focal + L1": Contender("torchvision", "l1"),
    "focal + GIoU": Contender("torchvision", "giou"),
    "RS": Contender("rank_sort"),
    "RS, weight 1": Contender("rank_sort", None, 1.0),
}

STEPS, BATCH, PERIOD, WARM_UP = 400, 8, 50, 50
EVALUATIONS = 4  # of a run, the last at its end
LEARNING_RATES, FIRST, SHORT = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), slice(2, 5), 200
SCENES, HELD_OUT = 1600, 200
TUNING_SEED = 100
CPU = torch.device("cpu")
_LOGGED = 10  # steps


def settings_of(name: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """What a run of the comparison is: arguments of :class:`RankingDetector`, and ``batch`` and ``steps``."""
    return {
        "detector": "retinanet_small", "size": 128, "batch": BATCH, "steps": steps, "optimizer": "adamw", "lr": lr,
        "warm_up": WARM_UP, "schedule": "cosine", "period": PERIOD, "seed": seed, **CONTENDERS[name]._asdict(),
    }  # fmt: skip


def _make(settings: dict[str, Any], folder: Path) -> tuple[RankingDetector, CocoDataModule]:
    data = CocoDataModule(folder, batch=settings["batch"], workers=0, flip=False, seed=settings["seed"])
    of_model = {name: value for name, value in settings.items() if name not in ("batch", "steps")}
    return RankingDetector(data.categories, **of_model), data


def true_positives(found: Sequence[Found]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and IoUs of the detections that are true at an IoU of 0.5: best score first, each truth found once."""
    scores: list[float] = []
    ious: list[float] = []
    for _, one, truth in found:
        overlaps = box_iou(one["boxes"], truth["boxes"])
        overlaps[one["labels"][:, None] != truth["labels"][None]] = 0
        for index in one["scores"].argsort(descending=True, stable=True).tolist():
            if overlaps.shape[1] and (best := overlaps[index].max(0)).values >= 0.5:
                overlaps[:, best.indices] = 0
                scores.append(one["scores"][index].item())
                ious.append(best.values.item())
    return np.array(scores), np.array(ious)


class _Log(History):
    """Also the gradients."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.probe = Probe(pl_module.detector)  # before the loss that was put in just now

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self.steps[-1] |= self.probe.gradients()


def train_one(name: str, lr: float, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """One run: its log, its evaluations, and the correlation of score and IoU of what it finds.

    ``diverged`` is the step whose losses were not finite, where the run ended, or None.
    """
    torch.set_num_threads(1)  # two runs at a time, on two cores
    settings, log = settings_of(name, lr, seed, steps), _Log()
    model, data = _make(settings, folder)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[log],
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, log_every_n_steps=_LOGGED,
        max_steps=steps, val_check_interval=steps // EVALUATIONS, check_val_every_n_epoch=None,
    )  # fmt: skip
    diverged: int | None = None
    begin = time.perf_counter()
    try:
        trainer.fit(model, datamodule=data)
    except FloatingPointError:
        diverged = trainer.global_step + 1
    scores, ious = true_positives(model.found)
    ranks = [rankdata(values) for values in (scores, ious)]
    correlation = float(np.corrcoef(*ranks)[0, 1]) if len(scores) > 2 else math.nan  # Spearman's
    return {
        "contender": name,
        "seed": seed,
        "settings": settings,
        "diverged": diverged,
        "log": log.steps,
        "evaluations": log.evaluations,
        "true_positives": len(scores),
        "score_iou_correlation": correlation,
        "mean_iou": float(ious.mean()) if len(ious) else math.nan,
        "seconds": time.perf_counter() - begin,
    }


def time_all(folder: Path, turns: int) -> dict[str, Any]:
    """Steps of all losses in turn, on both cores: milliseconds of a step, and of the loss in it."""
    made = {name: _make(settings_of(name, 1e-3, 0, turns + 3), folder) for name in CONTENDERS}
    optimizers = {name: torch.optim.AdamW(model.parameters(), 1e-3) for name, (model, _) in made.items()}
    clocks = {name: LossClock(model.detector) for name, (model, _) in made.items()}
    _, data = next(iter(made.values()))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    turn_of = tqdm(range(turns + 3), desc="time of a step", unit="turn")
    for turn, batch in zip(turn_of, cycle(data.train_dataloader())):
        for name, (model, _) in made.items():
            begin = time.perf_counter()
            losses = model.detector(batch.images, batch.targets)  # of a RetinaNet: both have labels from 0
            optimizers[name].zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizers[name].step()
            if turn >= 3:
                seconds[name].append((time.perf_counter() - begin, clocks[name].watch.seconds))
    logits = next(iter(clocks.values())).positive
    times = {
        name: {
            "step_ms": [float(q) for q in np.percentile([1e3 * step for step, _ in pairs], (20, 50, 80))],
            "loss_ms": [float(q) for q in np.percentile([1e3 * loss for _, loss in pairs], (20, 50, 80))],
            "share": float(np.median([loss / step for step, loss in pairs])),
        }
        for name, pairs in seconds.items()
    }
    return {"turns": turns, "logits": logits.numel(), "positives": int(logits.sum()), "losses": times}


def _kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a former call left in the file, or what is made and left there now."""
    if not file.exists():
        _write(file, make())
    return json.loads(file.read_text())


def _write(file: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(file)


def _run_apart(jobs: Sequence[tuple[str, float, int, int]], data: Path, work: Path) -> list[dict[str, Any]]:
    """Each job in a process of its own, two at a time; those that have left a file are not run again."""

    def run(job: tuple[str, float, int, int]) -> dict[str, Any]:
        name, lr, seed, steps = job
        file = work / f"{name.replace(' ', '_')}-{lr:g}-{seed}-{steps}.json"
        if not file.exists():
            command = [sys.executable, "-m", "bench.comparison", "one", "--data", str(data), "--file", str(file)]
            command += ["--name", name, "--lr", str(lr), "--seed", str(seed), "--steps", str(steps)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        result = json.loads(file.read_text())
        if result["settings"] != settings_of(name, lr, seed, steps):
            raise ValueError(f"{file} is of a run with other settings: remove {work}")
        return result

    with ThreadPoolExecutor(2) as pool:
        return list(tqdm(pool.map(run, jobs), total=len(jobs), desc="runs", unit="run"))


def _tune(run: Callable[[list[tuple[str, float]]], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """How short runs ended, ``run`` of loss and learning rate: until no loss is best at an end of what it was given."""
    of_loss: dict[str, dict[float, dict[str, Any] | None]] = {name: {} for name in CONTENDERS}
    wanted = [(name, lr) for name in CONTENDERS for lr in LEARNING_RATES[FIRST]]
    while wanted:
        for (name, lr), one in zip(wanted, run(wanted), strict=True):
            of_loss[name][lr] = None if one["diverged"] else one["evaluations"][-1]
        wanted = []
        for name, ends in of_loss.items():
            best = LEARNING_RATES.index(_best(ends))
            around = LEARNING_RATES[max(best - 1, 0) : best + 2]
            wanted += [(name, lr) for lr in around if lr not in ends]
    return [{"contender": name, "lr": lr, "end": ends[lr]} for name, ends in of_loss.items() for lr in sorted(ends)]


def _best(ends: dict[float, dict[str, Any] | None]) -> float:
    """The learning rate with the highest AP; a run that diverged has none."""
    return max(ends, key=lambda lr: end["AP"] if (end := ends[lr]) else -1.0)


def compare(seeds: int, work: Path, turns: int) -> dict[str, Any]:
    """The whole comparison.

    Raises:
        ValueError: a run diverged at the learning rate that was chosen.
    """
    run = describe_run(CPU)
    final, other = work / "scenes-0", work / "scenes-1"
    for seed, folder in enumerate((final, other)):
        if not folder.exists():
            write(folder, SCENES, HELD_OUT, seed)
    times = _kept(work / "times.json", lambda: time_all(final, turns))
    if times["turns"] != turns:
        raise ValueError(f"{work / 'times.json'} is of {times['turns']} turns, not of {turns}: remove {work}")
    tuning = _tune(lambda wanted: _run_apart([(name, lr, TUNING_SEED, SHORT) for name, lr in wanted], other, work))
    ends = {name: {entry["lr"]: entry["end"] for entry in tuning if entry["contender"] == name} for name in CONTENDERS}
    jobs = [(name, _best(ends[name]), seed, STEPS) for seed in range(seeds) for name in CONTENDERS]
    runs = _run_apart(jobs, final, work)
    diverged = [f"{one['contender']}, seed {one['seed']}, step {one['diverged']}" for one in runs if one["diverged"]]
    if diverged:
        raise ValueError(f"not finite at the learning rate of the best short run: {'; '.join(diverged)}")
    return {
        "run": run,
        "command": "python -m bench.comparison",
        "comparison": runs,
        "tuning": tuning,
        "times": times,
    }


def check(file: Path, work: Path) -> dict[str, Any]:
    """Repeats the short run of each loss, at its chosen learning rate, with the code as it is now.

    Raises:
        ValueError: a run ended elsewhere than the result file says.
    """
    report = json.loads(file.read_text())
    chosen = {run["contender"]: run["settings"]["lr"] for run in report["comparison"]}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        write(Path(folder) / "scenes", SCENES, HELD_OUT, 1)
        jobs = [(name, lr, TUNING_SEED, SHORT) for name, lr in chosen.items()]
        repeated = _run_apart(jobs, Path(folder) / "scenes", Path(folder))
    before = {(entry["contender"], entry["lr"]): entry["end"] for entry in report["tuning"]}
    for run in repeated:
        name, now = run["contender"], None if run["diverged"] else run["evaluations"][-1]
        wanted = before[name, chosen[name]]
        # As text, for NaN is no equal of NaN; of float32, as evaluations are and those of older files were not.
        texts = [end and [str(np.float32(end[key])) for key in wanted or ()] for end in (now, wanted)]
        if texts[0] != texts[1]:
            raise ValueError(f"{name} ended at {now}, the result file says {wanted}")
    now = describe_run(CPU)
    report["checked"] = {"runs": len(repeated), "commit": now["commit"], "dirty": now["dirty"], "date": now["date"]}
    return report


def main() -> None:
    """Compare, or do one run of the comparison."""
    parser = argparse.ArgumentParser(prog="python -m bench.comparison", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each loss (default %(default)s)")
    parser.add_argument("--turns", type=int, default=40, help="steps to take the time of (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("comparison"), help="folder of scenes and runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "comparison.json", help="result file")
    commands.add_parser("check", help="repeat the short runs, compare them with the result file, and note that there")
    one = commands.add_parser("one")
    for name, kind in {"data": Path, "file": Path, "name": str, "lr": float, "seed": int, "steps": int}.items():
        one.add_argument(f"--{name}", type=kind, required=True)
    options = parser.parse_args()
    if options.command == "one":
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        result = train_one(options.name, options.lr, options.seed, options.steps, options.data)
        _write(options.file, result)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    if options.command == "check":
        store(check(options.out, options.work), options.out)
        return
    store(compare(options.seeds, options.work, options.turns), options.out)


if __name__ == "__main__":
    main()
