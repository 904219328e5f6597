# pyright: reportMissingImports=false
# Ultralytics need not be installed where types are checked.
"""What stands in for the class loss of a criterion of Ultralytics; :mod:`.ultralytics` puts it in.

The criterion stays theirs, and runs as it does. Its class becomes one that is made here, at run time, of theirs: where
it asks for its assigner, its loss of classes and its loss of boxes, it finds ones that call those it had.
"""

import copy
import math
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modules import ALRPLoss, RankSortLoss
from .box_errors import Boxes, at_least_float32
from .head_loss import HeadLoss, HeadLosses

NEEDS = "this integration needs ultralytics>=8.4.140"
try:
    import ultralytics
    from ultralytics.utils.loss import v8DetectionLoss
except ImportError as missing:
    raise ImportError(NEEDS) from missing
_VERSION = str(vars(ultralytics)["__version__"])
if tuple(map(int, re.findall(r"\d+", _VERSION)[:3])) < (8, 4, 140):
    # Older trainers start their processes without the callbacks of the user: on several GPUs nothing would be ranked.
    raise ImportError(f"{NEEDS}, got {_VERSION}")

HEAD = "head"
BRANCHES = ("one2many", "one2one")
"""Of heads that detect without non-maximum suppression: YOLO26, YOLOv10."""


class _Decoded(NamedTuple):
    points: Tensor  # (A, 2), in cells of their own grid
    boxes: Tensor  # (B, A, 4), too


class _Assigned(NamedTuple):
    points: Tensor  # (A, 2), in pixels
    labels: Tensor  # (B, A)
    boxes: Tensor  # (B, A, 4), in pixels
    scores: Tensor  # (B, A, C), of a positive's own class from 0 to 1, else 0
    positive: Tensor  # (B, A)


class Ranking:
    """The loss of one branch, and what its criterion has said of this step so far. Copied with the model."""

    def __init__(self, head_loss: HeadLoss, model: nn.Module) -> None:
        self.head_loss, self.model = head_loss, model
        self.decoded: _Decoded | None = None
        self.assigned: _Assigned | None = None
        self.box: Tensor | None = None
        """aLRP's localisation part, until the criterion asks for it; in a warm start its share of it."""
        self.share = 1.0
        """That of the ranking in this step."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranking":
        return Ranking(copy.deepcopy(self.head_loss, memo), memo.get(id(self.model), self.model))

    def classification(self, logits: Tensor, own: Callable[[], Tensor]) -> Tensor:
        """0-d, of logits ``(B, A, C)``: all images and levels are one ranking. ``own``: the criterion's sum, 0-d."""
        assert self.assigned is not None
        # The criterion divides by this sum, for its own loss is one.
        normaliser = self.assigned.scores.sum().clamp(min=1)

        def ranked() -> HeadLosses:
            classification, box = self._ranked(logits)
            return HeadLosses(classification * normaliser, box)

        with self._of_this_step():
            self.share = self.head_loss.share
            # Their box loss they ask for themselves.
            found = self.head_loss.blended(lambda: (own(), torch.zeros_like(normaliser)), ranked)
            self.head_loss.count_step()
            self.box = found.box if isinstance(self.head_loss.criterion, ALRPLoss) else None
            return found.classification

    def _ranked(self, logits: Tensor) -> HeadLosses:
        assert self.assigned is not None
        points, labels, boxes, scores, positive = self.assigned
        positive = positive.bool()  # of older versions it is a number where no image has an object
        criterion, no_box = self.head_loss.criterion, scores.new_zeros(())
        if isinstance(criterion, RankSortLoss):
            grades = scores.detach().amax(-1)
            # Of score 0 are negatives, to the library and in the published loss. NaN is not, so that it is seen.
            positive = positive & (grades != 0)
            return HeadLosses(criterion(logits, _indices(logits, labels, positive), grades[positive]).total, no_box)
        targets, (image, anchor) = _indices(logits, labels, positive), positive.nonzero(as_tuple=True)
        if not isinstance(criterion, ALRPLoss):
            return HeadLosses(criterion(logits, targets, num_positives=len(anchor)), no_box)
        assert self.decoded is not None
        stride = at_least_float32(points) / at_least_float32(self.decoded.points)
        predicted = at_least_float32(self.decoded.boxes[image, anchor]) * stride.repeat(1, 2)[anchor]
        return self.head_loss(logits, targets, Boxes(predicted, at_least_float32(boxes[image, anchor])))

    @contextmanager
    def _of_this_step(self) -> Generator[None]:
        """What balances records nothing of a validation loss; nor do processes wait for each other in it.

        They have no reason to validate equally many batches.
        """
        criterion = self.head_loss.criterion
        group = criterion.process_group
        self.head_loss.train(self.model.training)
        if not self.model.training:
            criterion.process_group = None
        try:
            yield
        finally:
            criterion.process_group = group
            self.decoded = self.assigned = None  # holds no graph


def _indices(logits: Tensor, labels: Tensor, positive: Tensor) -> Tensor:
    return torch.where(positive, labels.long(), logits.shape[-1])


class _Ranked:
    """Comes before the class of a criterion, and is asked first. A pickle has their criterion, without any of this."""

    theirs: type[Any]
    ranking: Ranking
    hyp: Any

    def bbox_decode(self, anchor_points: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        theirs: Any = super()
        boxes = theirs.bbox_decode(anchor_points, *args, **kwargs)
        self.ranking.decoded, self.ranking.box = _Decoded(anchor_points, boxes), None
        return boxes

    @property
    def assigner(self) -> Any:
        return self._assign

    @property
    def bce(self) -> Any:
        return self._classification

    @property
    def bbox_loss(self) -> Any:
        return self._box

    def _assign(self, scores: Tensor, boxes: Tensor, points: Tensor, *args: Any, **kwargs: Any) -> Any:
        assigned = vars(self)["assigner"](scores, boxes, points, *args, **kwargs)
        self.ranking.assigned = _Assigned(points, *assigned[:4])
        return assigned

    def _classification(self, logits: Tensor, targets: Tensor) -> Tensor:
        # Targets are the assigner's scores, in half precision maybe.
        return self.ranking.classification(logits, lambda: vars(self)["bce"](logits, targets).sum())

    def _box(self, *args: Any, **kwargs: Any) -> Any:
        overlap, *others = vars(self)["bbox_loss"](*args, **kwargs)
        if self.ranking.box is not None:
            # Both parts of aLRP Loss have the gain of the classes: what balances them is not to be undone.
            gain = self.hyp.cls / self.hyp.box if self.hyp.box else 0.0
            own, overlap = overlap, self.ranking.box * gain
            if self.ranking.share < 1:
                overlap = overlap + own * (1 - self.ranking.share)
            self.ranking.box = None
        return (overlap, *others)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = object.__new__(self.theirs)
        vars(plain).update({name: value for name, value in vars(self).items() if name != "ranking"})
        return object.__reduce_ex__(plain, 0)  # from 2 on pickle insists on the class that this object has

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


@cache
def _ranked(theirs: type[Any]) -> type[Any]:
    return type(f"Ranking{theirs.__name__}", (_Ranked, theirs), {"theirs": theirs})


def parts_of(criterion: Any) -> dict[str, Any]:
    """The criteria of a criterion by the name of their branch: two, or itself."""
    found = {name: vars(criterion)[name] for name in BRANCHES if name in vars(criterion)}
    return found or {HEAD: criterion}


def put_in(model: nn.Module, criterion: Any, losses: dict[str, HeadLoss]) -> None:
    """Makes a criterion of this model rank. TypeError if it is another than those that are known, and is as before."""
    parts = parts_of(criterion)
    for part in parts.values():
        if not isinstance(part, v8DetectionLoss):
            raise TypeError(
                f"model must have a v8DetectionLoss, {type(model).__name__} has {type(part).__name__}, which calls no "
                "assigner"
            )
        if getattr(part, "class_weights", None) is not None:
            raise ValueError("cls_pw must be 0: it weighs cross entropy class by class, a ranking has all classes")
    if list(parts) != list(losses):
        raise ValueError(f"model must have the branches {', '.join(losses)}, got {', '.join(parts)}: call this again")
    for name, part in parts.items():
        if not isinstance(part, _Ranked):
            part.__class__ = _ranked(type(part))
        part.ranking = Ranking(losses[name], model)


def take_out(criterion: Any) -> None:
    """The criterion as it was; nothing happens where it is."""
    for part in parts_of(criterion).values():
        if isinstance(part, _Ranked):
            part.__class__ = part.theirs
            del part.ranking


def losses_in(criterion: Any) -> dict[str, HeadLoss]:
    """The losses by the name of their branch; empty where there are none."""
    return {name: each.ranking.head_loss for name, each in parts_of(criterion).items() if isinstance(each, _Ranked)}


@torch.no_grad()
def raise_scores(head: Any, prior: float | None) -> None:
    """Raises the logits of all classes and levels of a branch by one number, so that the greatest bias is ``prior``.

    Where biases are not those of a new head, which follow from the strides but for one number, it has been trained, and
    is left alone; so is one that is as high.
    """
    if prior is None:
        return
    for branch in BRANCHES:
        scores = getattr(head, "cv3" if branch == "one2many" else "one2one_cv3", None)
        biases = [] if scores is None else [level[-1].bias[: head.nc] for level in scores]
        strides = [2 * math.log(stride) for stride in head.stride.tolist()]
        apart = [bias - stride for bias, stride in zip(biases, strides, strict=bool(biases))]
        if apart and float(torch.cat(apart).max() - torch.cat(apart).min()) < 1e-4:
            lift = math.log(prior / (1 - prior)) - float(torch.cat(biases).max())
            for bias in biases:
                bias += max(lift, 0.0)
