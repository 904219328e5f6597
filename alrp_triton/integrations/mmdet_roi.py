# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false, reportIncompatibleMethodOverride=false
# As in mmdet_dense.py.
"""The second stage of MMDetection's detectors: box heads of Faster, Mask and Cascade R-CNN."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..targets import IGNORE_INDEX
from .box_errors import at_least_float32
from .head_loss import HeadLoss
from .mmdet_dense import coded_boxes, head_loss_of

try:
    from mmdet.models.roi_heads.bbox_heads import BBoxHead, Shared2FCBBoxHead
    from mmdet.registry import MODELS
except ImportError as missing:
    raise ImportError("this integration needs mmdet>=3.0 with mmengine and the mmcv that it asks for") from missing

_ALL = 1_000_000  # more proposals than any image has


class ClassScores(nn.Module):
    """What a box head of mmdet asks its ``loss_cls`` for to have scores of its own: one sigmoid for each class."""

    custom_cls_channels = True
    custom_activation = True
    num_classes = 0  # of the head, set by it

    def get_cls_channels(self, num_classes: int) -> int:
        return num_classes

    def get_activation(self, logits: Tensor) -> Tensor:
        """Scores ``(N, C + 1)``: mmdet leaves a last column out, that of the background."""
        scores = at_least_float32(logits[:, : self.num_classes]).sigmoid()
        return torch.cat([scores, scores.new_zeros(len(scores), 1)], 1)


class RankingBBoxHeadMixin:
    """Gives a head derived from ``BBoxHead`` one ranking loss for all proposals of a batch. The first of the bases.

    ::

        @MODELS.register_module()
        class MyRankingHead(RankingBBoxHeadMixin, Shared4Conv1FCBBoxHead): ...

    Scores become independent for each class, by a sigmoid, and none stands for the background. A head that makes its
    classifier itself, as DoubleConvFCBBoxHead, keeps the column of the background: it is neither ranked nor detected.
    ``loss_cls`` of the config is replaced, ``loss_bbox`` built and not used.

    All proposals are ranked, so the sampler in ``train_cfg`` must leave none out. As published, ground truths are among
    them for ``"rank_sort"`` and not for the other losses::

        sampler=dict(type="RandomSampler", num=1e10, pos_fraction=0.25)  # rank_sort
        sampler=dict(type="PseudoSampler")  # alrp, ap

    Each stage of a Cascade R-CNN has a loss of its own, and ``stage_loss_weights`` hold. tau is 0.5 in all of them, as
    published, whatever the threshold of the stage's assigner.

    Args:
        *args: of the head.
        ranking_loss: arguments of :class:`HeadLoss`, as a dict.
        **kwargs: of the head.

    Raises:
        TypeError: ``ranking_loss`` is no dict; the head is no BBoxHead, or has a ``get_targets`` of its own.
        ValueError: the head lacks scores or boxes; ``box_loss`` is ``"smooth_l1"``, and the coder has no deltas; and
            what :class:`HeadLoss` raises. In training: a sampler that leaves proposals out, or that has ground truths
            among them where the paper has none, or the other way round.

    Reference: Oksuz et al., NeurIPS 2020, Section 5; Oksuz et al., ICCV 2021, Section 5; the published configurations.
    """

    ranking_loss: HeadLoss
    # Of the head.
    bbox_coder: Any
    num_classes: int
    reg_class_agnostic: bool
    get_targets: Any
    loss_cls: Any
    with_cls: bool
    with_reg: bool

    def __init__(self, *args: Any, ranking_loss: dict[str, Any], **kwargs: Any) -> None:
        name = type(self).__name__
        if not isinstance(self, BBoxHead) or type(self).get_targets is not BBoxHead.get_targets:
            raise TypeError(f"{name} must be a BBoxHead of mmdet and take its targets as that does (get_targets)")
        super().__init__(*args, **{**kwargs, "loss_cls": {"type": ClassScores}})  # pyright: ignore[reportCallIssue]
        if not (self.with_cls and self.with_reg):
            raise ValueError(f"{name} must have with_cls=True and with_reg=True: scores are ranked with boxes")
        self.loss_cls.num_classes = self.num_classes
        self.ranking_loss = head_loss_of(ranking_loss, self.bbox_coder)
        self.reg_decoded_bbox = True  # so that targets are boxes, which no coder has clipped

    def loss_and_target(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        rois: Tensor,
        sampling_results: list[Any],
        rcnn_train_cfg: Any,
        concat: bool = True,
        reduction_override: str | None = None,
    ) -> dict[str, Any]:
        """The losses of a batch, and its targets; arguments as BBoxHead has them."""
        _check_sampler(rcnn_train_cfg.get("sampler"), self.ranking_loss.loss)
        return super().loss_and_target(  # pyright: ignore[reportAttributeAccessIssue]
            cls_score, bbox_pred, rois, sampling_results, rcnn_train_cfg, concat, reduction_override
        )

    def loss(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        rois: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
        reduction_override: str | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch, ``loss_cls`` and ``loss_bbox``, 0-d each.

        Args:
            cls_score: ``(N, C)`` of all proposals, or ``(N, C + 1)``.
            bbox_pred: ``(N, 4)``, or ``(N, C * 4)`` with boxes for each class.
            rois: image and corners of the proposals, ``(N, 5)``.
            labels: ``(N,)``, C for background.
            label_weights: ``(N,)``; 0: the proposal is ignored.
            bbox_targets: true boxes of the positives, ``(N, 4)``.
            bbox_weights: not looked at.
            reduction_override: None, for a ranking is one number.
        """
        if reduction_override is not None:
            raise ValueError(f"reduction_override must be None, a ranking is one number; got {reduction_override!r}")
        labels = torch.where(label_weights > 0, labels, IGNORE_INDEX)
        positive = (labels >= 0) & (labels < self.num_classes)
        deltas = bbox_pred[positive]
        if not self.reg_class_agnostic:
            of_class = labels[positive][:, None, None].expand(-1, 1, 4)
            deltas = deltas.unflatten(1, (self.num_classes, 4)).gather(1, of_class)[:, 0]
        boxes = coded_boxes(self.ranking_loss, self.bbox_coder, rois[positive, 1:], deltas, bbox_targets[positive])
        out = self.ranking_loss(cls_score[:, : self.num_classes], labels, boxes)
        return {"loss_cls": out.classification, "loss_bbox": out.box}


def _check_sampler(sampler: Any, loss: str) -> None:
    """ValueError unless the sampler of a config keeps all proposals, with ground truths among them as published."""
    config = cast("dict[str, Any]", sampler or {})
    kind = config.get("type")
    kind = str(getattr(kind, "__name__", kind)).rpartition(".")[2]  # a name, with or without a scope, or a class
    takes_all, adds_truth = kind == "PseudoSampler", False
    if kind == "RandomSampler":
        takes_all = config["num"] * config["pos_fraction"] >= _ALL and config.get("neg_pos_ub", -1) < 0
        adds_truth = config.get("add_gt_as_proposals", True)
    if not takes_all or adds_truth != (loss == "rank_sort"):
        wanted = "no ground truths: dict(type='PseudoSampler')"
        if loss == "rank_sort":
            wanted = "the ground truths: dict(type='RandomSampler', num=1e10, pos_fraction=0.25)"
        raise ValueError(
            f"sampler of the box head's train_cfg must, for loss {loss!r}, keep all proposals and add {wanted}; "
            f"got {sampler}"
        )


@MODELS.register_module()
class RankingShared2FCBBoxHead(RankingBBoxHeadMixin, Shared2FCBBoxHead):
    """The box head of Faster R-CNN with a ranking loss; see :class:`RankingBBoxHeadMixin`."""
