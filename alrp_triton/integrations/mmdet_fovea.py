# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false, reportIncompatibleMethodOverride=false
# As in mmdet_dense.py.
"""MMDetection's head of FoveaBox, which has no anchors."""

from typing import Any, cast

import torch
from torch import Tensor

from .box_errors import Boxes, at_least_float32
from .mmdet_dense import check_sigmoid, head_loss_of

try:
    from mmdet.models.dense_heads import FoveaHead
    from mmdet.registry import MODELS
except ImportError as missing:
    raise ImportError("this integration needs mmdet>=3.0 with mmengine and the mmcv that it asks for") from missing

_SMOOTH_L1_BETA = 0.11


@MODELS.register_module()
class RankingFoveaHead(FoveaHead):
    """FoveaBox' head with a ranking loss in place of focal loss and smooth L1, for all levels and images.

    Targets stay mmdet's own: which locations belong to an object, on one level or several, and its box, whose sides are
    clipped to 1/16 and 16 times the edge of the level. Regions to be ignored are not looked at, as in FoveaHead.

    Smooth L1, the box loss of ``"ap"``, is taken of what the head predicts, logarithms of distances, with beta = 0.11,
    as published.

    Args:
        *args: of FoveaHead.
        ranking_loss: arguments of :class:`HeadLoss`, as a dict.
        **kwargs: of FoveaHead.

    Raises:
        TypeError: ``ranking_loss`` is no dict.
        ValueError: the head has a softmax; and what :class:`HeadLoss` raises.

    Reference: Kong et al., "FoveaBox: Beyond Anchor-based Object Detector", TIP 2020; Oksuz et al., NeurIPS 2020,
    Section 5.
    """

    def __init__(self, *args: Any, ranking_loss: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_sigmoid(self)
        self.ranking_loss = head_loss_of(ranking_loss)
        self.ranking_loss.smooth_l1_beta = _SMOOTH_L1_BETA

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        batch_gt_instances: list[Any],
        batch_img_metas: list[dict[str, Any]],
        batch_gt_instances_ignore: list[Any] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch, ``loss_cls`` and ``loss_bbox``, 0-d each; arguments as :class:`RankingHeadMixin`'s."""
        sizes: list[Any] = [score.shape[-2:] for score in cls_scores]
        # Half precision would put the locations on whole pixels.
        dtype = torch.promote_types(bbox_preds[0].dtype, torch.float32)
        locations = self.prior_generator.grid_priors(sizes, dtype=dtype, device=bbox_preds[0].device)
        labels, targets = cast("tuple[Tensor, Tensor]", self.get_targets(batch_gt_instances, sizes, locations))
        # Level after level, in each image after image: the order of get_targets, and so that of the positives.
        logits, deltas = (
            torch.cat([each.permute(0, 2, 3, 1).reshape(-1, each.shape[1]) for each in levels])
            for levels in (cls_scores, bbox_preds)
        )
        positive = (labels >= 0) & (labels < self.num_classes)
        own, true = at_least_float32(deltas[positive]), targets[positive]
        out = self.ranking_loss(logits, labels, Boxes(_around(own), _around(true), own, true))
        return {"loss_cls": out.classification, "loss_bbox": out.box}


def _around(distances: Tensor) -> Tensor:
    """Boxes around the origin, by the logarithms of how far their sides are, in units of the level's edge.

    Overlaps depend neither on where a pair of boxes is, nor on their unit.
    """
    return distances.exp() * distances.new_tensor([-1.0, -1.0, 1.0, 1.0])
