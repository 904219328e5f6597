"""What stands in for the mask loss of torchvision's Mask R-CNN, beside the losses of its box head."""

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from ..distributed import ProcessGroup, propagates_errors
from .head_loss import HeadLoss, greatest_scores
from .masks import draw_masks
from .torchvision_heads import RoIHeads, Target


class MaskRoIHeads(RoIHeads):
    """Also in place of the cross entropy of masks: dice, weighted and balanced as Rank & Sort Loss has it."""

    methods = (*RoIHeads.methods, "has_mask")

    def __init__(self, name: str, part: Any, loss: HeadLoss) -> None:
        super().__init__(name, part, loss)
        self.hides_masks = False
        self.selected: tuple[list[Tensor], ...] = ()
        self.logits: Tensor | None = None

    def has_mask(self) -> bool:
        return not self.hides_masks and self.original("has_mask")

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        # torchvision would run the mask branch on all positives, and compute a loss that cannot be replaced for one
        # model. While it trains it is told that there is no such branch, which then runs here.
        trains = self.part.training and self.original("has_mask")
        self.hides_masks = trains
        try:
            detections, losses = super().forward(features, proposals, image_shapes, targets)
        finally:
            self.hides_masks = False
        if trains:
            assert targets is not None
            losses["loss_mask"] = self.mask_loss(features, image_shapes, targets, losses["loss_classifier"])
        return detections, losses

    def mask_loss(
        self,
        features: dict[str, Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target],
        classification: Tensor,
    ) -> Tensor:
        assert self.logits is not None
        (proposals, matched, labels, _), logits = self.selected, self.logits
        self.selected, self.logits = (), None
        classes = torch.cat(labels)
        drawn = draw_masks(classes > 0)
        of_images = drawn.split([len(of_image) for of_image in labels])
        boxes = [of_image[which] for of_image, which in zip(proposals, of_images, strict=True)]
        pooled = self.part.mask_roi_pool(features, boxes, image_shapes)
        masks = self.part.mask_predictor(self.part.mask_head(pooled))  # (P, C, h, w)
        true = [
            project_masks_on_boxes(target["masks"], of_image, match[which], masks.shape[-1])
            for target, of_image, match, which in zip(targets, boxes, matched, of_images, strict=True)
        ]
        own = masks[torch.arange(len(masks), device=masks.device), classes[drawn]]
        return self.loss.mask_loss(own, torch.cat(true), greatest_scores(logits[drawn]), classification)

    def losses(self, logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        self.logits = logits[:, 1:].detach()  # without the background
        return super().losses(logits, deltas)

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[Target] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        self.selected = selected = super().select_training_samples(proposals, targets)
        return selected

    def check_labels(self, targets: list[Target], first: int, last: int) -> None:
        super().check_labels(targets, first, last)
        _check_masks(targets, process_group=self.loss.criterion.process_group)


@propagates_errors
def _check_masks(targets: list[Target], *, process_group: ProcessGroup | None) -> None:
    """ValueError unless each box has a mask: torchvision takes too many, and too few are read beyond their memory."""
    for image, target in enumerate(targets):
        if "masks" not in target:
            raise ValueError(
                f"targets of a model with a mask branch must have 'masks', got {[*target]} in image {image}"
            )
        shape, boxes = tuple(target["masks"].shape), len(target["boxes"])
        if len(shape) != 3 or shape[0] != boxes:
            raise ValueError(f"masks of targets must have one entry a box, got {shape} for {boxes} in image {image}")
