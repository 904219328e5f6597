"""A callback of transformers' Trainer for models with a ranking loss; needs what Trainer needs, accelerate.

::

    model = RTDetrForObjectDetection.from_pretrained(name)
    use_ranking_loss(model, "alrp", period="later")
    arguments = TrainingArguments(folder, max_grad_norm=0)
    trainer = Trainer(model, arguments, train_dataset=..., data_collator=...)
    RankingLossCallback.add_to(trainer)
    trainer.train()
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .transformers import loss_function_of

try:
    from transformers import Trainer, TrainerCallback
except ImportError as missing:
    raise ImportError("Trainer needs transformers>=5.0 and accelerate") from missing

__all__ = ["RankingLossCallback"]


class RankingLossCallback(TrainerCallback):
    """Tells Trainer what a ranking loss needs, and its logs what the loss is made of.

    - Sets a ``period`` that is ``"later"``: an epoch in the steps of the training's loader. Each forward pass is a step
      of the self-balancing, whatever ``gradient_accumulation_steps``.
    - Adds the entries of the model's ``loss_dict`` to each log of training, ``loss_vfl``, ``loss_giou_aux_0`` and so
      on, their means since the log before. Of RT-DETR, D-FINE and DEIMv2 they are weighted, and their sum is ``loss``;
      other models weigh them later. And of each ranking the mean of :class:`HeadLoss`'s ``box_weight`` and
      ``box_error``: ``box_weight_last``, ``box_error_encoder``. Of several processes they are those of the first. The
      host waits for them when there is a log, and in no other step.
    - Warns (UserWarning) of ``max_grad_norm``, which is 1.0 by default.

    Put it in by :meth:`add_to`, before the callbacks that report to TensorBoard and others: those handed over by
    ``callbacks=[...]`` come after them, and what they add is in ``log_history``, and nowhere else.
    """

    def __init__(self) -> None:
        self.in_front = False
        self._sets_period = False
        self._sums: dict[tuple[str, ...], Tensor] = {}  # by names: values, how many are NaN, steps; [3, names]

    @classmethod
    def add_to(cls, trainer: Trainer) -> "RankingLossCallback":
        """Adds one to a trainer, in front of its other callbacks.

        Raises:
            TypeError: no Trainer.
            ValueError: its model has no ranking loss.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer must be a Trainer of transformers, got {type(trainer).__name__}")
        loss_function_of(trainer.model)
        callback = cls()
        callback.in_front = True
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = loss_function_of(kwargs["model"])
        if self._sets_period or loss.losses.arguments["period"] == "later":
            self._sets_period = True
            try:
                loss.losses.set_period(len(kwargs["train_dataloader"]))
            except TypeError as error:
                raise ValueError("period is 'later', and the loader of the training has no length: set it") from error
        if 0 < args.max_grad_norm < math.inf:
            ranks_boxes = loss.losses.arguments["loss"] == "alrp"
            why = "the weight of its box loss begins at 50, and " if ranks_boxes else ""
            warnings.warn(
                f"max_grad_norm={args.max_grad_norm} clips gradients, which no published recipe of these losses does: "
                f"{why}most steps would have the same length whatever the loss; "
                "pass TrainingArguments(max_grad_norm=0), or filter this warning if you mean it",
                stacklevel=2,
            )
        if args.report_to and not self.in_front:
            warnings.warn(
                f"callbacks that report to {', '.join(args.report_to)} come before this one and do not get what it "
                "logs; instead of callbacks=[...] use RankingLossCallback.add_to(trainer)",
                stacklevel=2,
            )
        self._sums = {}
        loss.watch = self._watch

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss_function_of(kwargs["model"]).watch = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # of an evaluation, or of the whole training
            return
        parts = self._means()
        logs.update(parts)
        state.log_history[-1].update(parts)  # a copy that Trainer made before

    def _watch(self, losses: Any, parts: Mapping[str, Tensor], names: list[str]) -> None:
        values = dict(parts)
        for name in names:
            values[f"box_weight_{name}"] = losses[name].box_weight
            values[f"box_error_{name}"] = losses[name].box_error  # NaN before the first positive
        device = next(iter(parts.values())).device
        found = torch.stack([value.detach().to(device, torch.float32).reshape(()) for value in values.values()])
        missing = found.isnan()
        sums = torch.stack([torch.where(missing, 0.0, found), missing.float(), torch.ones_like(found)])
        before = self._sums.get(tuple(values))  # there is no denoising in a step without objects
        self._sums[tuple(values)] = sums if before is None else before + sums

    def _means(self) -> dict[str, float]:
        sums = [(names, each.tolist()) for names, each in self._sums.items()]
        self._sums = {}
        steps = sum(each[2][0] for _, each in sums)
        merged: dict[str, Tensor] = {}
        for names, each in sums:
            for name, column in zip(names, torch.tensor(each, dtype=torch.float64).unbind(1), strict=True):
                merged[name] = merged.get(name, 0.0) + column
        means: dict[str, float] = {}
        for name, column in merged.items():
            total, missing, seen = column.tolist()
            if not name.startswith("box_"):  # a part that is missing adds nothing to the loss
                means[name] = math.nan if missing else total / steps
            elif seen > missing:
                means[name] = total / (seen - missing)
        return means
