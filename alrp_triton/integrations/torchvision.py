"""Ranking losses in torchvision's detectors: one call puts them in, one takes them out; their code stays theirs.

::

    model = retinanet_resnet50_fpn(num_classes=91)
    loss = use_ranking_loss(model, "alrp", period=len(loader))
    losses = model(images, targets)  # the same keys as before
    sum(losses.values()).backward()

Methods are replaced on the model's own head, by ones that call those it had; parameters and buffers are not touched, so
a ``state_dict`` fits the model with and without the loss. The state of the self-balancing is in ``loss.state_dict()``.
"""

import copy
import math
from functools import partial
from typing import Any, Literal, cast, get_args

from torch import nn

from ..balance import INITIAL_WEIGHT, InitialWeight, Period
from ..boxes import TAU
from ..checks import check_integer, check_number
from ..dispatch import Backend
from ..distributed import GradientReduction, ProcessGroup
from .atss import CANDIDATES
from .box_errors import BoxLoss
from .head_loss import RPN_WEIGHT, TAU_RPN, DetectorLoss, HeadLoss, Loss
from .torchvision_heads import FCOSHead, Head, RegionProposalNetwork, RetinaNetHead, RoIHeads
from .torchvision_masks import MaskRoIHeads
from .warm_start import WarmStart, check_warm_start

try:
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
except ImportError as missing:
    raise ImportError("this integration needs torchvision, in the version that fits your torch") from missing

__all__ = ["plain_copy", "ranking_loss_of", "remove_ranking_loss", "use_ranking_loss"]

Assignment = Literal["iou", "atss"]
BoxCoding = Literal["model", "published"]
MaskLoss = Literal["dice", "bce"]
_HOOK = "__prepare_scriptable__"  # torch.jit.script asks for it, and scripts what it returns


def use_ranking_loss(
    model: nn.Module,
    loss: Loss = "alrp",
    *,
    period: Period | None = None,
    initial_weight: InitialWeight = INITIAL_WEIGHT,
    assignment: Assignment = "iou",
    candidates: int | None = None,
    box_coder: BoxCoding = "model",
    box_loss: BoxLoss | None = None,
    box_weight: float | None = None,
    delta: float | None = None,
    rpn_weight: float = RPN_WEIGHT,
    mask_loss: MaskLoss | None = None,
    process_group: ProcessGroup | None = None,
    gradient_reduction: GradientReduction = "mean",
    backend: Backend = "auto",
    warm_start: int = 0,
) -> DetectorLoss:
    """Makes a detector of torchvision train with a ranking loss, and with the box loss of its paper.

    All logits of a batch, of all images and levels, are one ranking, without sampling; what the matcher ignores is
    left out. In training the model returns losses under the names that it has without, to be added up.

    - RetinaNet: focal loss and L1 are replaced.
    - FCOS: so is the centre-ness, for scores are ranked by overlaps already: it is neither trained (its layer is
      frozen) nor looked at.
    - Faster R-CNN (Mask R-CNN, Keypoint R-CNN): in the RPN with tau = 0.7, and in the box head with tau = 0.5, where
      scores become independent for each class, by a sigmoid instead of the softmax; the column of the background is
      left alone. All proposals are used; with ``"rank_sort"`` ground truth is among them, as torchvision adds it and
      as published, with the others it is not, as aLRP Loss has it.
    - Mask R-CNN with ``"rank_sort"``: masks are trained by dice in place of cross entropy, at most 200 a step, see
      :meth:`HeadLoss.mask_loss`; true masks are cut out as torchvision does. The papers of the others train no masks,
      and leave theirs as they are, as keypoints are left.

    Put it in when the model has its heads, and before ``DistributedDataParallel`` and ``torch.compile`` are put around
    it. ``torch.jit.script`` scripts a :func:`plain_copy`, and where the detector is part of another module it puts that
    in its place there: script a copy of such a module. To detect, RetinaNet and the RPN work without it, unless
    ``box_coder`` is ``"published"``; FCOS and the box head of Faster R-CNN need it, for their scores are other ones. A
    ranking fixes the order of scores and not their level: ``model.score_thresh`` (``model.roi_heads.score_thresh``) may
    want to be lower.

    Args:
        model: ``RetinaNet``, ``FCOS``, ``FasterRCNN`` or another ``GeneralizedRCNN`` with torchvision's parts.
        loss: ``"alrp"``, ``"ap"`` or ``"rank_sort"``.
        period: of aLRP's self-balancing, an epoch in your steps, ``len(loader)``; ``"later"``: not known yet, call
            ``set_period`` of what is returned before the first step.
        initial_weight: see :class:`HeadLoss`; ``"auto"`` to fine-tune a detector.
        assignment: of RetinaNet's anchors: ``"iou"``, the model's own matcher, or ``"atss"``.
        candidates: of ``"atss"``, on each level, see :func:`alrp_triton.integrations.atss.atss_match`; None: 9, as in
            the configurations of aLRP and Rank & Sort Loss, whatever the number of anchors at a location.
        box_coder: which deviations boxes are encoded with, and decoded: ``"model"``, those that it has, or
            ``"published"``, .1 .1 .2 .2 as in all configurations of the three losses, where torchvision's RetinaNet and
            RPN have 1. It scales what the head has to predict, so a detector that was trained with others has to be
            trained again, and one that was trained with these detects with them alone: call this with
            ``"published"`` there, too, for a ``state_dict`` does not hold them. FCOS has none.
        box_loss: see :class:`HeadLoss`.
        box_weight: see :class:`HeadLoss`; of both heads of a Faster R-CNN.
        delta: see :class:`HeadLoss`.
        rpn_weight: of both losses of the RPN; published: 0.2.
        mask_loss: of Mask R-CNN with ``"rank_sort"``: ``"dice"``, that of the paper, or ``"bce"``, torchvision's; None:
            that of the paper where there are masks.
        process_group: see :class:`HeadLoss`; with DistributedDataParallel, ``"world"`` ranks what all GPUs have.
        gradient_reduction: see :class:`HeadLoss`.
        backend: see :class:`HeadLoss`.
        warm_start: of RetinaNet and FCOS: steps with torchvision's own losses, over as many more the ranking takes
            over. For a beginning in which no score means anything yet.

    Returns:
        The losses, :class:`HeadLoss` by the name of the head: ``"head"``, or ``"rpn"`` and ``"roi_heads"``. Save its
        ``state_dict()`` with your checkpoint. Called again, the model's losses are replaced by new ones.

    Raises:
        TypeError: the model is none of these.
        ValueError: ``assignment``, ``box_coder``, ``mask_loss`` or ``warm_start`` that is unknown or not for this model
            or loss; and what :class:`HeadLoss` raises. The model is then as before.

    Reference: Oksuz et al., NeurIPS 2020, Section 5, and the published configurations.
    """
    if assignment not in get_args(Assignment):
        raise ValueError(f"assignment must be 'iou' or 'atss', got {assignment!r}")
    if assignment == "atss" and not isinstance(model, RetinaNet):
        raise ValueError(f"assignment 'atss' is for RetinaNet; {type(model).__name__} has one of its own")
    if candidates is not None and assignment != "atss":
        raise ValueError(f"candidates are those of assignment 'atss'; got candidates={candidates} with {assignment!r}")
    if box_coder not in get_args(BoxCoding):
        raise ValueError(f"box_coder must be 'model' or 'published', got {box_coder!r}")
    candidates = check_integer("candidates", CANDIDATES if candidates is None else candidates, 1, 2**31)
    warm_start = check_warm_start(warm_start)
    if warm_start and isinstance(model, GeneralizedRCNN):
        raise ValueError(
            f"warm_start is for RetinaNet and FCOS; the box head of {type(model).__name__} has a softmax without the "
            f"ranking, so its own loss is no beginning; got {warm_start}"
        )
    dice = _trains_dice(model, loss, mask_loss)
    rpn_weight = check_number("rpn_weight", rpn_weight, 0.0, math.inf)

    def head_loss(tau: float) -> HeadLoss:
        made = HeadLoss(
            loss,
            period=period,
            initial_weight=initial_weight,
            tau=tau,
            box_loss=box_loss,
            box_weight=box_weight,
            delta=delta,
            process_group=process_group,
            gradient_reduction=gradient_reduction,
            backend=backend,
        )
        made.warm_start = WarmStart(warm_start) if warm_start else None
        return made

    heads: list[Head]
    coders: list[Any]
    if isinstance(model, FCOS):
        heads, coders = [FCOSHead("head", model.head, head_loss(TAU))], [model.head.box_coder]
    elif isinstance(model, RetinaNet):
        heads = [RetinaNetHead("head", model.head, head_loss(TAU), candidates if assignment == "atss" else 0)]
        coders = [model.head.regression_head.box_coder, model.box_coder]
    elif isinstance(model, GeneralizedRCNN):
        rpn = RegionProposalNetwork("rpn", model.rpn, head_loss(TAU_RPN), rpn_weight)
        heads = [rpn, (MaskRoIHeads if dice else RoIHeads)("roi_heads", model.roi_heads, head_loss(TAU))]
        coders = [model.rpn.box_coder, model.roi_heads.box_coder]
    else:
        raise TypeError(f"model must be a RetinaNet, FCOS or FasterRCNN of torchvision, got {type(model).__name__}")
    if box_coder == "published" and not all(isinstance(coder, BoxCoder) for coder in coders):
        seen = [type(coder).__name__ for coder in coders]
        raise ValueError(
            f"box_coder 'published' is for models with deviations of deltas, which BoxCoder has; "
            f"{type(model).__name__} has {', '.join(seen)}"
        )
    remove_ranking_loss(model)
    if box_coder == "published":
        heads[0].coders = coders
    for head in heads:
        head.put_in()
    vars(model)[_HOOK] = partial(plain_copy, model)
    return DetectorLoss({head.name: head.loss for head in heads})


def _trains_dice(model: nn.Module, loss: Loss, mask_loss: MaskLoss | None) -> bool:
    has_masks = isinstance(model, GeneralizedRCNN) and cast("Any", model.roi_heads).has_mask()
    if mask_loss is not None:
        if mask_loss not in get_args(MaskLoss):
            raise ValueError(f"mask_loss must be 'dice', 'bce' or None, got {mask_loss!r}")
        if loss != "rank_sort":
            raise ValueError(f"mask_loss is part of loss 'rank_sort'; got mask_loss={mask_loss!r} with {loss!r}")
        if not has_masks:
            raise ValueError(f"mask_loss {mask_loss!r} is for models with masks; {type(model).__name__} has none")
    return has_masks and loss == "rank_sort" and mask_loss != "bce"


def remove_ranking_loss(model: nn.Module) -> None:
    """Gives a detector the losses back that it had; nothing happens where there is no ranking loss in it."""
    for head in _heads(model):
        head.take_out()
    for module in model.modules():
        vars(module).pop(_HOOK, None)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy that detects as the model does, with torchvision's losses in it; it shares parameters and buffers.

    It is what ``torch.jit.script`` takes in the place of a model with a ranking loss, and all that is left to ship:
    its methods are torchvision's, but for the sigmoid of Faster R-CNN. A plain FCOS that loads its ``state_dict``
    detects the same, for its centre-ness is always 1.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, tensors)
    for head in _heads(copied):
        head.make_plain()
    for module in copied.modules():
        vars(module).pop(_HOOK, None)
    return copied


def ranking_loss_of(model: nn.Module) -> DetectorLoss:
    """The losses that :func:`use_ranking_loss` put into this model: of a copy, its own. Empty where there are none."""
    return DetectorLoss({head.name: head.loss for head in _heads(model)})


def _heads(model: nn.Module) -> list[Head]:
    methods = (value for module in model.modules() for value in vars(module).values())
    found = (getattr(method, "__self__", None) for method in methods)
    return list(dict.fromkeys(head for head in found if isinstance(head, Head)))
