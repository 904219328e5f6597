"""What Lightning's callbacks lack: the last checkpoint comes before what can fail; a history; images a second."""

import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

LAST = "last.ckpt"


class KeepLast(Checkpoint):
    """Writes ``last.ckpt`` before each evaluation, after each epoch, and when training is interrupted or fails.

    Not after a loss that is not finite: the checkpoint stays that of before. Nor where one process of several fails,
    for the others are not asked then.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LAST

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            trainer.save_checkpoint(self.file, weights_only=False)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.file, weights_only=False)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        alone = trainer.world_size == 1 or isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        if (
            trainer.state.fn == "fit"
            and trainer.training
            and trainer.global_step
            and alone
            and not isinstance(exception, FloatingPointError)
        ):
            trainer.save_checkpoint(self.file, weights_only=False)
            rank_zero_info(f"stopped at step {trainer.global_step}: {self.file} goes on from there with --resume")


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
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 and (not self.steps or self.steps[-1]["step"] < step):
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
