"""What a training loop does with a loss: mixed precision, memory formats, repeatability, capture on a GPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alrp_triton import alrp_loss, ap_loss, rank_sort_loss
from alrp_triton.dispatch import Backend
from bench.gpu.clock import capture
from tests.conftest import DEVICE
from tests.support.cases import FINITE, draw
from tests.support.compare import assert_balanced

Loss = Callable[..., Tensor]


def total(logits: Tensor, targets: Tensor, values: Tensor, **settings: Any) -> Tensor:
    out = alrp_loss(logits, targets, values, **settings)
    return out.classification + out.localisation


def total_rs(logits: Tensor, targets: Tensor, values: Tensor, **settings: Any) -> Tensor:
    out = rank_sort_loss(logits, targets, values, **settings)
    return out.ranking + out.sorting


def total_ap(logits: Tensor, targets: Tensor, values: Tensor, **settings: Any) -> Tensor:
    return ap_loss(logits, targets, num_positives=len(values), **settings)


LOSSES: dict[str, Loss] = {"alrp": total, "ap": total_ap, "rank_sort": total_rs}


class Head(nn.Module):
    """The end of a dense detector: a convolution for the classes, one for the overlap of the box."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.boxes = nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(features).permute(0, 2, 3, 1), self.boxes(features).sigmoid().flatten()


def batch(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, 10, 12, generator=generator)
    targets = torch.randint(0, 20, (2, 10, 12), generator=generator).clamp(max=3)
    return features.to(device), targets.to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_autocast(name: str, dtype: torch.dtype, device: str) -> None:
    """The head computes in half precision, the loss in full, inside of autocast as outside, bit for bit."""
    torch.manual_seed(0)
    head, (features, targets) = Head().to(device), batch(device)
    with torch.autocast(device, dtype=dtype):
        logits, overlaps = head(features)
        assert logits.dtype == dtype
        inside = LOSSES[name](logits, targets, overlaps[targets.flatten() < 3].float())
    outside = LOSSES[name](logits, targets, overlaps[targets.flatten() < 3].float())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    inside.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    assert head.classes.weight.grad is not None
    assert head.classes.weight.grad.dtype == torch.float32


def test_gradient_scaler(device: str) -> None:
    """Scaled gradients come out as unscaled ones; a step whose gradients overflow is skipped and the scale halved."""
    features, targets = batch(device)
    weights: list[Tensor] = []
    for enabled in (False, True):
        torch.manual_seed(0)
        head = Head().to(device)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=enabled)  # pyright: ignore[reportPrivateImportUsage]
        for step in range(6):
            logits, overlaps = head(features)
            loss = total(logits, targets, 1 - overlaps[targets.flatten() < 3])
            if step == 3 and enabled:
                loss = loss * torch.tensor(1e38, device=device)  # times the scale: infinite
            if step == 3 and not enabled:
                continue
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if enabled:
            assert scaler.get_scale() == 2.0**9
        weights.append(head.classes.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_memory_formats_and_views(name: str, device: str) -> None:
    """Whatever the strides, the same loss, and the gradient where it belongs."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(2, 6, 7, 5, generator=generator).to(device)  # classes last
    targets = (torch.rand(2, 6, 7, 5, generator=generator) < 0.1).long().to(device)
    values = torch.rand(int(targets.sum()), generator=generator).to(device)
    leaf = plain.clone().requires_grad_()
    expected = LOSSES[name](leaf, targets, values)
    (gradient,) = torch.autograd.grad(expected, leaf)

    def channels_last() -> tuple[Tensor, Tensor]:
        leaf = plain.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
        return leaf, leaf.permute(0, 2, 3, 1)  # contiguous again, without a copy

    def channels_first() -> tuple[Tensor, Tensor]:
        leaf = plain.permute(0, 3, 1, 2).contiguous().requires_grad_()
        return leaf, leaf.permute(0, 2, 3, 1)

    def sliced() -> tuple[Tensor, Tensor]:
        leaf = torch.zeros(2, 6, 9, 5, device=device)
        leaf[:, :, 1:8] = plain
        return leaf.requires_grad_(), leaf[:, :, 1:8]

    def every_second() -> tuple[Tensor, Tensor]:
        leaf = plain.repeat_interleave(2, 3).requires_grad_()
        return leaf, leaf[..., ::2]

    def with_an_offset() -> tuple[Tensor, Tensor]:
        leaf = torch.cat([torch.zeros(1, device=device), plain.flatten()]).requires_grad_()
        return leaf, leaf[1:].view(plain.shape)

    for view in (channels_last, channels_first, sliced, every_second, with_an_offset):
        leaf, logits = view()
        loss = LOSSES[name](logits, targets, values)
        (mine,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(loss, expected), view.__name__
        spread = torch.zeros_like(leaf)
        view_of_gradient = {
            channels_last: lambda g=spread: g.permute(0, 2, 3, 1),
            channels_first: lambda g=spread: g.permute(0, 2, 3, 1),
            sliced: lambda g=spread: g[:, :, 1:8],
            every_second: lambda g=spread: g[..., ::2],
            with_an_offset: lambda g=spread: g[1:].view(plain.shape),
        }[view]
        view_of_gradient().copy_(gradient)
        assert torch.equal(mine, spread), view.__name__
    one = torch.zeros(1, device=device, requires_grad=True)  # all logits are one number
    loss = LOSSES[name](one.expand(plain.shape), targets, values)
    (mine,) = torch.autograd.grad(loss, one)
    assert abs(mine) < 1e-6  # Theorem 2
    strided = targets.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(LOSSES[name](plain, strided, values), expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_many_runs_and_any_number_of_threads_are_bitwise_equal(name: str, backend: Backend) -> None:
    """Under use_deterministic_algorithms, which is on in all tests."""
    assert torch.are_deterministic_algorithms_enabled()
    case = draw(0, 300_000, 500)  # several blocks and chunks
    logits = torch.tensor(case.logits, requires_grad=True)
    targets, values = torch.tensor(case.targets), torch.tensor(case.box_errors).clamp(0, 1)
    threads = torch.get_num_threads()
    first: tuple[Tensor, Tensor] | None = None
    try:
        for run in range(100):
            torch.set_num_threads((1, 2, 3, 8)[run % 4])
            loss = LOSSES[name](logits, targets, values, backend=backend)
            now = loss.detach(), torch.autograd.grad(loss, logits)[0]
            first = first or now
            assert torch.equal(now[0], first[0])
            assert torch.equal(now[1], first[1]), run
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["triton_tiled", "triton_binned"])
def test_the_triton_kernels_repeat_themselves(name: str, backend: Backend, device: str) -> None:
    runs = 100 if device == "cuda" else 3  # the interpreter does one thing after the other
    case = FINITE["random"]
    logits = torch.tensor(case.logits, device=device, requires_grad=True)
    targets, values = (torch.tensor(a, device=device) for a in (case.targets, np.clip(case.box_errors, 0, 1)))
    results: list[tuple[Tensor, Tensor]] = []
    for _ in range(runs):
        loss = LOSSES[name](logits, targets, values, backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


@pytest.fixture(params=[True, False], ids=["deterministic", "as torch is"])
def setting(request: pytest.FixtureRequest) -> None:
    """Of torch.use_deterministic_algorithms, which lets torch take other kernels; put back after each test."""
    torch.use_deterministic_algorithms(request.param)


@needs_gpu
@pytest.mark.usefixtures("setting")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["triton_tiled", "triton_binned"])
def test_the_host_does_not_wait_for_the_gpu(name: str, backend: Backend) -> None:
    case = FINITE["more_than_a_block"]
    logits = torch.tensor(case.logits, device="cuda", requires_grad=True)
    targets, values = (torch.tensor(a, device="cuda") for a in (case.targets, np.clip(case.box_errors, 0, 1)))
    torch.autograd.grad(LOSSES[name](logits, targets, values, backend=backend), logits)  # compiled now
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (gradient,) = torch.autograd.grad(LOSSES[name](logits, targets, values, backend=backend), logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_balanced(gradient, 1e-6)


@needs_gpu
@pytest.mark.usefixtures("setting")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["triton_tiled", "triton_binned"])
def test_captured_in_a_cuda_graph_and_replayed(name: str, backend: Backend) -> None:
    """With other logits, values and positives than those of the capture, as many of each."""
    first, second = draw(0, 5000, 60), draw(1, 5000, 60)
    logits, targets, values = (torch.tensor(a, device="cuda") for a in first[:3])
    values.clamp_(0, 1)
    logits.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = LOSSES[name](logits, targets, values, backend=backend)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    replay = capture(step)
    for case in (first, second):
        with torch.no_grad():
            for held, new in zip((logits, targets, values), case[:3], strict=True):
                held.copy_(torch.tensor(new))
            values.clamp_(0, 1)
        captured: Any = replay()
        expected = step()
        assert torch.equal(captured[0], expected[0])
        assert torch.equal(captured[1], expected[1])
