"""Lightning: what the ranking losses in one's own LightningModule do, in its logs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .head_loss import HeadLoss

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as missing:
    raise ImportError("this integration needs lightning: pip install lightning") from missing

__all__ = ["LogRankingLoss"]


class LogRankingLoss(Callback):
    """Logs of each ranking loss in a module, under its name there, at every ``log_every_n_steps``-th step:

    - ``NAME/box_weight``: what self-balancing, or the balance by value, multiplies the box loss by;
    - ``NAME/box_error``: the mean of 1 - GIoU (or smooth L1) of the positives, which falls as boxes improve, where the
      ranked localisation loss depends on the ranks, too;
    - ``NAME/gradient_balance``: the sum of the gradients that pull scores up, by that of those that push scores down.
      1 in every step of any of the losses, to the rounding of the logits' dtype (NaN without positives); something
      between the loss and the logits that treats them apart, such as a clip of their gradients, shows here. With a
      process group the sums over all processes are equal, and one process' share of them is not.

    The losses are found among the submodules: assign what ``use_ranking_loss`` returns to an attribute, which puts the
    state of the self-balancing into Lightning's checkpoints, too.

    Raises:
        ValueError: a module without a ranking loss begins to train.

    Reference: Oksuz et al., NeurIPS 2020, Theorem 2 (the balance).
    """

    def __init__(self) -> None:
        self._losses: dict[str, HeadLoss] = {}
        self._balance: dict[str, Tensor] = {}
        self._watching: list[RemovableHandle] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find(pl_module)
        if not self._losses:
            raise ValueError(
                f"{type(pl_module).__name__} has no ranking loss among its submodules: assign what use_ranking_loss "
                "returns to an attribute"
            )

    def _find(self, pl_module: LightningModule) -> None:
        """Losses of a DETR's outputs are made in its first steps."""
        self._losses = {name: part for name, part in pl_module.named_modules() if isinstance(part, HeadLoss)}

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._balance.clear()
        every = trainer.log_every_n_steps  # 0: never
        # As Lightning counts: steps of two optimisers in a batch are one.
        if every and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0:
            self._find(pl_module)
            self._watching = [
                loss.register_forward_pre_hook(self._watch(name), with_kwargs=True)
                for name, loss in self._losses.items()
            ]

    def _watch(self, name: str) -> Any:
        def note(gradient: Tensor) -> None:
            up, down = gradient.clamp(max=0).sum(dtype=torch.float64), gradient.clamp(min=0).sum(dtype=torch.float64)
            self._balance[name] = -up / down

        def hook(loss: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            logits, *others = inputs if inputs else (named["logits"],)
            if logits.requires_grad:
                logits = logits.view_as(logits)  # whose gradient is that of this loss alone
                logits.register_hook(note)
            return (logits, *others), {name: value for name, value in named.items() if name != "logits"}

        return hook

    def _stop_watching(self) -> None:
        while self._watching:
            self._watching.pop().remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_watching()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_watching()
        for name, loss in self._losses.items():
            pl_module.log_dict({f"{name}/box_weight": loss.box_weight, f"{name}/box_error": loss.box_error})
        pl_module.log_dict({f"{name}/gradient_balance": value.float() for name, value in self._balance.items()})
