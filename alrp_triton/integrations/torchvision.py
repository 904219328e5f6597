"""Ranking losses in torchvision's detectors: one call puts them in, one takes them out; their code stays theirs.

::

    model = retinanet_resnet50_fpn(num_classes=91)
    loss = use_ranking_loss(model, "alrp", period=len(loader))
    losses = model(images, targets)  # the same keys as before
    sum(losses.values()).backward()

Methods are replaced on the model's own head, by ones that call those of its class; parameters and buffers are not
touched, so a ``state_dict`` fits the model with and without the loss. The state of the self-balancing is in
``loss.state_dict()``.
"""

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..boxes import TAU
from ..checks import check_number
from ..dispatch import Backend
from ..distributed import GradientReduction, ProcessGroup
from .atss import CANDIDATES, atss_match
from .head_loss import Boxes, BoxLoss, DetectorLoss, HeadLoss, Loss, at_least_float32

try:
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder, Matcher
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
except ImportError as missing:
    raise ImportError("this integration needs torchvision, in the version that fits your torch") from missing

Assignment = Literal["iou", "atss"]
Target = dict[str, Tensor]

TAU_RPN = 0.7
RPN_WEIGHT = 0.2
_STANDARD = (10.0, 10.0, 5.0, 5.0)  # 1 / standard deviation of the four deltas, as the published heads have them
_IGNORED = -1
_UNIT = 1024.0  # side of the anchor that relative boxes are decoded with; large, for box losses add an epsilon to areas


def use_ranking_loss(
    model: nn.Module,
    loss: Loss = "alrp",
    *,
    period: int | None = None,
    assignment: Assignment = "iou",
    box_loss: BoxLoss | None = None,
    box_weight: float | None = None,
    delta: float | None = None,
    rpn_weight: float = RPN_WEIGHT,
    process_group: ProcessGroup | None = None,
    gradient_reduction: GradientReduction = "mean",
    backend: Backend = "auto",
) -> DetectorLoss:
    """Makes a detector of torchvision train with a ranking loss, and with the box loss of its paper.

    All logits of a batch, of all images and levels, are one ranking, without sampling; what the matcher ignores is
    left out. In training the model returns losses under the names that it has without, to be added up.

    - RetinaNet: focal loss and L1 are replaced.
    - FCOS: so is the centre-ness, for scores are ranked by overlaps already: it is neither trained (its layer is
      frozen) nor looked at.
    - Faster R-CNN (Mask R-CNN, Keypoint R-CNN): in the RPN with tau = 0.7, and in the box head with tau = 0.5, where
      scores become independent for each class, by a sigmoid instead of the softmax; the column of the background is
      left alone. All proposals are used, ground truth is not added to them. Masks and keypoints stay as they are.

    Put it in before ``DistributedDataParallel`` and ``torch.compile`` are put around the model. To detect, RetinaNet
    and the RPN work without it; FCOS and the box head of Faster R-CNN need it, for their scores are other ones. A
    ranking fixes the order of scores and not their level: ``model.score_thresh`` (``model.roi_heads.score_thresh``)
    may want to be lower.

    Args:
        model: ``RetinaNet``, ``FCOS``, ``FasterRCNN`` or another ``GeneralizedRCNN`` with torchvision's parts.
        loss: ``"alrp"``, ``"ap"`` or ``"rank_sort"``.
        period: of aLRP's self-balancing, an epoch in your steps, ``len(loader)``.
        assignment: of RetinaNet's anchors: ``"iou"``, the model's own matcher, or ``"atss"``.
        box_loss: see :class:`HeadLoss`.
        box_weight: see :class:`HeadLoss`; of both heads of a Faster R-CNN.
        delta: see :class:`HeadLoss`.
        rpn_weight: of both losses of the RPN; published: 0.2.
        process_group: see :class:`HeadLoss`; with DistributedDataParallel, ``"world"`` ranks what all GPUs have.
        gradient_reduction: see :class:`HeadLoss`.
        backend: see :class:`HeadLoss`.

    Returns:
        The losses, :class:`HeadLoss` by the name of the head: ``"head"``, or ``"rpn"`` and ``"roi_heads"``. Save its
        ``state_dict()`` with your checkpoint. Called again, the model's losses are replaced by new ones.

    Raises:
        TypeError: the model is none of these. ValueError: ``assignment`` that is unknown or not for this model; and
        what :class:`HeadLoss` raises. The model is then as before.

    Reference: Oksuz et al., NeurIPS 2020, Section 5, and the published configurations.
    """
    if assignment not in get_args(Assignment):
        raise ValueError(f"assignment must be 'iou' or 'atss', got {assignment!r}")
    if assignment == "atss" and not isinstance(model, RetinaNet):
        raise ValueError(f"assignment 'atss' is for RetinaNet; {type(model).__name__} has one of its own")
    rpn_weight = check_number("rpn_weight", rpn_weight, 0.0, math.inf)

    def head_loss(tau: float) -> HeadLoss:
        return HeadLoss(
            loss,
            period=period,
            tau=tau,
            box_loss=box_loss,
            box_weight=box_weight,
            delta=delta,
            process_group=process_group,
            gradient_reduction=gradient_reduction,
            backend=backend,
        )

    heads: list[_Head]
    if isinstance(model, FCOS):
        heads = [_FCOSHead("head", model.head, head_loss(TAU))]
    elif isinstance(model, RetinaNet):
        heads = [_RetinaNetHead("head", model.head, head_loss(TAU), assignment)]
    elif isinstance(model, GeneralizedRCNN):
        rpn = _RegionProposalNetwork("rpn", model.rpn, head_loss(TAU_RPN), rpn_weight)
        heads = [rpn, _RoIHeads("roi_heads", model.roi_heads, head_loss(TAU))]
    else:
        raise TypeError(f"model must be a RetinaNet, FCOS or FasterRCNN of torchvision, got {type(model).__name__}")
    remove_ranking_loss(model)
    for head in heads:
        head.put_in()
    return DetectorLoss({head.name: head.loss for head in heads})


def remove_ranking_loss(model: nn.Module) -> None:
    """Gives a detector the losses of torchvision back; nothing happens where it has them."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            head = getattr(value, "__self__", None)
            if isinstance(head, _Head):
                delattr(module, name)
                head.taken_out()


class _Head:
    """Stands in for some methods of a detector's part. Copied and pickled with it, for they are its attributes.

    ``methods`` are those; each calls that of the part's class where it does not do the whole work itself.
    """

    methods: tuple[str, ...]

    def __init__(self, name: str, part: Any, loss: HeadLoss) -> None:
        self.name, self.part, self.loss = name, part, loss

    def put_in(self) -> None:
        for method in self.methods:
            setattr(self.part, method, getattr(self, method))

    def taken_out(self) -> None:
        """Undoes what else :meth:`put_in` did."""

    def original(self, method: str, *arguments: Any) -> Any:
        return getattr(type(self.part), method)(self.part, *arguments)


class _DenseHead(_Head):
    """A head that predicts at every anchor of every level."""

    def losses(
        self, targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor], matched: list[Tensor]
    ) -> dict[str, Tensor]:
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
        classes[matches == Matcher.BETWEEN_THRESHOLDS] = _IGNORED
        classes[positive] = labels
        # Under autocast the coder would round anchors to the dtype of the deltas.
        predicted = self.boxes(at_least_float32(deltas[positive]), torch.stack(anchors)[positive], boxes)
        out = self.loss(logits, classes, predicted)
        return {"classification": out.classification, "bbox_regression": out.box}

    def boxes(self, deltas: Tensor, anchors: Tensor, targets: Tensor) -> Boxes:
        raise NotImplementedError


class _RetinaNetHead(_DenseHead):
    methods = ("compute_loss", "forward")

    def __init__(self, name: str, part: Any, loss: HeadLoss, assignment: Assignment) -> None:
        super().__init__(name, part, loss)
        self.atss = assignment == "atss"
        self.locations: list[int] = []

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        self.locations = [feature.shape[-2] * feature.shape[-1] for feature in features]
        return self.original("forward", features)

    def compute_loss(
        self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        if self.atss:
            at_location = len(anchors[0]) // sum(self.locations)
            levels = [count * at_location for count in self.locations]
            matched_idxs = [
                atss_match(target["boxes"], of_image, levels, CANDIDATES * at_location)
                for target, of_image in zip(targets, anchors, strict=True)
            ]
        return self.losses(targets, head_outputs, anchors, matched_idxs)

    def boxes(self, deltas: Tensor, anchors: Tensor, targets: Tensor) -> Boxes:
        coder: BoxCoder = self.part.regression_head.box_coder
        return _decoded(coder, deltas, coder.encode_single(targets, anchors), anchors)


class _FCOSHead(_DenseHead):
    methods = ("compute_loss", "forward")

    def put_in(self) -> None:
        super().put_in()
        self.part.regression_head.bbox_ctrness.requires_grad_(False)

    def taken_out(self) -> None:
        self.part.regression_head.bbox_ctrness.requires_grad_(True)

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


class _RegionProposalNetwork(_Head):
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


class _RoIHeads(_Head):
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
        return list(proposals)

    def subsample(self, labels: list[Tensor]) -> list[Tensor]:
        return [torch.where(label >= 0)[0] for label in labels]  # all but the ignored

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[Target] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        selected = self.original("select_training_samples", proposals, targets)
        self.samples = torch.cat(selected[2]), torch.cat(selected[3])
        return selected

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """torchvision's, with the sigmoid of each class in place of the softmax.

        The softmax of the logarithms of a distribution is that distribution. So give it the sigmoids, divided by their
        number, with what is missing to 1 as background, and multiply the scores again.
        """
        count = max(class_logits.shape[1] - 1, 1)
        scores = at_least_float32(class_logits[:, 1:]).sigmoid() / count
        rest = (1 - scores.sum(1, keepdim=True)).clamp(min=0)
        logarithms = torch.cat([rest, scores], 1).log()
        threshold = self.part.score_thresh
        self.part.score_thresh = threshold / count
        try:
            boxes, found, labels = self.original(
                "postprocess_detections", logarithms, box_regression, proposals, image_shapes
            )
        finally:
            self.part.score_thresh = threshold
        return boxes, [score * count for score in found], labels


def _decoded(coder: BoxCoder, deltas: Tensor, target_deltas: Tensor, anchors: Tensor | None = None) -> Boxes:
    """Boxes of deltas relative to their anchors, or to one anchor in place of all.

    Overlaps do not depend on where a pair of boxes is, nor on their unit, so where torchvision does not hand over the
    anchors, any other gives the same localisation error.
    """
    if anchors is None:
        anchors = deltas.new_tensor([0.0, 0.0, _UNIT, _UNIT]).expand(len(deltas), 4)
    unlimited = BoxCoder(coder.weights, bbox_xform_clip=math.inf)  # a true box may be of any size
    predicted, target = coder.decode_single(deltas, anchors), unlimited.decode_single(target_deltas, anchors)
    scale = deltas.new_tensor(_STANDARD) / deltas.new_tensor(cast("tuple[float, ...]", coder.weights))
    return Boxes(predicted, target, deltas * scale, target_deltas * scale)
