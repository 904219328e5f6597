"""Ranking losses in the DETR-like models of Hugging Face transformers that score each class by a sigmoid.

::

    model = RTDetrForObjectDetection.from_pretrained(name)
    loss = use_ranking_loss(model, "alrp", period=len(loader))
    model(pixel_values=images, labels=labels).loss.backward()

The model's own loss function runs, with one method of its criterion replaced: matching, auxiliary outputs, denoising,
the weights of the config are theirs. Parameters and buffers are not touched, and ``state_dict`` stays as it is.
"""

import copy
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..balance import INITIAL_WEIGHT, InitialWeight, Period
from ..boxes import TAU
from ..dispatch import Backend
from ..distributed import GradientReduction, ProcessGroup
from .box_errors import Boxes, at_least_float32
from .head_loss import HeadLoss, HeadLosses, Loss

try:
    from torchvision.ops import box_convert
    from transformers import PreTrainedModel
except ImportError as missing:
    raise ImportError("this integration needs transformers>=5.0, scipy and torchvision") from missing


class _Family(NamedTuple):
    criterion: str  # the class that the loss function makes its criterion of
    passes: int  # over the layers of the decoder: 2 with denoising
    encoder: int  # 1 where the encoder's proposals have a loss too


_FAMILIES = {
    "DeformableDetrForObjectDetectionLoss": _Family("DeformableDetrImageLoss", 1, 0),
    "LwDetrForObjectDetectionLoss": _Family("LwDetrImageLoss", 1, 1),
    "RTDetrForObjectDetectionLoss": _Family("RTDetrLoss", 2, 1),
    "DFineForObjectDetectionLoss": _Family("DFineLoss", 2, 1),
    "Deimv2ForObjectDetectionLoss": _Family("Deimv2Loss", 2, 1),
}
_CLASSIFICATION = {"labels": "loss_ce", "vfl": "loss_vfl", "mal": "loss_mal"}  # and the key of its value
_GIOU = "loss_giou"
_GIOU_WEIGHTS = ("giou_loss_coefficient", "weight_loss_giou")  # in configs


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
) -> nn.ModuleList:
    """Makes a detector of transformers rank its class scores, in place of focal, varifocal or matching-aware loss.

    The queries of all images of a batch are one ranking in each decoder layer, the last and the auxiliary ones, in the
    encoder's proposals and in each layer of denoising. The loss stands under the key, and has the weight, of the one it
    replaces. Box losses (L1, GIoU, those of D-FINE) stay as they are, but for ``"alrp"``: there the errors of
    localisation come from the GIoU of the matched boxes, and aLRP's localisation part takes the place of the GIoU loss,
    weighted by self-balancing instead of the config's coefficient.

    Each of these rankings has a :class:`HeadLoss` of its own, for its boxes are better or worse than those of other
    layers, and so is the weight that balances it; and ``period`` stays a number of steps.

    Args:
        model: Deformable DETR, Conditional DETR, DAB-DETR, RT-DETR, RT-DETRv2, D-FINE, DEIMv2, LW-DETR or RF-DETR
            (untested, its loss is that of LW-DETR); ``...ForObjectDetection``.
        loss: ``"alrp"``, ``"ap"`` or ``"rank_sort"``.
        period: of aLRP's self-balancing, an epoch in your steps, ``len(loader)``; ``"later"``: not known yet, set
            ``period`` of each of the losses before the first step.
        initial_weight: see :class:`HeadLoss`; ``"auto"`` to fine-tune a detector.
        tau: see :class:`HeadLoss`.
        box_weight: of aLRP's localisation part, a constant instead of self-balancing; for ``"alrp"`` alone.
        delta: see :class:`HeadLoss`.
        process_group: see :class:`HeadLoss`.
        gradient_reduction: see :class:`HeadLoss`.
        backend: see :class:`HeadLoss`.

    Returns:
        The losses, :class:`HeadLoss` in the order of the model's ``loss_dict``: the last layer, the auxiliary ones, the
        encoder, denoising. Save its ``state_dict()`` with your checkpoint. Called again, they are replaced by new ones.

    Raises:
        TypeError: a model that is none of these, such as one that scores by a softmax with a "no object" class: DETR,
            YOLOS, Table Transformer. ValueError: its config scores by a softmax; ``box_weight`` without aLRP; and what
            :class:`HeadLoss` raises. The model is then as before.

    Reference: Oksuz et al., NeurIPS 2020 and ICCV 2021, whose detectors are others: here a ranking loss is new.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a detector of transformers, got {type(model).__name__}")
    if box_weight is not None and loss != "alrp":
        raise ValueError(f"box_weight is for loss 'alrp', box losses of {loss!r} are the model's; got {box_weight}")
    current: Any = model.loss_function
    original = current.original if isinstance(current, _RankingLoss) else current
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
    losses = nn.ModuleList(
        HeadLoss(
            loss,
            period=period,
            initial_weight=initial_weight,
            tau=tau,
            box_loss="giou",
            box_weight=box_weight,
            delta=delta,
            process_group=process_group,
            gradient_reduction=gradient_reduction,
            backend=backend,
        )
        for _ in range(family.passes * layers + family.encoder)
    )
    model.loss_function = _RankingLoss(model, original, family.criterion, losses)
    return losses


def remove_ranking_loss(model: PreTrainedModel) -> None:
    """Gives a detector the loss of transformers back; nothing happens where it has it."""
    current: Any = model.loss_function
    if isinstance(current, _RankingLoss):
        model.loss_function = current.original


class _RankingLoss:
    """Stands in for a model's loss function; copied and pickled with the model, for it is its attribute."""

    def __init__(self, model: nn.Module, original: FunctionType, criterion: str, losses: nn.ModuleList) -> None:
        self.model, self.original, self.criterion, self.losses = model, original, criterion, losses
        first: Any = losses[0]
        self.ranks_boxes = first.loss == "alrp"

    def __call__(
        self, logits: Tensor, labels: Any, device: Any, pred_boxes: Tensor, config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # The function itself makes its criterion, of a class that it finds by name. So it is called with this name
        # standing for ours, in a namespace of its own: transformers' is left alone, and other models with it.
        self.losses.train(self.model.training)  # what balances records nothing of a validation loss
        theirs = self.original.__globals__[self.criterion]
        state = {"head_losses": self.losses, "ranks_boxes": self.ranks_boxes}
        ours = type(self.criterion, (_Ranked, theirs), state)
        names = {**self.original.__globals__, self.criterion: ours}
        function = FunctionType(self.original.__code__, names, None, self.original.__defaults__)
        function.__kwdefaults__ = self.original.__kwdefaults__
        if self.ranks_boxes:  # HeadLoss has weighted them
            config = copy.copy(config)
            for name in _GIOU_WEIGHTS:
                if hasattr(config, name):
                    setattr(config, name, type(getattr(config, name))(1))  # int or float, which configs insist on
        return function(logits, labels, device, pred_boxes, config, *args, **kwargs)


class _Ranked:
    """The part of a criterion that ranks. A criterion is made anew for each step, and asks for its losses in order."""

    head_losses: nn.ModuleList
    ranks_boxes: bool
    asked = 0

    def get_loss(
        self, loss: str, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]], indices: Any, num_boxes: Any
    ) -> dict[str, Tensor]:
        if loss not in _CLASSIFICATION:
            theirs: Any = super()
            values = theirs.get_loss(loss, outputs, targets, indices, num_boxes)
            return {key: value for key, value in values.items() if not (self.ranks_boxes and key == _GIOU)}
        head_loss: Any = self.head_losses[self.asked]
        self.asked += 1
        out = _ranked(head_loss, outputs["logits"], outputs["pred_boxes"], targets, indices)
        values = {_CLASSIFICATION[loss]: out.classification}
        return {**values, _GIOU: out.box} if self.ranks_boxes else values


def _ranked(
    head_loss: HeadLoss, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], indices: Any
) -> HeadLosses:
    """The losses of logits ``(B, Q, C)`` and boxes ``(B, Q, 4)`` for pairs of queries and objects of each image."""
    classes = torch.full(logits.shape[:2], logits.shape[-1], device=logits.device)  # background
    matched = torch.zeros(boxes.shape, device=boxes.device)
    positive = torch.zeros_like(classes, dtype=torch.bool)
    # By query, whatever the order of the pairs: positives are in the order of their flat index.
    for image, (target, (queries, objects)) in enumerate(zip(targets, indices, strict=True)):
        queries, objects = queries.to(logits.device), objects.to(logits.device)
        classes[image, queries] = target["class_labels"].to(classes.dtype)[objects]
        matched[image, queries] = target["boxes"].to(matched.dtype)[objects]
        positive[image, queries] = True
    corners = (box_convert(at_least_float32(each[positive]), "cxcywh", "xyxy") for each in (boxes, matched))
    return head_loss(logits, classes, Boxes(*corners))
