"""The demo's parts: scenes are repeatable and held out, and the head hands the loss what it should."""

from unittest import mock

import numpy as np
import pytest
import torch

from alrp_triton import giou_localisation_error
from reference.dense import alrp_loss as oracle
from tests.compare import assert_near

pytest.importorskip("torchvision.ops", reason="torchvision is the demo's, not the package's", exc_type=ImportError)
pytest.importorskip("sklearn", reason="scikit-learn is the demo's, not the package's")

from torchvision.ops import generalized_box_iou_loss

from examples.digits.detector import ALRPHead, build_detector
from examples.digits.evaluate import average_precision, detect
from examples.digits.scenes import NUM_CLASSES, SCENE_SIZE, Scene, compose_scene, split_digits


def compose(seed: int, count: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    training, _ = split_digits(rng)
    return [compose_scene(training, rng) for _ in range(count)]


def test_scenes() -> None:
    scenes, again = compose(3, 20), compose(3, 20)
    for scene, same in zip(scenes, again, strict=True):
        assert torch.equal(scene.image, same.image)
        boxes, labels = scene.target["boxes"], scene.target["labels"]
        assert scene.image.shape == (1, SCENE_SIZE, SCENE_SIZE)
        assert 1 <= len(boxes) == len(labels) <= 7
        assert ((boxes >= 0) & (boxes <= SCENE_SIZE)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((labels >= 0) & (labels < NUM_CLASSES)).all()


def test_digits_are_held_out() -> None:
    training, held_out = split_digits(np.random.default_rng(0))
    assert len(training.labels) + len(held_out.labels) == 1797
    assert len(held_out.labels) > 400


def test_head_is_the_loss_of_the_whole_batch() -> None:
    """The losses that the detector returns are those of a computation by hand, over all images and levels."""
    torch.manual_seed(0)
    scenes = compose(5, 3)
    model = build_detector(balance_period=10)
    head = model.head
    assert isinstance(head, ALRPHead)
    with mock.patch.object(head, "compute_loss", wraps=head.compute_loss) as spy:
        losses = model([s.image for s in scenes], [s.target for s in scenes])
    _, outputs, anchors, matched = spy.call_args.args
    logits, dense, errors = [], [], []
    for image, scene in enumerate(scenes):
        target = np.zeros((len(anchors[image]), NUM_CLASSES), np.int64)
        for anchor, match in enumerate(matched[image].tolist()):
            if match == -2:
                target[anchor] = -1
            elif match >= 0:
                target[anchor, int(scene.target["labels"][match])] = 1
                box = head.regression_head.box_coder.decode_single(
                    outputs["bbox_regression"][image, anchor][None], anchors[image][anchor][None]
                )
                loss = generalized_box_iou_loss(box, scene.target["boxes"][match][None])
                errors.append(float(giou_localisation_error(loss.detach())))
        logits.append(outputs["cls_logits"][image].detach().numpy())
        dense.append(target)
    expected = oracle(np.stack(logits), np.stack(dense), errors)
    assert len(errors) > 10
    assert_near(losses["classification"], expected.classification, 1e-6)
    assert_near(losses["bbox_regression"], 50 * expected.localisation, 1e-5)
    sum(losses.values(), torch.zeros(())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_evaluation() -> None:
    scenes = compose(7, 5)
    perfect = [{**s.target, "scores": torch.ones(len(s.target["labels"]))} for s in scenes]
    assert average_precision(scenes, perfect)["AP"] == pytest.approx(1)
    torch.manual_seed(0)
    untrained = average_precision(scenes, detect(build_detector(balance_period=10), scenes))
    assert untrained["AP50"] < 0.1
