# pyright: reportMissingImports=false
# Ultralytics need not be installed where types are checked.
"""Ranking losses in the YOLO models of Ultralytics: v8, 11, 12, 26 and their kin, in the library's own trainer.

::

    model = YOLO("yolo11n.yaml")
    loss = use_ranking_loss(model, "rank_sort")
    model.train(data="coco8.yaml", epochs=100)

Assigner, box loss, DFL and the gains of the config are theirs; what is replaced is the cross entropy of the classes.
Models, their weights and what is exported of them hold nothing of it. Ultralytics is under the AGPL-3.0; this module
imports it, and none of its code is in this package.
"""

from typing import Any

from torch import nn

from ..balance import INITIAL_WEIGHT, InitialWeight, Period
from ..boxes import TAU
from ..checks import check_number
from ..dispatch import Backend
from ..distributed import GradientReduction, ProcessGroup
from .head_loss import DetectorLoss, HeadLoss, Loss, check_box_weight
from .ultralytics_criterion import BRANCHES, HEAD, NEEDS, losses_in, put_in, raise_scores, take_out
from .warm_start import WarmStart, check_warm_start

try:
    from ultralytics.engine.model import Model
    from ultralytics.nn.tasks import BaseModel, DetectionModel, OBBModel, RTDETRDetectionModel
    from ultralytics.utils import LOGGER
    from ultralytics.utils.torch_utils import unwrap_model
except ImportError as missing:
    raise ImportError(NEEDS) from missing

__all__ = ["ranking_loss_of", "remove_ranking_loss", "use_ranking_loss"]

PRIOR = 0.01  # published, of RetinaNet


def use_ranking_loss(
    model: nn.Module,
    loss: Loss = "rank_sort",
    *,
    period: Period | None = None,
    initial_weight: InitialWeight = INITIAL_WEIGHT,
    tau: float = TAU,
    box_weight: float | None = None,
    delta: float | None = None,
    prior: float | None = PRIOR,
    process_group: ProcessGroup | None = None,
    gradient_reduction: GradientReduction = "mean",
    backend: Backend = "auto",
    warm_start: int = 0,
) -> DetectorLoss:
    """Makes a YOLO model of Ultralytics rank its class scores, in place of binary cross entropy.

    All anchors of a batch, of all images and levels, are one ranking. Who is a positive is what the task-aligned
    assigner says. A YOLO26 (and any head that detects without non-maximum suppression) has two branches, and each is
    a ranking of its own, with the weight that it has in the model's loss.

    - ``"rank_sort"``: positives are sorted by the assigner's soft scores. Losses of boxes stay theirs.
    - ``"alrp"``: errors of localisation come from the GIoU of the assigned boxes, and aLRP's localisation part takes
      the place of the CIoU loss. It has the gain ``cls`` as the classification has, and is weighted by self-balancing;
      the gain ``box`` does nothing to it. DFL (in YOLO26: L1) stays theirs.
    - ``"ap"``: Losses of boxes stay theirs.

    A ``YOLO`` is given callbacks, which put the loss into the model that its trainer makes, and into the average that
    the trainer validates, on all processes; the callbacks stay for the next ``train``. A new run begins with an empty
    balance, and its warm start anew. What has been balanced and counted so far is with the optimizer's state in a
    checkpoint, and so neither in ``best.pt`` nor in what else ``strip_optimizer`` leaves: ``model = YOLO("last.pt")``,
    this call again, and ``model.train(resume=True)`` go on with it.

    A ``DetectionModel`` is for a loop of your own; save the ``state_dict()`` of what is returned. Call it when the
    model is on its device and has its ``args``, with the gains, and before ``DistributedDataParallel``.

    Args:
        model: ``YOLO``, or its ``model``: of detection, segmentation or key points; of rotated boxes with
            ``"rank_sort"`` and ``"ap"``.
        loss: ``"rank_sort"``, ``"alrp"`` or ``"ap"``.
        period: of aLRP's self-balancing, an epoch in steps: of a ``YOLO`` None is that of the trainer; of a
            ``DetectionModel`` ``len(loader)``, or ``"later"``, and ``set_period`` of what is returned.
        initial_weight: see :class:`HeadLoss`; ``"auto"`` to fine-tune a detector.
        tau: see :class:`HeadLoss`.
        box_weight: of aLRP's localisation part, a constant instead of self-balancing; for ``"alrp"`` alone.
        delta: see :class:`HeadLoss`.
        prior: the greatest score that an untrained head begins with; published: 0.01. A ranking leaves the level of
            scores where it is, and those of an untrained YOLO are so low that its validation, which looks at none
            below 0.001, would find nothing to the end. So the biases of all classes and levels are raised by one
            number, which no ranking sees. Scores of a head that has been trained are left alone. None: all are; so it
            is in a warm start, for cross entropy sees the level, and raises it where there is something.
        process_group: see :class:`HeadLoss`. Of a ``YOLO`` None or ``"world"``, for its trainer makes the processes. A
            validation loss is ranked in each process alone.
        gradient_reduction: see :class:`HeadLoss`.
        backend: see :class:`HeadLoss`.
        warm_start: steps with Ultralytics' own losses, over as many more the ranking takes over. For a beginning in
            which no score means anything yet. The gains are the same for both.

    Returns:
        The losses, :class:`HeadLoss` by the name of the branch: ``"head"``, or ``"one2many"`` and ``"one2one"``. Called
        again, they are replaced by new ones.

    Raises:
        TypeError: another model, such as RT-DETR, one of classification, or one that is wrapped.
        ValueError: ``box_weight`` without aLRP; ``args`` of a ``DetectionModel`` without gains; class weights,
            ``cls_pw``; another ``prior`` with ``warm_start``; and what :class:`HeadLoss` raises. The model is then as
            before.

    Reference: Oksuz et al., NeurIPS 2020 and ICCV 2021, whose detectors are others: here a ranking loss is new.
    """
    inner = _detector(model, loss)
    check_box_weight(loss, box_weight)
    trained = isinstance(model, Model)
    if trained and not (process_group is None or process_group == "world"):
        raise ValueError(
            f"process_group of a YOLO must be None or 'world', for its trainer makes the processes; got {process_group}"
        )
    if prior is not None:
        prior = check_number("prior", prior, 1e-9, 1.0, high_open=True)
    warm_start = check_warm_start(warm_start)
    if warm_start:
        if prior not in (None, PRIOR):
            raise ValueError(
                f"prior must be left as it is with warm_start={warm_start}, whose cross entropy begins with the scores "
                f"that the model has; got {prior}"
            )
        prior = None
    of_trainer = trained and period is None

    def head_loss() -> HeadLoss:
        made = HeadLoss(
            loss,
            period="later" if of_trainer else period,
            initial_weight=initial_weight,
            tau=tau,
            box_loss="giou",
            box_weight=box_weight,
            delta=delta,
            process_group=process_group,
            gradient_reduction=gradient_reduction,
            backend=backend,
        )
        made.warm_start = WarmStart(warm_start) if warm_start else None
        return made

    two = getattr(inner.model[-1], "one2one_cv2", None) is not None
    losses = DetectorLoss({name: head_loss() for name in (BRANCHES if two else (HEAD,))})
    if trained:
        remove_ranking_loss(model)
        _Run(losses, of_trainer, prior).put_in(model)
    else:
        _rank(inner, losses)
        raise_scores(inner.model[-1], prior)
    return losses


def remove_ranking_loss(model: nn.Module) -> None:
    """Gives a model the library's loss back; nothing happens where it has it. Not while its trainer runs."""
    found: Any = model
    if isinstance(model, Model):
        for event, callbacks in found.callbacks.items():
            found.callbacks[event] = [each for each in callbacks if not isinstance(_owner(each), _Run)]
    elif getattr(model, "criterion", None) is not None:
        take_out(found.criterion)


def ranking_loss_of(model: nn.Module) -> DetectorLoss:
    """The losses that :func:`use_ranking_loss` put into this model: of a copy, its own. Empty where there are none."""
    found: Any = model
    if isinstance(model, Model):
        runs = [_owner(each) for callbacks in found.callbacks.values() for each in callbacks]
        return next((run.losses for run in runs if isinstance(run, _Run)), DetectorLoss({}))
    criterion = getattr(found, "criterion", None)
    return DetectorLoss({} if criterion is None else losses_in(criterion))


def _owner(callback: Any) -> Any:
    return getattr(callback, "__self__", None)


def _detector(model: Any, loss: Loss) -> Any:
    """The module that has the head. TypeError unless its loss is one that asks an assigner, and no other."""
    inner: Any = model.model if isinstance(model, Model) else model
    if isinstance(inner, RTDETRDetectionModel):
        raise TypeError(
            "model must have YOLO's loss, RT-DETR has that of a DETR: train it in transformers, whose RT-DETR "
            "alrp_triton.integrations.transformers takes"
        )
    if not isinstance(inner, DetectionModel) or type(inner).loss is not BaseModel.loss:
        seen = inner if isinstance(inner, str) else type(inner).__name__
        raise TypeError(
            f"model must be a YOLO of Ultralytics, or its model, that detects, segments or finds key points, got {seen}"
        )
    if isinstance(inner, OBBModel) and loss == "alrp":
        raise TypeError("model must have boxes along the axes for loss 'alrp', which ranks their GIoU; got OBBModel")
    return inner


def _rank(model: Any, losses: DetectorLoss) -> None:
    """Puts the losses into the criterion of a model, which has one then."""
    gains = getattr(model, "args", None)
    if any(not hasattr(gains, gain) for gain in ("box", "cls", "dfl")):
        raise ValueError(
            "model.args must have the gains box, cls and dfl as attributes, as its trainer sets them: "
            f"model.args = ultralytics.cfg.get_cfg(); got {type(gains).__name__}"
        )
    criterion = getattr(model, "criterion", None)
    if criterion is None:
        criterion = model.init_criterion()
    put_in(model, criterion, dict(losses.items()))
    losses.to(next(model.parameters()).device)
    model.criterion = criterion


class _Run:
    """What a trainer calls, in all of its processes; it is pickled for them."""

    key = "ranking_loss"
    """Of the state among a group of the optimizer's parameters: it is saved with the optimizer, put back with it, on
    resume and where the trainer goes back to its last checkpoint after NaN, and stripped with it."""
    events = ("on_train_start", "on_train_epoch_start", "on_train_epoch_end")

    def __init__(self, losses: DetectorLoss, period_of_trainer: bool, prior: float | None) -> None:
        self.losses, self.period_of_trainer, self.prior = losses, period_of_trainer, prior
        self.empty = self.known = self._state()

    def put_in(self, model: Any) -> None:
        for event in self.events:
            model.add_callback(event, getattr(self, event))

    def on_train_start(self, trainer: Any) -> None:
        group = trainer.optimizer.param_groups[0]
        if not trainer.resume:
            group.pop(self.key, None)
        elif self.empty["state"] and self.key not in group:
            LOGGER.warning("The checkpoint has no state of a ranking loss, which begins anew.")
        self.known = group.setdefault(self.key, self.empty)
        self._load(trainer)
        for model in self._models(trainer):
            raise_scores(model.model[-1], self.prior)

    def on_train_epoch_start(self, trainer: Any) -> None:
        self._rank(trainer)  # after NaN the average is a new one, and after too large a batch the optimizer
        trainer.optimizer.param_groups[0].setdefault(self.key, self.known)
        self._load(trainer)
        if self.period_of_trainer:
            self.losses.set_period(len(trainer.train_loader))

    def on_train_epoch_end(self, trainer: Any) -> None:
        trainer.optimizer.param_groups[0][self.key] = self.known = self._state()

    def _rank(self, trainer: Any) -> None:
        for model in self._models(trainer):
            if list(ranking_loss_of(model).values()) != list(self.losses.values()):
                _rank(model, self.losses)

    def _models(self, trainer: Any) -> list[Any]:
        """The model and its average, as far as it is in this process."""
        models = [unwrap_model(trainer.model)] + ([] if trainer.ema is None else [trainer.ema.ema])
        return [_detector(model, next(iter(self.losses.values())).loss) for model in models]

    def _state(self) -> dict[str, Any]:
        kind = next(iter(self.losses.values())).loss
        return {"loss": kind, "state": {name: each.clone() for name, each in self.losses.state_dict().items()}}

    def _load(self, trainer: Any) -> None:
        saved = trainer.optimizer.param_groups[0][self.key]
        if saved["loss"] != self.empty["loss"] or saved["state"].keys() != self.empty["state"].keys():
            raise ValueError(
                f"loss of the checkpoint is {saved['loss']!r} with the state {sorted(saved['state'])}, and that of "
                f"this run {self.empty['loss']!r} with {sorted(self.empty['state'])}: call use_ranking_loss as before"
            )
        self.losses.load_state_dict(saved["state"])
