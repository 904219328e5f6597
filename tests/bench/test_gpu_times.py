"""`python -m bench gpu`: what is timed, and the constants that are fitted to it."""

from types import SimpleNamespace

import pytest
import torch

from bench.gpu import times
from bench.gpu.compiling import Compilations
from bench.gpu.fit import BINNED, TILED, Point, fit, points
from bench.gpu.work import Record
from bench.speed.problems import CASES, Size, as_dense, classes_of, draw_problem

CPU = torch.device("cpu")


def row(contender: str, n: int, p: int, ms: float, expected: str = TILED) -> Record:
    return {"group": "crossover", "contender": contender, "anchors": n, "positives": p, "device_ms": [2 * ms] * 3, "graph_ms": [ms] * 3, "expected": expected}  # fmt: skip


def test_the_fit_finds_the_constants_that_made_the_times() -> None:
    rows: list[Record] = []
    for n in (100_000, 1_000_000, 16_000_000):
        for p in (10, 100, 1000):
            expected = BINNED if p > 50 else TILED
            rows += [row(TILED, n, p, 2e-10 * n * p + 0.02, expected), row(BINNED, n, p, 3e-8 * n + 0.1, expected)]
    of = points(rows)
    assert len(of) == 9
    found = fit(of)
    assert found is not None
    assert found == pytest.approx((2e-4, 20.0, 3e-2, 100.0), rel=1e-6)
    assert found.positives == pytest.approx(150)
    assert fit(of[:2]) is None
    assert [point.faster for point in of if point.positives == 100] == [TILED] * 3


def test_a_size_that_one_of_them_lacks_is_no_point() -> None:
    rows = [row(TILED, 10, 1, 1.0), row(BINNED, 10, 1, 1.0) | {"missing": "out of memory"}, row(TILED, 20, 1, 1.0)]
    assert points(rows) == []
    assert points([*rows, row(BINNED, 20, 1, 0.5)]) == [Point(20, 1, 1.0, 0.5, TILED)]


def test_problems_drawn_on_the_device() -> None:
    for size in (
        Size("x", 4000, 30),
        Size("x", 401, 20, 0.0, "late"),
        Size("cases", 1203 * 40, 9, 1.0, "late", "LVIS, ATSS"),
    ):
        problem = draw_problem(size, CPU, torch.bfloat16, 3)
        assert problem.logits.shape == (size.anchors // classes_of(size), classes_of(size))
        assert problem.logits.dtype == torch.bfloat16
        assert problem.box_errors.shape == (size.positives,)
        dense = as_dense(problem, torch.int8)
        assert (dense.targets == 1).sum() == size.positives == (problem.targets < problem.logits.shape[1]).sum()
        assert dense.logits.data_ptr() == problem.logits.data_ptr()
        where = dense.targets.reshape(problem.logits.shape).nonzero()
        assert torch.equal(where[:, 1], problem.targets[where[:, 0]])
        twin = draw_problem(size, CPU, torch.bfloat16, 3)
        assert all(torch.equal(a, b) for a, b in zip(problem[:3], twin[:3], strict=True))
    with pytest.raises(ValueError, match="are no anchors for 30 positives"):
        draw_problem(Size("cases", 800, 30, 1.0, "late", "ATSS"), CPU, torch.float32, 0)


@pytest.mark.parametrize("rehearse", [True, False])
def test_all_that_is_to_be_timed_can_be_drawn(rehearse: bool) -> None:
    wanted = times.setups(rehearse)
    assert len({setup.name for setup in wanted}) == len(wanted)
    for setup in wanted:
        size = setup.size
        assert size.anchors % classes_of(size) == 0
        assert size.anchors // classes_of(size) >= size.positives
    if not rehearse:
        assert {setup.size.case for setup in wanted} >= set(CASES)
        assert [setup.size.case for setup in wanted[:2]] == ["ATSS", "RetinaNet"]  # a short run has those
        assert {times.LOOP, times.BUCKETED} <= set(wanted[0].contenders)


def test_compilations_are_counted_by_tritons_hooks() -> None:
    """As the compiler calls them, before and after, by keyword."""
    triton = pytest.importorskip("triton")
    pytest.importorskip("triton.knobs", reason="hooks of older versions have other names")
    runtime = triton.knobs.runtime
    before = runtime.jit_cache_hook, runtime.jit_post_compile_hook
    info = SimpleNamespace(module="m", name="package.module.count_kernel")
    with Compilations() as counted:
        for _ in range(2):
            arguments = {"key": "k", "repr": "r", "fn": info, "compile": {}, "is_manual_warmup": False}
            assert not runtime.jit_cache_hook(**arguments, already_compiled=False)
            runtime.jit_post_compile_hook(**arguments, already_compiled=False)
    assert [name for name, _ in counted.found] == ["count_kernel"] * 2
    assert all(seconds >= 0 for _, seconds in counted.found)
    assert (runtime.jit_cache_hook, runtime.jit_post_compile_hook) == before
