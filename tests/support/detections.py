"""Random detections, finished evaluations of them, and how results are held against the reference."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alrp_triton.metrics import LRPResult
from reference import lrp as reference

COCO_PACKAGES = ["pycocotools", "faster", "faster_separate"]
Images = list[dict[str, Tensor]]


def random_images(seed: int, count: int = 12) -> tuple[Images, Images]:
    """Boxes of all sizes, five classes, most detected near where they are, and scores with many ties.

    Class 3 has no ground truth and class 4 no detection; some images have neither the one nor the other; a tenth are
    crowds; half the images give areas, which are those of no box.
    """
    rng = np.random.default_rng(seed)
    preds: Images = []
    target: Images = []
    for image in range(count):
        truths = 0 if image % 5 == 1 else int(rng.integers(1, 12))
        corner, size = rng.uniform(0, 300, (truths, 2)), np.exp(rng.uniform(np.log(8), np.log(200), (truths, 2)))
        boxes = np.concatenate([corner, corner + size], 1)
        labels = rng.choice([0, 1, 2, 4], truths)
        target.append({"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)})
        if image % 3 != 0:
            target[-1]["iscrowd"] = torch.tensor(rng.random(truths) < 0.1)
        if image % 2 == 0:
            target[-1]["area"] = torch.tensor(size.prod(1) * rng.uniform(0.5, 1, truths))
        copies = np.repeat(np.arange(truths), rng.integers(0, 4, truths))
        jitter = rng.normal(0, 0.08, (len(copies), 4)) * size[copies][:, [0, 1, 0, 1]]
        stray = np.concatenate([a := rng.uniform(0, 300, (4, 2)), a + rng.uniform(5, 150, (4, 2))], 1)
        found = np.concatenate([boxes[copies] + jitter, stray])
        found = np.concatenate([np.minimum(found[:, :2], found[:, 2:]), np.maximum(found[:, :2], found[:, 2:])], 1)
        classes = np.concatenate([np.where(labels[copies] == 4, 3, labels[copies]), rng.integers(0, 4, 4)])
        keep = slice(0, 0) if image % 5 == 2 else slice(None)
        scores = np.round(rng.random(len(found)), 1 if image % 2 else 4)
        preds.append(
            {
                "boxes": torch.tensor(found[keep]),
                "scores": torch.tensor(scores[keep]),
                "labels": torch.tensor(classes[keep]),
            }
        )
    return preds, target


def evaluated(
    package: str, preds: Images, target: Images, max_dets: int = 100, masks: bool = False, **params: object
) -> Any:
    """A finished evaluation; ``masks`` evaluates the boxes as polygons."""
    if package == "pycocotools":
        coco = pytest.importorskip("pycocotools.coco").COCO
        evaluator, options = pytest.importorskip("pycocotools.cocoeval").COCOeval, {}
    else:
        faster = pytest.importorskip("faster_coco_eval")
        coco, evaluator, options = faster.COCO, faster.COCOeval_faster, {"separate_eval": package == "faster_separate"}
    sets: list[Any] = []
    for images in (target, preds):
        annotations: list[dict[str, Any]] = []
        for number, image in enumerate(images):
            for n, (x1, y1, x2, y2) in enumerate(image["boxes"].tolist()):
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": number + 7,
                    "category_id": int(image["labels"][n]) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                    "area": float(image["area"][n]) if "area" in image else (x2 - x1) * (y2 - y1),
                    "iscrowd": int(image["iscrowd"][n]) if "iscrowd" in image else 0,
                    "score": float(image["scores"][n]) if "scores" in image else 0.0,
                }
                annotations.append(annotation)
        sets.append(coco())
        sets[-1].dataset = {
            "images": [{"id": number + 7, "height": 700, "width": 700} for number in range(len(target))],
            "categories": [{"id": label + 1, "name": str(label)} for label in range(5)],
            "annotations": annotations,
        }
    with contextlib.redirect_stdout(io.StringIO()):
        for dataset in sets:
            dataset.createIndex()
        evaluation = evaluator(*sets, iouType="segm" if masks else "bbox", **options)
        evaluation.params.maxDets = [1, max_dets]
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
    return evaluation


def expected(preds: Images, target: Images, size: str, classes: int = 5, **options: Any) -> list[reference.Errors]:
    return [reference.lrp(preds, target, label, size=size, **options) for label in range(classes)]


def assert_result(result: LRPResult, points: list[reference.Errors]) -> None:
    np.testing.assert_allclose(np.array(result.per_class).T, np.array(points), rtol=0, atol=1e-9)
    means = [reference.mean([point[n] for point in points]) for n in range(4)]
    np.testing.assert_allclose(
        [result.lrp, result.localisation, result.false_positive, result.false_negative], means, rtol=0, atol=1e-9
    )


def make_metric(**options: Any) -> Any:
    pytest.importorskip("torchmetrics")
    pytest.importorskip(options.get("backend", "faster_coco_eval"))
    from alrp_triton.metrics import OptimalLRP

    made = OptimalLRP(**options)
    made.set_dtype(torch.float64)
    return made


def assert_metric(out: dict[str, Tensor], preds: Images, target: Images, **options: Any) -> None:
    name = "lrp" if "score_threshold" in options else "olrp"
    for size in reference.SIZES:
        points = expected(preds, target, size, **options)
        for n, component in enumerate(["", "_loc", "_fp", "_fn"]):
            key = f"{name}{component}" + ("" if size == "all" else f"_{size}")
            np.testing.assert_allclose(out[key], reference.mean([p[n] for p in points]), rtol=0, atol=1e-9)
            if size == "all":
                np.testing.assert_allclose(out[f"{name}{component}_per_class"], [p[n] for p in points], atol=1e-9)
        if size == "all" and name == "olrp":
            np.testing.assert_allclose(out["olrp_thresholds"], [p.threshold for p in points], atol=1e-9)


def images_of(rank: int) -> slice:
    return slice(0, 4) if rank == 0 else slice(4, 12)
