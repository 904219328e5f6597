# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportIncompatibleMethodOverride=false
"""Box heads of two-stage detectors in MMDetection: real heads of mmdet, against the oracle, proposal by proposal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.compare import assert_near
from tests.support.mmdet_proposals import (
    ALL,
    CLASSES,
    IGNORED,
    LOSSES,
    SIDE,
    WIDTH,
    assert_by_hand,
    box_head,
    inside,
    outputs,
    proposals,
    samples,
    train_cfg,
    truth,
)
from tests.support.processes import run_ranks

# mmdet asks for operators at import.
# isort: split
from mmdet.models.roi_heads.bbox_heads import BBoxHead, DIIHead, DoubleConvFCBBoxHead, Shared4Conv1FCBBoxHead
from mmdet.models.task_modules.samplers import RandomSampler
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from mmengine.config import ConfigDict

from alrp_triton.integrations.mmdet import RankingBBoxHeadMixin

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("settings", LOSSES, ids=lambda settings: settings["loss"])
def test_box_head_is_the_loss_of_the_whole_batch(settings: dict[str, Any], agnostic: bool) -> None:
    loss, config = settings["loss"], train_cfg(settings["loss"])
    head = MODELS.build(box_head(reg_class_agnostic=agnostic, ranking_loss=settings))
    assert head.fc_cls.out_features == CLASSES
    sampled = samples(config, truth())
    rois = bbox2roi([each.priors for each in sampled])
    # All but those to be ignored, and the objects themselves where the paper has them.
    kept = sum(
        not inside(box, IGNORED[image]) for image, of_image in enumerate(proposals()) for box in of_image.tolist()
    )
    assert kept < sum(map(len, proposals()))
    assert len(rois) == kept + (3 if loss == "rank_sort" else 0)
    scores, deltas = outputs(len(rois), agnostic)
    out = head.loss_and_target(scores, deltas, rois, sampled, config)
    assert_by_hand(loss, out["loss_bbox"], scores, deltas, rois)
    assert len(out["bbox_targets"]) == 4


def test_a_column_of_the_background() -> None:
    """Of a head that makes its own classifier: it is neither ranked nor detected."""

    class Double(RankingBBoxHeadMixin, DoubleConvFCBBoxHead): ...

    head: Any = Double(
        num_convs=1,
        num_fcs=1,
        in_channels=WIDTH,
        conv_out_channels=16,
        fc_out_channels=16,
        roi_feat_size=SIDE,
        num_classes=CLASSES,
        ranking_loss={"loss": "rank_sort"},
    )
    sampled, config = samples(train_cfg("rank_sort"), truth()), train_cfg("rank_sort")
    rois = bbox2roi([each.priors for each in sampled])
    scores, deltas = outputs(len(rois), False, CLASSES + 1)
    losses = head.loss_and_target(scores, deltas, rois, sampled, config)["loss_bbox"]
    assert_by_hand("rank_sort", losses, scores, deltas, rois)
    found = head.predict_by_feat([rois], [scores], [deltas], [{"img_shape": (64, 80)}])[0]
    assert_near(found.scores[:, :CLASSES], scores[:, :CLASSES].sigmoid(), 1e-6)
    assert not found.scores[:, CLASSES].any()
    assert found.scores.shape[1] == CLASSES + 1


def test_half_precision_and_nothing_in_any_image() -> None:
    head = MODELS.build(box_head(ranking_loss={"loss": "alrp", "box_weight": 1.0}))
    config = train_cfg("alrp")
    sampled = samples(config, truth())
    rois = bbox2roi([each.priors for each in sampled])
    half = [each.detach().half() for each in outputs(len(rois), False)]
    found, single = (
        head.loss_and_target(scores, deltas, rois, sampled, config)["loss_bbox"]
        for scores, deltas in (half, [each.float() for each in half])
    )
    assert_near(found["loss_bbox"], single["loss_bbox"], 1e-6)
    assert_near(found["loss_cls"], single["loss_cls"], 2**-10)
    for loss in LOSSES:
        head, config = MODELS.build(box_head(ranking_loss=loss)), train_cfg(loss["loss"])
        sampled = samples(config, truth([[], [], []]))
        rois = bbox2roi([each.priors for each in sampled])
        scores, deltas = outputs(len(rois), False)
        losses = head.loss_and_target(scores, deltas, rois, sampled, config)["loss_bbox"]
        assert losses["loss_cls"].item() == losses["loss_bbox"].item() == 0
        sum(losses.values(), torch.zeros(())).backward()
        assert not scores.grad.any()  # pyright: ignore[reportOptionalMemberAccess]
    labels = torch.zeros(0, dtype=torch.int64)
    none = head.loss(
        *outputs(0, False), torch.zeros(0, 5), labels, torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, 4)
    )
    assert none["loss_cls"].item() == none["loss_bbox"].item() == 0


@pytest.mark.parametrize(
    ("loss", "sampler"),
    [
        ("alrp", {"type": "RandomSampler", "num": 512, "pos_fraction": 0.25, "add_gt_as_proposals": False}),
        ("alrp", ALL),
        ("ap", {**ALL, "neg_pos_ub": 3, "add_gt_as_proposals": False}),
        ("ap", {"type": "mmdet.OHEMSampler", "num": 512, "pos_fraction": 0.25}),
        ("ap", None),
        ("rank_sort", {"type": "PseudoSampler"}),
        ("rank_sort", {**ALL, "add_gt_as_proposals": False}),
        ("rank_sort", {**ALL, "num": 512}),
    ],
)
def test_samplers_that_are_refused(loss: str, sampler: Any) -> None:
    head = MODELS.build(box_head(ranking_loss={"loss": loss, "box_weight": 1.0}))
    config = ConfigDict(sampler=sampler, pos_weight=-1)
    with pytest.raises(ValueError, match=f"sampler of the box head's train_cfg must, for loss '{loss}', keep all"):
        head.loss_and_target(*outputs(3, False), torch.zeros(3, 5), [], config)


@pytest.mark.parametrize(
    ("loss", "sampler"),
    [
        ("alrp", {"type": "mmdet.PseudoSampler", "num": 512, "pos_fraction": 0.25, "add_gt_as_proposals": True}),
        ("ap", {**ALL, "add_gt_as_proposals": False}),
        ("rank_sort", {**ALL, "type": RandomSampler, "neg_pos_ub": -1}),
    ],
)
def test_samplers_that_take_all(loss: str, sampler: Any) -> None:
    head = MODELS.build(box_head(ranking_loss={"loss": loss, "box_weight": 1.0}))
    sampled, config = samples(train_cfg(loss), truth()), ConfigDict(sampler=sampler, pos_weight=-1)
    rois = bbox2roi([each.priors for each in sampled])
    losses = head.loss_and_target(*outputs(len(rois), False), rois, sampled, config)["loss_bbox"]
    assert losses["loss_cls"] > 0


def test_bad_arguments() -> None:
    class Dynamic(RankingBBoxHeadMixin, DIIHead): ...

    class Alone(RankingBBoxHeadMixin): ...

    class Shared4(RankingBBoxHeadMixin, Shared4Conv1FCBBoxHead): ...

    for of in (Dynamic, Alone):
        with pytest.raises(TypeError, match=f"{of.__name__} must be a BBoxHead of mmdet"):
            of(ranking_loss={"loss": "ap"})
    with pytest.raises(TypeError, match="ranking_loss must be a dict"):
        Shared4(ranking_loss=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="Shared4 must have with_cls=True and with_reg=True"):
        Shared4(ranking_loss={"loss": "ap"}, with_reg=False)
    with pytest.raises(ValueError, match="period must be given"):
        Shared4(ranking_loss={"loss": "alrp"})
    with pytest.raises(ValueError, match=r"smooth_l1.*TBLRBBoxCoder"):
        Shared4(ranking_loss={"loss": "ap"}, bbox_coder={"type": "TBLRBBoxCoder"})
    head: Any = Shared4(ranking_loss={"loss": "ap"}, num_classes=CLASSES)
    assert isinstance(head, BBoxHead)
    assert head.fc_cls.out_features == CLASSES
    with pytest.raises(ValueError, match="reduction_override must be None, a ranking is one number; got 'none'"):
        head.loss(*outputs(1, False), *([torch.zeros(1)] * 5), reduction_override="none")


def of_process(images: list[int], together: bool) -> list[Tensor]:
    """Losses, and their gradients in what the head was given of these images."""
    found: list[Tensor] = []
    for settings in LOSSES:
        group = {"process_group": "world", "gradient_reduction": "sum"} if together else {}
        head, config = MODELS.build(box_head(ranking_loss={**settings, **group})), train_cfg(settings["loss"])
        of_all = samples(config, truth())
        counts = [len(each.priors) for each in of_all]
        rows = [torch.split(each.detach(), counts) for each in outputs(sum(counts), False)]
        given = [torch.cat([each[image] for image in images]).requires_grad_() for each in rows]
        sampled = [of_all[image] for image in images]
        rois = bbox2roi([each.priors for each in sampled])
        losses = head.loss_and_target(*given, rois, sampled, config)["loss_bbox"]
        found += [*losses.values(), *torch.autograd.grad(sum(losses.values(), torch.zeros(())), given)]
    return found


def test_one_ranking_over_two_processes(tmp_path: Path) -> None:
    """The second has an image without objects; equal to one process with all of them."""
    for process in run_ranks(["box_head"], 2, tmp_path / "store"):
        assert process.returncode == 0, process.stderr
        assert "done: box_head\n" in process.stdout


def in_a_group(rank: int) -> None:
    """What each of the two does, see tests/support/ranks.py."""
    mine = [[0, 2], [1]][rank]
    joint, shares = of_process([0, 2, 1], False), of_process(mine, True)
    for which, (whole, share) in enumerate(zip(joint, shares, strict=True)):
        if which % 4 < 2:
            assert_near(share, whole, 1e-6)
        else:
            assert_near(share, whole[: len(share)] if rank == 0 else whole[-len(share) :], 1e-5)
