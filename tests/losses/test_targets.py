"""Targets read by Triton's kernels, by numba and by torch operations, against a loop over values."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alrp_triton import dispatch
from tests.conftest import or_skip

Classify = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(params=["torch_targets", "numba_targets", "triton_targets"])
def classify(request: pytest.FixtureRequest, device: str) -> Classify:
    backend, _, _ = request.param.partition("_")
    or_skip(backend, device)
    read = dispatch.backend_module(request.param).read

    def classify(targets: Tensor, classes: int | None, *how: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mask of the negatives, positives, status."""
        if backend == "triton":
            positives, marks, status = by_triton(read, targets, classes, *how)
        else:
            positives, marks, status = read(targets, classes, *how)
        if marks is None:
            assert classes is None
            assert targets.dtype.itemsize == 1
            marks = targets
        if marks.dtype == torch.int32:
            marks = marks.cpu()[:, None]
            marks = (marks == -2) | (marks == torch.arange(classes or 0))
        return (marks == 0).view(-1), positives, status

    return classify


def by_triton(
    read: Callable[..., Any], targets: Tensor, classes: int | None, *how: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Positives in order, marks, status; and of each positive, in whatever order they are, what is told beside."""
    logits = torch.randn(targets.numel() * (classes or 1), device=targets.device)
    groups = torch.arange(targets.numel(), device=targets.device) % 7
    found, marks = read(targets, classes, *how, logits=logits, groups=groups)
    if found.status[0] == how[-1]:
        assert torch.equal(found.scores, logits.double()[found.places])
        assert torch.equal(found.groups, groups[found.places // (classes or 1)])
        if how[2]:
            assert torch.equal(found.grades, targets.double()[found.places])
    return found.places.sort().values, marks, found.status[:2]


def by_hand(targets: Tensor, classes: int | None, background: int, ignore: int) -> tuple[list[bool], list[int], int]:
    negatives: list[bool] = []
    positives: list[int] = []
    bad = 0
    for target in targets.reshape(-1).tolist():
        if classes is None:
            negatives.append(target == 0)
            if target == 1:
                positives.append(len(negatives) - 1)
            bad += target not in (0, 1) and not (target == -1 and targets.dtype.is_signed)
        else:
            positive = 0 <= target < classes and target not in (background, ignore)
            if positive:
                positives.append(len(negatives) + target)
            negatives += [target != ignore and not (positive and c == target) for c in range(classes)]
            bad += not (0 <= target < classes or target in (background, ignore))
    return negatives, positives, bad


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.uint16])  # fmt: skip
@pytest.mark.parametrize("n", [1, 2048, 5001])
@pytest.mark.parametrize("values", ["good", "bad"])
def test_dense(classify: Classify, dtype: torch.dtype, n: int, values: str, device: str) -> None:
    rng = np.random.default_rng(n)
    targets = torch.tensor(rng.choice([-1, 0, 1] if dtype.is_signed else [0, 1], n, p=[0.1, 0.85, 0.05] if dtype.is_signed else [0.9, 0.1]))  # fmt: skip
    if values == "bad" and dtype != torch.bool:
        targets[n // 2] = 255 if dtype == torch.uint8 else 3
    targets = targets.to(dtype)
    negatives, positives, bad = by_hand(targets, None, 0, -1)
    given = targets.to(device)
    mask, where, status = classify(given, None, 0, -1, False, len(positives))
    assert torch.equal(given.cpu(), targets)
    assert status[0] == len(positives)
    assert (status[1] > 0) == (bad > 0)
    if not bad:
        assert mask.tolist() == negatives
        assert where.tolist() == positives


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
@pytest.mark.parametrize(("background", "ignore"), [(-2, -1), (3, 5), (200, 100)])
@pytest.mark.parametrize(("anchors", "classes"), [(1, 1), (70, 7), (33, 80), (40, 130)])
def test_class_indices(classify: Classify, dtype: torch.dtype, background: int, ignore: int, anchors: int, classes: int, device: str) -> None:  # fmt: skip
    choices = [*range(min(classes, 100)), background, ignore]
    choices = [choice for choice in choices if dtype.is_signed or choice >= 0]
    targets = torch.tensor(np.random.default_rng(0).choice(choices, anchors)).to(dtype)
    negatives, positives, bad = by_hand(targets, classes, background, ignore)
    assert bad == 0
    mask, where, status = classify(targets.to(device), classes, background, ignore, False, len(positives))
    assert status.tolist() == [len(positives), 0]
    assert mask.tolist() == negatives
    assert where.tolist() == positives
    targets[anchors // 2] = 250 if dtype == torch.uint8 else 1000
    assert classify(targets.to(device), classes, background, ignore, False, 0)[2][1] > 0


@pytest.mark.parametrize(("background", "ignore"), [(3, -1), (-1, -2), (3, 7)])
def test_unsigned_class_indices_do_not_wrap(classify: Classify, background: int, ignore: int, device: str) -> None:
    targets = torch.tensor(np.array([0, 3, 2**64 - 1, 2**64 - 2], np.uint64)).to(device)
    assert classify(targets, 3, background, ignore, False, 1)[2][1] > 0


def test_another_number_of_positives_is_told_and_writes_nothing_beyond(classify: Classify, device: str) -> None:
    targets = torch.ones(3000, dtype=torch.int8, device=device)
    for count in (0, 5, 2999, 3001):
        _, where, status = classify(targets, None, 0, -1, False, count)
        assert where.shape == (count,)
        assert status.tolist() == [3000, 0]
        assert ((where >= 0) & (where < 3000)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
def test_grades(classify: Classify, dtype: torch.dtype, device: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.choice([-1.0, 0.0, 0.0, 2**-20, 0.5, 1.0, 1 + 2**-7], 3000)
    grades = torch.tensor(values if dtype.is_floating_point else np.abs(np.trunc(values))).to(dtype)
    expected = [k for k, grade in enumerate(grades.tolist()) if grade > 0]
    mask, where, status = classify(grades.to(device), None, 0, -1, True, len(expected))
    assert status.tolist() == [len(expected), 0]
    assert mask.tolist() == (grades == 0).tolist()
    assert where.tolist() == expected
    for bad in (2, *((-0.5, 1.02, float("nan"), float("inf")) if dtype.is_floating_point else ())):
        broken = grades.clone()
        broken[1234] = bad
        assert classify(broken.to(device), None, 0, -1, True, 0)[2][1] > 0
