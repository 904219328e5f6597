"""What stands in for the losses of torchvision's heads; :mod:`alrp_triton.integrations.torchvision` puts it in."""

import math
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import roi_heads
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder, Matcher

from ..checks import check_values
from ..distributed import ProcessGroup, propagates_errors
from ..targets import IGNORE_INDEX
from . import methods
from .atss import atss_match
from .box_errors import STANDARD, Boxes, at_least_float32, in_deviations
from .head_loss import HeadLoss, HeadLosses

Target = dict[str, Tensor]
_CERTAIN = 100.0  # a logit whose sigmoid is 1


class Head:
    """Stands in for some methods of a detector's part. Copied and pickled with it, for they are its attributes.

    ``methods`` are those; where one does not do the whole work itself it calls what was there before: the method of the
    part's class, or one that its user had set.
    """

    methods: tuple[str, ...]

    def __init__(self, name: str, part: Any, loss: HeadLoss) -> None:
        self.name, self.part, self.loss = name, part, loss
        self.former: dict[str, Any] = {}
        self.coders: list[BoxCoder] = []
        """Those that have the published deviations meanwhile."""
        self.weights: list[Any] = []

    def put_in(self) -> None:
        self.weights = [coder.weights for coder in self.coders]
        for coder in self.coders:
            coder.weights = STANDARD
        self.former = methods.put_in(self.part, {name: getattr(self, name) for name in self.methods})

    def take_out(self) -> None:
        self.restore_methods()
        for coder, weights in zip(self.coders, self.weights, strict=True):
            coder.weights = weights

    def restore_methods(self) -> None:
        methods.take_out(self.part, self.methods, self.former)

    def make_plain(self) -> None:
        """Of a copy: let the part detect as it does now by its own methods, which TorchScript can read."""
        self.restore_methods()

    def check_labels(self, targets: list[Target], first: int, last: int) -> None:
        _check_labels(targets, first, last, process_group=self.loss.criterion.process_group)

    def original(self, method: str, *arguments: Any) -> Any:
        if method in self.former:
            return self.former[method](*arguments)
        return getattr(type(self.part), method)(self.part, *arguments)


class DenseHead(Head):
    """A head that predicts at every anchor of every level."""

    def losses(
        self, targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor], matched: list[Tensor]
    ) -> dict[str, Tensor]:
        """Those of torchvision by their names; ``matched`` (A,) of each image, an object or a negative number."""
        self.check_labels(targets, 0, outputs["cls_logits"].shape[-1] - 1)
        names = ("classification", "bbox_regression")

        def own() -> tuple[Tensor, ...]:
            theirs = self.original("compute_loss", targets, outputs, anchors, matched)
            return tuple(theirs[name] for name in names)

        found = self.loss.blended(own, lambda: self.ranked(targets, outputs, anchors, matched))
        self.loss.count_step()
        return dict(zip(names, found, strict=True))

    def ranked(
        self, targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor], matched: list[Tensor]
    ) -> HeadLosses:
        logits, deltas = outputs["cls_logits"], outputs["bbox_regression"]  # (B, A, C), (B, A, 4)
        matches = torch.stack(matched)  # (B, A)
        positive = matches >= 0
        # In the order of the anchors, image after image: that of the positives.
        of_positives = [
            (target["boxes"][match[match >= 0]], target["labels"][match[match >= 0]])
            for target, match in zip(targets, matched, strict=True)
        ]
        boxes, labels = (torch.cat(each) for each in zip(*of_positives, strict=True))
        classes = torch.full_like(matches, logits.shape[-1])  # background
        classes[matches == Matcher.BETWEEN_THRESHOLDS] = IGNORE_INDEX
        classes[positive] = labels.to(classes.dtype)
        # Under autocast the coder would round anchors to the dtype of the deltas.
        own = at_least_float32(deltas[positive])
        return self.loss(logits, classes, self.boxes(own, torch.stack(anchors)[positive], boxes.to(own.dtype)))

    def boxes(self, deltas: Tensor, anchors: Tensor, targets: Tensor) -> Boxes:
        raise NotImplementedError


class RetinaNetHead(DenseHead):
    """In place of focal loss and L1, with the matches that the model found or those of ATSS."""

    methods = ("compute_loss", "forward")

    def __init__(self, name: str, part: Any, loss: HeadLoss, candidates: int) -> None:
        super().__init__(name, part, loss)
        self.candidates = candidates  # of ATSS on a level; 0: the model's own matches
        self.locations: list[int] = []

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        self.locations = [feature.shape[-2] * feature.shape[-1] for feature in features]
        return self.original("forward", features)

    def compute_loss(
        self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        if self.candidates:
            at_location = len(anchors[0]) // sum(self.locations)
            levels = [count * at_location for count in self.locations]
            matched_idxs = [
                atss_match(target["boxes"], of_image, levels, self.candidates)
                for target, of_image in zip(targets, anchors, strict=True)
            ]
        return self.losses(targets, head_outputs, anchors, matched_idxs)

    def boxes(self, deltas: Tensor, anchors: Tensor, targets: Tensor) -> Boxes:
        coder: BoxCoder = self.part.regression_head.box_coder
        return _decoded(coder, deltas, coder.encode_single(targets, anchors), anchors)


class FCOSHead(DenseHead):
    """In place of focal, GIoU and centre-ness loss; scores are those of the classes alone."""

    methods = ("compute_loss", "forward")

    def put_in(self) -> None:
        super().put_in()
        layer = self.part.regression_head.bbox_ctrness
        self.trained = [name for name, value in layer.named_parameters() if value.requires_grad]
        layer.requires_grad_(False)

    def take_out(self) -> None:
        super().take_out()
        for name in self.trained:  # not the parameters, which may have been replaced since
            self.part.regression_head.bbox_ctrness.get_parameter(name).requires_grad_(True)

    def make_plain(self) -> None:
        super().make_plain()
        layer: nn.Conv2d = self.part.regression_head.bbox_ctrness
        for name, value in (("weight", 0.0), ("bias", _CERTAIN)):
            setattr(layer, name, nn.Parameter(torch.full_like(getattr(layer, name), value), requires_grad=False))

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        outputs = self.original("forward", features)
        # Certainly in the centre: torchvision multiplies scores by the sigmoid of it.
        outputs["bbox_ctrness"] = torch.full_like(outputs["bbox_ctrness"], math.inf)
        return outputs

    def compute_loss(
        self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        return self.losses(targets, head_outputs, anchors, matched_idxs)

    def boxes(self, deltas: Tensor, anchors: Tensor, targets: Tensor) -> Boxes:
        coder: BoxLinearCoder = self.part.box_coder
        return Boxes(coder.decode(deltas, anchors), targets, deltas, coder.encode(anchors, targets))


class RegionProposalNetwork(Head):
    """In place of the binary cross entropy and smooth L1 of sampled anchors: all that are not ignored."""

    methods = ("compute_loss",)

    def __init__(self, name: str, part: Any, loss: HeadLoss, weight: float) -> None:
        super().__init__(name, part, loss)
        self.weight = weight

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        marks = torch.cat(labels)  # 1, 0, and -1 ignored
        positive = marks >= 1
        targets = torch.cat(regression_targets)[positive]
        boxes = _decoded(self.part.box_coder, at_least_float32(pred_bbox_deltas[positive]), targets)
        out = self.loss(objectness.flatten(), marks, boxes)
        return out.classification * self.weight, out.box * self.weight


class RoIHeads(Head):
    """In place of cross entropy and smooth L1 of the box head, on all proposals; scores by a sigmoid for each class."""

    methods = (
        "forward",
        "add_gt_proposals",
        "subsample",
        "select_training_samples",
        "postprocess_detections",
    )

    def __init__(self, name: str, part: Any, loss: HeadLoss) -> None:
        super().__init__(name, part, loss)
        self.samples: tuple[Tensor, Tensor] | None = None
        self.kind: type[Any] = type(part)

    def put_in(self) -> None:
        if self.kind is SigmoidRoIHeads:  # of a plain copy, which has the sigmoid already
            self.part.__class__ = roi_heads.RoIHeads
        super().put_in()

    def take_out(self) -> None:
        super().take_out()
        self.part.__class__ = self.kind

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        # torchvision computes its own losses inside, by a function that cannot be replaced for one model. They cost
        # little beside pooling, are dropped here, and ours are made of what the predictor gave.
        predictions: list[tuple[Tensor, Tensor]] = []

        def keep(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
            predictions.append(outputs)
            if self.part.training and targets is not None:  # before torchvision's losses, which take any label or crash
                self.check_labels(targets, 1, outputs[0].shape[1] - 1)

        hook = self.part.box_predictor.register_forward_hook(keep)
        try:
            detections, losses = self.original("forward", features, proposals, image_shapes, targets)
        finally:
            hook.remove()
        if self.part.training:
            losses["loss_classifier"], losses["loss_box_reg"] = self.losses(*predictions[0])
        return detections, losses

    def losses(self, logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        assert self.samples is not None
        labels, targets = self.samples
        self.samples = None
        logits = logits[:, 1:]  # without the background
        positive = labels > 0
        classes = torch.where(positive, labels - 1, logits.shape[1])
        own = at_least_float32(deltas.unflatten(1, (-1, 4))[positive, labels[positive]])  # a box for each class
        out = self.loss(logits, classes, _decoded(self.part.box_coder, own, targets[positive]))
        return out.classification, out.box

    def add_gt_proposals(self, proposals: list[Tensor], gt_boxes: list[Tensor]) -> list[Tensor]:
        # As published: the configurations of Rank & Sort Loss keep the ground truth among the proposals, aLRP's do not.
        return (
            self.original("add_gt_proposals", proposals, gt_boxes) if self.loss.loss == "rank_sort" else list(proposals)
        )

    def subsample(self, labels: list[Tensor]) -> list[Tensor]:
        return [torch.where(label >= 0)[0] for label in labels]  # all but the ignored

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[Target] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        # torchvision rounds true boxes to the dtype of the proposals, half precision where the RPN ran under autocast.
        proposals = [at_least_float32(of_image) for of_image in proposals]
        selected = self.original("select_training_samples", proposals, targets)
        self.samples = torch.cat(selected[2]), torch.cat(selected[3])
        return selected

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """torchvision's, with the sigmoid of each class in place of the softmax."""
        logarithms, count = _as_distribution(class_logits)
        threshold = self.part.score_thresh
        self.part.score_thresh = threshold / count
        try:
            boxes, found, labels = self.original(
                "postprocess_detections", logarithms, box_regression, proposals, image_shapes
            )
        finally:
            self.part.score_thresh = threshold
        return boxes, [(score * count).clamp(max=1) for score in found], labels

    def make_plain(self) -> None:
        if type(self.part) is not roi_heads.RoIHeads or "postprocess_detections" in self.former:
            raise TypeError(
                f"model must detect by torchvision's own RoIHeads for a plain copy, got {type(self.part).__name__}"
                + " with a method of its own" * bool(self.former)
            )
        super().make_plain()
        self.part.__class__ = SigmoidRoIHeads


class SigmoidRoIHeads(roi_heads.RoIHeads):
    """Detects as torchvision's with :class:`RoIHeads` in its place, and can be scripted."""

    # TorchScript tells methods of a class apart by the names of their functions.
    _by_softmax = FunctionType(roi_heads.RoIHeads.postprocess_detections.__code__, roi_heads.__dict__, "_by_softmax")

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        logarithms, count = _as_distribution(class_logits)
        threshold = self.score_thresh
        self.score_thresh = threshold / count
        boxes, found, labels = self._by_softmax(logarithms, box_regression, proposals, image_shapes)
        self.score_thresh = threshold
        return boxes, [(score * count).clamp(max=1) for score in found], labels


def _as_distribution(class_logits: Tensor) -> tuple[Tensor, int]:
    """Logits (M, 1 + C) of which the softmax is the sigmoid of each class, divided by their number; and that number.

    The softmax of the logarithms of a distribution is that distribution: what is missing to 1 is background.
    """
    count = max(class_logits.shape[1] - 1, 1)
    scores = at_least_float32(class_logits[:, 1:]).sigmoid() / count
    rest = (1 - scores.sum(1, keepdim=True)).clamp(min=0)
    return torch.cat([rest, scores], 1).log(), count


def _decoded(coder: BoxCoder, deltas: Tensor, target_deltas: Tensor, anchors: Tensor | None = None) -> Boxes:
    """Boxes of deltas relative to their anchors, or to one anchor in place of all.

    Overlaps do not depend on where a pair of boxes is, nor on their unit, so where torchvision does not hand over the
    anchors, any other gives the same localisation error.
    """
    target_deltas = target_deltas.to(deltas.dtype)
    if anchors is None:
        anchors = deltas.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(deltas), 4)
    unlimited = BoxCoder(coder.weights, bbox_xform_clip=math.inf)  # a true box may be of any size
    predicted, target = coder.decode_single(deltas, anchors), unlimited.decode_single(target_deltas, anchors)
    weights = cast("tuple[float, ...]", coder.weights)
    return Boxes(predicted, target, in_deviations(deltas, weights), in_deviations(target_deltas, weights))


@propagates_errors
def _check_labels(targets: list[Target], first: int, last: int, *, process_group: ProcessGroup | None) -> None:
    """Raise TypeError or ValueError unless each box has one label, of a class of the head.

    On a GPU the latter is an asynchronous device assertion.
    """
    for image, target in enumerate(targets):
        shape, boxes = tuple(target["labels"].shape), len(target["boxes"])
        if shape != (boxes,):
            raise ValueError(f"labels of targets must have one entry a box, got {shape} for {boxes} in image {image}")
        if target["labels"].is_floating_point():
            raise TypeError(f"labels of targets must be integers, got {target['labels'].dtype} in image {image}")
    labels = torch.cat([target["labels"] for target in targets])

    def error() -> ValueError:
        seen = labels[(labels < first) | (labels > last)].unique().tolist()
        return ValueError(f"labels of targets must be in {first}..{last}, the classes of the head, got {seen}")

    check_values(((labels >= first) & (labels <= last)).all(), error, "labels of targets must be classes of the head")
