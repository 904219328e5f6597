"""AP Loss and Rank & Sort Loss: their own cases, and the published interfaces of the family."""

import numpy as np
import pytest
import torch

import alrp_triton
from alrp_triton import APLoss, RankSortLoss, alrp_loss, ap_loss, compat, rank_sort_loss
from alrp_triton.dispatch import Backend
from bench.speed.problems import Problem
from bench.speed.timing import peak_memory
from reference import dense, loop
from tests.support.cases import FINITE
from tests.support.compare import as_numpy, assert_balanced, assert_gradient, assert_near
from tests.support.losses import ious_of

BACKENDS = ("torch", "numba", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """What is of size N is the operator's, which has tests of its own for all backends."""
    return request.param


def test_without_interpolation_ap_is_the_classification_part_of_alrp(backend: Backend, device: str) -> None:
    """And with box errors of 0 the gradient, too."""
    case = FINITE["zero_box_errors"]
    logits, targets, errors = (torch.tensor(a, device=device) for a in case[:3])
    of_alrp, of_ap = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    classification = alrp_loss(of_alrp, targets, errors, eps=0, backend=backend).classification
    loss = ap_loss(of_ap, targets, interpolate=False, backend=backend)
    assert_near(loss, classification, 1e-6)
    (classification + loss).backward()
    assert of_alrp.grad is not None
    assert of_ap.grad is not None
    assert_near(of_ap.grad, of_alrp.grad, 1e-6)


def test_precision_one_and_zero_false_positives() -> None:
    """The lowest positive outranks all: nothing is divided by zero, and the others keep precision 1 by interpolation."""
    logits = torch.tensor([5.0, 8.0, 7.5, 0.0, -1.0], requires_grad=True)
    targets = torch.tensor([1, 1, 1, 0, 0])
    loss = ap_loss(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0
    assert not gradient.any()
    higher = torch.tensor([5.0, 8.0, 9.5, -5.0], requires_grad=True)  # the hard step's precision 1, 1, then 2/3 raised
    expected = dense.ap_loss(as_numpy(higher), [1, 1, 0, 0], True, 0.0)
    loss = ap_loss(higher, torch.tensor([1, 1, 0, 0]), delta=0)
    assert_near(loss, expected.loss, 1e-6)


@pytest.mark.parametrize("own", [(1.0, 1.0), (2.0, 0.5), (0.0, 3.0), (1.0, None), (None, 1.0)])
def test_both_incoming_gradients_of_rank_sort(own: tuple[float | None, float | None], backend: Backend, device: str) -> None:  # fmt: skip
    case = FINITE["random"]
    expected = dense.rank_sort_loss(case.logits, case.targets, ious_of(case), case.delta)
    logits = torch.tensor(case.logits, device=device, requires_grad=True)
    out = rank_sort_loss(logits, torch.tensor(case.targets, device=device), torch.tensor(ious_of(case), device=device), delta=1.0, backend=backend)  # fmt: skip
    losses, weights = zip(*((loss, torch.tensor(w, device=device)) for loss, w in zip(out, own, strict=True) if w is not None), strict=True)  # fmt: skip
    (gradient,) = torch.autograd.grad(losses, logits, weights)
    assert_gradient(gradient, (own[0] or 0) * expected.grad_ranking + (own[1] or 0) * expected.grad_sorting, 1e-6)


def test_forms_of_targets(device: str) -> None:
    """Graded targets, a mask with IoUs, and class indices say the same; only the latter two let a positive have IoU 0."""
    classes, anchors, rng = 5, 40, np.random.default_rng(0)
    indices = torch.tensor(rng.choice([-1, *range(classes), *[classes] * 6], anchors))
    positive = (indices >= 0) & (indices < classes)
    ious = torch.rand(int(positive.sum())).clamp(min=0.05)
    mask = torch.zeros(anchors, classes, dtype=torch.int64)
    mask[positive, indices[positive]] = 1
    mask[indices < 0] = -1
    graded = mask.float()
    graded[mask == 1] = ious
    logits = torch.randn(anchors, classes)
    x, ious = logits.to(device), ious.to(device)
    results = [
        rank_sort_loss(x, graded.to(device)),
        rank_sort_loss(x, graded.to(device), num_positives=len(ious)),
        rank_sort_loss(x, mask.to(device), ious),
        rank_sort_loss(x, indices.to(device), ious),
    ]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    of_indices, of_mask = ap_loss(x, indices.to(device)), ap_loss(x, mask.to(device), num_positives=len(ious))
    assert torch.equal(of_indices, of_mask)

    ious[0] = 0
    expected = dense.rank_sort_loss(as_numpy(logits), as_numpy(mask), as_numpy(ious))
    assert_near(rank_sort_loss(x, mask.to(device), ious).sorting, expected.sorting, 1e-6)
    as_negative = rank_sort_loss(x, torch.where(mask == 1, graded, mask.float()).masked_fill(mask == 1, 1.0).to(device))
    assert as_negative.sorting == 0  # all alike


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_iou_that_is_not_finite(value: float, backend: Backend, device: str) -> None:
    case = FINITE["random"]
    ious = ious_of(case)
    ious[5] = value
    logits = torch.tensor(case.logits, device=device, requires_grad=True)
    targets, given = torch.tensor(case.targets, device=device), torch.tensor(ious, device=device)
    if np.isinf(value):
        if device == "cuda":
            pytest.skip("on a GPU an asynchronous device assertion: tests/core/test_device_errors.py")
        with pytest.raises(ValueError, match=r"ious must be in \[0, 1\], got \[inf\] among 1"):
            rank_sort_loss(logits, targets, given, backend=backend)
        return
    expected = dense.rank_sort_loss(case.logits, case.targets, ious)
    out = rank_sort_loss(logits, targets, given, backend=backend)
    assert np.isnan(expected.ranking + expected.sorting)
    for loss, wanted in ((out.ranking, expected.grad_ranking), (out.sorting, expected.grad_sorting)):
        assert loss.isnan()
        assert_near(torch.autograd.grad(loss, logits, retain_graph=True)[0], wanted, 1e-6)


def test_labels_need_no_care(backend: Backend, device: str) -> None:
    """Targets and IoUs may require gradients, or come from inference mode: they are labels."""
    case = FINITE["random"]
    targets = torch.tensor(case.targets, device=device)
    graded = targets.float()
    graded[targets == 1] = torch.tensor(ious_of(case), device=device)
    with torch.inference_mode():
        ious = torch.tensor(ious_of(case), device=device)
    plain = rank_sort_loss(torch.tensor(case.logits, device=device), graded, backend=backend)
    for given in ((graded.clone().requires_grad_(),), (targets, ious), (targets, ious.clone().requires_grad_())):
        logits = torch.tensor(case.logits, device=device, requires_grad=True)
        out = rank_sort_loss(logits, *given, backend=backend)
        assert torch.equal(out.sorting, plain.sorting)
        (out.ranking + out.sorting).backward()
        assert logits.grad is not None
        assert given[-1].grad is None
    logits = torch.tensor(case.logits, device=device, requires_grad=True)
    ap_loss(logits, targets.float().requires_grad_(), backend=backend).backward()
    with torch.inference_mode():
        errors = torch.tensor(case.box_errors, device=device)
    alrp_loss(logits, targets.float().requires_grad_(), errors, backend=backend).classification.backward()


def test_no_second_derivative_and_no_positives(backend: Backend, device: str) -> None:
    weight = torch.ones((), device=device, requires_grad=True)
    logits, targets = torch.randn(4, 5, device=device) * weight, torch.zeros(4, 5, device=device)
    losses = ap_loss(logits, targets, backend=backend), *rank_sort_loss(logits, targets, backend=backend)
    torch.stack(losses).sum().backward()
    assert all(loss == 0 for loss in losses)
    assert weight.grad == 0
    x = torch.randn(20, device=device, requires_grad=True)
    targets = (torch.arange(20, device=device) < 4).long()
    out = rank_sort_loss(x, targets, torch.rand(4, device=device), backend=backend)
    for loss in (ap_loss(x, targets, backend=backend), *out):
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.square().sum().backward()


@pytest.mark.parametrize(("backend", "p"), [("numba", 20_000), ("torch", 4000)])
def test_many_positives_in_little_memory(backend: Backend, p: int) -> None:
    """A P x P matrix would have 64 MB at P = 4,000, and 1,600 at 20,000. What the process takes at its peak is the witness.

    Of three steps the one that took least: a process takes memory at times that is not the step's.
    """
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=2 * p).astype(np.float32), requires_grad=True)
    targets, ious = (torch.arange(2 * p) < p).long(), torch.tensor(rng.random(p).astype(np.float32))
    out = rank_sort_loss(logits, targets, ious, backend=backend)
    (gradient,) = torch.autograd.grad(out.ranking + out.sorting, logits)
    assert_balanced(gradient, 1e-6)

    def step() -> None:
        torch.autograd.grad(rank_sort_loss(logits, targets, ious, backend=backend).sorting, logits)

    peaks = [peak_memory(step, Problem(logits, targets, ious, 0.5)) for _ in range(3)]
    assert min((peak for peak in peaks if peak is not None), default=0) < 32  # MiB
    some = rng.choice(p, 20, replace=False)
    s, t = as_numpy(logits)[:p], as_numpy(ious)
    h = np.clip(s[None, :] - s[some][:, None] + 0.5, 0, 1)
    kept = h * (t[None, :] >= t[some][:, None])
    sorting = (h @ (1 - t)) / h.sum(1) - (kept @ (1 - t)) / kept.sum(1)
    assert abs(sorting.mean() - out.sorting.item()) < 4 * sorting.std() / np.sqrt(20)


def test_modules_call_the_functions() -> None:
    case = FINITE["random"]
    logits, targets = torch.tensor(case.logits), torch.tensor(case.targets)
    ious = torch.tensor(ious_of(case))
    assert APLoss(interpolate=False, delta=0.5)(logits, targets) == ap_loss(
        logits, targets, interpolate=False, delta=0.5
    )
    module = RankSortLoss(delta=0.25, eps=1e-3, backend="torch")
    assert module(logits, targets, ious) == rank_sort_loss(logits, targets, ious, delta=0.25, eps=1e-3, backend="torch")
    assert (
        repr(module)
        == "RankSortLoss(delta=0.25, eps=0.001, background=None, ignore_index=-1, process_group=None, gradient_reduction='mean', backend='torch')"
    )
    assert (
        repr(APLoss())
        == "APLoss(interpolate=True, delta=1.0, background=None, ignore_index=-1, process_group=None, gradient_reduction='mean', backend='auto')"
    )


@pytest.mark.parametrize("name", ["random", "ties_at_knots", "hard_step", "more_than_a_block", "nothing_ignored"])
def test_published_interfaces(name: str) -> None:
    """Positional, in the published order, with what the published loops give."""
    case = FINITE[name]
    logits = torch.tensor(case.logits, requires_grad=True)
    targets, errors = torch.tensor(case.targets), torch.tensor(case.box_errors, requires_grad=True)
    expected = loop.alrp_loss(*case)
    loss, rank, order = compat.aLRPLoss.apply(logits, targets, errors, case.delta, case.eps)
    assert_near(loss, expected.classification, 1e-6)
    assert_near(torch.autograd.grad(loss, logits)[0], expected.grad_logits, 1e-6)
    assert not rank.requires_grad
    from_best = order.detach().flip(dims=[0])
    box = (errors[from_best].cumsum(0) / rank[from_best]).mean()
    if "ties" not in name:  # whose order the published code leaves to the sort
        assert_near(box, expected.localisation, 1e-6)
    (box * 50).backward()
    assert errors.grad is not None

    of_ap = loop.ap_loss(case.logits, case.targets, True, case.delta)
    loss = compat.APLoss.apply(logits, targets, case.delta)
    assert_near(loss, of_ap.loss, 1e-6)
    assert_near(torch.autograd.grad(loss, logits)[0], of_ap.grad_logits, 1e-6)

    graded = targets.float()
    graded[targets == 1] = torch.tensor(ious_of(case))
    wanted = loop.rank_sort_loss(case.logits, case.targets, ious_of(case), case.delta)
    ranking, sorting = compat.RankSort.apply(logits, graded, case.delta, 1e-10)
    assert_near(ranking, wanted.ranking, 1e-6)
    assert_near(sorting, wanted.sorting, 1e-6)
    (gradient,) = torch.autograd.grad(ranking + sorting, logits)
    assert_near(gradient, wanted.grad_ranking + wanted.grad_sorting, 1e-6)


@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_bucketed_interfaces_are_exact_where_a_bucket_is_one_negative(delta: float) -> None:
    """Scores that alternate, so that a bucket's mean is its negative: the published computation by hand, pair by pair."""
    scores = np.array([2.3, 1.9, 1.2, 0.7, 0.4, 0.1, -0.6, -0.8], dtype=np.float32)
    quality = np.array([0, 0.9, 0, 0.3, 0, 0.6, 0, 0.8], dtype=np.float32)
    positive = quality > 0
    difference = scores[None, :].astype(np.float64) - scores[positive][:, None]
    step = np.clip(difference / (2 * delta) + 0.5, 0, 1) if delta else (difference >= 0).astype(np.float64)
    false, rank = step[:, ~positive].sum(1), step.sum(1)
    error = false / rank
    gradient = np.zeros(8)
    gradient[positive] = -error / 4
    gradient[~positive] = (step[:, ~positive] * (error / np.where(false == 0, 1, false))[:, None]).sum(0) / 4

    logits = torch.tensor(scores, requires_grad=True)
    for targets in (torch.tensor(quality), torch.tensor(positive), torch.tensor(positive).long()):
        loss = compat.BucketedAPLoss.apply(logits, targets, delta)
        assert_near(loss, np.float64(error.mean()), 1e-6)
        assert_near(torch.autograd.grad(loss, logits)[0], gradient, 1e-6)
    ranking, sorting = compat.BucketedRankSort.apply(logits, torch.tensor(quality), delta)
    assert_near(ranking, np.float64(error.mean()), 1e-6)
    (of_both,) = torch.autograd.grad(ranking + sorting, logits)
    wanted = loop.rank_sort_loss(scores, positive.astype(int), quality[positive], delta)
    assert_near(of_both, wanted.grad_ranking + wanted.grad_sorting, 1e-6)
    with pytest.raises(TypeError, match=r"targets must be a torch\.Tensor, got list"):
        compat.BucketedAPLoss.apply(logits, [0, 1])  # pyright: ignore[reportArgumentType]


def test_bad_settings_of_modules() -> None:
    with pytest.raises(TypeError, match="interpolate must be True or False, got str"):
        APLoss(interpolate="yes")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="eps must be at least 0"):
        RankSortLoss(eps=-1)
    assert alrp_triton.APLoss().delta == 1.0
    assert alrp_triton.RankSortLoss().delta == 0.5
