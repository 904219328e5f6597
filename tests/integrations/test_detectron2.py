"""The arithmetic of the adapter for detectron2, which is not on PyPI, on stand-ins for the few of its classes that it uses.

This says nothing of detectron2 itself: the stand-ins follow its source as it was read, and no more of it.
"""

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.boxes_by_hand import differentiable
from tests.support.compare import assert_gradient, assert_near

pytest.importorskip("torchvision.ops", reason="the integrations need torchvision", exc_type=ImportError)
if importlib.util.find_spec("detectron2") is not None:
    pytest.skip("detectron2 is here: its stand-ins would hide it", allow_module_level=True)

from torchvision.ops import generalized_box_iou_loss

from alrp_triton.integrations.head_loss import HeadLoss

CLASSES, LEVELS = 3, (24, 6)
WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # detectron2's RetinaNet


class StandInBoxes:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class StandInTransform:
    weights = WEIGHTS
    scale_clamp = math.log(1000.0 / 16)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        size, target = src_boxes[:, 2:] - src_boxes[:, :2], target_boxes[:, 2:] - target_boxes[:, :2]
        shift = (target_boxes[:, :2] + target / 2 - src_boxes[:, :2] - size / 2) / size
        return torch.cat([shift, (target / size).log()], 1)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        size = boxes[:, 2:] - boxes[:, :2]
        centre = boxes[:, :2] + size / 2 + deltas[:, :2] * size
        half = deltas[:, 2:].clamp(max=self.scale_clamp).exp() * size / 2
        return torch.cat([centre - half, centre + half], 1)


class StandInRetinaNet(nn.Module):
    def __init__(self, *, num_classes: int, box2box_transform: Any) -> None:
        super().__init__()
        self.num_classes, self.box2box_transform = num_classes, box2box_transform

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        return {"num_classes": cfg.MODEL.NUM_CLASSES, "box2box_transform": StandInTransform()}


class StandInCfgNode(dict[str, Any]):
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # pyright: ignore[reportAssignmentType]


def stand_in_configurable(init: Any) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, **(type(self).from_config(args[0]) if args else kwargs))

    return wrapped


class StandInRegistry:
    def register(self) -> Callable[[type], type]:
        return self.same

    def same(self, made: type) -> type:
        return made


class StandInStorage:
    scalars: dict[str, float]

    def put_scalar(self, name: str, value: float) -> None:
        self.scalars = {name: value}


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The adapter's module on the stand-ins, and without it afterwards."""
    storage = StandInStorage()
    contents: dict[str, dict[str, Any]] = {
        "detectron2": {},
        "detectron2.config": {"CfgNode": StandInCfgNode, "configurable": stand_in_configurable},
        "detectron2.modeling": {"META_ARCH_REGISTRY": StandInRegistry(), "RetinaNet": StandInRetinaNet},
        "detectron2.utils": {},
        "detectron2.utils.events": {"get_event_storage": lambda: storage},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    name = "alrp_triton.integrations.detectron2"
    sys.modules.pop(name, None)
    module = importlib.import_module(name)
    vars(module)["storage"] = storage
    yield module
    sys.modules.pop(name, None)


def batch() -> tuple[Any, ...]:
    """Anchors, logits, labels, deltas and true boxes of three images; the second one is empty."""
    generator = torch.Generator().manual_seed(0)
    count = sum(LEVELS)

    def boxes(*shape: int) -> Tensor:
        corner = 50 * torch.rand(*shape, 2, generator=generator)
        return torch.cat([corner, corner + 10 + 30 * torch.rand(*shape, 2, generator=generator)], -1)

    logits = [torch.randn(3, n, CLASSES, generator=generator).requires_grad_() for n in LEVELS]
    deltas = [(0.2 * torch.randn(3, n, 4, generator=generator)).requires_grad_() for n in LEVELS]
    labels = torch.randint(-1, CLASSES + 3, (3, count), generator=generator).clamp(max=CLASSES)
    labels[1] = CLASSES
    anchors = [StandInBoxes(boxes(n)) for n in LEVELS]
    near = torch.cat([each.tensor for each in anchors]) + torch.randint(-4, 5, (3, count, 4), generator=generator)
    return anchors, logits, list(labels), deltas, list(near)


@pytest.mark.parametrize("loss", ["alrp", "ap", "rank_sort"])
def test_arithmetic_on_stand_ins(adapter: Any, loss: Any) -> None:
    head_loss = HeadLoss(loss, period=10, backend="torch")
    model = adapter.RankingRetinaNet(ranking_loss=head_loss, num_classes=CLASSES, box2box_transform=StandInTransform())
    anchors, logits, labels, deltas, truth = batch()
    losses = model.losses(anchors, logits, labels, deltas, truth)
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    (losses["loss_cls"] + losses["loss_box_reg"]).backward()
    ours = [each.grad.clone() for each in (*logits, *deltas)]

    scores: list[Tensor] = []
    dense: list[list[int]] = []
    pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    best: list[Tensor] = []
    transform = StandInTransform()
    for image in range(3):
        number = 0
        for level, count in enumerate(LEVELS):
            for place in range(count):
                scores.append(logits[level][image, place])
                label = int(labels[image][number])
                dense.append([-1] * CLASSES if label == -1 else [int(label == c) for c in range(CLASSES)])
                if 0 <= label < CLASSES:
                    anchor, target = anchors[level].tensor[place][None], truth[image][number][None]
                    delta = deltas[level][image, place][None]
                    pairs.append(
                        (
                            transform.apply_deltas(delta, anchor)[0],
                            target[0],
                            delta[0],
                            transform.get_deltas(anchor, target)[0],
                        )
                    )
                    best.append(scores[-1].detach().amax().sigmoid())
                number += 1
    predicted, target, delta, encoded = (torch.stack(each) for each in zip(*pairs, strict=True))
    assert len(pairs) > 15
    assert adapter.storage.scalars == {"num_pos_anchors": pytest.approx(len(pairs) / 3)}
    all_logits = torch.stack(scores)
    low, high = torch.maximum(predicted, target)[:, :2], torch.minimum(predicted, target)[:, 2:]
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(each[:, 2:] - each[:, :2]).prod(-1) for each in (predicted, target)]
    ious = (common / (areas[0] + areas[1] - common)).detach().numpy()
    off = (delta - encoded) * torch.tensor([10.0, 10.0, 5.0, 5.0])
    giou = generalized_box_iou_loss(predicted, target)
    classification, grad, box = differentiable(loss, all_logits, dense, giou, off, ious, torch.stack(best))
    assert_near(losses["loss_cls"], classification, 1e-5, "classification")
    assert_near(losses["loss_box_reg"], box, 1e-5, "box")
    for each in (*logits, *deltas):
        each.grad = None
    ((all_logits.flatten() * torch.from_numpy(grad)).sum() + box).backward()
    for gradient, each in zip(ours, (*logits, *deltas), strict=True):
        assert_near(gradient, each.grad, 1e-5, "gradient")
    assert_gradient(
        np.concatenate([g.numpy().ravel() for g in ours[: len(LEVELS)]]),
        np.concatenate([each.grad.numpy().ravel() for each in logits]),
        1e-5,
    )


def test_nothing_in_any_image(adapter: Any) -> None:
    model = adapter.RankingRetinaNet(
        ranking_loss=HeadLoss(period=1, backend="torch"), num_classes=CLASSES, box2box_transform=StandInTransform()
    )
    anchors, logits, labels, deltas, truth = batch()
    losses = model.losses(anchors, logits, [torch.full_like(labels[0], CLASSES)] * 3, deltas, truth)
    assert losses["loss_cls"] == losses["loss_box_reg"] == 0
    sum(losses.values(), torch.zeros(())).backward()


def test_config_and_checkpoint(adapter: Any) -> None:
    cfg = StandInCfgNode(MODEL=StandInCfgNode(NUM_CLASSES=CLASSES))
    with pytest.raises(ValueError, match="add_ranking_loss_config"):
        adapter.RankingRetinaNet(cfg)
    adapter.add_ranking_loss_config(cfg)
    assert set(cfg.MODEL.RANKING_LOSS) == {name.upper() for name in signature(HeadLoss).parameters}
    with pytest.raises(ValueError, match="period must be given"):
        adapter.RankingRetinaNet(cfg)
    cfg.MODEL.RANKING_LOSS.PERIOD = 1
    model = adapter.RankingRetinaNet(cfg)
    model.losses(*batch())
    again = adapter.RankingRetinaNet(cfg)
    again.load_state_dict(model.state_dict())
    assert float(again.ranking_loss.balance.weight) == float(model.ranking_loss.balance.weight) != 50


def test_bad_arguments(adapter: Any) -> None:
    with pytest.raises(TypeError, match="ranking_loss must be a HeadLoss, got dict"):
        adapter.RankingRetinaNet(ranking_loss={}, num_classes=CLASSES, box2box_transform=StandInTransform())
    with pytest.raises(ValueError, match="needs a Box2BoxTransform, got object"):
        adapter.RankingRetinaNet(ranking_loss=HeadLoss("ap"), num_classes=CLASSES, box2box_transform=object())
    model = adapter.RankingRetinaNet(
        ranking_loss=HeadLoss("ap"), num_classes=CLASSES, box2box_transform=StandInTransform()
    )
    anchors, logits, labels, deltas, truth = batch()
    with pytest.raises(ValueError, match="must agree in the number of anchors"):
        model.losses(anchors[:1], logits, labels, deltas, truth)
