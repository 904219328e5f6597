"""aLRP Loss: its own cases, the forms of targets, and what its results may be used for."""

import numpy as np
import pytest
import torch
from torch import Tensor

from alrp_triton import ALRPLoss, alrp_loss, rank_sort_loss
from alrp_triton.dispatch import Backend
from reference.dense import alrp_loss as oracle
from tests.support.cases import FINITE, draw
from tests.support.compare import as_numpy, assert_gradient, assert_near
from tests.support.losses import assert_matches, outcome_of_alrp, outcome_of_oracle


@pytest.mark.parametrize(("delta", "rank"), [(1.0, 25.5), (0.0, 50.0)])
def test_of_tied_positives_each_counts_by_half(delta: float, rank: float, backend: Backend, device: str) -> None:
    """By hand: no negatives, 50 equal scores; each has itself and 49 times h(0) in its rank, and in its sum of errors."""
    errors = torch.linspace(0, 2, 50, device=device).requires_grad_()
    ones = torch.ones(50, dtype=torch.int64, device=device)
    out = alrp_loss(torch.zeros(50, device=device), ones, errors, delta=delta, backend=backend)
    assert_near(out.rank, np.full(50, rank), 1e-6)
    assert_near(out.localisation, 1.0, 1e-6)  # the mean error
    assert_near(torch.autograd.grad(out.localisation, errors)[0], np.full(50, 1 / 50), 1e-6)


def test_incoming_gradients(backend: Backend, device: str) -> None:
    case = FINITE["random"]
    expected = oracle(*case)
    logits = torch.tensor(case.logits, device=device, requires_grad=True)
    errors = torch.tensor(case.box_errors, device=device, requires_grad=True)
    out = alrp_loss(logits, torch.tensor(case.targets, device=device), errors, backend=backend)
    grads = torch.autograd.grad(-3 * out.classification, [logits, errors], allow_unused=True, retain_graph=True)
    assert_near(grads[0], -3 * expected.grad_logits, 1e-6)
    assert grads[1] is None
    grads = torch.autograd.grad(50 * out.localisation, [logits, errors], allow_unused=True, retain_graph=True)
    assert grads[0] is None
    assert_near(grads[1], 50 * expected.grad_box_errors, 1e-6)
    grads = torch.autograd.grad([out.classification, out.localisation], [logits, errors], [torch.tensor(0.5, device=device), torch.tensor(2.0, device=device)])  # fmt: skip
    assert_gradient(grads[0], 0.5 * expected.grad_logits, 1e-6)
    assert_near(grads[1], 2 * expected.grad_box_errors, 1e-6)


def test_only_the_wanted_gradient(device: str) -> None:
    case = FINITE["random"]
    targets = torch.tensor(case.targets, device=device)
    for want_logits, want_errors in ((True, False), (False, True), (False, False)):
        logits = torch.tensor(case.logits, device=device, requires_grad=want_logits)
        errors = torch.tensor(case.box_errors, device=device, requires_grad=want_errors)
        out = alrp_loss(logits, targets, errors)
        assert (out.classification.requires_grad, out.localisation.requires_grad) == (want_logits, want_errors)
        assert not out.rank.requires_grad
        assert not out.order.requires_grad
        if want_logits or want_errors:
            (out.classification + out.localisation).backward()
        assert (logits.grad is not None, errors.grad is not None) == (want_logits, want_errors)
    with torch.no_grad():
        out = alrp_loss(torch.tensor(case.logits, device=device, requires_grad=True), targets, errors)
    assert not out.classification.requires_grad
    assert_near(out.classification, oracle(*case).classification, 1e-6)


def test_saves_its_inputs_a_mask_and_little_more() -> None:
    case = draw(0, 50_000, 10)
    logits = torch.tensor(case.logits, requires_grad=True)
    targets, errors = torch.tensor(case.targets), torch.tensor(case.box_errors, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        alrp_loss(logits, targets, errors)
    inputs = {logits.data_ptr(), targets.data_ptr(), errors.data_ptr()}
    marks, *others = sorted((t for t in saved if t.data_ptr() not in inputs), key=lambda t: -t.numel())
    assert (marks.dtype, marks.numel()) == (torch.uint8, 50_000)
    assert sum(t.nbytes for t in others) <= 2000 * case.num_positives  # tables, most of all


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_may_be_written_into(dtype: torch.dtype) -> None:
    case = FINITE["random"]
    logits = torch.tensor(case.logits, dtype=dtype, requires_grad=True)
    errors = torch.tensor(case.box_errors, requires_grad=True)
    out = alrp_loss(logits, torch.tensor(case.targets), errors)
    out.rank.zero_()
    (out.classification + out.localisation).backward()
    assert errors.grad is not None
    assert_near(errors.grad, oracle(*case).grad_box_errors, 1e-6)


def test_inputs_are_left_alone(backend: Backend, device: str) -> None:
    case = FINITE["random"]
    arguments = [torch.tensor(a, device=device) for a in case[:3]]
    copies = [a.clone() for a in arguments]
    logits, targets, errors = arguments
    out = alrp_loss(logits.requires_grad_(), targets, errors.requires_grad_(), backend=backend)
    (out.classification + out.localisation).backward()
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


def test_second_derivative_is_an_error() -> None:
    case = FINITE["random"]
    logits, errors = (torch.tensor(a, requires_grad=True) for a in (case.logits, case.box_errors))
    out = alrp_loss(logits, torch.tensor(case.targets), errors)
    for loss, source in ((out.classification, logits), (out.localisation, errors)):
        (gradient,) = torch.autograd.grad(loss, source, create_graph=True)
        with pytest.raises(RuntimeError, match="a ranking loss has no second derivative"):
            gradient.square().sum().backward()


def test_no_positives_stays_in_the_graph(backend: Backend, device: str) -> None:
    weight = torch.ones((), device=device, requires_grad=True)
    logits = torch.randn(4, 5, 6, device=device) * weight
    errors = torch.zeros(0, device=device) * weight
    out = alrp_loss(logits, torch.zeros(4, 5, 6, device=device), errors, backend=backend)
    assert out.classification == 0
    assert out.localisation == 0
    assert out.classification.dtype == torch.float32
    assert out.classification.device == logits.device
    assert out.rank.shape == out.order.shape == (0,)
    (out.classification + out.localisation).backward()
    assert weight.grad == 0


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float32, torch.bfloat16]
)
def test_dense_targets_of_any_dtype(dtype: torch.dtype, device: str) -> None:
    signed = dtype not in (torch.uint8, torch.bool)
    case = draw(1, 400, 20, ignored=0.2 if signed else 0.0)
    targets = torch.tensor(case.targets).to(device, dtype)
    out = alrp_loss(torch.tensor(case.logits, device=device), targets, torch.tensor(case.box_errors, device=device))
    assert_near(out.classification, oracle(*case).classification, 1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(("background", "ignore_index"), [(None, -1), (255, 254), (0, 100)])
@pytest.mark.parametrize("shape", [(60,), (3, 4, 5)])
def test_class_indices(dtype: torch.dtype, background: int | None, ignore_index: int, shape: tuple[int, ...], backend: Backend, device: str) -> None:  # fmt: skip
    if dtype == torch.uint8 and ignore_index < 0:
        pytest.skip("uint8 holds no -1")
    classes, rng = 7, np.random.default_rng(3)
    nothing = classes if background is None else background
    indices = rng.choice([*(c for c in range(classes) if c != nothing), nothing, ignore_index], shape)
    dense = np.zeros((*shape, classes), np.int64)
    for where in np.ndindex(shape):
        if indices[where] == ignore_index:
            dense[where] = -1
        elif indices[where] != nothing:
            dense[(*where, indices[where])] = 1
    logits = rng.normal(size=dense.shape).astype(np.float32)
    errors = rng.uniform(0, 1, int((dense == 1).sum())).astype(np.float32)
    expected = oracle(logits, dense, errors)
    x, e = (
        torch.tensor(logits, device=device, requires_grad=True),
        torch.tensor(errors, device=device, requires_grad=True),
    )
    out = alrp_loss(x, torch.tensor(indices, dtype=dtype, device=device), e, background=background, ignore_index=ignore_index, backend=backend)  # fmt: skip
    (out.classification + out.localisation).backward()
    assert x.grad is not None
    assert e.grad is not None
    assert_matches(outcome_of_alrp(out, x.grad.reshape(-1), e.grad), outcome_of_oracle(expected), 1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint64])
@pytest.mark.parametrize("classes", [100, 128, 200, 256, 300, 65600])
def test_class_indices_do_not_wrap_around(dtype: torch.dtype, classes: int) -> None:
    indices = torch.tensor([44, 1, 99, 0])
    logits, errors = torch.randn(4, classes), torch.rand(4)
    wide, narrow = (alrp_loss(logits, t, errors) for t in (indices, indices.to(dtype)))
    assert wide.rank.shape == (4,)
    assert torch.equal(wide.rank, narrow.rank)


def test_one_class_index_form() -> None:
    """(A, 1) logits with (A,) indices: 0 is the class, 1 is background."""
    logits = torch.randn(50, 1)
    indices = (torch.rand(50) < 0.8).long()
    errors = torch.rand(int((indices == 0).sum()))
    by_index = alrp_loss(logits, indices, errors)
    dense = alrp_loss(logits, 1 - indices[:, None], errors)
    assert torch.equal(by_index.classification, dense.classification)


def test_any_shape_and_stride(backend: Backend, device: str) -> None:
    case = FINITE["random"]
    shape = (10, 20, 5)
    logits = torch.tensor(case.logits, device=device).reshape(shape).permute(2, 0, 1)
    targets = torch.tensor(case.targets, device=device).reshape(shape).permute(2, 0, 1)
    assert not logits.is_contiguous()
    flat = case._replace(logits=logits.flatten().cpu().numpy(), targets=targets.flatten().cpu().numpy())
    leaf = logits.detach().requires_grad_()
    out = alrp_loss(leaf, targets, torch.tensor(case.box_errors, device=device), backend=backend)
    out.classification.backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == leaf.shape
    assert_gradient(leaf.grad.flatten(), oracle(*flat).grad_logits, 1e-6)


def test_autocast(device: str) -> None:
    weight = torch.randn(16, 8, device=device, requires_grad=True)
    features, targets = torch.randn(100, 16, device=device), (torch.rand(100, 8, device=device) < 0.1).long()
    errors = torch.rand(int(targets.sum()), device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        logits = features @ weight
        assert logits.dtype == torch.bfloat16
        out = alrp_loss(logits, targets, errors)
        loss = out.classification + out.localisation
    loss.backward()
    expected = oracle(as_numpy(logits), as_numpy(targets), as_numpy(errors))
    assert out.classification.dtype == torch.float32
    assert_near(out.classification, expected.classification, 1e-6)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert_near(weight.grad, as_numpy(features).T @ expected.grad_logits.reshape(100, 8), 3e-2)


def test_module_calls_the_function() -> None:
    case = FINITE["random"]
    arguments = [torch.tensor(a) for a in case[:3]]
    module = ALRPLoss(delta=0.5, eps=1e-3, backend="torch")
    expected = alrp_loss(*arguments, delta=0.5, eps=1e-3, backend="torch")
    out = module(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(out.positives, expected.positives, strict=True))
    assert torch.equal(out.total, expected.total)
    assert (
        repr(module)
        == "ALRPLoss(delta=0.5, eps=0.001, background=None, ignore_index=-1, process_group=None, gradient_reduction='mean', backend='torch')"
    )
    assert not module.state_dict()


def test_a_detector_learns_to_rank() -> None:
    """Gradient steps on the logits themselves bring positives to the top and drive the loss to 0."""
    logits = torch.zeros(300, requires_grad=True)
    targets = (torch.arange(300) % 30 == 0).long()
    errors = torch.full((10,), 0.3)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(alrp_loss(logits, targets, errors).classification, logits)
        logits = (logits - 10 * gradient).detach().requires_grad_()
    assert alrp_loss(logits, targets, errors).classification < 0.01
    assert logits[targets == 1].min() > logits[targets == 0].max()


def test_minus_zero_is_a_hard_step() -> None:
    case = FINITE["hard_ties"]
    arguments = [torch.tensor(a) for a in case[:3]]
    assert torch.equal(alrp_loss(*arguments, delta=-0.0).rank, alrp_loss(*arguments, delta=0).rank)


def test_parts_may_be_added_and_ranks_may_not(device: str) -> None:
    """``sum(out)`` once added ranks and indices to the loss without a word."""
    logits = torch.randn(30, device=device, requires_grad=True)
    targets = (torch.arange(30, device=device) % 3 == 0).long()
    out = alrp_loss(logits, targets, torch.rand(10, device=device))
    assert torch.equal(out.total, out.classification + out.localisation)
    with pytest.raises(TypeError, match="PositiveRanks"):
        sum(out)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(TypeError, match="PositiveRanks"):
        torch.stack(out)  # pyright: ignore[reportArgumentType]
    classification, localisation, (rank, order) = out
    assert torch.equal(classification + localisation, out.total)
    assert rank is out.rank
    assert order is out.order
    both = rank_sort_loss(logits, targets, torch.rand(10, device=device))
    assert torch.equal(both.total, both.ranking + both.sorting)
    assert torch.equal(both.total, torch.stack(both).sum())
