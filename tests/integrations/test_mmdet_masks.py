# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportIncompatibleMethodOverride=false
"""Masks of MMDetection's Mask R-CNN with Rank & Sort Loss: mmdet's real RoI head, against loops in NumPy."""

import copy
import math
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.integrations.test_mmdet_detectors import data as pictures
from tests.integrations.test_mmdet_detectors import detector
from tests.support.boxes_by_hand import iou_and_giou
from tests.support.compare import assert_near
from tests.support.masks_by_hand import Array, crop, gradient_of_masks
from tests.support.mmdet_proposals import CLASSES, SIDE, WIDTH, box_head, train_cfg
from tests.support.processes import ROOT

# mmdet asks for operators at import.
# isort: split
import mmdet
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.structures import InstanceData

from alrp_triton.integrations.masks import MAX_MASKS, dice_error

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDE, SIZE = 64, 80, 2 * SIDE


def roi_head(kind: str = "RankingMaskRoIHead", shared: bool = False, agnostic: bool = False, **settings: Any) -> Any:
    extractor: dict[str, Any] = {"type": "SingleRoIExtractor", "out_channels": WIDTH, "featmap_strides": [4, 8, 16, 32]}
    extractor["roi_layer"] = {"type": "RoIAlign", "output_size": SIDE, "sampling_ratio": 0}
    masks: dict[str, Any] = {"type": "FCNMaskHead", "num_convs": 1, "in_channels": WIDTH, "conv_out_channels": WIDTH}
    masks |= {"num_classes": CLASSES, "class_agnostic": agnostic}
    config: dict[str, Any] = {"type": kind, "bbox_roi_extractor": extractor, "bbox_head": box_head()}
    config |= {"mask_head": masks, "mask_roi_extractor": None if shared else extractor}
    config |= {"train_cfg": train_cfg("rank_sort")}
    torch.manual_seed(0)
    head: Any = MODELS.build({**config, **settings})
    head.init_weights()
    nn.init.normal_(head.bbox_head.fc_cls.weight, std=2.0)  # scores far from each other
    head.mask_head.conv_logits.weight.data *= 5  # masks far from 1/2
    return head


class Data(NamedTuple):
    features: tuple[Tensor, ...]
    proposals: list[Tensor]
    boxes: list[Tensor]
    labels: list[Tensor]
    masks: list[Array]

    def step(self, head: Any) -> dict[str, Tensor]:
        samples: list[Any] = []
        for boxes, labels, masks in zip(self.boxes, self.labels, self.masks, strict=True):
            objects = InstanceData(bboxes=boxes, labels=labels)
            objects.masks = BitmapMasks(masks.astype(np.uint8), HEIGHT, WIDE)
            samples.append(DetDataSample(gt_instances=objects))
        return head.loss(self.features, [InstanceData(bboxes=each) for each in self.proposals], samples)


def data(counts: tuple[int, ...] = (3, 0, 2), near: int = 4) -> Data:
    """Objects in the shape of ellipses, and proposals, some close to them, some that reach out of the image."""
    generator = torch.Generator().manual_seed(1)
    found = Data(
        tuple(torch.randn(len(counts), WIDTH, 16 >> i, 20 >> i, generator=generator) for i in range(4)),
        *([] for _ in range(4)),
    )
    x, y = np.meshgrid(np.arange(WIDE) + 0.5, np.arange(HEIGHT) + 0.5)
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([45.0, 30.0])
        boxes = torch.cat([corner, corner + 15 + 18 * torch.rand(count, 2, generator=generator)], 1)
        ellipses = [
            ((2 * x - a - c) / (c - a)) ** 2 + ((2 * y - b - d) / (d - b)) ** 2 < 1 for a, b, c, d in boxes.tolist()
        ]
        around = boxes.repeat(near, 1)
        others = torch.rand(20, 2, generator=generator) * 60 - 10
        found.boxes.append(boxes)
        found.labels.append(torch.arange(count) % CLASSES)
        found.masks.append(np.array(ellipses, np.float64).reshape(-1, HEIGHT, WIDE))
        found.proposals.append(torch.cat([
            around + 3 * torch.randn(around.shape, generator=generator), torch.cat([others, others + 15], 1),
        ]))  # fmt: skip
    assert any((each < 0).any() for each in found.proposals)
    return found


class Seen:
    """A step, and what passed by: proposals of the box head with its scores, masks, and the features of both."""

    def __init__(self, head: Any, of: Data) -> None:
        found: dict[str, list[Any]] = {"boxes": [], "scores": [], "masks": []}

        def keep(key: str, part: nn.Module) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                found[key].append((inputs, output))

            return part.register_forward_hook(hook)

        parts = {"boxes": head.bbox_roi_extractor, "scores": head.bbox_head, "masks": head.mask_head}
        hooks = [keep(key, part) for key, part in parts.items()]
        if not head.share_roi_extractor:
            found["cut"] = []
            hooks.append(keep("cut", head.mask_roi_extractor))
        self.losses = of.step(head)
        for hook in hooks:
            hook.remove()
        assert all(len(each) == 1 for each in found.values())
        (_, self.rois), features = found["boxes"][0]
        self.scores: Tensor = found["scores"][0][1][0]
        (masked,), self.masks = found["masks"][0]
        # Which proposals those masks are of, told by their boxes, or by their features where the two heads share them.
        keys, wanted = (features, masked) if head.share_roi_extractor else (self.rois, found["cut"][0][0][1])
        known = {tuple(each.flatten().tolist()): row for row, each in enumerate(keys)}
        assert len(known) == len(keys)
        self.rows = [known[tuple(each.flatten().tolist())] for each in wanted]


def by_hand(seen: Seen, of: Data, soft: bool) -> Array:
    """The gradient of the loss by the logits of all masks, each with its own proposal's object and score."""
    masks = seen.masks.detach().double().numpy()
    weights, truth, channels = list[float](), list[Array](), list[int]()
    for row in seen.rows:
        image, *corners = seen.rois[row].tolist()
        image = int(image)
        overlaps = [iou_and_giou(corners, box)[0] for box in of.boxes[image].tolist()]
        which = int(np.argmax(overlaps))
        assert overlaps[which] >= 0.5
        clipped = [min(max(each, 0), edge) for each, edge in zip(corners, [WIDE, HEIGHT] * 2, strict=True)]
        true = crop(of.masks[image][which], [each - 0.5 for each in clipped], SIZE)  # mmdet has pixels at halves
        if not soft:
            assert np.abs(true - 0.5).min() > 1e-5
            true = np.where(true > 0.5, 1.0, 0.0)
        truth.append(true)
        weights.append(max(1 / (1 + math.exp(-score)) for score in seen.scores[row, :CLASSES].tolist()))
        channels.append(int(of.labels[image][which]) if masks.shape[1] > 1 else 0)
    assert len({round(each, 3) for each in weights}) > 3
    own = np.stack([masks[index, channel] for index, channel in enumerate(channels)])
    gradient = np.zeros(masks.shape)
    for index, slope in enumerate(gradient_of_masks(own, truth, weights, seen.losses["loss_cls"].item())):
        gradient[index, channels[index]] = slope
    return gradient


def assert_by_hand(seen: Seen, of: Data, soft: bool = False) -> None:
    """The loss is worth the classification loss, whatever the masks: so it is the gradient that tells."""
    assert set(seen.losses) == {"loss_cls", "loss_bbox", "loss_mask"}
    assert seen.losses["loss_mask"].shape == ()
    assert_near(seen.losses["loss_mask"], seen.losses["loss_cls"], 1e-6)
    gradient, *others = torch.autograd.grad(
        seen.losses["loss_mask"], [seen.masks, seen.scores], retain_graph=True, allow_unused=True
    )
    assert others == [None]
    expected = by_hand(seen, of, soft)
    assert np.abs(expected).max() > 1e-6
    assert_near(gradient.float(), expected, 1e-5)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_masks_of_all_positives(shared: bool, agnostic: bool, soft: bool) -> None:
    """One image has no object. True masks as mmdet cuts them out, of 0 and 1 or soft."""
    head, of = roi_head(shared=shared, agnostic=agnostic), data()
    head.train_cfg.soft_mask_target = soft
    seen = Seen(head, of)
    positive = [
        row
        for row, (image, *corners) in enumerate(seen.rois.tolist())
        if any(iou_and_giou(corners, box)[0] >= 0.5 for box in of.boxes[int(image)].tolist())
    ]
    assert seen.rows == positive
    assert 10 < len(positive) < len(seen.rois) - 10
    assert_by_hand(seen, of, soft)
    torch.stack(list(seen.losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("shared", [False, True])
def test_at_most_200(shared: bool) -> None:
    """Drawn before the mask head runs, others each time, each with its own score and true mask."""
    head, of = roi_head(shared=shared), data((3, 0, 2), 60)
    rows = list[list[int]]()
    for seen in (Seen(head, of), Seen(head, of)):
        assert len(seen.masks) == len(set(seen.rows)) == MAX_MASKS == 200
        assert {int(seen.rois[row, 0]) for row in seen.rows} == {0, 2}
        assert_by_hand(seen, of)
        rows.append(seen.rows)
    assert rows[0] != rows[1]


def test_the_box_head_is_not_touched() -> None:
    """Its losses are bit for bit those of mmdet's StandardRoIHead, also where masks are drawn."""
    head, stock, of = roi_head(), roi_head("StandardRoIHead"), data((3, 0, 2), 60)
    stock.load_state_dict(head.state_dict())
    with mock.patch.object(head, "mask_loss", wraps=head.mask_loss) as spy:
        losses, theirs = of.step(head), of.step(stock)
    assert sum(len(each.pos_priors) for each in spy.call_args.args[1]) > 230  # what was sampled is as it was
    assert set(losses) == set(theirs)
    assert all(torch.equal(losses[key], theirs[key]) for key in ("loss_cls", "loss_bbox"))
    assert not torch.equal(losses["loss_mask"], theirs["loss_mask"])


def test_half_precision() -> None:
    """Masks of half precision; the loss is made in float32."""
    head, of = roi_head(), data()
    with torch.autocast("cpu", torch.bfloat16):
        seen = Seen(head, of)
    assert seen.masks.dtype == torch.bfloat16
    assert seen.losses["loss_mask"].dtype == torch.float32
    (gradient,) = torch.autograd.grad(seen.losses["loss_mask"], seen.masks)
    assert_near(gradient.float(), by_hand(seen, of, False), 1e-2)


@pytest.mark.parametrize("shared", [False, True])
def test_no_objects(shared: bool) -> None:
    """0, and of the graph: a mask head without a gradient would stop DistributedDataParallel."""
    head = roi_head(shared=shared)
    losses = data((0, 0)).step(head)
    assert losses["loss_mask"] == 0
    losses["loss_mask"].backward()
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in head.mask_head.parameters())


def test_checkpoints_fit() -> None:
    """Those of mmdet's own RoI head with the same box head; and the mask head's of any Mask R-CNN."""
    head, stock = roi_head(), roi_head("StandardRoIHead")
    assert list(head.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(head.state_dict())
    head.load_state_dict(stock.state_dict())
    theirs = box_head("Shared2FCBBoxHead")
    del theirs["ranking_loss"]
    other = roi_head("StandardRoIHead", bbox_head=theirs)
    head.mask_head.load_state_dict(other.mask_head.state_dict())
    assert {key for key in other.state_dict() if key.startswith("mask")} == {
        key for key in head.state_dict() if key.startswith("mask")
    }


def test_copied_and_pickled() -> None:
    """After a step, of which nothing is left behind."""
    head, of = roi_head(), data()
    plain = of.step(head)
    for copied in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        losses = of.step(copied)
        assert all(torch.equal(losses[key], value) for key, value in plain.items())


def test_whole_detector() -> None:
    """Masks train every parameter that they should, and are detected."""
    model = detector("MaskRCNN", {"loss": "rank_sort"}, roi_head="RankingMaskRoIHead")
    images, objects = pictures()
    losses = model.loss(images, objects)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
    assert_near(losses["loss_mask"], losses["loss_cls"], 1e-6)
    torch.stack([value.sum() for value in losses.values()]).sum().backward()
    trained = {key for key, value in model.named_parameters() if value.grad is not None}
    assert trained == {key for key, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        found = model.eval().predict(images[:1], objects[:1])[0].pred_instances
    assert len(found) > 50
    assert found.masks.shape == (len(found), 64, 80)


def test_masks_are_learned() -> None:
    """By heart, at the true boxes: the error, which the loss does not show, falls."""
    head, of = roi_head(), data()
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    targets = torch.from_numpy(
        np.array([
            crop(of.masks[image][which], [each - 0.5 for each in box], SIZE)
            for image, boxes in enumerate(of.boxes) for which, box in enumerate(boxes.tolist())
        ])
    )  # fmt: skip
    rois = torch.cat([torch.cat([torch.full((len(b), 1), float(i)), b], 1) for i, b in enumerate(of.boxes)])
    errors = list[float]()
    for _ in range(40):
        with torch.no_grad():
            masks = head._mask_forward(of.features, rois)["mask_preds"][torch.arange(len(rois)), torch.cat(of.labels)]
        errors.append(dice_error(masks, targets).mean().item())
        optimizer.zero_grad()
        torch.stack(list(of.step(head).values())).sum().backward()
        optimizer.step()
    assert errors[-1] < 0.1 < 0.2 < errors[0]


def test_the_config_of_the_docs() -> None:
    """The two of a Mask R-CNN, put upon mmdet's own."""
    base = Path(str(mmdet.__file__)).parent / ".mim/configs/_base_/models/mask-rcnn_r50_fpn.py"
    if not base.exists():
        pytest.skip("this build of mmdet has no configs")
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "docs/integrations.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for word in ("RankingRPNHead", "RankingMaskRoIHead"):
        (code,) = (block for block in blocks if word in block)
        exec(code, names)
    config = Config.fromfile(base)
    config.merge_from_dict({"model": names["model"]})
    config.model.data_preprocessor.type = "mmdet.DetDataPreprocessor"
    for part in ("bbox_head", "mask_head"):
        config.model.roi_head[part].num_classes = CLASSES
    losses = MODELS.build(config.model).train().loss(*pictures())
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
    assert_near(losses["loss_mask"], losses["loss_cls"], 1e-6)


def test_what_is_refused() -> None:
    theirs = box_head("Shared2FCBBoxHead")
    del theirs["ranking_loss"]
    with pytest.raises(TypeError, match=r"bbox_head of RankingMaskRoIHead must have a ranking loss.*got Shared2FCBBox"):
        roi_head(bbox_head=theirs)
    with pytest.raises(TypeError, match=r"bbox_head of RankingMaskRoIHead must have a ranking loss.*got NoneType"):
        roi_head(bbox_head=None)
    for settings in ({"loss": "alrp", "period": 10}, {"loss": "ap"}):
        words = f"must be 'rank_sort', the only one that trains masks; got '{settings['loss']}', which StandardRoIHead"
        with pytest.raises(ValueError, match=words):
            roi_head(bbox_head=box_head(ranking_loss=settings))

    class Own(FCNMaskHead):
        def loss_and_target(self, *arguments: Any, **named: Any) -> Any: ...

    for mask, name in (
        (None, "NoneType"),
        ({"type": Own}, "Own"),
        ({"type": "GlobalContextHead"}, "GlobalContextHead"),
    ):
        with pytest.raises(TypeError, match=f"mask_head of RankingMaskRoIHead must be a FCNMaskHead.*got {name}"):
            roi_head(mask_head=mask)
    head = roi_head()
    head.train_cfg.mask_size = 7
    with pytest.raises(ValueError, match=r"must both have shape \(P, h, w\), got \(\d+, 6, 6\) and \(\d+, 7, 7\)"):
        data().step(head)
    with pytest.raises(ValueError, match="sampler of the box head's train_cfg must, for loss 'rank_sort', keep all"):
        data().step(roi_head(train_cfg=train_cfg("ap")))
