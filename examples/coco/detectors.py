"""A small RetinaNet, torchvision's own, with the aLRP Loss in its head."""

from collections import OrderedDict
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, generalized_box_iou_loss

from alrp_triton import ALRPLoss, SelfBalance, giou_localisation_error

from .scenes import NUM_CLASSES, SCENE_SIZE, Target

_CHANNELS = 48
_BACKBONE_CHANNELS = (16, 32, 48, 64)
_PYRAMID_LEVELS = 3  # strides 4, 8, 16
_ANCHOR_SIZES = ((16, 20), (25, 32), (40, 50))
_ASPECT_RATIOS = (1.4,)
_HEAD_CONVOLUTIONS = 2  # of torchvision's 4: scenes are small

_norm = partial(nn.GroupNorm, 8)


class ALRPHead(RetinaNetHead):
    """RetinaNet's head, trained with the aLRP Loss over the whole batch and all pyramid levels at once.

    A ranking loss compares every positive with every negative, so the batch must not be cut into images or levels.

    Args:
        in_channels: channels of the pyramid.
        num_anchors: anchors at each location.
        num_classes: foreground classes; labels are 0..num_classes - 1 and background has no logit.
        balance_period: iterations after which the weight of the localisation loss is set anew.
    """

    def __init__(self, in_channels: int, num_anchors: int, num_classes: int, balance_period: int) -> None:
        super().__init__(in_channels, num_anchors, num_classes, norm_layer=_norm)
        for branch in (self.classification_head, self.regression_head):
            branch.conv = branch.conv[:_HEAD_CONVOLUTIONS]
        self.criterion = ALRPLoss()
        self.balance = SelfBalance(period=balance_period)

    def compute_loss(
        self,
        targets: list[Target],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Computes the two parts of the loss; their sum is what to minimise.

        Args:
            targets: ground truth, one dict an image.
            head_outputs: `cls_logits` (B, A, C) and `bbox_regression` (B, A, 4).
            anchors: (A, 4) for each image.
            matched_idxs: (A,) for each image: the ground-truth box that each anchor matches, -1 for background, -2 for
                anchors between the two IoU thresholds.

        Returns:
            `classification` and `bbox_regression`, the latter weighted by the self-balancing weight.
        """
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        num_classes = logits.shape[-1]
        matched = torch.stack(matched_idxs)  # (B, A)
        foreground = matched >= 0
        # Both follow the order of the anchors, as the positives do.
        true_labels = torch.cat([t["labels"][m[m >= 0]] for t, m in zip(targets, matched_idxs, strict=True)])  # (P,)
        true_boxes = torch.cat([t["boxes"][m[m >= 0]] for t, m in zip(targets, matched_idxs, strict=True)])  # (P, 4)

        classes = torch.full_like(matched, num_classes)  # background
        classes[matched == self.classification_head.BETWEEN_THRESHOLDS] = -1  # ignored
        classes[foreground] = true_labels

        box_coder = self.regression_head.box_coder
        boxes = box_coder.decode_single(deltas[foreground], torch.stack(anchors)[foreground])
        errors = giou_localisation_error(generalized_box_iou_loss(boxes, true_boxes))

        out = self.criterion(logits.reshape(-1, num_classes), classes.flatten(), errors)
        weighted = self.balance(out.classification, out.localisation)
        return {"classification": out.classification, "bbox_regression": weighted}


class SmallBackbone(nn.Module):
    """Stages that halve the resolution, and a feature pyramid over the last three."""

    def __init__(self) -> None:
        super().__init__()
        conv = partial(Conv2dNormActivation, norm_layer=_norm)
        widths = (1, *_BACKBONE_CHANNELS)
        self.stages = nn.ModuleList(
            nn.Sequential(conv(narrow, wide, stride=2), conv(wide, wide)) for narrow, wide in pairwise(widths)
        )
        self.pyramid = FeaturePyramidNetwork(list(widths[-_PYRAMID_LEVELS:]), _CHANNELS)
        self.out_channels = _CHANNELS

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Maps images (B, 1, H, W) to the levels of the pyramid, finest first."""
        features: OrderedDict[str, Tensor] = OrderedDict()
        for index, stage in enumerate(self.stages):
            images = stage(images)
            features[str(index)] = images
        finest = len(self.stages) - _PYRAMID_LEVELS
        return self.pyramid(OrderedDict(list(features.items())[finest:]))


def build_detector(balance_period: int) -> RetinaNet:
    """Builds the detector for scenes of digits, with random weights."""
    backbone = SmallBackbone()
    anchor_generator = AnchorGenerator(_ANCHOR_SIZES, (_ASPECT_RATIOS,) * len(_ANCHOR_SIZES))
    num_anchors = anchor_generator.num_anchors_per_location()[0]
    return RetinaNet(
        backbone,
        NUM_CLASSES,
        min_size=SCENE_SIZE,
        max_size=SCENE_SIZE,
        image_mean=[0.5],
        image_std=[0.25],
        anchor_generator=anchor_generator,
        head=ALRPHead(backbone.out_channels, num_anchors, NUM_CLASSES, balance_period),
        # A ranking loss orders scores and leaves their level free, so no fixed threshold may cut them.
        score_thresh=0.0,
        topk_candidates=200,
        detections_per_img=50,
    )
