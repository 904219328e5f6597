"""From scores to precision: against known shares and pooling by hand; AP and LRP stay; state; every error."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn", reason="scikit-learn is the trainer's, not the package's")

from alrp_triton.metrics import Calibration, coco_calibration, coco_olrp
from tests.support.detections import COCO_PACKAGES, Images, evaluated, random_images


def with_precision(
    share: Callable[[Any], Any], scores: np.ndarray[Any, Any], label: int = 0, seed: int = 0
) -> tuple[Images, Images]:
    """An image a score, of one object and one detection, which is right with the probability ``share(score)``."""
    right = np.random.default_rng(100 + seed).random(len(scores)) < share(scores)
    boxes = [torch.tensor([[0.0, 0, 10, 10]]) + 50 * (not hit) for hit in right]
    labels = torch.tensor([label])
    preds = [
        {"boxes": box, "scores": torch.tensor([score], dtype=torch.float64), "labels": labels}
        for box, score in zip(boxes, scores.tolist(), strict=True)
    ]
    return preds, [{"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": labels} for _ in preds]


def scores_and_ids(preds: Images) -> tuple[Tensor, Tensor]:
    """Of all images; ids of categories begin at 1 in the evaluation."""
    return torch.cat([one["scores"] for one in preds]), torch.cat([one["labels"] for one in preds]) + 1


@pytest.mark.parametrize("package", COCO_PACKAGES)
def test_known_precision(package: str) -> None:
    """Of a ranking's detector: scores between .4 and .5 which stand for shares from 0 to 1."""
    scores = np.random.default_rng(1).uniform(0.4, 0.5, 3000)

    def share(score: Any) -> Any:
        return 1 / (1 + np.exp(-100 * (score - 0.46)))

    evaluation = evaluated(package, *with_precision(share, scores))
    grid = torch.linspace(0.401, 0.499, 50, dtype=torch.float64)
    wanted = share(grid.numpy())
    for method in ("isotonic", "logistic"):
        curve = coco_calibration(evaluation, method)
        got = curve(grid, torch.ones(50, dtype=torch.int64)).numpy()
        assert np.abs(got - wanted).mean() < 0.03
        assert np.abs(got - wanted).max() < 0.15
        assert (np.diff(got) > 0).all()


def pooled_by_hand(scores: list[float], right: list[bool]) -> dict[float, float]:
    """The greatest least mean: of all stretches of the sorted scores that end at or after, and begin at or before."""
    values = sorted(set(scores))
    sums = [(sum(r for s, r in zip(scores, right, strict=True) if s == v), sum(s == v for s in scores)) for v in values]
    out: dict[float, float] = {}
    for k, value in enumerate(values):
        least = [
            min(sum(a for a, _ in sums[i : j + 1]) / sum(b for _, b in sums[i : j + 1]) for j in range(k, len(values)))
            for i in range(k + 1)
        ]
        out[value] = max(least)
    return out


def test_isotonic_against_pooling_by_hand() -> None:
    scores = np.round(np.random.default_rng(2).random(120), 2)
    preds, target = with_precision(lambda s: s**2, scores)
    right = [bool(one["boxes"][0, 0] == 0) for one in preds]
    curve = coco_calibration(evaluated("faster_separate", preds, target), least=1)
    by_hand = pooled_by_hand(scores.tolist(), right)
    x = torch.tensor(list(by_hand), dtype=torch.float64)
    got = curve(x, torch.ones(len(x), dtype=torch.int64))
    low, high = min(by_hand), max(by_hand)
    assert 0 < low < high < 1
    rise = [0.01 + 0.98 * (s - low) / (high - low) for s in by_hand]
    wanted = torch.tensor(
        [0.999 * y + 0.001 * r for y, r in zip(by_hand.values(), rise, strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["isotonic", "logistic"])
@pytest.mark.parametrize("seed", range(2))
def test_average_precision_and_lrp_stay(seed: int, method: Any) -> None:
    from torchmetrics.detection import MeanAveragePrecision

    preds, target = random_images(seed, 40)
    evaluation = evaluated("faster_separate", preds, target)
    calibration = coco_calibration(evaluation, method, least=5)
    levels = [one | {"scores": calibration(one["scores"], one["labels"] + 1)} for one in preds]
    values: list[dict[str, Any]] = []
    for detections in (preds, levels):
        metric = MeanAveragePrecision(backend="faster_coco_eval", class_metrics=True)
        metric.update(detections, target)
        values.append(metric.compute())
    for key in ("map", "map_50", "map_per_class"):
        assert torch.equal(values[0][key], values[1][key])
    before, after = coco_olrp(evaluation), coco_olrp(evaluated("faster_separate", levels, target))
    assert before.lrp == after.lrp
    thresholds = torch.tensor(before.per_class.threshold)
    found = ~thresholds.isnan()
    mapped = calibration(thresholds[found], torch.tensor(before.classes)[found])
    torch.testing.assert_close(mapped, torch.tensor(after.per_class.threshold)[found], rtol=0, atol=1e-12)


def test_classes_with_little_share_a_curve() -> None:
    parts = [
        with_precision(np.asarray, np.random.default_rng(k).random(count), k, k)
        for k, count in enumerate((400, 300, 8))
    ]
    preds, target = ([*itertools.chain(*side)] for side in zip(*parts, strict=True))
    evaluation = evaluated("faster_separate", preds, target)
    own, one = coco_calibration(evaluation), coco_calibration(evaluation, by_class=False)
    assert (one.curves, one.of_all) == ({}, own.of_all)
    assert set(own.curves) == {1, 2}
    assert own.curves[1] != own.curves[2] != own.of_all
    grid = torch.linspace(0, 1, 9)
    assert torch.equal(own(grid, torch.full((9,), 3)), one(grid, torch.full((9,), 7)))
    alone = coco_calibration(evaluated("faster_separate", *parts[1]))
    assert alone.curves[2] == own.curves[2]
    nothing = coco_calibration(evaluated("faster_separate", [], []))
    scores, ids = torch.rand(20, dtype=torch.float64), torch.randint(1, 6, (20,))
    torch.testing.assert_close(nothing(scores, ids), scores, rtol=0, atol=1e-4)


def test_scores_close_to_each_other_stay_apart() -> None:
    """As those of Rank & Sort Loss are, all of them small; in float32."""
    scores = np.random.default_rng(5).uniform(0, 0.02, 3000).astype(np.float32).astype(np.float64)
    curve = coco_calibration(evaluated("faster_separate", *with_precision(lambda s: s * 40, scores)))
    given = torch.tensor(scores, dtype=torch.float32).unique()
    assert len(curve(given, torch.ones(len(given), dtype=torch.int64)).unique()) > 0.9 * len(given)


def test_a_class_whose_scores_fall_takes_the_curve_of_all() -> None:
    scores = np.random.default_rng(6).random(600)
    parts = [with_precision(np.asarray, scores), with_precision(lambda s: 1 - s, scores[:100], label=1)]
    preds, target = ([*itertools.chain(*side)] for side in zip(*parts, strict=True))
    calibration = coco_calibration(evaluated("faster_separate", preds, target), "logistic")
    assert set(calibration.curves) == {1}


def test_state_and_dtypes() -> None:
    preds, target = random_images(0)
    scores, labels = scores_and_ids(preds)
    for method in ("isotonic", "logistic"):
        calibration = coco_calibration(evaluated("pycocotools", preds, target), method, least=5)
        again = Calibration.from_state_dict(json.loads(json.dumps(calibration.state_dict())))
        assert torch.equal(calibration(scores, labels), again(scores, labels))
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            low = calibration(scores.to(dtype), labels.int())
            assert low.dtype == torch.float32
            torch.testing.assert_close(low, calibration(scores.to(dtype).double(), labels).float())
        assert calibration(scores[:0], labels[:0]).shape == (0,)


def test_errors() -> None:
    preds, target = random_images(4)
    evaluation = evaluated("faster_separate", preds, target)
    with pytest.raises(ValueError, match="method must be one of isotonic, logistic, got 'beta'"):
        coco_calibration(evaluation, "beta")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"least must be at least 1 .*, got 0"):
        coco_calibration(evaluation, least=0)
    for image in preds:
        image["scores"] = image["scores"] * 2
    with pytest.raises(ValueError, match=r"scores of the evaluation must be in 0..1, got [12]\."):
        coco_calibration(evaluated("faster_separate", preds, target))
    for share, error in (
        (np.zeros_like, r"right and wrong detections, got 0 right of 60"),
        (np.flip, r"scores of the evaluation must rise with precision, those of all classes together fall"),
    ):
        turned = evaluated("faster_separate", *with_precision(share, np.linspace(0, 1, 60)))
        with pytest.raises(ValueError, match=error):
            coco_calibration(turned, "logistic")
    calibration = coco_calibration(evaluation)
    half, one = torch.tensor([0.5]), torch.tensor([1])
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        (torch.tensor([1.5]), one, ValueError, "scores must be in 0..1, got 1.5"),
        (torch.tensor([float("nan")]), one, ValueError, "scores must be in 0..1, got nan"),
        (half, torch.tensor([0, 1]), ValueError, r"one shape \(D,\), got \(1,\) and \(2,\)"),
        (one, one, TypeError, "scores must be"),
        (half, half, TypeError, "labels must be"),
    ]
    for scores, labels, kind, words in wrong:
        with pytest.raises(kind, match=words):
            calibration(scores, labels)
