"""Columns counted in shared memory, as on NVIDIA, with tests.support.ptx in the interpreter; on a GPU as it is."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from alrp_triton import ComparisonMatrix, alrp_loss
from alrp_triton.backends.columns import ALL, NONE, Columns
from tests.conftest import or_skip
from tests.support.ptx import SharedMemory, shared_memory

__all__ = ["shared_memory"]


def of_device(multiprocessors: int) -> Callable[[torch.device], int]:
    """In place of the question how many a device has."""
    return lambda device: multiprocessors


@pytest.fixture(autouse=True)
def binned(device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which finds a device of one multiprocessor."""
    or_skip("triton")
    module = import_module("alrp_triton.backends.triton_binned")
    if device != "cuda":
        request.getfixturevalue("shared_memory")
    monkeypatch.setattr(module, "_multiprocessors", of_device(1))
    return module


def problem(seed: int, anchors: int, classes: int, positives: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(anchors, classes, generator=generator) * spread - 2
    targets = torch.full((anchors,), classes)
    order = torch.randperm(anchors, generator=generator)
    targets[order[:positives]] = torch.randint(classes, (positives,), generator=generator)
    targets[order[positives : positives + anchors // 20]] = -1
    return logits, targets, torch.rand(positives, generator=generator)


def step(
    backend: str, logits: Tensor, targets: Tensor, errors: Tensor, device: str, **settings: object
) -> list[Tensor]:
    leaf, errors = (of.detach().to(device, copy=True).requires_grad_() for of in (logits, errors))
    out = alrp_loss(leaf, targets.to(device), errors, backend=backend, **settings)  # pyright: ignore[reportArgumentType]
    return [out.total.detach(), *torch.autograd.grad(out.total, (leaf, errors))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("anchors", "classes", "positives", "spread", "delta"),
    [
        (70, 80, 9, 1.5, 1.0),  # two programs of two blocks, of which the last is not whole
        (70, 80, 9, 0.0, 1.0),  # all logits are equal
        (150, 80, 9, 1e-3, 1.0),  # blocks of one bin, and of two
        (3000, 3, 40, 1.5, 0.3),
        (2500, 1, 1, 1.5, 1.0),
        (70, 80, 9, 1.5, 0.0),
    ],
)
def test_a_step_is_that_of_torch(
    anchors: int, classes: int, positives: int, spread: float, delta: float, dtype: torch.dtype, device: str
) -> None:
    logits, targets, errors = problem(0, anchors, classes, positives, spread)
    logits = logits.to(dtype)
    settings = {"delta": delta}
    ours, wanted = (
        step(backend, logits, targets, errors, device, **settings) for backend in ("triton_binned", "torch")
    )
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6 if dtype == torch.float32 else 1e-2, atol=1e-9)
    again = step("triton_binned", logits, targets, errors, device, **settings)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_groups_and_dense_targets(device: str) -> None:
    logits, targets, errors = problem(1, 160, 40, 30, 1.5)
    images = logits.reshape(4, 40, 40), targets.reshape(4, 40), errors
    settings = {"groups": torch.tensor([0, 1, 0, 2])}
    ours, wanted = (step(backend, *images, device, **settings) for backend in ("triton_binned", "torch"))
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-9)
    dense = torch.zeros(logits.shape, dtype=torch.int8)
    dense[targets == -1] = -1
    (where,) = torch.nonzero((targets >= 0) & (targets < 40), as_tuple=True)
    dense[where, targets[where]] = 1
    alone = step("triton_binned", logits, targets, errors, device)
    for mine, theirs in zip(step("triton_binned", logits, dense, errors, device), alone, strict=True):
        assert torch.equal(mine, theirs)


def test_nan_poisons_where_it_counts(device: str) -> None:
    logits, targets, errors = problem(2, 70, 80, 9, 1.5)
    negative = int((targets == 80).nonzero()[-1])
    ignored = int((targets == -1).nonzero()[0])
    logits[ignored, 5] = float("nan")
    total, gradient, _ = step("triton_binned", logits, targets, errors, device)
    assert total.isfinite()
    assert gradient.isfinite().all()
    logits[negative, 3] = float("nan")
    assert step("triton_binned", logits, targets, errors, device)[0].isnan()


def test_small_positions_are_rounded_to_the_nearest(device: str) -> None:
    """Cut off, each would be too small by half a unit: 5e-5 of a sum of such positions."""
    rows = torch.tensor([-4.3], device=device).double()
    near = rows.float() - 0.3 + torch.rand(6000, generator=torch.Generator().manual_seed(0)).to(device) * 3e-5
    wanted = ((near.double() - rows) / 0.6 + 0.5).clamp(0, 1).sum()
    found = ComparisonMatrix(rows, near, delta=0.3, backend="triton_binned").matvec()
    assert abs(float(found / wanted) - 1) < 5e-6


def test_a_block_in_one_bin_adds_its_sum(device: str, request: pytest.FixtureRequest) -> None:
    if device == "cuda":
        pytest.skip("additions are counted in the interpreter")
    memory: SharedMemory = request.getfixturevalue("shared_memory")
    logits, targets, errors = problem(3, 256, 80, 9, 0.0)  # ten blocks of two programs
    step("triton_binned", logits, targets, errors, device)
    assert memory.additions == 10
    memory.additions = 0
    logits[0, 0] += 3  # the other blocks of its program go column by column, too
    step("triton_binned", logits, targets, errors, device)
    assert 5 + 4 * 2048 < memory.additions < 5 + 5 * 2048


def test_sums_are_those_of_integers(binned: ModuleType, device: str) -> None:
    """All that a column adds, and the carry from word to word: some thousand columns at positions near 1 in one bin."""
    rows = torch.tensor([0.0, 4.0], dtype=torch.float64, device=device)
    columns = torch.tensor([0.999] * 3000 + [-5.0, 7.0], device=device)
    assert binned._launch(Columns(columns, None), 2, 1).settings["SHARED"]
    each = float(columns[0]) / 2 + 0.5  # h of a score of 0 there
    found = ComparisonMatrix(rows, columns, delta=1.0, backend="triton_binned").matvec().cpu().numpy()
    assert abs(found[0] - (3000 * each + 1)) <= 3000 * 2.0**-23  # the position itself is rounded
    assert found[1] == 1
    found = ComparisonMatrix(rows, columns[:-2].contiguous(), delta=1.0, backend="triton_binned").matvec().cpu().numpy()
    assert abs(found[0] - 3000 * each) <= 3000 * 2.0**-23


def test_where_shared_memory_is_not(binned: ModuleType, device: str) -> None:
    """Elsewhere all is added to global memory."""
    from alrp_triton.backends import triton_shared

    columns = torch.zeros(100, device=device)
    anchors = torch.tensor([NONE, ALL, 3], dtype=torch.int32, device=device)

    def shared(columns: Columns, positives: int = 3) -> bool:
        return binned._launch(columns, positives, 1).settings["SHARED"]

    assert shared(Columns(columns, None))
    assert shared(Columns(columns, columns.byte()))
    assert shared(Columns(columns[:99], anchors, 33))
    assert shared(Columns(columns.bfloat16(), None), triton_shared.BINS // 2 - 1)
    assert not shared(Columns(columns, None), triton_shared.BINS // 2)
    assert not shared(Columns(columns, columns))
    assert not shared(Columns(columns.double(), None))


@pytest.mark.parametrize("columns", [1, 5_000, 4_000_000, 100_000_000, 2**32])
@pytest.mark.parametrize(("multiprocessors", "runs"), [(1, 1), (132, 1), (132, 16), (132, 300)])
def test_a_program_has_no_more_than_it_can_add_up(
    binned: ModuleType, monkeypatch: pytest.MonkeyPatch, columns: int, multiprocessors: int, runs: int
) -> None:
    from alrp_triton.backends import triton_shared

    monkeypatch.setattr(binned, "_multiprocessors", of_device(multiprocessors))
    columns = max(columns - columns % runs, runs)
    launch = binned._launch(Columns(torch.empty(1, device="meta").expand(columns), None), 3, runs)
    assert launch.settings["SHARED"]
    span = launch.block * launch.each
    assert span < 1 << 18
    # Programs fill a GPU once; or more often, but then with as much as each can have.
    programs = runs * -(-columns // runs // span)
    most = max(triton_shared.PROGRAMS * multiprocessors, runs)
    assert programs <= most or span > triton_shared.MAX_COLUMNS // 2


def test_threads_that_would_do_the_same_are_an_error(shared_memory: SharedMemory) -> None:
    with pytest.raises(AssertionError, match="several threads"):
        shared_memory.run("ld.shared.u32 $0, [$1];", [np.zeros(32, np.int32)])
