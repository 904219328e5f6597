"""The detectors: torchvision's, and a small RetinaNet for two CPU cores; and weights to begin with."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from .errors import UserError, in_a_line

SMALL = "retinanet_small"
DETECTORS = (
    SMALL,
    *(n for n in torchvision.models.list_models(detection) if n.startswith(("retina", "fcos", "fasterrcnn"))),
)

_norm = partial(nn.GroupNorm, 8)


def make_detector(name: str, categories: int, size: int) -> tuple[nn.Module, int]:
    """A detector with random weights, and the label that it has for the first category: 1 where 0 is the background.

    Args:
        name: one of ``DETECTORS``.
        categories: how many.
        size: shorter side that images are resized to.
    """
    if name not in DETECTORS:
        raise UserError(f"detector must be one of {', '.join(DETECTORS)}; got {name!r}")
    first = int(name.startswith("fasterrcnn"))
    # A ranking loss orders scores and leaves their level free, so no threshold may cut them. Without sampling all
    # proposals are used, 1000 as published.
    own: dict[str, Any] = (
        {"box_score_thresh": 0.001, "rpn_post_nms_top_n_train": 1000} if first else {"score_thresh": 0.0}
    )
    if name == SMALL:
        return _small_retinanet(categories, min_size=size, max_size=4 * size, **own), first
    sizes = {"min_size": size, "max_size": round(size * 5 / 3)}
    build = partial(torchvision.models.get_model, name, weights=None, weights_backbone=None)
    return build(num_classes=categories + first, **sizes, **own), first


def _small_retinanet(categories: int, **settings: Any) -> nn.Module:
    """For small objects in small images, such as digits of 14 to 44 pixels in 128."""
    backbone = _SmallBackbone()
    sizes = ((16, 20), (25, 32), (40, 50))
    anchors = AnchorGenerator(sizes, ((1.4,),) * len(sizes))
    head = RetinaNetHead(backbone.out_channels, anchors.num_anchors_per_location()[0], categories, norm_layer=_norm)
    for branch in (head.classification_head, head.regression_head):
        branch.conv = branch.conv[:2]  # of torchvision's 4
    own: dict[str, Any] = {"anchor_generator": anchors, "head": head, "topk_candidates": 200, "detections_per_img": 100}
    return detection.RetinaNet(backbone, categories, **own, **settings)


class _SmallBackbone(nn.Module):
    """Four stages that halve the resolution, and a feature pyramid over the last three, of strides 4, 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        conv, widths = partial(Conv2dNormActivation, norm_layer=_norm), (16, 32, 48, 64)
        self.stages = nn.ModuleList(
            nn.Sequential(conv(narrow, wide, stride=2), conv(wide, wide)) for narrow, wide in pairwise((3, *widths))
        )
        self.out_channels = 48
        self.pyramid = FeaturePyramidNetwork(list(widths[1:]), self.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps images (B, 3, H, W) to the levels of the pyramid, finest first."""
        features: dict[str, Tensor] = {}  # of all but the first; in types that torch.jit.script knows
        for index, stage in enumerate(self.stages):
            images = stage(images)
            if index > 0:
                features[str(index)] = images
        return self.pyramid(features)


def read_weights(source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name from a file, or torchvision's by their name; and what a checkpoint says of its own model.

    Args:
        source: a file of ``torch.save`` or safetensors with a state_dict, alone or as ``state_dict`` or ``model``, or
            such as ``"ResNet50_Weights.IMAGENET1K_V2"``, which torchvision downloads.

    Raises:
        UserError: there is no such file or name, it holds no weights, or it cannot be downloaded.
    """
    file = Path(source)
    wrong = "there is no such file, and none of this name at torchvision"
    try:
        if not file.is_file():
            weights = torchvision.models.get_weight(source)
            wrong = f"cannot be downloaded; fetch {weights.url} by other means, and give the file"
            return dict(weights.get_state_dict(progress=True)), {}
        wrong = "cannot be read"
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file), {}
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: of unpickling, zip, json, the network
        raise UserError(f"weights {source}: {wrong}: {in_a_line(error)}") from error
    about = content.get("hyper_parameters", {}) if isinstance(content, dict) else {}
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {n: t for n, t in content.items() if isinstance(t, Tensor)} if isinstance(content, dict) else {}
    if about.get("detector") in DETECTORS:  # a checkpoint of ours, with the state of the loss in it
        tensors = {name: value for name, value in tensors.items() if not name.startswith("losses.")}
    if not tensors:
        raise UserError(f"weights {source}: there are no tensors with names in it")
    return tensors, about


def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> str:
    """Takes what fits by name and shape; returns a sentence on how much that is.

    Names may have what wrappers put before them, or lack what a detector puts before its backbone's.

    Raises:
        UserError: nothing fits; the model is as before.
    """
    own = model.state_dict()
    for wrapper in ("module.", "_orig_mod.", "model.", "detector.") * 2:
        if sum(name.startswith(wrapper) for name in tensors) > len(tensors) / 2:
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    named: dict[str, Tensor] = {}
    fits: set[str] = set()
    for prefix in ("", "backbone.", "backbone.body."):
        these = {prefix + name: value for name, value in tensors.items()}
        fit = {name for name, value in these.items() if name in own and own[name].shape == value.shape}
        if len(fit) > len(fits):
            named, fits = these, fit
    if not fits:
        raise UserError(
            f"none of {len(tensors)} weights, such as {next(iter(tensors))!r}, has a name and shape of this detector"
        )
    model.load_state_dict(own | {name: named[name] for name in fits})
    said = f"begins with {len(fits)} of {len(tensors)} given tensors, of the detector's {len(own)}"
    if left := [name for name in named if name not in fits]:
        said += f"; left out, for want of a place or of its shape: {', '.join(left[:3])}{', ...' * (len(left) > 3)}"
    if len(left) > len(tensors) / 4:
        said += " (are these weights of another detector?)"
    return said
