# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false
# detectron2 is not installed where types are checked.
"""Ranking losses in detectron2's RetinaNet. **Untested here**: detectron2 is not on PyPI.

Written from detectron2's source and tested with a stand-in for its base class alone. With a config::

    from alrp_triton.integrations.detectron2 import add_ranking_loss_config

    cfg = get_cfg()
    add_ranking_loss_config(cfg)
    cfg.merge_from_file(...)  # of a RetinaNet
    cfg.MODEL.META_ARCHITECTURE = "RankingRetinaNet"
    cfg.MODEL.RANKING_LOSS.PERIOD = 7330  # an epoch in your steps
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .box_errors import Boxes, at_least_float32, in_deviations
from .head_loss import HeadLoss

try:
    from detectron2.config import CfgNode, configurable
    from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
    from detectron2.utils.events import get_event_storage
except ImportError as missing:
    raise ImportError("this integration needs detectron2, built for your torch from its repository") from missing

__all__ = ["RankingRetinaNet", "add_ranking_loss_config"]


def add_ranking_loss_config(cfg: Any) -> None:
    """Adds ``MODEL.RANKING_LOSS``, the arguments of :class:`HeadLoss` in capitals, with its defaults."""
    arguments = signature(HeadLoss).parameters.values()
    cfg.MODEL.RANKING_LOSS = CfgNode({argument.name.upper(): argument.default for argument in arguments})


@META_ARCH_REGISTRY.register()
class RankingRetinaNet(RetinaNet):
    """RetinaNet with a ranking loss in place of focal loss and smooth L1, for all levels and images at once.

    Anchors, their labels and the transform of boxes stay those of RetinaNet; anchors between the matcher's thresholds
    are ignored. ``focal_loss_*``, ``smooth_l1_beta``, ``box_reg_loss_type`` and ``loss_normalizer`` mean nothing here.
    The state of the self-balancing is part of the model, so it is in the checkpoint, under ``ranking_loss``.

    Args:
        ranking_loss: a :class:`HeadLoss`; from a config, made of ``MODEL.RANKING_LOSS``.
        **kwargs: of RetinaNet.

    Raises:
        TypeError: ``ranking_loss`` is none.
        ValueError: its ``box_loss`` is ``"smooth_l1"``, and the transform has no weights of deltas.

    Reference: Oksuz et al., NeurIPS 2020, Section 5; Oksuz et al., ICCV 2021, Section 5.
    """

    ranking_loss: HeadLoss
    # Of RetinaNet.
    box2box_transform: Any
    num_classes: int

    @configurable
    def __init__(self, *, ranking_loss: HeadLoss, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(ranking_loss, HeadLoss):
            raise TypeError(f"ranking_loss must be a HeadLoss, got {type(ranking_loss).__name__}")
        if ranking_loss.box_loss == "smooth_l1" and not hasattr(self.box2box_transform, "weights"):
            transform = type(self.box2box_transform).__name__
            raise ValueError(f"box_loss 'smooth_l1' needs a Box2BoxTransform, got {transform}; take 'giou'")
        self.ranking_loss = ranking_loss

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        if "RANKING_LOSS" not in cfg.MODEL:
            raise ValueError("cfg.MODEL must have RANKING_LOSS; call add_ranking_loss_config(cfg) first")
        arguments = {name.lower(): value for name, value in cfg.MODEL.RANKING_LOSS.items()}
        return {**super().from_config(cfg), "ranking_loss": HeadLoss(**arguments)}

    def losses(
        self,
        anchors: list[Any],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """The losses of a batch, ``loss_cls`` and ``loss_box_reg``, 0-d each; to be added up, as detectron2 does.

        Args:
            anchors: ``Boxes`` of each level.
            pred_logits: ``(B, A, K)`` for each level.
            gt_labels: ``(N,)`` for each image, N anchors of all levels; -1 ignored, K background.
            pred_anchor_deltas: ``(B, A, 4)`` for each level.
            gt_boxes: ``(N, 4)`` for each image; of positives.
        """
        # Image after image, in each level after level: the order of the labels, and so that of the positives.
        logits, deltas = torch.cat(pred_logits, 1), torch.cat(pred_anchor_deltas, 1)  # (B, N, K), (B, N, 4)
        at_anchors = torch.cat([level.tensor for level in anchors])  # (N, 4)
        labels = torch.stack(gt_labels)
        if not logits.shape[:2] == deltas.shape[:2] == labels.shape == (len(logits), len(at_anchors)):
            shapes = [tuple(each.shape) for each in (logits, deltas, labels, at_anchors)]
            raise ValueError(f"logits, deltas, labels and anchors must agree in the number of anchors, got {shapes}")
        positive = (labels >= 0) & (labels < self.num_classes)
        targets = torch.stack(gt_boxes)[positive]
        get_event_storage().put_scalar("num_pos_anchors", len(targets) / len(labels))
        at_positives = at_anchors.expand(len(labels), -1, -1)[positive]
        boxes = self._boxes(at_positives, at_least_float32(deltas[positive]), targets)
        out = self.ranking_loss(logits, labels, boxes)
        return {"loss_cls": out.classification, "loss_box_reg": out.box}

    def _boxes(self, anchors: Tensor, deltas: Tensor, targets: Tensor) -> Boxes:
        transform = self.box2box_transform
        predicted = transform.apply_deltas(deltas, anchors)
        if self.ranking_loss.box_loss == "giou":
            return Boxes(predicted, targets)
        encoded, weights = transform.get_deltas(anchors, targets), transform.weights
        return Boxes(predicted, targets, in_deviations(deltas, weights), in_deviations(encoded, weights))
