"""Ranking losses in the DETR-like models of Hugging Face transformers that score each class by a sigmoid.

::

    model = RTDetrForObjectDetection.from_pretrained(name)
    losses = use_ranking_loss(model, "alrp", period=len(loader))
    model(pixel_values=images, labels=labels).loss.backward()

The model's own loss function runs, with methods of its criterion replaced: matching, auxiliary outputs, denoising, the
weights of the config are theirs. Parameters are not touched. The losses are part of the model, ``model.ranking_loss``,
and their state of its ``state_dict``, so that it goes where the model's goes: into checkpoints, and back on resume.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..balance import INITIAL_WEIGHT, InitialWeight, Period
from ..boxes import TAU
from ..dispatch import Backend
from ..distributed import GradientReduction, ProcessGroup
from .head_loss import Loss
from .queries import LAST, QueryLosses, Ranking

try:
    from safetensors import safe_open
    from transformers import PreTrainedModel
except ImportError as missing:
    raise ImportError("this integration needs transformers>=5.0, scipy and torchvision") from missing

__all__ = ["load_ranking_loss", "remove_ranking_loss", "use_ranking_loss"]


class _Family(NamedTuple):
    criterion: str  # the class that the loss function makes its criterion of
    denoising: bool  # whether layers are passed with denoising queries, too
    encoder: bool  # whether the encoder's proposals have a loss, too


_FAMILIES = {
    "DeformableDetrForObjectDetectionLoss": _Family("DeformableDetrImageLoss", False, False),
    "LwDetrForObjectDetectionLoss": _Family("LwDetrImageLoss", False, True),
    "RTDetrForObjectDetectionLoss": _Family("RTDetrLoss", True, True),
    "DFineForObjectDetectionLoss": _Family("DFineLoss", True, True),
    "Deimv2ForObjectDetectionLoss": _Family("Deimv2Loss", True, True),
}
_GIOU_WEIGHTS = ("giou_loss_coefficient", "weight_loss_giou")  # in configs
_STATE = "ranking_loss"  # the losses' name in the model


def use_ranking_loss(
    model: PreTrainedModel,
    loss: Loss = "alrp",
    *,
    period: Period | None = None,
    initial_weight: InitialWeight = INITIAL_WEIGHT,
    tau: float = TAU,
    box_weight: float | None = None,
    delta: float | None = None,
    process_group: ProcessGroup | None = None,
    gradient_reduction: GradientReduction = "mean",
    backend: Backend = "auto",
    warm_start: int = 0,
) -> QueryLosses:
    """Makes a detector of transformers rank its class scores, in place of focal, varifocal or matching-aware loss.

    The queries of all images of a batch are one ranking in each decoder layer, the last and the auxiliary ones, in the
    encoder's proposals and in each layer of denoising; LW-DETR's groups of queries are ranked apart. The loss stands
    under the key, and has the weight, of the one it replaces. Box losses (L1, GIoU, those of D-FINE) stay as they are,
    but for ``"alrp"``: there the errors of localisation come from the GIoU of the matched boxes, and aLRP's
    localisation part takes the place of the GIoU loss, weighted by self-balancing instead of the config's coefficient.

    Each of these rankings has a :class:`HeadLoss` of its own, for its boxes are better or worse than those of other
    layers, and so is the weight that balances it; and ``period`` stays a number of steps.

    With ``Trainer``: its checkpoints and its resume hold the losses' state; ``TrainingArguments(max_grad_norm=0)``, for
    the default of 1.0 clips gradients, which the published recipes do not; and
    :class:`alrp_triton.integrations.transformers_trainer.RankingLossCallback` logs the parts of the loss.

    Args:
        model: Deformable DETR, Conditional DETR, DAB-DETR, RT-DETR, RT-DETRv2, D-FINE, DEIMv2, LW-DETR or RF-DETR
            (untested, its loss is that of LW-DETR); ``...ForObjectDetection``.
        loss: ``"alrp"``, ``"ap"`` or ``"rank_sort"``.
        period: of aLRP's self-balancing, an epoch in your steps, ``len(loader)``; ``"later"``: not known yet, call
            ``set_period`` of what is returned before the first step, or add the callback.
        initial_weight: see :class:`HeadLoss`; ``"auto"`` to fine-tune a detector.
        tau: see :class:`HeadLoss`.
        box_weight: of aLRP's localisation part, a constant instead of self-balancing; for ``"alrp"`` alone.
        delta: see :class:`HeadLoss`.
        process_group: see :class:`HeadLoss`.
        gradient_reduction: see :class:`HeadLoss`.
        backend: see :class:`HeadLoss`.
        warm_start: steps with the model's own losses, over as many more the ranking takes over. For a beginning in
            which no score means anything yet.

    Returns:
        The losses, :class:`HeadLoss` by the name of the output: ``"last"``, ``"auxiliary_0"`` and so on, ``"encoder"``,
        ``"denoising_0"`` and so on. Called again, they are replaced by new ones.

    Raises:
        TypeError: a model that is none of these, such as one that scores by a softmax with a "no object" class: DETR,
            YOLOS, Table Transformer.
        ValueError: its config scores by a softmax; ``box_weight`` without aLRP; and what :class:`HeadLoss` raises. The
            model is then as before. In a step with ``warm_start``: the model's own loss takes queries of denoising for
            detections, as before transformers 5.18.

    Reference: Oksuz et al., NeurIPS 2020 and ICCV 2021, whose detectors are others: here a ranking loss is new.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a detector of transformers, got {type(model).__name__}")
    current: Any = model.loss_function
    original = current.original if isinstance(current, RankingLossFunction) else current
    name = getattr(original, "__name__", type(original).__name__)
    if name in ("ForObjectDetectionLoss", "ForSegmentationLoss"):
        raise TypeError(
            f"model must score each class by a sigmoid; {type(model).__name__} has a softmax with a 'no object' class, "
            "where scores of a query are shares of 1 and none can be ranked by itself"
        )
    if name not in _FAMILIES or _FAMILIES[name].criterion not in original.__globals__:
        known = ", ".join(each.removesuffix("ForObjectDetectionLoss") for each in _FAMILIES)
        raise TypeError(f"model must have a loss of {known}; {type(model).__name__} has {name}")
    config: Any = model.config
    if not getattr(config, "use_focal_loss", True):
        raise ValueError("model must score by a sigmoid, its config has use_focal_loss=False, which is a softmax")
    family, layers, last = _FAMILIES[name], config.decoder_layers, getattr(config, "eval_idx", -1)
    if last >= 0:  # wider layers after the one that is evaluated
        layers += layers - 1 - last
    names = [LAST, *(f"auxiliary_{layer}" for layer in range(layers - 1))]
    names += ["encoder"] * family.encoder + [f"denoising_{layer}" for layer in range(layers)] * family.denoising
    losses = QueryLosses(
        names,
        loss=loss,
        period=period,
        initial_weight=initial_weight,
        tau=tau,
        box_weight=box_weight,
        delta=delta,
        process_group=process_group,
        gradient_reduction=gradient_reduction,
        backend=backend,
        warm_start=warm_start,
    )
    # The RT-DETR family has the encoder's proposals behind the auxiliary layers, in one list.
    other_names = {f"auxiliary_{layers - 1}": "encoder"} if family.denoising else {}
    model.ranking_loss = losses.train(model.training)
    model.loss_function = RankingLossFunction(original, family.criterion, losses, other_names)
    return losses


def remove_ranking_loss(model: PreTrainedModel) -> None:
    """Gives a detector the loss of transformers back; nothing happens where it has it."""
    current: Any = model.loss_function
    if isinstance(current, RankingLossFunction):
        model.loss_function = current.original
        del model.ranking_loss


def load_ranking_loss(model: PreTrainedModel, folder: str | Path) -> None:
    """Gives the losses of a model the state that ``save_pretrained``, or ``Trainer``, has stored with it.

    ``from_pretrained`` makes a model that has the loss of transformers, and leaves the state of the ranking loss out,
    which its report says. To go on from there: ``from_pretrained``, :func:`use_ranking_loss`, and this. ``Trainer``
    does it by itself on ``resume_from_checkpoint``.

    Args:
        model: with a ranking loss.
        folder: that it was saved in, with its ``*.safetensors``.

    Raises:
        ValueError: the model has no ranking loss; there is no state in the files, or that of another kind of loss.
        FileNotFoundError: no such files. The state of the losses is then as before.
    """
    losses = loss_function_of(model).losses
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"folder must have a model in *.safetensors, got {folder}")
    state: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            keys = [key for key in stored.keys() if key.startswith(f"{_STATE}.")]  # noqa: SIM118
            state |= {key.removeprefix(f"{_STATE}."): stored.get_tensor(key) for key in keys}
    own = losses.state_dict().keys()
    other = sorted(own ^ state.keys())
    if other or not state:
        raise ValueError(
            f"folder must have the state of a ranking loss as this model has it; {folder} has {len(state)} values, the "
            f"model {len(own)}, and only one of them {', '.join(other[:3]) or 'nothing'}"
            f"{' and others' * (len(other) > 3)}: call use_ranking_loss as when it was saved"
        )
    losses.load_state_dict(state)


def loss_function_of(model: nn.Module | None) -> "RankingLossFunction":
    """That of a model, which may be wrapped. ValueError: it has no ranking loss."""
    for module in () if model is None else model.modules():
        found = vars(module).get("_loss_function")
        if isinstance(found, RankingLossFunction):
            return found
    raise ValueError(f"model must have a ranking loss; {type(model).__name__} has none: call use_ranking_loss first")


class RankingLossFunction:
    """Stands in for a model's loss function; copied and pickled with the model, for it is its attribute."""

    def __init__(
        self, original: FunctionType, criterion: str, losses: QueryLosses, other_names: Mapping[str, str]
    ) -> None:
        self.original, self.criterion, self.losses, self.other_names = original, criterion, losses, other_names
        self.watch: Callable[[QueryLosses, Mapping[str, Tensor], list[str]], None] | None = None
        """Told of each step of training: the losses, the parts of the loss, the names of what was ranked."""

    def __call__(
        self, logits: Tensor, labels: Any, device: Any, pred_boxes: Tensor, config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # The function itself makes its criterion, of a class that it finds by name. So it is called with this name
        # standing for ours, in a namespace of its own: transformers' is left alone, and other models with it.
        theirs = self.original.__globals__[self.criterion]
        denoising = kwargs.get("denoising_meta_values")
        made: list[_Ranking] = []
        giou_weight = 1.0
        if self.losses.arguments["loss"] == "alrp":  # Ranking gives what is weighted
            config = copy.copy(config)
            for name in _GIOU_WEIGHTS:
                if hasattr(config, name):
                    giou_weight = getattr(config, name)
                    setattr(config, name, type(giou_weight)(1))  # int or float, which configs insist on

        def criterion(*args: Any, **options: Any) -> Any:
            ranking = _Ranking(theirs(*args, **options), self.losses, self.other_names, giou_weight)
            ranking.split = None if denoising is None else tuple(denoising["dn_num_split"])
            made.append(ranking)
            return ranking.put_in().criterion

        names = {**self.original.__globals__, self.criterion: criterion}
        function = FunctionType(self.original.__code__, names, None, self.original.__defaults__)
        function.__kwdefaults__ = self.original.__kwdefaults__
        try:
            loss, parts, *rest = function(logits, labels, device, pred_boxes, config, *args, **kwargs)
        finally:
            for ranking in made:  # a criterion that refers to itself would not be gone at once
                ranking.take_out()
        if self.watch is not None and self.losses.training:
            self.watch(self.losses, parts, [name for ranking in made for name in ranking.asked])
        return (loss, parts, *rest)


class _Ranking(Ranking):
    split: tuple[int, int] | None = None
    """How many queries are there for denoising, and how many others behind them."""

    def forward(self, outputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        # transformers before 5.18 (DEIMv2 without auxiliary losses: in all versions) matches and scores those of
        # denoising as if they were detections.
        if self.split is not None and outputs["logits"].shape[1] == sum(self.split):
            if self.losses[LAST].share < 1:
                raise ValueError(
                    "warm_start must be 0 where the model's own loss matches queries of denoising as if they were "
                    "detections, as before transformers 5.18, and in DEIMv2 without auxiliary_loss; or train with "
                    "num_denoising=0"
                )
            detections = {name: outputs[name][:, self.split[0] :] for name in ("logits", "pred_boxes")}
            outputs = {**outputs, **detections}
        return super().forward(outputs, *args, **kwargs)
