# pyright: reportMissingImports=false
"""Small models of Ultralytics, what their heads say, and their rankings by hand. It is told to keep off the network."""

import os
import tempfile
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from reference.dense import alrp_loss, ap_loss, rank_sort_loss
from tests.support.boxes_by_hand import iou_and_giou
from tests.support.compare import assert_near

pytest.importorskip("torchvision.ops", reason="the integrations need torchvision", exc_type=ImportError)
# Before it is imported: it keeps settings and counts in a folder, looks for newer versions and installs what it misses.
_FOLDER = tempfile.TemporaryDirectory()
_SAID = np.get_printoptions()
os.environ.update(YOLO_CONFIG_DIR=_FOLDER.name, YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
_GIVEN = set(os.environ)
pytest.importorskip("ultralytics", reason="ultralytics is a user's, not the package's", exc_type=ImportError)

from ultralytics.cfg import get_cfg  # noqa: E402
from ultralytics.nn import tasks  # noqa: E402

from alrp_triton.integrations import ultralytics_criterion  # noqa: E402

# What it sets for all that is imported beside it, and for processes that are started: one thread, and how numbers print.
for _name in set(os.environ) - _GIVEN:
    del os.environ[_name]
np.set_printoptions(**_SAID)
torch.set_printoptions(profile="default")

CLASSES, SIDE, GAIN = 3, 64, 0.5
LEVELS = [(8, 8), (4, 4), (2, 2)]
ANCHORS = sum(h * w for h, w in LEVELS)
BOXES = [(0, 2, (5, 6, 40, 44)), (0, 0, (30, 20, 62, 50)), (2, 1, (10, 10, 26, 30)), (2, 1, (11, 12, 60, 61))]
"""Image, class, corners. Nothing is in the second image."""


def build(name: str = "yolo11n", kind: str = "DetectionModel", **args: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(tasks, kind)(f"{name}.yaml", ch=3, nc=CLASSES, verbose=False).train()
    model.args = get_cfg(overrides={"cls": GAIN, "epochs": 3, **args})
    return model


def batch_of(boxes: Any = BOXES, images: int = 3) -> dict[str, Tensor]:
    corners = torch.tensor([box for *_, box in boxes], dtype=torch.float32).reshape(-1, 4)
    torch.manual_seed(1)
    return {
        "img": torch.rand(images, 3, SIDE, SIDE),
        "batch_idx": torch.tensor([float(image) for image, *_ in boxes]),
        "cls": torch.tensor([float(label) for _, label, _ in boxes]),
        "bboxes": torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1) / SIDE,
    }


def outputs_of(model: Any, dtype: torch.dtype = torch.float32, images: int = 3) -> Any:
    """What a head gives to its criterion, by chance: of each branch its own."""
    head = model.model[-1]

    def branch() -> dict[str, Any]:
        boxes = torch.randn(images, 4 * head.reg_max, ANCHORS) * 2
        if head.reg_max == 1:
            boxes = boxes.abs() + 0.5
        feats = [torch.zeros(images, 1, *level, dtype=dtype) for level in LEVELS]
        scores = torch.randn(images, CLASSES, ANCHORS)
        return {name: value.to(dtype).requires_grad_() for name, value in (("boxes", boxes), ("scores", scores))} | {
            "feats": feats
        }

    torch.manual_seed(2)
    return {name: branch() for name in ("one2many", "one2one")} if hasattr(head, "one2one_cv2") else branch()


class ByHand(NamedTuple):
    """The ranking of a branch. Positives are in the order of their anchors."""

    logits: np.ndarray
    dense: np.ndarray
    grades: np.ndarray
    errors: Tensor
    """Of localisation, of all positives; differentiable in the outputs for boxes."""


def by_hand(criterion: Any, outputs: dict[str, Any], batch: dict[str, Tensor]) -> ByHand:
    """Boxes of the outputs, one by one and in pixels, and what the criterion's assigner says of them."""
    logits, raw = outputs["scores"].permute(0, 2, 1), outputs["boxes"].permute(0, 2, 1)
    images, bins = len(logits), raw.shape[-1] // 4
    strides = torch.tensor([SIDE // h for h, w in LEVELS for _ in range(h * w)], dtype=torch.float32)
    points = torch.tensor([(x + 0.5, y + 0.5) for h, w in LEVELS for y in range(h) for x in range(w)])
    sides = raw.float().unflatten(-1, (4, bins))
    sides = (sides.softmax(-1) * torch.arange(bins)).sum(-1) if bins > 1 else sides[..., 0]
    boxes = torch.cat([points - sides[..., :2], points + sides[..., 2:]], -1) * strides[:, None]
    most = max(1, int(torch.bincount(batch["batch_idx"].long(), minlength=images).max()))
    labels, true = torch.zeros(images, most, 1), torch.zeros(images, most, 4)
    counts = [0] * images
    for image, label, box in zip(batch["batch_idx"], batch["cls"], batch["bboxes"] * SIDE, strict=True):
        place = (int(image), counts[int(image)])
        labels[place], counts[int(image)] = label, counts[int(image)] + 1
        true[place] = torch.cat([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])
    there = (true.sum(-1, keepdim=True) > 0).float()
    assigner = vars(criterion)["assigner"]
    out = assigner(logits.detach().sigmoid(), boxes.detach(), points * strides[:, None], labels, true, there)
    dense, grades, errors = np.zeros(logits.shape, np.int64), np.zeros(logits.shape), list[Tensor]()
    for image, anchor in out[3].nonzero().tolist():
        label = int(out[0][image, anchor])
        dense[image, anchor, label] = 1
        grades[image, anchor, label] = float(out[2][image, anchor, label])
        mine, its = boxes[image, anchor], out[1][image, anchor]
        width, height = (torch.minimum(mine[2:], its[2:]) - torch.maximum(mine[:2], its[:2])).clamp(min=0)
        hull = (torch.maximum(mine[2:], its[2:]) - torch.minimum(mine[:2], its[:2])).prod()
        union = (mine[2:] - mine[:2]).prod() + (its[2:] - its[:2]).prod() - width * height
        giou = width * height / union - (hull - union) / hull
        assert_near(giou, iou_and_giou(mine.tolist(), its.tolist())[1], 1e-3)
        errors.append((1 - giou) / 2 / 0.5)
    return ByHand(
        logits.detach().float().numpy(), dense, grades, torch.stack(errors) if errors else boxes.sum()[None][:0]
    )


def branches(criterion: Any, outputs: Any, items: Any = None) -> list[tuple[str, Any, dict[str, Any]]]:
    parts = ultralytics_criterion.parts_of(criterion)
    return [(name, part, outputs if name == "head" else outputs[name]) for name, part in parts.items()]


def expected(loss: str, hand: ByHand) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Classification, localisation, and the gradients of logits and errors."""
    if loss == "ap":
        ap = ap_loss(hand.logits, hand.dense)
        return ap.loss, 0.0, ap.grad_logits, np.zeros(0)
    if loss == "rank_sort":  # of grade 0 are negatives
        positive = hand.grades > 0
        ranked = rank_sort_loss(hand.logits, positive.astype(np.int64), hand.grades[positive])
        return ranked.ranking + ranked.sorting, 0.0, ranked.grad_ranking + ranked.grad_sorting, np.zeros(0)
    out = alrp_loss(hand.logits, hand.dense, hand.errors.detach().numpy())
    return out.classification, out.localisation, out.grad_logits, out.grad_box_errors


def losses_of(part: Any, outputs: dict[str, Any], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a criterion gives to minimise, and its items: boxes, classes, DFL or L1."""
    total, items = part.loss(outputs, batch)
    return total, torch.stack(list(items.values()))
