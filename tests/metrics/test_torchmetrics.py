"""OptimalLRP, the metric for torchmetrics: against the reference, in batches, over processes, and every error."""

import copy
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.detections import assert_metric, images_of, make_metric, random_images
from tests.support.processes import run_ranks

NAN = float("nan")


@pytest.fixture(params=["faster_coco_eval", "pycocotools"])
def metric(request: pytest.FixtureRequest) -> Any:
    return make_metric(backend=request.param, class_metrics=True)


@pytest.mark.parametrize("seed", range(3))
def test_metric_against_the_reference(metric: Any, seed: int) -> None:
    preds, target = random_images(seed)
    metric.update(preds, target)
    out = metric.compute()
    assert_metric(out, preds, target)
    assert out["classes"].tolist() == [0, 1, 2, 3, 4]
    few = make_metric(backend=metric.backend, class_metrics=True, max_detections=2, tau=0.6, score_threshold=0.5)
    few.update(preds, target)
    out = few.compute()
    assert_metric(out, preds, target, tau=0.6, max_dets=2)
    assert_metric(out, preds, target, tau=0.6, max_dets=2, score_threshold=0.5)


def test_metric_in_batches(metric: Any) -> None:
    preds, target = random_images(6)
    metric.update(preds, target)
    whole = metric.compute()
    metric.reset()
    metric.update([], [])
    for start in (0, 5, 10):
        step = metric(
            preds[start : start + 5], target[start : start + 5]
        )  # forward: update, and the result of the batch
        alone = make_metric(backend=metric.backend, class_metrics=True)
        alone.update(preds[start : start + 5], target[start : start + 5])
        np.testing.assert_equal(as_lists(step), as_lists(alone.compute()))
    np.testing.assert_equal(as_lists(metric.compute()), as_lists(whole))
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        np.testing.assert_equal(as_lists(twin.compute()), as_lists(whole))


def as_lists(out: dict[str, Tensor]) -> dict[str, Any]:
    return {key: value.tolist() for key, value in out.items()}


@pytest.mark.parametrize("box_format", ["xywh", "cxcywh"])
def test_metric_box_formats_and_dtypes(metric: Any, box_format: str) -> None:
    ops = pytest.importorskip("torchvision.ops")
    preds, target = random_images(7)
    metric.update(preds, target)
    other = make_metric(backend=metric.backend, class_metrics=True, box_format=box_format)

    def convert(image: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = image["labels"].to(torch.uint8)
        return {**image, "boxes": ops.box_convert(image["boxes"], "xyxy", box_format), "labels": labels}

    other.update([convert(image) for image in preds], [convert(image) for image in target])
    out, wanted = other.compute(), metric.compute()
    for key in wanted:
        np.testing.assert_allclose(out[key], wanted[key], rtol=0, atol=1e-9)


def test_metric_returns_scalars_of_its_dtype() -> None:
    made = make_metric()
    made.set_dtype(torch.float32)
    preds, target = random_images(8)
    made.update(preds, target)
    out = made.compute()
    sizes = ["", "_small", "_medium", "_large"]
    assert list(out) == [f"olrp{component}{size}" for component in ["", "_loc", "_fp", "_fn"] for size in sizes]
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in out.values())
    assert made.higher_is_better is False


def test_metric_without_images_or_boxes(metric: Any) -> None:
    with pytest.warns(UserWarning, match="was called before"):
        out = metric.compute()
    assert out["olrp"].isnan()
    assert out["classes"].tolist() == []
    empty = torch.tensor([])  # the lazy way, of any dtype
    metric.reset()
    metric.update([{"boxes": empty, "scores": empty, "labels": empty}], [{"boxes": empty, "labels": empty}])
    assert metric.compute()["olrp"].isnan()
    box = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([3])}
    metric.update([{"boxes": empty, "scores": empty, "labels": empty}], [box])
    out = metric.compute()
    assert (out["olrp"], out["olrp_fn"], out["classes"]) == (1, 1, 3)  # torchmetrics makes scalars of single entries
    metric.reset()
    metric.update([{**box, "scores": torch.tensor([0.5])}], [{"boxes": empty, "labels": empty}])
    assert metric.compute()["olrp"].isnan()


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
def test_metric_gathers_with_a_hook(backend: str) -> None:
    """Two processes with different numbers of images, one after the other: a hook that knows what both have."""
    preds, target = random_images(9)
    sent: list[list[Tensor]] = [[], []]
    for rank, record in enumerate(sent):

        def keep(value: Tensor, group: object, record: list[Tensor] = record) -> list[Tensor]:
            record.append(value)
            return [value]

        other = make_metric(backend=backend)
        other.update(preds[images_of(rank)], target[images_of(rank)])
        other.sync(dist_sync_fn=keep, distributed_available=lambda: True)
    both = iter(zip(*sent, strict=True))

    def gather(value: Tensor, group: object) -> list[Tensor]:
        return list(next(both))

    made = make_metric(
        backend=backend,
        class_metrics=True,
        dist_sync_fn=gather,
        distributed_available_fn=lambda: True,
    )
    made.update(preds[images_of(0)], target[images_of(0)])
    assert_metric(made.compute(), preds, target)
    assert len(made.detection_boxes) == 4  # its own again


def test_metric_gathers_over_gloo(tmp_path: Path) -> None:
    make_metric()
    for process in run_ranks(["metric"], 2, tmp_path / "store"):
        assert process.returncode == 0, process.stderr


BOXES, SCORES, LABELS = torch.tensor([[0.0, 0, 9, 9]] * 2), torch.tensor([0.5, 0.6]), torch.tensor([0, 1])
PRED, TRUTH = {"boxes": BOXES, "scores": SCORES, "labels": LABELS}, {"boxes": BOXES, "labels": LABELS}


def wrong_images() -> Iterator[tuple[Any, Any, type[Exception], str]]:
    yield [PRED], [], ValueError, "preds and target must have one length, got 1 and 0"
    yield PRED, [TRUTH], TypeError, "preds must be a sequence of dicts, one an image, got dict"
    yield [PRED, 3], [TRUTH, TRUTH], TypeError, r"preds\[1\] must be a dict of tensors, got int"
    yield (
        [{"boxes": BOXES, "labels": LABELS}],
        [TRUTH],
        ValueError,
        r"preds\[0\] must have the key 'scores', got boxes, labels",
    )
    yield [PRED], [{"labels": LABELS}], ValueError, r"target\[0\] must have the key 'boxes', got labels"
    yield [PRED], [{}], ValueError, r"target\[0\] must have the key 'boxes', got no key"
    yield [{**PRED, "boxes": [1]}], [TRUTH], TypeError, r"preds\[0\]\['boxes'\] must be a torch.Tensor, got list"
    yield [{**PRED, "scores": 0.5}], [TRUTH], TypeError, r"preds\[0\]\['scores'\] must be a torch.Tensor, got float"
    yield (
        [{**PRED, "boxes": BOXES[:, :3]}],
        [TRUTH],
        ValueError,
        r"preds\[0\]\['boxes'\] must have shape \(N, 4\), got float32 \(2, 3\)",
    )
    yield (
        [{**PRED, "scores": SCORES[:1]}],
        [TRUTH],
        ValueError,
        r"preds\[0\]\['scores'\] must have shape \(2,\), one for each of 2 boxes, got float32 \(1,\)",
    )
    yield [{**PRED, "labels": SCORES}], [TRUTH], TypeError, r"preds\[0\]\['labels'\] must be integer, got float32"
    yield [{**PRED, "scores": LABELS}], [TRUTH], TypeError, r"preds\[0\]\['scores'\] must be floating, got int64"
    yield [{**PRED, "boxes": BOXES.long()}], [TRUTH], TypeError, r"preds\[0\]\['boxes'\] must be floating, got int64"
    yield (
        [PRED],
        [{**TRUTH, "iscrowd": SCORES}],
        TypeError,
        r"target\[0\]\['iscrowd'\] must be integer or bool, got float32",
    )
    yield (
        [PRED],
        [{**TRUTH, "area": SCORES > 0}],
        TypeError,
        r"target\[0\]\['area'\] must be floating or integer, got bool",
    )
    yield [PRED], [{**TRUTH, "area": SCORES[:, None]}], ValueError, r"target\[0\]\['area'\] must have shape \(2,\)"
    yield [{**PRED, "scores": SCORES * NAN}], [TRUTH], ValueError, r"preds\[0\]\['scores'\] must be finite, got nan"
    yield [PRED], [{**TRUTH, "boxes": BOXES / 0}], ValueError, r"target\[0\]\['boxes'\] must be finite, got nan"
    yield (
        [{**PRED, "boxes": BOXES.flip(1)}],
        [TRUTH],
        ValueError,
        r"preds\[0\]\['boxes'\] must be xyxy and of no negative size, got \[9.0, 9.0, 0.0, 0.0\]",
    )


@pytest.mark.parametrize("case", list(wrong_images()), ids=lambda case: case[3][:60])
def test_errors_of_images(case: tuple[Any, Any, type[Exception], str]) -> None:
    made = make_metric()
    with pytest.raises(case[2], match=case[3]):
        made.update(case[0], case[1])
    assert made.detection_boxes == []


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"box_format": "corners"}, ValueError, "box_format must be one of xyxy, xywh, cxcywh, got 'corners'"),
        ({"backend": "mine"}, ValueError, "backend must be one of faster_coco_eval, pycocotools, got 'mine'"),
        ({"tau": 1}, ValueError, "tau must be at least 0 and less than 1, got 1.0"),
        ({"max_detections": 0}, ValueError, "max_detections must be at least 1"),
        ({"score_threshold": NAN}, ValueError, "score_threshold must be"),
        ({"class_metrics": 1}, TypeError, "class_metrics must be True or False, got int"),
    ],
)
def test_errors_of_settings(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    make_metric()
    from alrp_triton.metrics import OptimalLRP

    with pytest.raises(kind, match=text):
        OptimalLRP(**options)


def test_missing_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    make_metric()
    from alrp_triton.metrics import OptimalLRP

    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ImportError, match="backend 'pycocotools' is not installed: pip install"):
        OptimalLRP(backend="pycocotools")


def _one(score: float = 0.3, label: int = 0, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    boxes, labels = torch.tensor([[10.0, 10, 50, 50]]), torch.tensor([label])
    return {"boxes": boxes, "scores": torch.tensor([score], dtype=dtype), "labels": labels}, {"boxes": boxes.clone(), "labels": labels.clone()}  # fmt: skip


@pytest.mark.parametrize("score", [0.1, 0.3, 0.7])
def test_a_threshold_keeps_the_detection_that_it_is_the_score_of(score: float) -> None:
    found, truth = _one(score)
    metric = make_metric(class_metrics=True)
    metric.update([found], [truth])
    threshold = metric.compute()["olrp_thresholds"]
    assert (found["scores"] >= threshold).all()
    metric = make_metric(score_threshold=float(threshold))
    metric.update([found], [truth])
    assert metric.compute()["lrp"] == 0


def test_large_labels_and_inputs_that_change_later() -> None:
    found, truth = _one(label=2**40)
    metric = make_metric(class_metrics=True)
    metric.update([found], [truth])
    for tensors in (found, truth):
        for tensor in tensors.values():
            tensor.zero_()
    out = metric.compute()
    assert out["olrp"] == 0
    assert out["classes"] == 2**40
    found, truth = _one()
    with pytest.raises(ValueError, match=r"preds\[0\]\['labels'\] must be below 2\*\*63"):
        metric.update([found | {"labels": torch.tensor(np.array([2**63 + 5], np.uint64))}], [truth])
    with pytest.raises(ValueError, match=r"target\[0\]\['iscrowd'\] must be 0 or 1, got -1|must be 0 or 1"):
        metric.update([found], [truth | {"iscrowd": torch.tensor([-1])}])
