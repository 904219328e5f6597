# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false, reportIncompatibleMethodOverride=false
# MMDetection need not be installed where types are checked; where it is, its heads differ in the types they declare.
"""MMDetection's heads that predict at anchors, RetinaNet, ATSS, PAA and RPN."""

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..targets import IGNORE_INDEX
from .box_errors import Boxes, at_least_float32, in_deviations
from .head_loss import RPN_WEIGHT, TAU_RPN, HeadLoss

try:
    from mmdet.models.dense_heads import AnchorHead, ATSSHead, PAAHead, RetinaHead, RPNHead
    from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
    from mmdet.models.task_modules.samplers import PseudoSampler
    from mmdet.registry import MODELS
    from mmdet.structures.bbox import cat_boxes, get_box_tensor
except ImportError as missing:
    raise ImportError("this integration needs mmdet>=3.0 with mmengine and the mmcv that it asks for") from missing


def head_loss_of(ranking_loss: dict[str, Any], coder: Any = None) -> HeadLoss:
    """The loss of a head by its config's arguments; ``coder`` is that of its boxes, if it has one."""
    if not isinstance(ranking_loss, dict):
        raise TypeError(f"ranking_loss must be a dict of arguments of HeadLoss, got {type(ranking_loss).__name__}")
    loss = HeadLoss(**ranking_loss)
    if coder is not None and loss.box_loss == "smooth_l1" and not isinstance(coder, DeltaXYWHBBoxCoder):
        raise ValueError(
            f"box_loss 'smooth_l1' needs bbox_coder DeltaXYWHBBoxCoder, got {type(coder).__name__}; take 'giou'"
        )
    return loss


def coded_boxes(loss: HeadLoss, coder: Any, anchors: Tensor, deltas: Tensor, targets: Tensor) -> Boxes:
    """The boxes of positives, in float32 at least, from their deltas relative to anchors or proposals; ``(P, 4)``."""
    anchors, deltas = at_least_float32(anchors), at_least_float32(deltas)
    predicted = get_box_tensor(coder.decode(anchors, deltas))
    if loss.box_loss == "giou":
        return Boxes(predicted, targets)
    weights = [1 / deviation for deviation in coder.stds]
    encoded = coder.encode(anchors, targets)
    return Boxes(predicted, targets, in_deviations(deltas, weights), in_deviations(encoded, weights))


def check_sigmoid(head: Any) -> None:
    """ValueError where a dense head has a softmax."""
    if not head.use_sigmoid_cls:
        raise ValueError(
            f"loss_cls of {type(head).__name__} must have use_sigmoid=True: a softmax has no scores that can be ranked"
        )


class RankingHeadMixin:
    """Gives a head derived from ``AnchorHead`` one ranking loss for all levels and images. The first of the bases.

    ::

        @MODELS.register_module()
        class MyRankingHead(RankingHeadMixin, MyHead): ...

    Anchors, their assignment to ground truth and the coder of boxes stay those of the head. Anchors of label weight 0
    (between the assigner's thresholds, outside of the image, not sampled) are ignored; other label weights mean nothing
    here, nor does ``avg_factor``. What the head predicts beside scores and boxes is dropped, in training and inference.

    The state of the self-balancing is part of the head, so it is in the checkpoint, under ``ranking_loss``.

    Args:
        *args: of the head.
        ranking_loss: arguments of :class:`HeadLoss`, as a dict.
        **kwargs: of the head.

    Raises:
        TypeError: ``ranking_loss`` is no dict; the head does not take its targets as AnchorHead or ATSSHead does.
        ValueError: the head has a softmax; ``box_loss`` is ``"smooth_l1"``, and the coder has no deltas; and what
            :class:`HeadLoss` raises.

    Reference: Oksuz et al., NeurIPS 2020, Section 5; Oksuz et al., ICCV 2021, Section 5.
    """

    ranking_loss: HeadLoss
    # Of the head.
    bbox_coder: Any
    get_anchors: Any
    get_targets: Any
    num_classes: int
    cls_out_channels: int
    use_sigmoid_cls: bool

    _known_targets: tuple[Any, ...] = (AnchorHead.get_targets, ATSSHead.get_targets)

    def __init__(self, *args: Any, ranking_loss: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self, AnchorHead) or type(self).get_targets not in self._known_targets:
            raise TypeError(
                f"{type(self).__name__} must take its targets as mmdet's AnchorHead or ATSSHead does (get_targets)"
            )
        check_sigmoid(self)
        self.ranking_loss = head_loss_of(ranking_loss, self.bbox_coder)
        self.reg_decoded_bbox = True  # so that targets are boxes, which no coder has clipped

    def forward(self, x: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores ``(B, A * C, H, W)`` and deltas ``(B, A * 4, H, W)`` of each level."""
        scores, deltas, *_ = super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        return scores, deltas

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        batch_gt_instances: list[Any],
        batch_img_metas: list[dict[str, Any]],
        batch_gt_instances_ignore: list[Any] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch, ``loss_cls`` and ``loss_bbox``, 0-d each; to be added up, as mmdet does.

        Args:
            cls_scores: ``(B, A * C, H, W)`` for each level.
            bbox_preds: ``(B, A * 4, H, W)`` for each level.
            batch_gt_instances: ground truth of each image, with ``bboxes`` and ``labels``.
            batch_img_metas: of each image.
            batch_gt_instances_ignore: regions to be ignored of each image.
        """
        sizes = [score.shape[-2:] for score in cls_scores]
        anchors, valid = self.get_anchors(sizes, batch_img_metas, device=cls_scores[0].device)
        # Before the targets are taken, for ATSSHead changes these lists.
        at_anchors = torch.stack([get_box_tensor(cat_boxes(levels)) for levels in anchors])  # (B, N, 4)
        logits = _flat(cls_scores, self.cls_out_channels)  # (B, N, C)
        deltas = _flat(bbox_preds, 4)
        truth = anchors, valid, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore
        labels, weights, boxes = self._targets(logits, deltas, *truth)
        if not logits.shape[:2] == deltas.shape[:2] == labels.shape == at_anchors.shape[:2]:
            shapes = [tuple(each.shape) for each in (logits, deltas, labels, at_anchors)]
            raise ValueError(f"scores, deltas, labels and anchors must agree in the number of anchors, got {shapes}")
        labels = torch.where(weights > 0, labels, IGNORE_INDEX)
        positive = (labels >= 0) & (labels < self.num_classes)
        found = at_anchors[positive], deltas[positive], boxes[positive]
        out = self.ranking_loss(logits, labels, coded_boxes(self.ranking_loss, self.bbox_coder, *found))
        return {"loss_cls": out.classification, "loss_bbox": out.box}

    def _targets(self, logits: Tensor, deltas: Tensor, *truth: Any) -> tuple[Tensor, ...]:
        """Labels and their weights, ``(B, N)``, and boxes, ``(B, N, 4)``, in the order of the anchors.

        Image after image, in each level after level. That is the order of the positives, too.
        """
        targets = self.get_targets(*truth)
        first = 1 if isinstance(self, ATSSHead) else 0  # ATSSHead puts the anchors before them
        return tuple(torch.cat(levels, 1) for levels in targets[first : first + 3])


def _flat(levels: list[Tensor], channels: int) -> Tensor:
    """``(B, A * channels, H, W)`` of each level to ``(B, N, channels)``, in the order of the anchors."""
    return torch.cat([each.permute(0, 2, 3, 1).reshape(len(each), -1, channels) for each in levels], 1)


@MODELS.register_module()
class RankingRetinaHead(RankingHeadMixin, RetinaHead):
    """RetinaNet's head with a ranking loss in place of focal loss and L1; see :class:`RankingHeadMixin`."""


@MODELS.register_module()
class RankingATSSHead(RankingHeadMixin, ATSSHead):
    """ATSS' head with a ranking loss in place of focal, GIoU and centre-ness loss; see :class:`RankingHeadMixin`.

    A score that is ranked by overlaps makes the centre-ness superfluous: its layer stays, so that checkpoints of ATSS
    fit, but it is frozen, and detections are scored without it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.atss_centerness.requires_grad_(False)


@MODELS.register_module()
class RankingPAAHead(RankingATSSHead, PAAHead):
    """PAA's head with a ranking loss in place of focal, GIoU and IoU loss; see :class:`RankingHeadMixin`.

    Anchors are assigned by PAA's own losses, ``loss_cls`` and ``loss_bbox`` of its config: a mixture of two Gaussians
    for each ground truth, which needs scikit-learn. The layer that predicts overlaps stays and is frozen, and
    detections are scored and voted for without it.

    Reference: Kim, Lee: "Probabilistic Anchor Assignment with IoU Prediction for Object Detection", ECCV 2020; Oksuz et
    al., ICCV 2021, Section 5.2.
    """

    score_voting: Any
    _known_targets = (PAAHead.get_targets,)

    def _targets(self, logits: Tensor, deltas: Tensor, *truth: Any) -> tuple[Tensor, ...]:
        anchors = truth[0]
        assigned: list[tuple[Tensor, Tensor]] = []
        targets = self.get_targets(*truth)  # of each image, level after level
        with torch.no_grad():
            logits, deltas = at_least_float32(logits), at_least_float32(deltas)
            for levels, scores, own, labels, weights, boxes, of_boxes, positives, owners in zip(
                anchors, logits, deltas, *targets, strict=True
            ):
                losses = self.get_pos_loss(levels, scores, own, labels, weights, boxes, of_boxes, positives)[0]
                assigned.append(self.paa_reassign(losses, labels, weights, of_boxes, positives, owners, levels)[:2])
        labels, weights = (torch.stack(each) for each in zip(*assigned, strict=True))
        return labels, weights, torch.stack(targets[2])

    def predict_by_feat(
        self, cls_scores: list[Tensor], bbox_preds: list[Tensor], score_factors: None = None, **kwargs: Any
    ) -> list[Any]:
        """Detections of each image, scored by their class alone; arguments as PAAHead has them."""
        overlaps = [torch.full_like(deltas[:, ::4], math.inf) for deltas in bbox_preds]  # 1 after the sigmoid
        return super().predict_by_feat(cls_scores, bbox_preds, overlaps, **kwargs)

    def _bbox_post_process(self, results: Any, *args: Any, **kwargs: Any) -> Any:
        # PAAHead scores and votes by the root of class times overlap, which here is 1.
        results.scores = at_least_float32(results.scores).square()
        return super()._bbox_post_process(results, *args, **kwargs)


@MODELS.register_module()
class RankingRPNHead(RankingHeadMixin, RPNHead):
    """RPN with a ranking loss in place of cross entropy and L1, on all anchors that are not ignored.

    Args:
        *args: of RPNHead.
        ranking_loss: arguments of :class:`HeadLoss`, as a dict; ``tau`` is 0.7 unless given.
        weight: of both losses; published: 0.2.
        **kwargs: of RPNHead.

    Raises:
        ValueError: ``train_cfg`` has a sampler other than PseudoSampler; and what :class:`RankingHeadMixin` raises.
        TypeError: what :class:`RankingHeadMixin` raises.

    Reference: the configurations of Faster R-CNN of both papers.
    """

    def __init__(self, *args: Any, ranking_loss: dict[str, Any], weight: float = RPN_WEIGHT, **kwargs: Any) -> None:
        if isinstance(ranking_loss, dict):
            ranking_loss = {"tau": TAU_RPN, **ranking_loss}
        super().__init__(*args, ranking_loss=ranking_loss, **kwargs)
        self.loss_weight = check_number("weight", weight, 0.0, math.inf)
        if self.train_cfg and not isinstance(self.sampler, PseudoSampler):
            raise ValueError(
                f"sampler of {type(self).__name__} must be dict(type='PseudoSampler'), for all anchors are ranked; "
                f"got {type(self.sampler).__name__}"
            )

    def loss_by_feat(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The losses of a batch, ``loss_rpn_cls`` and ``loss_rpn_bbox``; see :class:`RankingHeadMixin`."""
        losses = super().loss_by_feat(*args, **kwargs)
        return {name.replace("loss_", "loss_rpn_"): value * self.loss_weight for name, value in losses.items()}
