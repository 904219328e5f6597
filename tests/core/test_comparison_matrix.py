"""The comparison matrix: both products of each backend against the dense matrix, and what must hold by itself."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import alrp_triton
from alrp_triton import ComparisonMatrix, dispatch, stages
from alrp_triton.dispatch import Backend
from reference import comparison_matrix
from tests.conftest import or_skip
from tests.support.compare import TOLERANCE, as_numpy, assert_near

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Rows among themselves: both of Triton's backends run the same kernels.
of_families = pytest.mark.parametrize("backend", ["torch", "numba", "triton_binned"], indirect=True)
DELTAS = [1.0, 0.3, 1e-3, 0.0]  # 0.3: its 1/(2 delta) is no short binary number


def draw(p: int, n: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(k, generator=generator).to(device, dtype) for k in (p, n))
    return rows, columns, (torch.rand(n, generator=generator) < 0.8).to(device)


@pytest.mark.parametrize(
    ("dtype", "delta"),
    [
        (dtype, delta)
        for dtype in DTYPES
        for delta in DELTAS
        if dtype in (torch.float32, torch.float64) or delta in (1.0, 0.0)
    ],
)
def test_both_products(backend: Backend, device: str, dtype: torch.dtype, delta: float) -> None:
    n = 2500 if dtype == torch.float32 else 700  # more than one tile in each direction either way
    rows, columns, mask = draw(70, n, dtype, device)
    h = comparison_matrix(as_numpy(rows), as_numpy(columns), delta)
    keep = as_numpy(mask)
    working = TOLERANCE[dtype if dtype == torch.float64 else torch.float32]
    w = torch.rand(70, device=device)
    v = torch.randn(n, device=device)
    matrix = ComparisonMatrix(rows, columns, mask=mask, delta=delta, backend=backend)
    assert_near(matrix.matvec(), h @ keep, working)
    assert_near(matrix.matvec(v), h @ (keep * as_numpy(v)), 4 * working)
    product = matrix.rmatvec(w)
    assert product.dtype == dtype
    assert_near(product, as_numpy(w) @ h * keep, TOLERANCE[dtype])
    unmasked = ComparisonMatrix(rows, columns, delta=delta, backend=backend)
    assert_near(unmasked.matvec(), h.sum(1), working)
    assert_near(unmasked.rmatvec(w), as_numpy(w) @ h, TOLERANCE[dtype])


@pytest.mark.parametrize(("p", "n"), [(1, 1), (1, 3000), (33, 1), (64, 2048), (65, 2049), (200, 300), (3, 255)])
@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_sizes(backend: Backend, device: str, p: int, n: int, delta: float) -> None:
    rows, columns, _ = draw(p, n, torch.float32, device, seed=p + n)
    h = comparison_matrix(as_numpy(rows), as_numpy(columns), delta)
    matrix = ComparisonMatrix(rows, columns, delta=delta, backend=backend)
    assert matrix.shape == (p, n)
    assert_near(matrix.matvec(), h.sum(1), 1e-6)
    assert_near(matrix.rmatvec(torch.ones(p, device=device)), h.sum(0), 1e-6)


@pytest.mark.parametrize(("p", "n"), [(0, 5), (5, 0), (0, 0)])
def test_empty(backend: Backend, device: str, p: int, n: int) -> None:
    matrix = ComparisonMatrix(torch.zeros(p, device=device), torch.zeros(n, device=device), backend=backend)
    assert torch.equal(matrix.matvec(), torch.zeros(p, dtype=torch.float64, device=device))
    assert torch.equal(matrix.rmatvec(torch.ones(p, device=device)), torch.zeros(n, device=device))


@pytest.mark.parametrize("delta", DELTAS)
def test_adjoint_identity(backend: Backend, device: str, delta: float) -> None:
    rows, columns, mask = draw(90, 1500, torch.float32, device)
    matrix = ComparisonMatrix(rows, columns, mask=mask, delta=delta, backend=backend)
    v, w = torch.randn(1500, device=device).double(), torch.randn(90, device=device).double()
    left, right = (matrix.matvec(v) * w).sum(), (v * matrix.rmatvec(w)).sum()
    scale = (matrix.matvec(v.abs()) * w.abs()).sum()
    assert abs(left - right) <= 1e-7 * scale


@pytest.mark.parametrize(
    ("spread", "delta"), [(1e30, 1.0), (1e30, 1e30), (1e-30, 1e-30), (1.0, 1e-30), (1.0, 1e30), (1e-30, 0.0)]
)
def test_extreme_magnitudes(backend: Backend, device: str, spread: float, delta: float) -> None:
    rows, columns, _ = draw(80, 1000, torch.float32, device)
    rows, columns = rows * spread, columns * spread
    columns[::7] = rows[3]  # equality matters most where delta is beyond the resolution
    columns[:4] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    h = comparison_matrix(as_numpy(rows), as_numpy(columns), delta)
    matrix = ComparisonMatrix(rows, columns, delta=delta, backend=backend)
    assert_near(matrix.matvec(), h.sum(1), 1e-6)
    assert_near(matrix.rmatvec(torch.ones(80, device=device)), h.sum(0), 1e-6)


def test_rows_of_mixed_magnitude(backend: Backend, device: str) -> None:
    scale = 10.0 ** torch.arange(-30, 30, device=device).float()
    rows = torch.cat([-scale, scale])
    columns = torch.cat([rows, rows * 1.0000002, torch.zeros(1, device=device)])
    for delta in (1.0, 1e-20, 0.0):
        h = comparison_matrix(as_numpy(rows), as_numpy(columns), delta)
        matrix = ComparisonMatrix(rows, columns, delta=delta, backend=backend)
        assert_near(matrix.matvec(), h.sum(1), 1e-6)
        assert_near(matrix.rmatvec(torch.ones(120, device=device)), h.sum(0), 1e-6)


def test_nan_is_never_hidden(backend: Backend, device: str) -> None:
    rows, columns, mask = draw(40, 600, torch.float32, device)
    for delta in (1.0, 0.0):
        bad = columns.clone()
        bad[7] = torch.nan
        mask[7] = True
        matrix = ComparisonMatrix(rows, bad, mask=mask, delta=delta, backend=backend)
        assert matrix.matvec().isnan().all()
        assert torch.equal(matrix.rmatvec(torch.ones(40, device=device)).isnan(), bad.isnan())
        mask[7] = False  # a column that takes no part is not looked at
        matrix = ComparisonMatrix(rows, bad, mask=mask, delta=delta, backend=backend)
        assert matrix.matvec().isfinite().all()
        assert matrix.rmatvec(torch.ones(40, device=device)).isfinite().all()
        for value in (torch.nan, torch.inf, -torch.inf):
            wrong = rows.clone()
            wrong[5] = value
            matrix = ComparisonMatrix(wrong, columns - 100, mask=mask, delta=delta, backend=backend)
            assert matrix.matvec().isnan().all()
            assert torch.equal(matrix.rmatvec(torch.ones(40, device=device)).isnan(), mask)
        weights = torch.ones(40, device=device)
        weights[0] = torch.nan
        matrix = ComparisonMatrix(rows, columns - 100, mask=mask, delta=delta, backend=backend)
        assert torch.equal(matrix.rmatvec(weights).isnan(), mask)


def test_weight_zero_takes_no_part(backend: Backend, device: str) -> None:
    rows, columns, mask = draw(20, 300, torch.float32, device)
    columns[~mask] = torch.nan
    v = torch.rand(300, device=device)
    masked = ComparisonMatrix(rows, columns, mask=mask, backend=backend).matvec(v)
    weighted = ComparisonMatrix(rows, columns, backend=backend).matvec(torch.where(mask, v, 0.0))
    assert masked.isfinite().all()
    assert torch.equal(masked, weighted)


def test_default_dtype_does_not_matter(backend: Backend, device: str) -> None:
    rows, columns, _ = draw(20, 300, torch.float32, device)
    products: list[Tensor] = []
    for dtype in (torch.float32, torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        matrix = ComparisonMatrix(rows, columns, delta=0.3, backend=backend)
        products.append(matrix.rmatvec(matrix.matvec()))
    torch.set_default_dtype(torch.float32)
    assert all(torch.equal(product, products[0]) for product in products)


def test_float64_near_its_end(backend: Backend, device: str) -> None:
    rows = torch.tensor([0.0, 1.75e308], dtype=torch.float64, device=device)
    columns = torch.tensor([1.75e308, -1.0, 2.0], dtype=torch.float64, device=device)
    for delta in (1e-12, 1e-3, 1.0):
        h = comparison_matrix(as_numpy(rows), as_numpy(columns), delta)
        matrix = ComparisonMatrix(rows, columns, delta=delta, backend=backend)
        assert_near(matrix.matvec(), h.sum(1), 1e-12)
        assert_near(matrix.rmatvec(torch.ones(2, device=device)), h.sum(0), 1e-12)


def test_float32_near_its_end(backend: Backend, device: str) -> None:
    most = torch.finfo(torch.float32).max
    for end in (most, -most):
        columns = torch.tensor([end, end * (1 - 2e-7), 0.0], device=device)
        rows = torch.tensor([end, end / 2], device=device)
        for delta in (1e33, 1e36, 1.0):
            h = comparison_matrix(as_numpy(rows), as_numpy(columns), delta)
            matrix = ComparisonMatrix(rows, columns, delta=delta, backend=backend)
            assert_near(matrix.matvec(), h.sum(1), 1e-6)
            assert_near(matrix.rmatvec(torch.ones(2, device=device)), h.sum(0), 1e-6)


def test_delta_of_a_few_ulps(backend: Backend, device: str) -> None:
    rows = torch.tensor([1e16, 1e10], dtype=torch.float64, device=device)
    columns = torch.tensor([1e16 + 2, 1e10 + 4e-6, 1e10], dtype=torch.float64, device=device)
    for delta in (5.0, 8e-6, 1e-6, 1e-9):
        h = comparison_matrix(as_numpy(rows), as_numpy(columns), delta)
        matrix = ComparisonMatrix(rows, columns, delta=delta, backend=backend)
        assert_near(matrix.matvec(), h.sum(1), 0.1)  # a knot is rounded to float64: half an ulp of the score
        assert_near(matrix.rmatvec(torch.ones(2, device=device)), h.sum(0), 0.1)


def test_repeatable(backend: Backend, device: str) -> None:
    rows, columns, mask = draw(80, 3000, torch.float32, device)
    matrix = ComparisonMatrix(rows, columns, mask=mask, backend=backend)
    first = matrix.matvec(), matrix.rmatvec(matrix.matvec())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    second = matrix.matvec(), matrix.rmatvec(matrix.matvec())
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@of_families
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("p", [1, 7, 140])
def test_the_rows_among_themselves(backend: Backend, device: str, delta: float, p: int) -> None:
    rows = draw(p, 1, torch.float32, device)[0]
    rows[::3] = rows[0]
    v = torch.rand(p, device=device)
    soft = comparison_matrix(as_numpy(rows), as_numpy(rows), delta)
    # A step narrower than any distance counts what the ranking does, but for the rows themselves.
    ranking = comparison_matrix(as_numpy(rows), as_numpy(rows), min(delta, 1e-9))
    np.fill_diagonal(ranking, 1)
    matrix = ComparisonMatrix(rows, rows[:0], delta=delta, backend=backend)
    count, weighed, ranked = matrix.among_rows(v)
    # Triton's interpreter passes a Python float, delta, as float32.
    tolerance = 1e-8 if backend.startswith("triton") and device == "cpu" else 1e-12
    assert_near(count, soft.sum(1), tolerance)
    assert_near(weighed, soft @ as_numpy(v), tolerance)
    assert_near(ranked, ranking @ as_numpy(v), 1e-12)
    assert_near(matrix.below_rows(v), as_numpy(v) @ ranking, 1e-12)
    v[p // 2] = torch.nan
    assert torch.equal(matrix.among_rows(v).isnan().all(1).cpu(), torch.tensor([False, True, True]))
    assert matrix.below_rows(v).isnan().all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        rows[p // 2] = bad
        matrix = ComparisonMatrix(rows, rows[:0], delta=delta, backend=backend)
        assert matrix.among_rows(torch.ones_like(v)).isnan().all()
        assert matrix.below_rows(torch.ones_like(v)).isnan().all()


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 130])
def test_sort_rows(size: int, backend: Backend, device: str) -> None:
    """As Python's own sort, which is stable, has them: NaN of either sign last."""
    drawn = (torch.randn(size, generator=torch.Generator().manual_seed(size)) * 4).round().double() / 4
    drawn[::7] = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0]).repeat(4)[: len(drawn[::7])]
    if size > 15:
        drawn[11] = torch.copysign(torch.tensor(torch.nan), torch.tensor(-1.0))
    numbers: list[float] = drawn.tolist()

    def place(i: int) -> tuple[bool, float]:
        return math.isnan(numbers[i]), 0.0 if math.isnan(numbers[i]) else numbers[i]

    wanted = sorted(range(size), key=place)
    rows, order = dispatch.sort_rows(drawn.to(device), backend)
    assert order.tolist() == wanted
    assert torch.equal(rows.cpu().nan_to_num(7e7), drawn[wanted].nan_to_num(7e7))
    apart = torch.stack([drawn, drawn + 1], 1).to(device)[:, 0]  # not one beside the other in memory
    assert dispatch.sort_rows(apart, backend)[1].tolist() == wanted


def test_more_rows_than_are_sorted_by_counting(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    or_skip("triton")
    from alrp_triton.backends import triton_sort

    logits, targets, groups = (
        torch.randn(200, device=device),
        torch.arange(200, device=device) % 5 == 0,
        torch.arange(8),
    )
    numbers, values, grades = (
        logits[:40].double(),
        torch.rand(40, device=device),
        targets * torch.rand(200, device=device),
    )
    apart = groups.flip(0).to(device)

    def results() -> list[Tensor]:
        def found(targets: Tensor, values: Tensor | None, groups: Tensor | None, graded: bool) -> tuple[Tensor, ...]:
            form = None, 0, -1, graded
            return stages.find(logits, targets, values, groups, *form, True, 40, "ious", "", "triton")

        return [
            *dispatch.sort_rows(numbers, "triton"),
            *dispatch.ranked(numbers, values.double(), None, "triton"),
            *dispatch.ranked(numbers, values.double(), (numbers * 2).long(), "triton"),
            *found(targets.long(), values, None, False),
            *found(targets.long(), None, apart, False),
            *found(grades, None, apart, True),
        ]

    few = results()
    monkeypatch.setattr(triton_sort, "MAX_COUNT", 39)
    monkeypatch.setattr(triton_sort, "order_kernel", None)
    assert all(torch.equal(a, b) for a, b in zip(few, results(), strict=True))


def test_rows_in_any_order(backend: Backend, device: str) -> None:
    rows, columns, _ = draw(100, 400, torch.float32, device)
    shuffle = torch.randperm(100).to(device)
    matrix, shuffled = (ComparisonMatrix(r, columns, backend=backend) for r in (rows, rows[shuffle]))
    assert torch.equal(matrix.matvec()[shuffle], shuffled.matvec())
    w = torch.rand(100, device=device)
    assert torch.equal(matrix.rmatvec(w), shuffled.rmatvec(w[shuffle]))
    assert torch.equal(rows[matrix.order], rows.sort().values)


def test_vectors_that_lie_apart_in_memory(backend: Backend, device: str) -> None:
    """1-D, so that they are flat as they are."""
    rows, columns, mask = draw(20, 600, torch.float32, device)
    logits, targets, values = columns, torch.arange(600, device=device) % 30 == 0, torch.rand(20, device=device)

    def apart(x: Tensor) -> Tensor:
        return torch.stack([x, x.logical_not() if x.dtype == torch.bool else x + 1], 1)[:, 0]

    def results(of: Any) -> list[Tensor]:
        matrix = ComparisonMatrix(of(rows), of(columns), mask=of(mask), backend=backend)
        found = [matrix.matvec(), matrix.matvec(of(columns)), matrix.rmatvec(of(rows))]
        for marks in (targets, targets.long()):
            x, e = of(logits).requires_grad_(), of(values).requires_grad_()
            out = alrp_triton.alrp_loss(x, of(marks), e, backend=backend)
            found += [out.rank, *torch.autograd.grad(out.total, (x, e))]
        return found

    for one, other in zip(results(apart), results(Tensor.clone), strict=True):
        assert torch.equal(one, other)


def test_columns_of_any_shape_and_stride(backend: Backend, device: str) -> None:
    rows, columns, mask = draw(20, 600, torch.float32, device)
    flat = ComparisonMatrix(rows, columns, mask=mask, backend=backend)
    grid, grid_mask = columns.reshape(20, 30).t(), mask.reshape(20, 30).t()
    assert not grid.is_contiguous()
    matrix = ComparisonMatrix(rows, grid, mask=grid_mask, backend=backend)
    w = torch.rand(20, device=device)
    assert_near(matrix.matvec(), flat.matvec(), 1e-6)
    assert torch.equal(matrix.rmatvec(w), flat.rmatvec(w).reshape(20, 30).t())


@of_families
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("p", [1, 7, 140])
def test_the_rows_by_grade(backend: Backend, device: str, delta: float, p: int) -> None:
    rows, _, _ = draw(p, 1, torch.float32, device, seed=p)
    t, w = torch.rand(p, dtype=torch.float64), torch.rand(p, dtype=torch.float64)
    t[: p // 2] = (t[: p // 2] * 4).round() / 4  # ties
    h = comparison_matrix(as_numpy(rows), as_numpy(rows), delta)
    lower = as_numpy(t)[None, :] < as_numpy(t)[:, None]
    matrix = ComparisonMatrix(rows, rows, delta=delta, backend=backend)
    grades, weights = t.to(device), w.to(device)
    values = 1 - as_numpy(t)
    expected = [(h * ~lower).sum(1), h * ~lower @ values, (h * lower).sum(1), h * lower @ values]
    assert_near(matrix.among_grades(grades), np.stack(expected), 1e-6 if backend.startswith("triton") else 1e-12)
    received = as_numpy(w) @ (h * lower)
    assert_near(matrix.below_grades(grades, weights), received, 1e-6 if backend.startswith("triton") else 1e-12)
    grades[-1] = float("nan")
    assert matrix.among_grades(grades).isnan().all()
    assert matrix.below_grades(grades, weights).isnan().all()
    rows[0] = float("inf")
    matrix = ComparisonMatrix(rows, rows, delta=delta, backend=backend)
    assert matrix.among_grades(torch.ones_like(weights)).isnan().all()


def test_auto_on_the_cpu_is_numba() -> None:
    rows, columns, _ = draw(12, 100, torch.float32, "cpu")
    auto, named = (ComparisonMatrix(rows, columns, backend=b).matvec() for b in ("auto", "numba"))
    assert torch.equal(auto, named)
    assert np.isfinite(as_numpy(auto)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": [1.0]}, TypeError, "rows must be a torch.Tensor, got list"),
        ({"rows": torch.zeros(2, 2)}, ValueError, r"rows must have shape \(P,\), got \(2, 2\)"),
        ({"columns": torch.zeros(3, dtype=torch.int32)}, TypeError, "columns must be float16, .* got int32"),
        ({"mask": torch.zeros(3)}, TypeError, "mask must be bool, got float32"),
        (
            {"mask": torch.zeros(4, dtype=torch.bool)},
            ValueError,
            r"mask must have the shape of columns, \(3,\), got \(4,\)",
        ),
        ({"delta": -1.0}, ValueError, "delta must be at least 0 and finite, got -1"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'torch', 'numba', .* got 'cuda'"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"rows": torch.zeros(2), "columns": torch.zeros(3)} | change
    with pytest.raises(error, match=message):
        alrp_triton.ComparisonMatrix(**arguments)  # pyright: ignore[reportArgumentType]


def test_bad_vectors() -> None:
    matrix = ComparisonMatrix(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"v must have the shape of columns, \(3,\), got \(2,\)"):
        matrix.matvec(torch.zeros(2))
    with pytest.raises(ValueError, match=r"w must have shape \(2,\), got \(3,\)"):
        matrix.rmatvec(torch.zeros(3))
    with pytest.raises(TypeError, match="w must be float16"):
        matrix.rmatvec(torch.zeros(2, dtype=torch.int64))
