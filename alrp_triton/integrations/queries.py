"""What all criteria of DETR-like detectors share: outputs with a name each, whose matched queries are ranked.

A criterion is any object that scores one output after the other, by methods ``loss_labels*`` and ``loss_boxes`` of
``(outputs, targets, indices, num_boxes, ...)``. Outputs have ``pred_logits`` (transformers: ``logits``) ``(B, Q, C)``
and ``pred_boxes`` ``(B, Q, 4)``, targets ``labels`` (transformers: ``class_labels``) and ``boxes``; boxes are cx, cy,
w, h, in units of the image.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..balance import Period
from ..distributed import ProcessGroup
from . import methods
from .box_errors import Boxes, at_least_float32
from .head_loss import DetectorLoss, HeadLoss, HeadLosses, check_box_weight
from .warm_start import WarmStart, check_warm_start

try:
    from torchvision.ops import box_convert
except ImportError as missing:
    raise ImportError("the integrations need torchvision, in the version that fits your torch") from missing

__all__ = ["QueryLosses"]

LAST = "last"
GIOU = "loss_giou"
_WORDS = {"aux": "auxiliary", "enc": "encoder", "dn": "denoising", "outputs": ""}  # of the keys of outputs


class QueryLosses(DetectorLoss):
    """The losses of a detector's outputs, each made when its output is seen first, or found in a ``state_dict``.

    Names are those that the outputs have in the criterion: ``"last"``, ``"auxiliary_0"``, ``"encoder"``,
    ``"denoising_0"`` and so on.

    Args:
        names: of those that are made at once, ``"last"`` among them.
        warm_start: steps with the library's own losses. The loss of ``"last"`` has it, and it is that of all outputs.
        **arguments: of each :class:`HeadLoss`; its box loss is GIoU.

    Raises:
        ValueError: ``box_weight`` without ``"alrp"``; and what :class:`HeadLoss` and :func:`check_warm_start` raise.
    """

    def __init__(self, names: Iterable[str] = (LAST,), *, warm_start: int = 0, **arguments: Any) -> None:
        super().__init__()
        check_box_weight(arguments["loss"], arguments["box_weight"])
        warm_start = check_warm_start(warm_start)
        self.arguments: dict[str, Any] = {**arguments, "box_loss": "giou"}
        for name in names:
            self.of(name)
        self[LAST].warm_start = WarmStart(warm_start) if warm_start else None

    def of(self, name: str) -> HeadLoss:
        """The loss of an output, a new one at the first time."""
        if name not in self:
            with torch.inference_mode(False):  # it may be in a validation, whose tensors no later step may change
                self[name] = HeadLoss(**self.arguments).train(self.training)
        return self[name]

    def set_period(self, period: Period) -> None:
        super().set_period(period)
        self.arguments["period"] = period

    def set_process_group(self, process_group: ProcessGroup | None) -> None:
        super().set_process_group(process_group)
        self.arguments["process_group"] = process_group

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any
    ) -> None:
        known = {key.removeprefix(prefix).partition(".")[0] for key in state_dict if key.startswith(prefix)}
        if LAST in known:
            # A state from before an output was seen, as averages of weights are begun with: it begins anew here, too.
            for name in [name for name, loss in self.items() if name not in known and loss.state_dict()]:
                del self[name]
        for key in state_dict:
            name, _, rest = key.removeprefix(prefix).partition(".")
            if key.startswith(prefix) and rest.startswith("balance."):
                if name.isdigit():
                    raise ValueError(
                        f"state_dict has losses by number, {key!r}, as version 0.5 had them; now they have names, such "
                        f"as {', '.join(map(repr, list(self)[:3]))}: rename its keys, or begin with a new state"
                    )
                self.of(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def ranked(
    head_loss: HeadLoss,
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Mapping[str, Tensor]],
    indices: Sequence[tuple[Any, Any]],
    groups: int = 1,
) -> HeadLosses:
    """The losses of logits ``(B, Q, C)`` and boxes ``(B, Q, 4)`` for pairs of queries and objects of each image.

    Queries of so many groups, one after the other in each image, are ranked apart: each is a detector of its own.
    """
    classes = torch.full(logits.shape[:2], logits.shape[-1], device=logits.device)  # background
    matched = torch.zeros(boxes.shape, device=boxes.device)
    positive = torch.zeros_like(classes, dtype=torch.bool)
    # By query, whatever the order of the pairs: positives are in the order of their flat index.
    for image, (target, pairs) in enumerate(zip(targets, indices, strict=True)):
        queries, objects = (torch.as_tensor(each, dtype=torch.int64, device=logits.device) for each in pairs)
        if "valid" in target:  # RF-DETR fills targets up to one size
            real = target["valid"].to(logits.device)[objects].bool()
            queries, objects = queries[real], objects[real]
        labels = target["class_labels" if "class_labels" in target else "labels"]
        labels = labels.to(classes.device, classes.dtype)[objects]
        if labels.device.type == "cpu":  # on a GPU the loss itself looks, and no host waits
            _check_labels(labels, logits.shape[-1], image)
        classes[image, queries] = labels
        matched[image, queries] = target["boxes"].to(matched.device, matched.dtype)[objects]
        positive[image, queries] = True
    corners = (box_convert(at_least_float32(each[positive]), "cxcywh", "xyxy") for each in (boxes, matched))
    apart = None
    if groups > 1:
        numbers = torch.arange(logits.shape[1], device=logits.device) // (logits.shape[1] // groups)
        apart = numbers.expand(logits.shape[:2])
    return head_loss(logits, classes, Boxes(*corners), apart)


def _check_labels(labels: Tensor, classes: int, image: int) -> None:
    """Raise ValueError unless all are classes: -1, and one beyond the last, would be taken for no object at all."""
    wrong = labels[(labels < 0) | (labels >= classes)].unique().tolist()
    if wrong:
        raise ValueError(f"labels of targets must be in 0..{classes - 1}, got {wrong} in image {image}")


def logits_of(outputs: Mapping[str, Any]) -> Any:
    """The logits of an output; None where it has none."""
    return outputs["pred_logits"] if "pred_logits" in outputs else outputs.get("logits")


def _named(outputs: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The logits of an output and of all others inside of it, with their names."""
    logits = logits_of(outputs)
    if isinstance(logits, Tensor):
        yield name or LAST, logits
    for key, value in outputs.items():
        words = [_WORDS.get(word, word) for word in str(key).replace(".", "_").split("_")]
        if len(words) > 2 and "auxiliary" in words:  # of denoising, or of the encoder
            words.remove("auxiliary")
        below = "_".join(word for word in (name, *words) if word)
        if isinstance(value, Mapping):
            yield from _named(value, below)
        elif isinstance(value, list | tuple):
            for number, each in enumerate(value):
                if isinstance(each, Mapping):
                    yield from _named(each, f"{below}_{number}")


class Ranking:
    """Stands in for methods of a criterion. Copied and pickled with it, for they are its attributes.

    Which output it is asked about it knows by its logits: ``forward`` looks for them among the outputs.

    Args:
        criterion: as this module says.
        losses: of its outputs.
        other_names: that some of the outputs are to have, by those that they would have.
        giou_weight: that the library gives to its own ``loss_giou``, of all outputs; for a warm start.
    """

    def __init__(
        self,
        criterion: Any,
        losses: QueryLosses,
        other_names: Mapping[str, str] | None = None,
        giou_weight: float = 1.0,
    ) -> None:
        self.criterion, self.losses, self.other_names = criterion, losses, other_names or {}
        self.giou_weight = giou_weight
        self.gious: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        """In a blend, by the identity of an output's logits: these, so that they live as long, and who has said which
        part of ``loss_giou``."""
        self.ranks_boxes = losses.arguments["loss"] == "alrp"
        self.names: dict[int, str] = {}  # by the identity of logits, in forward
        self.asked: list[str] = []
        self.scale: Any = 1.0
        self.former: dict[str, Any] = {}
        self.originals: dict[str, Callable[..., Any]] = {}
        self.weights: Any = None

    def put_in(self) -> "Ranking":
        ours: dict[str, Any] = {name: partial(self.labels, name) for name in label_methods(self.criterion)}
        ours["forward"] = self.forward
        if self.ranks_boxes:
            ours["loss_boxes"] = self.boxes
            self.weights = getattr(self.criterion, "weight_dict", None)
            if self.weights is not None:  # HeadLoss has weighted them
                ones = {key: 1.0 if key.startswith(GIOU) else weight for key, weight in self.weights.items()}
                self.criterion.weight_dict = ones
        if hasattr(self.criterion, "_can_batch_detection_losses"):  # RF-DETR, where it compiles: past loss_labels
            ours["_can_batch_detection_losses"] = self.cannot_batch
        self.originals = {name: getattr(self.criterion, name) for name in ours}
        self.former = methods.put_in(self.criterion, ours)
        return self

    def take_out(self) -> None:
        methods.take_out(self.criterion, self.originals, self.former)
        if self.weights is not None:  # others may have been changed meanwhile
            now = self.criterion.weight_dict.items()
            self.weights.update({key: value for key, value in now if not key.startswith(GIOU)})
            self.criterion.weight_dict = self.weights

    def cannot_batch(self, *args: Any) -> bool:
        return False

    def forward(self, outputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Where outputs share logits the first name counts.
        self.names = {id(logits): name for name, logits in reversed(list(_named(outputs)))}
        self.asked, self.gious = [], {}
        self.scale = self._scale(outputs, args, kwargs)
        try:
            values = self.originals["forward"](outputs, *args, **kwargs)
        finally:
            self.names, self.gious = {}, {}
        if not self.asked and isinstance(logits_of(outputs), Tensor):
            raise RuntimeError(
                f"nothing was ranked: {type(self.criterion).__name__} has not called {', '.join(self._labels())}"
            )
        self.losses[LAST].count_step()
        return values

    def _labels(self) -> list[str]:
        return [name for name in self.originals if name.startswith("loss_labels")]

    def _scale(self, outputs: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """RF-DETR may divide by the number of boxes later, to add up gradients of batches: what it will divide by."""
        if not hasattr(self.criterion, "num_boxes_for_targets"):
            return 1.0
        targets, num_boxes = (*args, *kwargs.values())[0], kwargs.get("num_boxes", args[1] if len(args) > 1 else None)
        return 1.0 if num_boxes is None else self.criterion.num_boxes_for_targets(outputs, targets) / num_boxes

    def labels(
        self, method: str, outputs: Mapping[str, Any], targets: Any, indices: Any, num_boxes: Any, *args: Any, **kw: Any
    ) -> dict[str, Any]:
        start = self.losses[LAST]
        # But for a warm start it is called for its key, and for what it has beside, for logs.
        with torch.set_grad_enabled(torch.is_grad_enabled() and start.share < 1):
            values = dict(self.originals[method](outputs, targets, indices, num_boxes, *args, **kw))
        keys = [key for key in values if key.startswith("loss")]
        if len(keys) != 1:
            raise TypeError(f"{method} must return one loss, to be replaced; got {', '.join(map(repr, values))}")
        logits = logits_of(outputs)
        self._check_sigmoid(logits)
        name = self.names.get(id(logits)) or (f"other_{len(self.asked)}" if self.names else LAST)
        name = self.other_names.get(name, name)
        self.asked.append(name)
        own, head_loss = values[keys[0]], self.losses.of(name)

        def ranking() -> HeadLosses:
            groups = self._groups(logits.shape[1])
            out = ranked(head_loss, logits, outputs["pred_boxes"], targets, indices, groups)
            if not self.ranks_boxes:  # boxes keep their own loss, with the weight that the library gives it
                head_loss.box_weight = torch.full_like(head_loss.box_weight, math.nan)
            return HeadLosses(out.classification * self.scale, out.box * self.scale)

        out = start.blended(lambda: (own, torch.zeros_like(own)), ranking)  # boxes() has their box loss
        values[keys[0]] = out.classification
        if not self.ranks_boxes or start.share == 0:
            return values
        return {**values, GIOU: out.box if start.share == 1 else self._giou("labels", logits, out.box)}

    def boxes(self, outputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        values = self.originals["loss_boxes"](outputs, *args, **kwargs)
        others = {key: value for key, value in values.items() if key != GIOU}
        left = 1 - self.losses[LAST].share
        if left == 0 or GIOU not in values:
            return others
        return {**others, GIOU: self._giou("boxes", logits_of(outputs), values[GIOU] * (left * self.giou_weight))}

    def _giou(self, method: str, logits: Tensor, part: Tensor) -> Tensor:
        """``loss_giou`` of an output, as far as it has been said; the criterion keeps what it gets last.

        Neither method could say it all: D-FINE's pairs of boxes are other ones than those of classes.
        """
        _, parts = self.gious.setdefault(id(logits), (logits, {}))
        parts[method] = part
        return torch.stack(list(parts.values())).sum()

    def _groups(self, queries: int) -> int:
        """As LW-DETR and RF-DETR match them: in training alone."""
        groups = getattr(self.criterion, "group_detr", 1) if self.criterion.training else 1
        return groups if queries % groups == 0 else 1

    def _check_sigmoid(self, logits: Tensor) -> None:
        classes = getattr(self.criterion, "num_classes", None)
        if isinstance(classes, int) and logits.shape[-1] == classes + 1:
            raise ValueError(
                f"pred_logits must have a sigmoid for each of {classes} classes, got shape {tuple(logits.shape)}: one "
                "more, as for a softmax with a 'no object' class, where none can be ranked by itself"
            )


def label_methods(criterion: Any) -> list[str]:
    """The names of its methods ``loss_labels*``."""
    names = [name for name in dir(criterion) if name.startswith("loss_labels")]
    return [name for name in names if callable(getattr(criterion, name))]


def ranking_in(criterion: nn.Module) -> Ranking | None:
    """The one that :meth:`Ranking.put_in` put into it."""
    owner = getattr(vars(criterion).get("forward"), "__self__", None)
    return owner if isinstance(owner, Ranking) else None
