"""Ranking losses in the criteria of DETR-like detectors: RF-DETR, RT-DETR, D-FINE, DEIM and what is built as they are.

::

    losses = use_ranking_loss(criterion, "alrp", period=len(loader))
    loss_dict = criterion(outputs, targets)
    weights = criterion.weight_dict
    loss = sum(loss_dict[key] * weights[key] for key in loss_dict if key in weights)
    loss.backward()

A criterion is told by its shape, see :mod:`alrp_triton.integrations.queries`; no library is imported. Its own matching,
auxiliary outputs, denoising and weights stay.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..balance import INITIAL_WEIGHT, InitialWeight, Period
from ..boxes import TAU
from ..dispatch import Backend
from ..distributed import GradientReduction, ProcessGroup
from .head_loss import Loss
from .queries import GIOU, QueryLosses, Ranking, label_methods, ranking_in

__all__ = ["remove_ranking_loss", "use_ranking_loss"]

_PARAMETERS = ("outputs", "targets", "indices")


def use_ranking_loss(
    criterion: nn.Module,
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
    """Makes a criterion rank the class scores of its outputs, in place of its focal, varifocal or other class loss.

    The queries of all images of a batch are one ranking in each output: the last layer, each auxiliary one, the
    encoder's proposals, each layer of denoising; of RF-DETR in each of its groups of queries, which are detectors of
    their own. The loss stands under the key, and has the weight, of the one that it replaces, and values for logs stand
    beside it. Box losses stay as they are, but for ``"alrp"``: there aLRP's localisation part takes the place of
    ``"loss_giou"``, with the positives of the class loss, weighted by self-balancing, and ``weight_dict`` has 1 for it.

    Args:
        criterion: with methods ``loss_labels*(outputs, targets, indices, num_boxes, ...)``, and with ``"alrp"`` one
            ``loss_boxes``; such as the ``SetCriterion`` of RF-DETR, RT-DETR, D-FINE, DEIM, Deformable DETR, DINO.
        loss: ``"alrp"``, ``"ap"`` or ``"rank_sort"``.
        period: of aLRP's self-balancing, an epoch in your steps, ``len(loader)``; ``"later"``: not known yet, call
            ``set_period`` of what is returned before the first step.
        initial_weight: see :class:`HeadLoss`; ``"auto"`` to fine-tune a detector.
        tau: see :class:`HeadLoss`.
        box_weight: of aLRP's localisation part, a constant instead of self-balancing; for ``"alrp"`` alone.
        delta: see :class:`HeadLoss`.
        process_group: see :class:`HeadLoss`.
        gradient_reduction: see :class:`HeadLoss`.
        backend: see :class:`HeadLoss`.
        warm_start: steps with the criterion's own losses, over as many more the ranking takes over. For a beginning in
            which no score means anything yet.

    Returns:
        The losses, :class:`HeadLoss` by the name of the output, ``"last"``, ``"auxiliary_0"``, ``"encoder"``,
        ``"denoising_0"``, each made when its output comes first. They are part of the criterion, ``ranking_loss``, and
        so of its ``state_dict``. Called again, they are replaced by new ones.

    Raises:
        TypeError: a criterion of another shape, or one that scores by a softmax with a "no object" class, as DETR's.
        ValueError: no weight for ``"loss_giou"`` with ``"alrp"``, or several with ``warm_start``; ``box_weight``
            without ``"alrp"``; and what :class:`HeadLoss` raises. The criterion is then as before.

    Reference: Oksuz et al., NeurIPS 2020 and ICCV 2021, whose detectors are others: here a ranking loss is new.
    """
    if not isinstance(criterion, nn.Module):
        raise TypeError(f"criterion must be a module with methods loss_labels*, got {type(criterion).__name__}")
    before = ranking_in(criterion)
    _check_shape(before.originals if before else _methods(criterion), criterion, loss)
    losses = QueryLosses(
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
    weights = before.weights if before and before.weights is not None else getattr(criterion, "weight_dict", None)
    giou_weight = _giou_weight(weights, warm_start) if warm_start and loss == "alrp" else 1.0
    remove_ranking_loss(criterion)
    criterion.ranking_loss = losses.train(criterion.training)
    Ranking(criterion, losses, giou_weight=giou_weight).put_in()
    return losses


def remove_ranking_loss(criterion: nn.Module) -> None:
    """Gives a criterion its own losses back; nothing happens where it has them."""
    ranking = ranking_in(criterion)
    if ranking is not None:
        ranking.take_out()
        del criterion.ranking_loss


def _methods(criterion: nn.Module) -> dict[str, Any]:
    names = [*label_methods(criterion), *(["loss_boxes"] if hasattr(criterion, "loss_boxes") else [])]
    return {name: getattr(criterion, name) for name in names}


def _check_shape(methods: dict[str, Any], criterion: nn.Module, loss: Loss) -> None:
    found = [name for name in methods if name.startswith("loss_labels")]
    if not found:
        raise TypeError(
            f"criterion must have a method loss_labels or loss_labels_*; {type(criterion).__name__} has none"
        )
    for name in found:
        parameters = tuple(inspect.signature(methods[name]).parameters)
        if parameters[:3] != _PARAMETERS:
            raise TypeError(
                f"criterion must have {name}(outputs, targets, indices, num_boxes, ...); "
                f"{type(criterion).__name__} has ({', '.join(parameters)})"
            )
    if hasattr(criterion, "empty_weight") and "labels" in getattr(criterion, "losses", ()):
        raise TypeError(
            f"criterion must score each class by a sigmoid; {type(criterion).__name__} has a softmax with a "
            "'no object' class (empty_weight), where scores of a query are shares of 1 and none can be ranked by itself"
        )
    if loss == "alrp":
        weights = getattr(criterion, "weight_dict", None)
        if "loss_boxes" not in methods and "loss_boxes" not in dir(criterion):
            raise TypeError(
                f"criterion must have a method loss_boxes for loss 'alrp'; {type(criterion).__name__} has none"
            )
        if weights is not None and GIOU not in weights:
            raise ValueError(
                f"criterion must have a weight for {GIOU!r}, in whose place aLRP's localisation part stands; "
                f"{type(criterion).__name__}.weight_dict has {', '.join(map(repr, weights)) or 'none'}"
            )


def _giou_weight(weights: Mapping[str, float] | None, warm_start: int) -> float:
    """That of the criterion's own GIoU loss. Which output it is asked about is known here, but not its key."""
    found = sorted({float(weight) for key, weight in (weights or {}).items() if key.startswith(GIOU)})
    if len(found) != 1:
        raise ValueError(
            f"warm_start with loss 'alrp' needs one weight of {GIOU!r} for all outputs, in weight_dict, to give it to "
            f"the criterion's own; got {', '.join(map(str, found)) or 'none'} with warm_start={warm_start}"
        )
    return found[0]
