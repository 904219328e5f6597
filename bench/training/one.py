"""A run of a comparison, and the time of a step with each of its losses."""

import math
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from scipy.stats import rankdata
from torchvision.ops import box_iou
from tqdm import tqdm

from alrp_triton.trainer import Found
from alrp_triton.trainer.callbacks import History

from .probes import LossClock, Probe
from .studies import DATA, STUDIES, make, open_data, settings_of

_LOGGED = 10  # steps
_QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0,
}  # fmt: skip


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


def _of_found(found: Sequence[Found]) -> dict[str, float]:
    """Number and mean IoU of the true detections, and Spearman's correlation of their scores and IoUs."""
    scores, ious = true_positives(found)
    ranks = [rankdata(values) for values in (scores, ious)]
    return {
        "true_positives": len(scores),
        "score_iou_correlation": float(np.corrcoef(*ranks)[0, 1]) if len(scores) > 2 else math.nan,
        "mean_iou": float(ious.mean()) if len(ious) else math.nan,
    }


class _Log(History):
    """Also the gradients."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.probe = Probe(pl_module.detector)  # before the loss that was put in just now

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self.steps[-1] |= self.probe.gradients()


def train_one(study: str, loss: str, lr: float, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """One run: its log, its evaluations, and the correlation of score and IoU of what it finds.

    ``diverged`` is the step whose losses were not finite, where the run ended, or None. ``test`` is what is found in
    the end in pictures that played no part in choosing a learning rate, where there are any.
    """
    torch.set_num_threads(1)  # two runs at a time, on two cores
    settings, log = settings_of(study, loss, lr, seed, steps), _Log()
    model, data = make(study, settings, folder)
    budget: dict[str, Any] = {"max_steps": steps, "val_check_interval": steps // STUDIES[study].evaluations}
    trainer = Trainer(callbacks=[log], log_every_n_steps=_LOGGED, check_val_every_n_epoch=None, **budget, **_QUIET)
    diverged: int | None = None
    begin = time.perf_counter()
    try:
        trainer.fit(model, datamodule=data)
    except FloatingPointError:
        diverged = trainer.global_step + 1
    run = {
        "study": study,
        "loss": loss,
        "seed": seed,
        "settings": settings,
        "diverged": diverged,
        "log": log.steps,
        "evaluations": log.evaluations,
        **_of_found(model.found),
        "seconds": time.perf_counter() - begin,
    }
    if DATA[STUDIES[study].data].has_test and not diverged:
        other = open_data(study, folder, settings["batch"], seed, "test")
        Trainer(**_QUIET).validate(model, datamodule=other, verbose=False)
        assert model.evaluation is not None
        run["test"] = model.evaluation.overall | _of_found(model.found)
    return run


def time_all(study: str, folder: Path) -> dict[str, Any]:
    """Steps of all losses in turn, on both cores: milliseconds of a step, and of the loss in it."""
    turns = STUDIES[study].turns
    made = {loss: make(study, settings_of(study, loss, 1e-3, 0, turns + 3), folder) for loss in STUDIES[study].losses}
    optimizers = {loss: torch.optim.AdamW(model.parameters(), 1e-3) for loss, (model, _) in made.items()}
    for model, data in made.values():
        model.set_epoch(data.steps_per_epoch)  # as a fit begins
    clocks = {loss: LossClock(model.detector) for loss, (model, _) in made.items()}
    _, data = next(iter(made.values()))
    seconds: dict[str, list[tuple[float, float]]] = {loss: [] for loss in made}
    turn_of = tqdm(range(turns + 3), desc=f"{study}: time of a step", unit="turn")
    for turn, batch in zip(turn_of, cycle(data.train_dataloader())):
        for loss, (model, _) in made.items():
            begin = time.perf_counter()
            losses = model.detector(batch.images, batch.targets)  # of a RetinaNet: both have labels from 0
            optimizers[loss].zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizers[loss].step()
            if turn >= 3:
                seconds[loss].append((time.perf_counter() - begin, clocks[loss].watch.seconds))
    logits = next(iter(clocks.values())).positive
    times = {
        loss: {
            "step_ms": [float(q) for q in np.percentile([1e3 * step for step, _ in pairs], (20, 50, 80))],
            "loss_ms": [float(q) for q in np.percentile([1e3 * part for _, part in pairs], (20, 50, 80))],
            "share": float(np.median([part / step for step, part in pairs])),
        }
        for loss, pairs in seconds.items()
    }
    return {"turns": turns, "logits": logits.numel(), "positives": int(logits.sum()), "losses": times}
