"""Ranking losses in MMDetection 3: heads that configs name, for all levels and images of a batch are one ranking.

::

    custom_imports = dict(imports=["alrp_triton.integrations.mmdet"])
    model = dict(
        bbox_head=dict(
            type="RankingRetinaHead",
            ranking_loss=dict(loss="alrp", period=7330),  # as HeadLoss
        )
    )

- One stage: :class:`RankingRetinaHead`, :class:`RankingATSSHead`, :class:`RankingPAAHead`, :class:`RankingFoveaHead`.
- Two stages: :class:`RankingRPNHead`, :class:`RankingShared2FCBBoxHead`, :class:`RankingMaskRoIHead`.
- A head of your own: :class:`RankingHeadMixin`, :class:`RankingBBoxHeadMixin`.

All else of the head's config stays. Its ``loss_cls`` and ``loss_bbox`` are built and not used, but by PAA, which
assigns anchors by them, and in box heads, where ``loss_cls`` is replaced. ``RankingMaskRoIHead`` is a Mask R-CNN's
``roi_head`` with Rank & Sort Loss; with another, masks train as mmdet's own.
"""

from .mmdet_dense import (
    RankingATSSHead,
    RankingHeadMixin,
    RankingPAAHead,
    RankingRetinaHead,
    RankingRPNHead,
)
from .mmdet_fovea import RankingFoveaHead
from .mmdet_masks import RankingMaskRoIHead
from .mmdet_roi import RankingBBoxHeadMixin, RankingShared2FCBBoxHead

__all__ = [
    "RankingATSSHead",
    "RankingBBoxHeadMixin",
    "RankingFoveaHead",
    "RankingHeadMixin",
    "RankingMaskRoIHead",
    "RankingPAAHead",
    "RankingRPNHead",
    "RankingRetinaHead",
    "RankingShared2FCBBoxHead",
]
