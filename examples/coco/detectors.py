"""The detectors: torchvision's, with random weights, and a small RetinaNet for two CPU cores."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn
from torchvision.models.detection import (
    RetinaNet,
    fasterrcnn_resnet50_fpn,
    fcos_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

_CHANNELS = 48
_BACKBONE_CHANNELS = (16, 32, 48, 64)
_PYRAMID_LEVELS = 3  # strides 4, 8, 16
_ANCHOR_SIZES = ((16, 20), (25, 32), (40, 50))
_ASPECT_RATIOS = (1.4,)
_HEAD_CONVOLUTIONS = 2  # of torchvision's 4

_norm = partial(nn.GroupNorm, 8)


class Detector(NamedTuple):
    """A model, and the label that it has for the first category: 1 where 0 is the background."""

    model: nn.Module
    first_label: int


class SmallBackbone(nn.Module):
    """Stages that halve the resolution, and a feature pyramid over the last three."""

    def __init__(self) -> None:
        super().__init__()
        conv = partial(Conv2dNormActivation, norm_layer=_norm)
        widths = (3, *_BACKBONE_CHANNELS)
        self.stages = nn.ModuleList(
            nn.Sequential(conv(narrow, wide, stride=2), conv(wide, wide)) for narrow, wide in pairwise(widths)
        )
        self.pyramid = FeaturePyramidNetwork(list(widths[-_PYRAMID_LEVELS:]), _CHANNELS)
        self.out_channels = _CHANNELS

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Maps images (B, 3, H, W) to the levels of the pyramid, finest first."""
        features: OrderedDict[str, Tensor] = OrderedDict()
        for index, stage in enumerate(self.stages):
            images = stage(images)
            features[str(index)] = images
        finest = len(self.stages) - _PYRAMID_LEVELS
        return self.pyramid(OrderedDict(list(features.items())[finest:]))


def _small_retinanet(categories: int, size: int) -> Detector:
    """For small objects in small images, such as digits of 14 to 44 pixels in 128."""
    backbone = SmallBackbone()
    anchors = AnchorGenerator(_ANCHOR_SIZES, (_ASPECT_RATIOS,) * len(_ANCHOR_SIZES))
    head = RetinaNetHead(_CHANNELS, anchors.num_anchors_per_location()[0], categories, norm_layer=_norm)
    for branch in (head.classification_head, head.regression_head):
        branch.conv = branch.conv[:_HEAD_CONVOLUTIONS]
    model = RetinaNet(
        backbone,
        categories,
        min_size=size,
        max_size=4 * size,
        anchor_generator=anchors,
        head=head,
        # A ranking loss orders scores and leaves their level free, so no fixed threshold may cut them.
        score_thresh=0.0,
        topk_candidates=200,
        detections_per_img=100,
    )
    return Detector(model, first_label=0)


def _resnet50(builder: Callable[..., nn.Module], first_label: int, categories: int, size: int) -> Detector:
    # weights_backbone=None: nothing is downloaded; --init takes a file.
    # A ranking loss leaves the level of scores free. Without sampling all proposals are used, 1000 as published.
    of_model = {"box_score_thresh": 0.001, "rpn_post_nms_top_n_train": 1000} if first_label else {"score_thresh": 0.0}
    model = builder(
        weights=None,
        weights_backbone=None,
        num_classes=categories + first_label,
        min_size=size,
        max_size=round(size * 5 / 3),
        **of_model,
    )
    return Detector(model, first_label)


DETECTORS: dict[str, Callable[[int, int], Detector]] = {
    "retinanet_small": _small_retinanet,
    "retinanet_resnet50": partial(_resnet50, retinanet_resnet50_fpn_v2, 0),
    "fcos_resnet50": partial(_resnet50, fcos_resnet50_fpn, 0),
    "fasterrcnn_resnet50": partial(_resnet50, fasterrcnn_resnet50_fpn, 1),
}
"""By name: makes one, for a number of categories and a size of the shorter side of images."""
