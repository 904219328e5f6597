"""LRP and oLRP by hand, and from finished COCO evaluations against the reference on random detections."""

import contextlib
import copy
import io
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from alrp_triton.metrics import LRPErrors, coco_lrp, coco_olrp, lrp_at, lrp_curve, optimal_lrp
from reference import lrp as reference
from tests.support.detections import COCO_PACKAGES, assert_result, evaluated, expected, make_metric, random_images
from tests.support.processes import run_together

NAN = float("nan")


def test_by_hand() -> None:
    """Three truths; true at 0.9 (IoU 0.9) and 0.7 (IoU 0.6), false at 0.8 and 0.6. Terms: localisation, FP, FN."""
    arguments = [0.6, 0.9, 0.7, 0.8], [False, True, True, False], [NAN, 0.9, 0.6, NAN], 3
    curve = lrp_curve(*arguments)
    np.testing.assert_allclose(curve.lrp, [(0.2 + 0 + 2) / 3, (0.2 + 1 + 2) / 4, (1.0 + 1 + 1) / 4, (1.0 + 2 + 1) / 5])
    np.testing.assert_allclose(curve.localisation, [0.1, 0.1, 0.25, 0.25])
    np.testing.assert_allclose(curve.false_positive, [0, 1 / 2, 1 / 3, 2 / 4])
    np.testing.assert_allclose(curve.false_negative, [2 / 3, 2 / 3, 1 / 3, 1 / 3])
    assert curve.threshold.tolist() == [0.9, 0.8, 0.7, 0.6]
    np.testing.assert_allclose(optimal_lrp(*arguments), [2.2 / 3, 0.1, 0, 2 / 3, 0.9])
    scores, is_tp, ious, truths = arguments
    best = optimal_lrp(torch.tensor(scores, dtype=torch.float64), torch.tensor(is_tp), torch.tensor(ious), truths)
    np.testing.assert_allclose(best, [2.2 / 3, 0.1, 0, 2 / 3, 0.9], rtol=1e-6)  # IoUs in float32
    found = lrp_at(*arguments, score_threshold=best.threshold)  # 0-d
    np.testing.assert_allclose(found, [2.2 / 3, 0.1, 0, 2 / 3, 0.9])
    np.testing.assert_allclose(lrp_at(*arguments, score_threshold=0.7), [3 / 4, 0.25, 1 / 3, 1 / 3, 0.7])
    np.testing.assert_allclose(lrp_at(*arguments, score_threshold=0.75), [3.2 / 4, 0.1, 1 / 2, 2 / 3, 0.75])
    np.testing.assert_allclose(optimal_lrp(*arguments, tau=0.0), [(0.5 + 1 + 1) / 4, 0.25, 1 / 3, 1 / 3, 0.7])


def test_of_equal_optima_the_highest_score() -> None:
    """In fractions, which are not rounded: true ones of IoU 0.6 or 0.8, which meet in the same LRP often."""
    rng = np.random.default_rng(0)
    met = 0
    for _ in range(1000):
        is_tp = rng.random(20) < 0.5
        is_tp[0] |= not is_tp.any()
        twentieths = rng.choice([12, 16], 20)
        truths = int(is_tp.sum()) + int(rng.integers(0, 3))
        exact: list[Fraction] = []
        error, true, false = Fraction(0), 0, 0
        for hit, twentieth in zip(is_tp.tolist(), twentieths.tolist(), strict=True):
            true, false = true + hit, false + (not hit)
            error += hit * (1 - Fraction(twentieth, 20)) / Fraction(1, 2)
            exact.append((error + false + truths - true) / (false + truths))
        least = min(exact)
        met += exact.count(least) > 1
        found = optimal_lrp(np.arange(20, 0, -1) / 20, is_tp, twentieths / 20, truths)
        assert found.threshold == (20 - exact.index(least)) / 20
        assert float(found.lrp) == pytest.approx(float(least), abs=1e-12)
    assert met > 10


def test_by_hand_from_boxes() -> None:
    """IoU 0.8 and a stray box on one image of two: oLRP is (0.2 / 0.5 + 0 + 1) / 2, at the first detection."""
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([0])}
    boxes = torch.tensor([[0.0, 0, 10, 8], [50, 50, 60, 60]])
    preds = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.4]), "labels": torch.tensor([0, 0])}]
    preds.append({"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)})
    for package in COCO_PACKAGES:
        result = coco_olrp(evaluated(package, preds, [truth, truth]))
        np.testing.assert_allclose(
            [result.lrp, result.localisation, result.false_positive, result.false_negative], [0.7, 0.2, 0, 0.5]
        )
        assert result.classes.tolist() == [1, 2, 3, 4, 5]
        np.testing.assert_allclose(result.per_class.threshold, [0.9, NAN, NAN, NAN, NAN], rtol=1e-7)
        np.testing.assert_allclose(result.by_size["small"].lrp, 0.7)
        assert np.isnan(result.by_size["large"].lrp)
        assert list(result.by_size) == ["all", "small", "medium", "large"]


def test_defined_where_nothing_is_found() -> None:
    missed, absent = [1, NAN, NAN, 1, NAN], [NAN] * 5
    np.testing.assert_equal(list(optimal_lrp([], [], [], 4)), missed)
    np.testing.assert_equal(list(optimal_lrp([0.5], [False], [0.0], 4)), missed)
    np.testing.assert_equal(list(optimal_lrp([0.5], [False], [0.0], 0)), absent)
    np.testing.assert_equal(list(lrp_at([0.5], [True], [0.8], 1, 0.6)), [1, NAN, NAN, 1, 0.6])
    np.testing.assert_equal(list(lrp_at([0.5], [True], [0.8], 1, NAN)), missed)
    np.testing.assert_equal(list(lrp_at([0.5], [False], [0.0], 2, 0.5)), [1, NAN, 1, 1, 0.5])
    np.testing.assert_equal(list(lrp_at([0.5], [False], [0.0], 0, 0.5)), [NAN, NAN, NAN, NAN, 0.5])
    assert np.isnan(lrp_curve([0.5], [False], [0.0], 0).lrp).all()
    np.testing.assert_equal(list(optimal_lrp([0.5, 0.4], [True, True], [1.0, 1.0], 2)), [0, 0, 0, 0, 0.4])


def test_of_equal_points_the_first() -> None:
    assert optimal_lrp([0.9, 0.8, 0.7], [True, False, True], [1.0, 0.0, 1.0], 2).threshold == 0.7
    best = optimal_lrp([0.9, 0.8, 0.7, 0.6], [True, False, False, True], [0.5, 0, 0, 1.0], 2)
    assert (best.lrp, best.threshold) == (0.75, 0.6)
    best = optimal_lrp([0.9, 0.8, 0.7], [True, False, True], [1.0, 0.0, 0.75], 2)  # 1/2, 2/3, (1/2 + 1) / 3
    assert (best.lrp, best.threshold) == (0.5, 0.9)
    best = optimal_lrp([0.9, 0.8], [True, False], [1.0, 0.0], 1)
    assert (best.lrp, best.threshold) == (0, 0.9)
    assert optimal_lrp([0.5, 0.5], [False, True], [0.0, 1.0], 1).lrp == 0.5  # in the order given


@pytest.mark.parametrize("package", COCO_PACKAGES)
@pytest.mark.parametrize("seed", range(4))
def test_random_against_the_reference(package: str, seed: int) -> None:
    preds, target = random_images(seed)
    for tau, max_dets in ((0.5, 100), (0.75, 100), (0.5, 2)):
        evaluation = evaluated(package, preds, target, max_dets)
        result = coco_olrp(evaluation, tau=tau)
        at = coco_lrp(evaluation, 0.5, tau=tau)
        for size in reference.SIZES:
            assert_result(result.by_size[size], expected(preds, target, size, tau=tau, max_dets=max_dets))
            points = expected(preds, target, size, tau=tau, max_dets=max_dets, score_threshold=0.5)
            assert_result(at.by_size[size], points)
        assert_result(result, expected(preds, target, "all", tau=tau, max_dets=max_dets))
    assert np.isnan(result.per_class.lrp[3])  # class 3 has no ground truth
    assert (result.per_class.lrp[4], result.per_class.false_negative[4]) == (1, 1)  # class 4 has no detection
    assert np.isfinite(result.per_class.threshold[:3]).all()


def test_random_images_have_what_they_claim() -> None:
    preds, target = random_images(0)
    points = {size: expected(preds, target, size) for size in reference.SIZES}
    assert all(0 < point.lrp < 1 for point in points["all"][:3])
    assert all(any(0 < point.lrp < 1 for point in of_size) for of_size in points.values())
    assert len({point.lrp for of_size in points.values() for point in of_size}) > 10
    assert any(bool(image["iscrowd"].any()) for image in target if "iscrowd" in image)
    assert (
        {len(image["boxes"]) == 0 for image in target} == {len(image["boxes"]) == 0 for image in preds} == {True, False}
    )
    assert expected(preds, target, "all", max_dets=2) != points["all"]


@pytest.mark.parametrize("package", COCO_PACKAGES)
def test_max_dets_below_those_evaluated(package: str) -> None:
    preds, target = random_images(1)
    evaluation = evaluated(package, preds, target)
    for max_dets in (1, 3):
        assert_result(coco_olrp(evaluation, max_dets=max_dets), expected(preds, target, "all", max_dets=max_dets))


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_packages_agree(masks: bool) -> None:
    preds, target = random_images(2)
    results = [coco_olrp(evaluated(package, preds, target, masks=masks)) for package in COCO_PACKAGES]
    for result in results[1:]:
        for size, part in results[0].by_size.items():
            np.testing.assert_allclose(result.by_size[size].per_class, part.per_class, rtol=0, atol=1e-9)
    if masks:
        assert results[0].lrp == pytest.approx(coco_olrp(evaluated("faster", preds, target)).lrp, abs=0.05)


@pytest.mark.parametrize("package", COCO_PACKAGES)
def test_without_categories(package: str) -> None:
    preds, target = random_images(3)
    result = coco_olrp(evaluated(package, preds, target, useCats=0))
    assert result.classes.tolist() == [-1]
    # COCO then sorts what it evaluates by category first.
    for images in (preds, target):
        for image in images:
            order = torch.argsort(image["labels"], stable=True)
            image.update({key: value[order] for key, value in image.items()})
            image["labels"] = torch.zeros_like(image["labels"])
    assert_result(result, expected(preds, target, "all", classes=1))


@pytest.mark.parametrize("package", COCO_PACKAGES)
def test_lrp_at_the_optimal_thresholds_is_olrp(package: str) -> None:
    preds, target = random_images(4)
    rng = np.random.default_rng(0)
    for image in preds:
        image["scores"] = torch.tensor(rng.random(len(image["scores"])))  # no ties
    evaluation = evaluated(package, preds, target)
    best = coco_olrp(evaluation)
    at = coco_lrp(evaluation, best.per_class.threshold)
    np.testing.assert_equal(list(at.per_class), list(best.per_class))
    for threshold in (0.0, 0.3, 0.6, 0.9, float("-inf"), float("inf")):
        worse = coco_lrp(evaluation, threshold).per_class.lrp
        assert (worse >= best.per_class.lrp - 1e-12)[~np.isnan(worse)].all()


@pytest.mark.parametrize("package", COCO_PACKAGES)
def test_evaluation_is_left_as_it_is(package: str) -> None:
    preds, target = random_images(5)
    evaluation = evaluated(package, preds, target)
    before = coco_olrp(evaluation)
    thresholds, ious = list(evaluation.params.iouThrs), copy.deepcopy(evaluation.ious)
    evaluation.params.maxDets = [1]  # a later change, that no evaluation has seen
    assert_result(coco_olrp(evaluation), [reference.Errors(*map(float, p)) for p in np.array(before.per_class).T])
    assert list(evaluation.params.iouThrs) == thresholds
    np.testing.assert_equal(evaluation.ious, ious)
    evaluation.params.maxDets = [1, 100]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        first = evaluation.eval["precision"].copy()
        evaluation.evaluate()
        evaluation.accumulate()
    np.testing.assert_array_equal(first, evaluation.eval["precision"])


def test_errors_of_arrays() -> None:
    for arguments, options, kind, text in (
        (([0.1], [True, False], [0.5], 1), {}, ValueError, r"scores, is_tp and ious must have one shape \(D,\), got \(1,\), \(2,\) and \(1,\)"),
        (([[0.1]], [[True]], [[0.5]], 1), {}, ValueError, r"got \(1, 1\)"),
        (([0.1], [True], [0.5], 0), {}, ValueError, "num_truths must be at least the number of true positives, got 0 and 1"),
        (([0.1], [True], [0.5], 1), {"tau": 1.0}, ValueError, "tau must be at least 0 and less than 1, got 1.0"),
        (([0.1], [True], [0.5], 1), {"tau": "x"}, TypeError, "tau must be a real number, got str"),
    ):  # fmt: skip
        for function in (lrp_curve, optimal_lrp):
            with pytest.raises(kind, match=text):
                function(*arguments, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize("package", COCO_PACKAGES)
def test_errors_of_evaluations(package: str) -> None:
    preds, target = random_images(0, count=2)
    evaluation = evaluated(package, preds, target)
    fresh = type(evaluation)(evaluation.cocoGt, evaluation.cocoDt, "bbox")
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: coco_olrp(fresh), ValueError, r"evaluation has no results: call its evaluate\(\) first"),
        (lambda: coco_olrp(3), TypeError, "evaluation must be a COCOeval or a COCOeval_faster, got int"),  # pyright: ignore[reportArgumentType]
        (lambda: coco_olrp(evaluation, tau=0.3), ValueError, r"tau must be among params.iouThrs of the evaluation, \[.*\], got 0.3"),
        (lambda: coco_olrp(evaluation, tau=1.0), ValueError, "tau must be at least 0 and less than 1, got 1.0"),
        (lambda: coco_olrp(evaluation, max_dets=101), ValueError, "max_dets must be at least 1 and at most 100, got 101"),
        (lambda: coco_olrp(evaluation, max_dets=1.5), TypeError, "max_dets must be an int, got float"),  # pyright: ignore[reportArgumentType]
        (lambda: coco_lrp(evaluation, [0.5, 0.5]), ValueError, r"score_threshold must be a number or one for each of 5 classes, got shape \(2,\)"),
        (lambda: coco_lrp(evaluation, NAN), ValueError, "score_threshold must be a number or one for each class, got nan"),
    ]  # fmt: skip
    for call, kind, text in cases:
        with pytest.raises(kind, match=text):
            call()
    evaluation.cocoGt.anns[0] = evaluation.cocoGt.anns.pop(1)
    with pytest.raises(ValueError, match="cocoGt of the evaluation has an annotation with id 0"):
        coco_olrp(evaluation)
    for number in (-1, 2**53 + 1, "7", None):
        evaluation = evaluated(package, preds, target)
        evaluation.cocoGt.anns[number] = evaluation.cocoGt.anns.pop(1)
        with pytest.raises(
            ValueError, match=rf"cocoGt .* an annotation with id {number!r}; ids have to be 1 to 2\*\*53"
        ):
            coco_olrp(evaluation)
    twice = evaluated(package, preds, target)
    twice.cocoGt.dataset["annotations"].append(twice.cocoGt.dataset["annotations"][0])
    with pytest.raises(ValueError, match="cocoGt of the evaluation has an annotation whose id another has"):
        coco_olrp(twice)
    far = evaluated(package, preds, target)
    far.cocoGt.imgs[2**60] = {"id": 2**60}
    with pytest.raises(ValueError, match="cocoGt of the evaluation has an image"):
        coco_olrp(far)
    wrong = evaluated(package, preds, target, areaRngLbl=["all"])
    with pytest.raises(
        ValueError, match=r"params.areaRngLbl of the evaluation must label each of 4 areaRng, got \['all'\]"
    ):
        coco_olrp(wrong)


@pytest.mark.parametrize("package", COCO_PACKAGES)
def test_all_is_found_by_its_name(package: str) -> None:
    """And not by its place: a range of one's own may come first."""
    preds, target = random_images(0, count=4)
    ranges = {"small": [0, 32**2], "large": [32**2, 1e10], "all": [0, 1e10]}
    own = evaluated(package, preds, target, areaRng=list(ranges.values()), areaRngLbl=list(ranges))
    found, wanted = coco_olrp(own), coco_olrp(evaluated(package, preds, target))
    np.testing.assert_array_equal(found.per_class, wanted.per_class)
    assert found.lrp == wanted.lrp != found.by_size["small"].lrp
    named = evaluated(package, preds, target, areaRng=[[0, 1e10]], areaRngLbl=["every"])
    with pytest.raises(ValueError, match=r"params.areaRngLbl of the evaluation must have 'all', got \['every'\]"):
        coco_olrp(named)


def test_evaluations_that_were_merged_of_batches() -> None:
    """Parts that are missing, or of other images, are no results."""
    preds, target = random_images(0, count=3)
    changes: list[tuple[Callable[[Any], object], str]] = [
        (lambda one: one.ious.clear(), "evaluation has no IoUs of image"),
        (lambda one: one.ious.update({key: [] for key in one.ious}), "evaluation has no IoUs of image"),
        (lambda one: one.evalImgs.pop(), "evalImgs of the evaluation must have an entry for each category"),
        (lambda one: one.evalImgs.reverse(), r"evalImgs of the evaluation has image \d+ where params.imgIds has \d+"),
    ]
    for change, words in changes:
        evaluation = evaluated("pycocotools", preds, target)
        change(evaluation)
        with pytest.raises(ValueError, match=words):
            coco_olrp(evaluation)


def test_packages_are_imported_when_needed() -> None:
    code = (
        "import sys; import alrp_triton.metrics as m; print([n for n in ('torchmetrics', 'pycocotools', 'faster_coco_eval') if n in sys.modules])\n"
        "sys.modules['torchmetrics'] = None\n"
        "try: m.OptimalLRP\nexcept ImportError as e: print(e)"
    )
    (done,) = run_together(["-W", "error", "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "OptimalLRP needs torchmetrics: pip install 'alrp-triton[metrics]'"]


def test_public_names() -> None:
    import alrp_triton.metrics as metrics

    make_metric()
    assert sorted(metrics.__all__) == metrics.__all__
    assert all(getattr(metrics, name).__doc__ for name in metrics.__all__)
    assert isinstance(optimal_lrp([], [], [], 0), LRPErrors)
    with pytest.raises(AttributeError, match="has no attribute 'mean_lrp'"):
        metrics.mean_lrp  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": [0.6, np.nan]}, ValueError, "scores must be numbers, got NaN for 1 of 2"),
        ({"is_tp": [1, 0]}, TypeError, "is_tp must be bool, got int64"),
        ({"ious": [0.2, 0.0]}, ValueError, r"ious of true positives must be in \[tau, 1\] = \[0.5, 1\], got \[0.2\]"),
        ({"ious": [np.inf, 0.0]}, ValueError, r"ious of true positives must be in .* got \[inf\]"),
        ({"num_truths": "3"}, TypeError, "num_truths must be an int, got str"),
        ({"num_truths": 1.5}, TypeError, "num_truths must be an int, got float"),
        ({"num_truths": -1}, ValueError, "num_truths must be at least 0"),
    ],
)
def test_arrays_that_mean_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"scores": [0.6, 0.5], "is_tp": [True, False], "ious": [0.9, 0.0], "num_truths": 2}
    lrp_curve(**good)
    with pytest.raises(error, match=message):
        lrp_curve(**good | change)
    with pytest.raises(TypeError, match="score_threshold must be a real number, got str"):
        lrp_at(**good, score_threshold="x")  # pyright: ignore[reportArgumentType]
