"""Rows by score and by grade, in NumPy, pair by pair and by the tree, held against the matrix of all pairs."""

# pyright: reportPrivateUsage=false
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from alrp_triton.backends import graded
from tests.support.compare import assert_near

Floats = NDArray[np.float64]


def step(distance: Floats, delta: float) -> Floats:
    return np.clip(distance / (2 * delta) + 0.5, 0, 1) if delta > 0 else (distance >= 0).astype(float)


@np.errstate(over="ignore")
def expected(
    rows: Floats, grades: Floats, weights: Floats, delta: float, of: slice = slice(None)
) -> tuple[Floats, ...]:
    """Among and below for one segment, or for some of its rows, from the matrix."""
    h = step(rows[None, :] - rows[of, None], delta)
    kept, lower = (np.where(side, h, 0.0) for side in (grades >= grades[of, None], grades < grades[of, None]))
    among = [(part * value).sum(1) for part in (kept, lower) for value in (np.ones_like(grades), 1 - grades)]
    below = np.where(grades > grades[of, None], step(rows[of, None] - rows, delta), 0.0) * weights
    return np.stack(among), below.sum(1)


def check(rows: Floats, grades: Floats, weights: Floats, bounds: NDArray[np.int64], delta: float, tolerance: float):
    among = graded.among_grades(rows, grades, bounds, delta)
    below = graded.below_grades(rows, grades, weights, bounds, delta)
    assert among.dtype == below.dtype == np.float64
    assert among.shape == (4, len(rows))
    assert below.shape == rows.shape
    for first, end in pairwise(bounds):
        of = slice(first, end)
        dense, transposed = expected(rows[of], grades[of], weights[of], delta)
        for number, (row, truth) in enumerate(zip(among, dense, strict=True)):
            assert_near(row[of], truth, tolerance, f"among, {number}")
            assert not row[of][truth == 0].any() or number in (1, 3)  # counts of nothing are exactly 0
        assert_near(below[of], transposed, tolerance, "below")
        assert_near((weights[of] * among[2, of]).sum(), below[of].sum(), 1e-9, "transpose")
    again = graded.among_grades(rows, grades, bounds, delta), graded.below_grades(rows, grades, weights, bounds, delta)
    assert among.tobytes() == again[0].tobytes()
    assert below.tobytes() == again[1].tobytes()


def one(rows: Floats) -> NDArray[np.int64]:
    return np.array([0, len(rows)])


@pytest.fixture(params=["pairs", "tree"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(graded, "_DENSE", 10**9 if request.param == "pairs" else 0)
    return request.param


def draw(name: str, count: int = 150) -> tuple[Floats, Floats, Floats]:
    """Rows, grades and weights by the name of what is hard about them."""
    rng = np.random.default_rng(0)
    rows, grades, weights = rng.normal(size=count), rng.uniform(size=count), rng.normal(size=count)
    if name == "ties":
        rows, grades = rows.round(1), grades.round(1)
    elif name == "huge range":
        rows *= 10.0 ** rng.integers(-30, 31, count)
    elif name == "equal scores":
        rows[:] = -4.6
    elif name == "equal grades":
        grades[:] = 0.7
    elif name == "two grades":
        grades = grades.round()
    elif name == "far from zero":
        rows += 1e6
    elif name == "neighbours":  # of which a narrow slope has some, none, or half a number more inside
        rows = 1e6 + np.spacing(1e6) * rng.integers(-20, 20, count)
    elif name == "on the edges":
        rows = rng.integers(-20, 20, count) * 0.25
        rows[::3] = np.nextafter(rows[::3], np.inf)
    elif name == "powers of two":
        rows = 2.0 ** rng.integers(-126, 125, count) * rng.choice([-1, 1], count)
        rows[::3], rows[1::3] = np.nextafter(rows[::3], np.inf), np.nextafter(rows[1::3], -np.inf)
        grades = 2.0 ** -rng.integers(0, 30, count)
    elif name == "zeros":
        rows = rng.choice([0.0, -0.0, 5e-324, -5e-324, 1e-310, 1e-38, -1e-38], count)
        grades = rng.choice([0.0, -0.0, 5e-324], count)
    elif name == "long chain":  # of slopes that overlap, with a crowd at its end
        rows = np.append(np.arange(count // 2) * 0.9, (count // 2 + rng.uniform(size=count - count // 2)) * 0.9)
    elif name == "ends of the range":
        rows[:4] = [1.7e308, -1.7e308, 1e300, -1e300]
    elif name == "grades of any size":
        grades = rng.normal(size=count) * 1e6
        weights *= 10.0 ** rng.integers(-12, 1, count)
    elif name == "no weights":
        weights[:] = 0
    return np.sort(rows).astype(np.float64), grades.astype(np.float64), weights


NAMES = [
    "random", "ties", "huge range", "equal scores", "equal grades", "two grades", "far from zero", "neighbours",
    "on the edges", "powers of two", "zeros", "long chain", "ends of the range", "grades of any size", "no weights",
]  # fmt: skip
ULP = float(np.spacing(1e6))
DELTAS = [1.0, 0.25, 0.3, 1e-3, 1e-30, 1e30, 2.0**-126, 2.0**125, 0.0, ULP / 4, ULP / 2, ULP, 1.5 * ULP, 8.4 * ULP]


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("way")
def test_hostile(name: str, delta: float):
    rows, grades, weights = draw(name)
    check(rows, grades, weights, one(rows), delta, 1e-12)


@pytest.mark.parametrize("delta", [0.5, 0.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 127, 128, 129])
@pytest.mark.usefixtures("way")
def test_sizes(count: int, delta: float):
    rows, grades, weights = draw("random", count)
    check(rows, grades, weights, one(rows), delta, 1e-13)


@pytest.mark.parametrize("delta", [0.5, 1e-3, 0.0])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_either_side_of_the_crossover(more: int, delta: float):
    rows, grades, weights = draw("random", graded._DENSE + more)
    check(rows, grades, weights, one(rows), delta, 1e-13)


@pytest.mark.usefixtures("way")
def test_a_row_is_half_above_itself():
    """Also where a number as small as delta is nothing beside the scores."""
    for delta, at_zero in ((1e-30, 0.5), (1e-12, 0.5), (0.0, 1.0)):
        rows = np.array([1e6, 1e6 + 1, 1e6 + 1, 1e6 + 2])
        among = graded.among_grades(rows, np.array([0.1, 0.2, 0.1, 0.3]), one(rows), delta)
        assert among[0].tolist() == [3 + at_zero, 1 + at_zero, 1 + 2 * at_zero, at_zero]
        assert among[2].tolist() == [0, at_zero, 0, 0]


@pytest.mark.parametrize("count", [15, 16, 1023, 1024])
@pytest.mark.usefixtures("way")
def test_greatest_sums(count: int):
    """A crowd at the far edge of a slope, as far from where positions count as one can be, of greatest values."""
    rows = np.append([0.0, 0.49, 0.98], np.full(count - 3, 1.47))
    grades, weights = np.full(count, 2.0**-50), np.full(count, 1 - 2.0**-53)
    grades[2] = 0.5
    check(rows, grades, weights, one(rows), 0.5, 1e-13)
    check(-rows[::-1], 0.5 - grades[::-1], weights, one(rows), 0.5, 1e-13)


def segments(sizes: list[int], name: str = "random") -> tuple[Floats, Floats, Floats, NDArray[np.int64]]:
    bounds = np.append(0, np.cumsum(sizes))
    rows, grades, weights = draw(name, int(bounds[-1]))
    rng = np.random.default_rng(1)
    rng.shuffle(rows)
    rows = np.concatenate([np.sort(part) for part in np.split(rows, bounds[1:-1])])
    return rows, grades, weights, bounds


SIZES = [1, 2, 3, 1, 450, 40, 2, 40, 500, 1, 1, 7, 401, 400]


@pytest.mark.parametrize("delta", [0.5, 1e-3, 1e-30, 0.0])
@pytest.mark.parametrize("name", ["random", "ties", "huge range"])
def test_segments(name: str, delta: float):
    check(*segments(SIZES, name), delta, 1e-12)


def test_many_small_segments():
    """More than are compared at once."""
    check(*segments([3] * (graded._PAIRS // 9 + 5)), 0.5, 1e-13)


@pytest.mark.parametrize("what", ["rows", "grades", "weights"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("delta", [0.5, 0.0])
def test_not_finite_stays_in_its_segment(what: str, value: float, delta: float):
    sizes = [450, 3, 3, 500, 1, 1, 3, 450]
    rows, grades, weights, bounds = segments(sizes)
    clean = graded.among_grades(rows, grades, bounds, delta), graded.below_grades(rows, grades, weights, bounds, delta)
    arrays = {"rows": rows, "grades": grades, "weights": weights}
    bad = [0, 2, 4]
    for number in bad:  # at the end that keeps scores in order
        arrays[what][bounds[number] if value == -np.inf else bounds[number + 1] - 1] = value
    hit = np.isin(np.repeat(np.arange(len(sizes)), sizes), bad)
    among = graded.among_grades(rows, grades, bounds, delta)
    below = graded.below_grades(rows, grades, weights, bounds, delta)
    if what == "weights":
        assert np.array_equal(among, clean[0])
    else:
        assert np.isnan(among[:, hit]).all()
        assert np.array_equal(among[:, ~hit], clean[0][:, ~hit])
    assert np.isnan(below[hit]).all()
    assert np.array_equal(below[~hit], clean[1][~hit])


@pytest.mark.parametrize("bounds", [[0], [0, 0]])
def test_empty(bounds: list[int]):
    none, ends = np.empty(0), np.array(bounds)
    assert graded.among_grades(none, none, ends, 0.5).shape == (4, 0)
    assert graded.below_grades(none, none, none, ends, 0.5).shape == (0,)


@pytest.mark.parametrize("delta", [0.5, 1e-4, 0.0])
@pytest.mark.parametrize("name", ["random", "ties", "equal scores", "long chain"])
def test_large(name: str, delta: float):
    rows, grades, weights = draw(name, 20_000)
    among = graded.among_grades(rows, grades, one(rows), delta)
    below = graded.below_grades(rows, grades, weights, one(rows), delta)
    of = slice(7, None, 199)
    dense, transposed = expected(rows, grades, weights, delta, of)
    for row, truth in zip(among, dense, strict=True):
        assert np.abs(row[of] - truth).max() <= 1e-12 * max(row.max(), 1)
    assert np.abs(below[of] - transposed).max() <= 1e-12 * np.abs(below).max()
    assert_near((weights * among[2]).sum(), below.sum(), 1e-11, "transpose")


def test_arguments_are_left_alone():
    arrays = draw("ties", 450)
    copies = [array.copy() for array in arrays]
    rows, grades, weights = arrays
    graded.among_grades(rows, grades, one(rows), 0.5)
    graded.below_grades(rows, grades, weights, one(rows), 0.5)
    assert all(np.array_equal(*pair) for pair in zip(arrays, copies, strict=True))
