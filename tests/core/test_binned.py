"""The CPU backends where their search has something to do: grids, crowded cells, blocks, and the worst cases for both."""

from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from alrp_triton.backends import knots, numba_binned, numba_streams, torch_binned
from alrp_triton.backends.columns import Columns
from reference import comparison_matrix
from tests.support.compare import TOLERANCE, as_numpy, assert_near

COLUMNS = 9000  # enough for a grid, and no multiple of anything


def draw(name: str) -> tuple[Tensor, Tensor]:
    """Rows (float64, ascending) and columns (float32) by the name of what is hard about them."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(n, generator=generator) for n in (150, COLUMNS))
    if name == "equal rows":
        rows = torch.cat([torch.full((1500,), 0.25), rows[:3]])
        columns[::2] = columns[::2].round(decimals=1)
    elif name == "all knots in one cell":
        rows[0] = 1e30
    elif name == "huge range":
        columns = columns * 10.0 ** torch.randint(-30, 30, (COLUMNS,), generator=generator)
        rows = rows * 10.0 ** torch.randint(-30, 30, (150,), generator=generator)
    elif name == "far from zero":
        rows, columns = rows + 1e6, columns + 1e6
    elif name == "columns on knots":
        columns = torch.cat([rows, rows + 1, rows - 1, rows.nextafter(rows + 1), rows.nextafter(rows - 1)]).repeat(12)[:COLUMNS]  # fmt: skip
    elif name == "all equal":
        rows, columns = torch.full((150,), -4.6), torch.full((COLUMNS,), -4.6)
    elif name == "one row":
        rows = rows[:1]
    elif name == "around zero":
        columns = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38]).repeat(COLUMNS // 6)
        rows[:3] = torch.tensor([0.0, 1e-45, -1e-45])
    elif name == "ends of the range":
        rows[:2] = torch.tensor([3.4e38, -3.4e38])
        columns[:4] = torch.tensor([3.4028234e38, -3.4028234e38, torch.inf, -torch.inf])
    return rows.double().sort().values, columns


NAMES = [
    "random", "equal rows", "all knots in one cell", "huge range", "far from zero", "columns on knots", "all equal",
    "one row", "around zero", "ends of the range",
]  # fmt: skip


class Products(NamedTuple):
    """Both products of a module, without groups."""

    module: ModuleType

    def matvec(self, rows: Tensor, columns: Tensor, weights: Tensor | None, delta: float) -> Tensor:
        if weights is not None and weights.dtype == torch.bool:
            weights = weights.logical_not().view(torch.uint8)
        these, tables = self._tables(rows, columns, weights, delta)
        return self.module.matvec(rows, None, these, delta, tables)

    def rmatvec(self, rows: Tensor, weights: Tensor, columns: Tensor, mask: Tensor | None, delta: float) -> Tensor:
        marks = None if mask is None else mask.logical_not().view(torch.uint8)
        these, tables = self._tables(rows, columns, marks, delta)
        return self.module.rmatvec(rows, None, weights, these, delta, tables)

    def _tables(
        self, rows: Tensor, columns: Tensor, marks: Tensor | None, delta: float
    ) -> tuple[Columns, list[Tensor]]:
        these = Columns(columns, marks)
        tables = self.module.empty_tables(rows, False, these)
        self.module.fill_tables(tables, rows, None, these, delta)
        return these, tables


@pytest.fixture(params=[torch_binned, numba_binned])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Products:
    # More than one block and chunk, the last of them short.
    monkeypatch.setattr(numba_streams, "_SHORT", 4200)
    monkeypatch.setattr(torch_binned, "_CHUNK", 4000)
    return Products(request.param)


@pytest.mark.parametrize("delta", [1.0, 0.3, 1e-3, 1e-30, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_against_the_dense_matrix(module: Products, name: str, delta: float) -> None:
    rows, columns = draw(name)
    mask = torch.rand(len(columns), generator=torch.Generator().manual_seed(1)) < 0.9
    weights = torch.rand(len(rows), dtype=torch.float64)
    values = torch.randn(len(columns)) * mask
    h = comparison_matrix(as_numpy(rows), as_numpy(columns), delta)
    assert_near(module.matvec(rows, columns, None, delta), h.sum(1), 1e-10)
    assert_near(module.matvec(rows, columns, mask, delta), h @ as_numpy(mask), 1e-10)
    assert_near(module.matvec(rows, columns, values, delta), h @ as_numpy(values), 1e-9)
    assert_near(module.rmatvec(rows, weights, columns, None, delta), as_numpy(weights) @ h, 2e-7)
    assert_near(module.rmatvec(rows, weights, columns, mask, delta), as_numpy(weights) @ h * as_numpy(mask), 2e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_dtypes(module: Products, dtype: torch.dtype, delta: float) -> None:
    rows, columns = draw("random")
    rows, columns = rows.to(dtype).double().sort().values, columns.to(dtype)
    columns[7], columns[8] = torch.inf, -torch.inf
    weights = torch.rand(len(rows), dtype=torch.float64)
    h = comparison_matrix(as_numpy(rows), as_numpy(columns), delta)
    assert_near(module.matvec(rows, columns, None, delta), h.sum(1), 1e-12)
    product = module.rmatvec(rows, weights, columns, None, delta)
    assert product.dtype == dtype
    assert_near(product, as_numpy(weights) @ h, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_mode(module: Products, dtype: torch.dtype) -> None:
    rows = draw("random")[0]
    weights = torch.ones_like(rows)
    columns = torch.randn(20_000).to(dtype)
    expected = module.matvec(rows, columns, None, 1.0), module.rmatvec(rows, weights, columns, None, 1.0)
    with torch.inference_mode():
        inside = columns.clone()
        assert torch.equal(module.matvec(rows, inside, None, 1.0), expected[0])
        assert torch.equal(module.rmatvec(rows, weights, inside, None, 1.0), expected[1])


def test_nan(module: Products) -> None:
    rows, columns = draw("random")
    weights = torch.rand(len(rows), dtype=torch.float64)
    columns[5000] = torch.nan
    mask = torch.ones(len(columns), dtype=torch.bool)
    assert module.matvec(rows, columns, mask, 1.0).isnan().all()
    assert torch.equal(module.rmatvec(rows, weights, columns, mask, 1.0).isnan(), columns.isnan())
    mask[5000] = False
    assert module.matvec(rows, columns, mask, 1.0).isfinite().all()
    assert module.rmatvec(rows, weights, columns, mask, 1.0).isfinite().all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = torch.cat([rows[1:], rows.new_tensor([bad])]).sort().values
        assert module.matvec(broken, columns, mask, 1.0).isnan().all()
        assert torch.equal(module.rmatvec(broken, weights, columns, mask, 1.0).isnan(), mask)
        broken = weights.clone()
        broken[3] = bad
        assert torch.equal(module.rmatvec(rows, broken, columns, mask, 1.0).isnan(), mask)


def test_results_do_not_depend_on_the_number_of_threads(module: Products) -> None:
    rows, _ = draw("random")
    columns = torch.randn(50_000)
    weights = torch.rand(len(rows), dtype=torch.float64)
    threads = torch.get_num_threads()
    results: list[tuple[Tensor, Tensor]] = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        results.append((module.matvec(rows, columns, None, 1.0), module.rmatvec(rows, weights, columns, None, 1.0)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for pair in results for a, b in zip(pair, results[0], strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grid_and_search_agree(name: str, dtype: torch.dtype) -> None:
    """The bin of every column, exactly."""
    rows, columns = draw(name)
    columns = columns.to(dtype)
    for delta in (1.0, 1e-3, 0.0):
        tables = knots.make_knots(rows.numpy(), delta, dtype)
        grid = torch_binned.make_grid(tables, len(columns), columns.device)
        assert grid is not None
        half, _, picked, bins = grid.locate(columns)
        found = torch.from_numpy(grid.halves(tables)[0]).index_select(0, half)
        found[picked] = bins
        assert torch.equal(found, torch.bucketize(columns, torch.from_numpy(tables.values), right=True))
        exact = torch.cat([rows - delta, rows + delta]).sort().values
        if delta == 1.0 and name in ("random", "one row"):
            assert np.array_equal(found.numpy(), np.searchsorted(exact.numpy(), columns.double().numpy(), "right"))


# The slope of the row at 8192 begins at the end of a wide cell, where a line begun with the cell has no digits left.
WIDE = [
    *(([-65536.0, 8192.0, 65536.0], 8192 - 0.3 * delta, delta) for delta in (1e-3, 1e-2, 0.1, 0.5)),
    *(([-20.0, 8.0, 20.0], 8 - 0.3 * delta, delta) for delta in (1e-4, 1e-3)),
]


@pytest.mark.parametrize(("scores", "column", "delta"), WIDE)
def test_a_slope_at_the_end_of_a_wide_cell(module: Products, scores: list[float], column: float, delta: float) -> None:
    rows = torch.tensor(scores, dtype=torch.float64)
    columns = torch.tensor([column, *[2 * min(scores)] * COLUMNS])
    weights = torch.ones(3, dtype=torch.float64)
    h = comparison_matrix(as_numpy(rows), as_numpy(columns), delta)
    assert_near(module.matvec(rows, columns, None, delta), h.sum(1), 1e-9)
    assert_near(module.rmatvec(rows, weights, columns, None, delta)[:1], h.sum(0)[:1], 3e-7)


@pytest.mark.parametrize(
    ("dtype", "most", "delta"),
    [(torch.float32, 3e38, 1e-7), (torch.float32, 3e38, 1e-8), (torch.float64, 1e300, 1e-20)],
)
def test_a_slope_much_less_than_a_cell(module: Products, dtype: torch.dtype, most: float, delta: float) -> None:
    """A position in it, in widths of a cell, may be less than all numbers but 0."""
    rows = torch.tensor([-most, 0.0, most], dtype=torch.float64)
    columns = torch.cat(
        [torch.linspace(-2 * delta, 2 * delta, 200, dtype=dtype), torch.linspace(-3, 3, COLUMNS).to(dtype)]
    )
    weights = torch.ones(3, dtype=torch.float64)
    h = comparison_matrix(as_numpy(rows), as_numpy(columns), delta)
    assert_near(module.matvec(rows, columns, None, delta), h.sum(1), 1e-10)
    assert_near(module.rmatvec(rows, weights, columns, None, delta), h.sum(0), 2e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_stands_in_new_memory_does_not_matter(bad: float) -> None:
    """Of rows that are not finite no tables are made, and what is there instead must not be read as places."""
    rows = torch.tensor([0.0, bad, 1.0], dtype=torch.float64).sort().values
    groups = torch.tensor([0, 1, 1])
    columns = Columns(torch.randn(6000), None, groups=torch.tensor([0, 1]))
    finite = torch.tensor([0.25, *rows[rows.isfinite()][:1], *rows[~rows.isfinite()]], dtype=torch.float64)
    finite[1:] = finite[1:].sort().values
    for value in (0, 127, 255):
        tables = [table.fill_(value) for table in numba_binned.empty_tables(finite, True, columns)]
        numba_binned.fill_tables(tables, finite, groups, columns, 1.0)
        sums = numba_binned.matvec(finite, groups, columns, 1.0, tables)
        assert sums.isnan().tolist() == [False, True, True]
        product = numba_binned.rmatvec(finite, groups, torch.ones(3, dtype=torch.float64), columns, 1.0, tables)
        assert product.isnan().tolist() == [False] * 3000 + [True] * 3000
