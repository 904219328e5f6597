"""Adaptive Training Sample Selection: which anchors a ground truth is assigned to, by statistics of its overlaps."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from ..checks import check_integer

__all__ = ["atss_match"]

BACKGROUND = -1
CANDIDATES = 9


def atss_match(
    boxes: Tensor, anchors: Tensor, anchors_per_level: Sequence[int], candidates: int = CANDIDATES
) -> Tensor:
    """Matches the anchors of an image with its ground truth.

    A ground truth's candidates are, on each level, the anchors whose centres are closest to its own. Of them those are
    positives that lie inside of it and overlap it by no less than the mean of all its candidates plus their standard
    deviation. An anchor that is a positive of several belongs to the one it overlaps most.

    Args:
        boxes: ground truth, corners, ``(M, 4)``; M may be 0.
        anchors: corners, ``(A, 4)``, level after level.
        anchors_per_level: how many anchors each level has; A in total.
        candidates: how many on each level; published: 9, with one anchor at a location. With more, the repositories of
            aLRP and Rank & Sort Loss still take 9, the authors of ATSS 9 for each.

    Returns:
        int64 ``(A,)``: the index of the ground truth of each anchor, -1 for background. No anchor is ignored.

    Raises:
        TypeError, ValueError: ``anchors_per_level`` that do not add up to A, ``candidates`` that are no int from 1 on.

    Reference: Zhang, Chi, Yao, Lei, Li: "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive
    Training Sample Selection", CVPR 2020, arXiv:1912.02424; Algorithm 1.
    """
    if sum(anchors_per_level) != len(anchors):
        raise ValueError(f"anchors_per_level must add up to {len(anchors)} anchors, got {list(anchors_per_level)}")
    check_integer("candidates", candidates, 1, 2**31)
    if len(boxes) == 0 or len(anchors) == 0:
        return torch.full((len(anchors),), BACKGROUND, dtype=torch.int64, device=anchors.device)
    boxes = boxes.to(anchors.dtype)
    overlaps = box_iou(boxes, anchors)  # (M, A)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    distances = torch.cdist((boxes[:, :2] + boxes[:, 2:]) / 2, centres, compute_mode="donot_use_mm_for_euclid_dist")
    chosen: list[Tensor] = []
    first = 0
    for count in anchors_per_level:
        nearest = distances[:, first : first + count].topk(min(candidates, count), largest=False).indices
        chosen.append(nearest + first)
        first += count
    candidate = torch.cat(chosen, 1)  # (M, K)
    of_candidates = overlaps.gather(1, candidate)
    spread = of_candidates.std(1, keepdim=True) if candidate.shape[1] > 1 else 0.0
    positive = of_candidates >= of_candidates.mean(1, keepdim=True) + spread
    at = centres[candidate]  # (M, K, 2)
    positive &= ((at > boxes[:, None, :2]) & (at < boxes[:, None, 2:])).all(-1)
    overlap = torch.full_like(overlaps, -1.0)
    overlap.scatter_(1, candidate, torch.where(positive, of_candidates, -1.0))
    most, owner = overlap.max(0)
    return torch.where(most >= 0, owner, BACKGROUND)
