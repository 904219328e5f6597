# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false, reportIncompatibleMethodOverride=false
# As in mmdet_dense.py.
"""The mask branch of MMDetection's Mask R-CNN beside Rank & Sort Loss."""

import copy
from typing import Any

import torch
from torch import Tensor

from .head_loss import greatest_scores
from .masks import draw_masks
from .mmdet_roi import RankingBBoxHeadMixin

try:
    from mmdet.models.roi_heads import StandardRoIHead
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmdet.registry import MODELS
    from mmdet.structures.bbox import bbox2roi
except ImportError as missing:
    raise ImportError("this integration needs mmdet>=3.0 with mmengine and the mmcv that it asks for") from missing

_OF_POSITIVES = ("pos_inds", "pos_priors", "pos_is_gt", "pos_assigned_gt_inds", "pos_gt_labels", "pos_gt_bboxes")


@MODELS.register_module()
class RankingMaskRoIHead(StandardRoIHead):
    """mmdet's ``StandardRoIHead``, whose masks train as Rank & Sort Loss has it: dice in place of cross entropy.

    The loss is :meth:`HeadLoss.mask_loss` of the box head's ``ranking_loss``, its targets those of the mask head, of
    which ``loss_mask`` is built and not used. At most 200 positives of a process train masks in a step, drawn at random
    before the mask head runs. Parameters are those of ``StandardRoIHead``, and detection is its own.

    Args:
        **kwargs: of ``StandardRoIHead``.

    Raises:
        TypeError: the box head has no ranking loss; the mask head is no FCNMaskHead, or has a loss of its own.
        ValueError: a ranking loss other than ``"rank_sort"``: its paper has no masks, and ``StandardRoIHead`` trains
            them as it does. In training: what :class:`RankingBBoxHeadMixin` and :meth:`HeadLoss.mask_loss` raise.

    Reference: Oksuz et al., ICCV 2021, and the published implementation of its Mask R-CNN.
    """

    # Of the head.
    bbox_head: Any
    mask_head: Any
    train_cfg: Any
    share_roi_extractor: bool

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        name, box = type(self).__name__, getattr(self, "bbox_head", None)
        mask: Any = getattr(self, "mask_head", None)
        if not isinstance(box, RankingBBoxHeadMixin):
            raise TypeError(
                f"bbox_head of {name} must have a ranking loss, as RankingShared2FCBBoxHead has; "
                f"got {type(box).__name__}"
            )
        if box.ranking_loss.loss != "rank_sort":
            raise ValueError(
                f"ranking_loss of {name} must be 'rank_sort', the only one that trains masks; "
                f"got {box.ranking_loss.loss!r}, which StandardRoIHead is for"
            )
        if not isinstance(mask, FCNMaskHead) or type(mask).loss_and_target is not FCNMaskHead.loss_and_target:
            raise TypeError(
                f"mask_head of {name} must be a FCNMaskHead of mmdet, with its loss_and_target; "
                f"got {type(mask).__name__}"
            )
        # What the loss of masks needs of that of boxes, between the two: scores of the positives, classification loss.
        self.ranked: tuple[Tensor, Tensor] | None = None

    def bbox_loss(self, x: Any, sampling_results: list[Any]) -> dict[str, Any]:
        """The losses of the box head, as StandardRoIHead has them."""
        results = super().bbox_loss(x, sampling_results)
        logits = results["cls_score"].detach()[:, : self.bbox_head.num_classes]
        of_images = logits.split([len(each.priors) for each in sampling_results])
        # In each image, mmdet has the positives first.
        positive = [rows[: len(each.pos_priors)] for rows, each in zip(of_images, sampling_results, strict=True)]
        self.ranked = greatest_scores(torch.cat(positive)), results["loss_bbox"]["loss_cls"].detach()
        return results

    def mask_loss(
        self, x: Any, sampling_results: list[Any], bbox_feats: Tensor, batch_gt_instances: list[Any]
    ) -> dict[str, Any]:
        """The loss of the mask head, ``loss_mask``; arguments and results as StandardRoIHead has them."""
        assert self.ranked is not None
        (scores, classification), self.ranked = self.ranked, None
        drawn = draw_masks(torch.ones_like(scores, dtype=torch.bool))
        of_images = drawn.split([len(each.pos_priors) for each in sampling_results])
        kept = _only(sampling_results, of_images)
        if self.share_roi_extractor:
            rows = [
                torch.cat([which, which.new_zeros(len(each.neg_priors))])
                for which, each in zip(of_images, kept, strict=True)
            ]
            results = self._mask_forward(x, pos_inds=torch.cat(rows), bbox_feats=bbox_feats)
        else:
            results = self._mask_forward(x, bbox2roi([each.pos_priors for each in kept]))
        masks = results["mask_preds"]  # (P, C, h, w), or (P, 1, h, w) for all classes
        true = self.mask_head.get_targets(kept, batch_gt_instances, self.train_cfg)
        classes = torch.cat([each.pos_gt_labels for each in kept])
        if self.mask_head.class_agnostic:
            classes = torch.zeros_like(classes)
        own = masks[torch.arange(len(masks), device=masks.device), classes]
        loss = self.bbox_head.ranking_loss.mask_loss(own, true, scores[drawn], classification)
        return {**results, "loss_mask": {"loss_mask": loss}}


def _only(sampling_results: list[Any], of_images: tuple[Tensor, ...]) -> list[Any]:
    """The same with these positives alone. Copies, for the originals are the box head's, too."""
    found: list[Any] = []
    for each, which in zip(sampling_results, of_images, strict=True):
        found.append(copy.copy(each))
        for name in _OF_POSITIVES:
            setattr(found[-1], name, getattr(each, name)[which])
    return found
