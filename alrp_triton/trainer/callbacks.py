"""What Lightning's callbacks lack: the last checkpoint comes before what can fail; a history; images a second."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from .errors import refuse_others
from .runs import BEST, LAST
from .sampling import batches_had


class KeepLast(Checkpoint):
    """Writes ``last.ckpt`` before and after each evaluation, after each epoch, and when training is stopped.

    Not where one process of several fails, for the others are not asked then; nor in Lightning's ``fast_dev_run``.

    Args:
        folder: of the run.
        ema: decay of the average of the weights, None without one. With it ``last.ckpt`` has the average in the place
            of the weights, so neither goes on from a checkpoint of the other.
    """

    def __init__(self, folder: Path, ema: float | None = None) -> None:
        self.file = folder / LAST
        self._settings: dict[str, Any] = {"ema": ema}
        self._saved, self._gradients = -1, list[Any]()
        self._began: int | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        for name in ("precision", "accumulate_grad_batches", "gradient_clip_val"):
            self._settings[name] = getattr(trainer, name)

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": self._gradients, "settings": self._settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        refuse_others(self._settings, state_dict.get("settings", {}))
        self._gradients = state_dict["gradients"]

    def has_trained(self, trainer: Trainer) -> bool:
        """Whether this process has taken a step."""
        return self._began is not None and batches_had(trainer) > self._began

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._began = batches_had(trainer)
        for parameter, gradient in zip(pl_module.parameters(), self._gradients, strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter)
        self._gradients = []

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # Lightning goes back on resuming to an evaluation that has begun, and passes over one that has not.
            progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
            progress.ready, progress.started = progress.ready + 1, progress.started + 1
            self._save(trainer)
            progress.ready, progress.started = progress.ready - 1, progress.started - 1

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        loop: Any = trainer.fit_loop.epoch_loop
        within = loop.batch_progress.total.started > loop.batch_progress.total.completed
        alone = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        if trainer.state.fn != "fit" or within or not alone:
            return
        # In an evaluation the checkpoint is of here already.
        if trainer.training and batches_had(trainer) > max(self._saved, 0):
            self._gradients = [one.grad for one in pl_module.parameters()] if loop._should_accumulate() else []
            self._save(trainer)
        if self.has_trained(trainer) and self.file.is_file():
            rank_zero_info(f"\nstopped at step {trainer.global_step}: {self.file} goes on from there with --resume")

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        _save_whole(trainer, self.file, lambda part: trainer.save_checkpoint(part, weights_only=False))
        self._saved = batches_had(trainer)


def _save_whole(trainer: Trainer, file: Path, save: Callable[[Path], None]) -> None:
    """Beside ``file``, and then in its place, so that a full disk, or what ends the process, leaves the one of before.

    Lightning writes to the system's temporary folder, from which a file is copied where that is another file system.
    """
    part = file.with_name(f"{file.name}.part")
    save(part)
    if trainer.is_global_zero:
        part.replace(file)


class KeepBest(ModelCheckpoint):
    """Of the checkpoints after an evaluation that of the best AP; a run may have been moved since."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Path(BEST).stem, monitor="AP", mode="max", enable_version_counter=False)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        _save_whole(trainer, Path(filepath), lambda part: super(KeepBest, self)._save_checkpoint(trainer, str(part)))
        self._last_checkpoint_saved = filepath

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = Path(str(self.dirpath), BEST)
        if best.is_file() and state_dict["best_k_models"]:  # else it is of a run that was stopped before it knew one
            moved = {"dirpath": self.dirpath, "best_model_path": str(best), "kth_best_model_path": str(best)}
            scores = state_dict["best_k_models"].values()
            super().load_state_dict(state_dict | moved | {"best_k_models": dict.fromkeys([str(best)], *scores)})


class EvaluateAtEnd(Callback):
    """A run that ends in mid-epoch, or between the epochs that are evaluated, is evaluated where it ends."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= pl_module.total_steps:
            trainer.should_stop, trainer.check_val_every_n_epoch = True, 1  # Lightning evaluates before it stops


class History(Callback):
    """Losses and evaluations of a run, through all of its resumptions; kept in the checkpoints."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "evaluations": self.evaluations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.evaluations = state_dict["steps"], state_dict["evaluations"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps  # 0: never
        if every and step % every == 0 and (self.steps[-1]["step"] if self.steps else 0) < step:
            self.steps.append({"step": step} | {name: float(value) for name, value in pl_module.values.items()})

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.evaluation and not trainer.sanity_checking:
            step = trainer.global_step
            self.evaluations = [one for one in self.evaluations if one["step"] < step]
            self.evaluations.append({"step": step} | pl_module.evaluation.overall)


class Progress(TQDMProgressBar):
    """Lightning's bar, with images a second and the time that is left of the whole run."""

    def on_train_start(self, *arguments: Any) -> None:
        super().on_train_start(*arguments)
        trainer, pl_module = arguments
        rank_zero_info(
            f"training to step {pl_module.total_steps}; on a CPU the first one compiles the loss, some seconds"
        )
        self._began, self._at = time.monotonic(), trainer.global_step

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        metrics = {n: v for n, v in super().get_metrics(trainer, pl_module).items() if n != "v_num"}
        steps = trainer.global_step - getattr(self, "_at", 0)
        if trainer.training and steps > 0:
            seconds = (time.monotonic() - self._began) / steps
            left = math.ceil(seconds * (pl_module.total_steps - trainer.global_step))
            metrics |= {
                "images/s": f"{pl_module.images_per_step / seconds:.1f}",
                "left": f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}",
            }
        return metrics
