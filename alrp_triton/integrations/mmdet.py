# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false, reportIncompatibleMethodOverride=false
# MMDetection need not be installed where types are checked; where it is, its heads differ in the types they declare.
"""Ranking losses in MMDetection 3: heads that configs name, for all levels and images of a batch are one ranking.

::

    custom_imports = dict(imports=["alrp_triton.integrations.mmdet"])
    model = dict(
        bbox_head=dict(
            type="RankingRetinaHead",  # or "RankingATSSHead"
            ranking_loss=dict(loss="alrp", period=7330),  # the arguments of HeadLoss
        )
    )

All else of the head's config stays. Its ``loss_cls`` and ``loss_bbox`` are built and not used.
"""

from typing import Any

import torch
from torch import Tensor

from ..targets import IGNORE_INDEX
from .head_loss import Boxes, HeadLoss, at_least_float32, in_deviations

try:
    from mmdet.models.dense_heads import AnchorHead, ATSSHead, RetinaHead
    from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
    from mmdet.registry import MODELS
    from mmdet.structures.bbox import cat_boxes, get_box_tensor
except ImportError as missing:
    raise ImportError("this integration needs mmdet>=3.0 with mmengine and the mmcv that it asks for") from missing


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

    def __init__(self, *args: Any, ranking_loss: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        name = type(self).__name__
        if not isinstance(self, AnchorHead) or type(self).get_targets not in (
            AnchorHead.get_targets,
            ATSSHead.get_targets,
        ):
            raise TypeError(f"{name} must take its targets as mmdet's AnchorHead or ATSSHead does (get_targets)")
        if not self.use_sigmoid_cls:
            raise ValueError(
                f"loss_cls of {name} must have use_sigmoid=True: a softmax has no scores that can be ranked"
            )
        if not isinstance(ranking_loss, dict):
            raise TypeError(f"ranking_loss must be a dict of arguments of HeadLoss, got {type(ranking_loss).__name__}")
        self.ranking_loss = HeadLoss(**ranking_loss)
        if self.ranking_loss.box_loss == "smooth_l1" and not isinstance(self.bbox_coder, DeltaXYWHBBoxCoder):
            coder = type(self.bbox_coder).__name__
            raise ValueError(f"box_loss 'smooth_l1' needs bbox_coder DeltaXYWHBBoxCoder, got {coder}; take 'giou'")
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
        targets = self.get_targets(
            anchors,
            valid,
            batch_gt_instances,
            batch_img_metas,
            batch_gt_instances_ignore=batch_gt_instances_ignore,
        )
        # Image after image, in each level after level: the order of the anchors, and so that of the positives.
        first = 1 if isinstance(self, ATSSHead) else 0  # ATSSHead puts the anchors before them
        labels, weights, boxes = (torch.cat(levels, 1) for levels in targets[first : first + 3])
        logits = _flat(cls_scores, self.cls_out_channels)  # (B, N, C)
        deltas = _flat(bbox_preds, 4)
        if not logits.shape[:2] == deltas.shape[:2] == labels.shape == at_anchors.shape[:2]:
            shapes = [tuple(each.shape) for each in (logits, deltas, labels, at_anchors)]
            raise ValueError(f"scores, deltas, labels and anchors must agree in the number of anchors, got {shapes}")
        labels = torch.where(weights > 0, labels, IGNORE_INDEX)
        positive = (labels >= 0) & (labels < self.num_classes)
        out = self.ranking_loss(
            logits, labels, self._boxes(at_anchors[positive], at_least_float32(deltas[positive]), boxes[positive])
        )
        return {"loss_cls": out.classification, "loss_bbox": out.box}

    def _boxes(self, anchors: Tensor, deltas: Tensor, targets: Tensor) -> Boxes:
        predicted = get_box_tensor(self.bbox_coder.decode(anchors, deltas))
        if self.ranking_loss.box_loss == "giou":
            return Boxes(predicted, targets)
        weights = [1 / deviation for deviation in self.bbox_coder.stds]
        encoded = self.bbox_coder.encode(anchors, targets)
        return Boxes(predicted, targets, in_deviations(deltas, weights), in_deviations(encoded, weights))


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
