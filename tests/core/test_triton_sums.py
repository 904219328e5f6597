"""Sums by prefix sums of integers, against dense float64: over bins, over rows for each bin, over rows among themselves."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from alrp_triton import ComparisonMatrix
from alrp_triton.backends.knots import make_knots
from tests.conftest import or_skip

Floats = NDArray[np.float64]
COLUMNS = 3000
DTYPES = [torch.float32, torch.float64]


class Rows(NamedTuple):
    """Rows of one group or more, and delta."""

    scores: Floats  # ascending within each group, numbers of the dtype of the columns
    groups: NDArray[np.int64] | None
    delta: float

    def segments(self) -> list[slice]:
        if self.groups is None:
            return [slice(0, len(self.scores))]
        ends = [*np.flatnonzero(np.diff(self.groups)) + 1, len(self.scores)]
        return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _single(x: NDArray[Any]) -> Floats:
    return x.astype(np.float32).astype(np.float64)


def draw(name: str, dtype: torch.dtype = torch.float64) -> Rows:
    rng = np.random.default_rng(len(name))
    scores: NDArray[Any] = rng.normal(size=150)
    groups, delta = None, 0.5
    if name == "more than a block":
        scores, delta = rng.normal(size=1500) * 30, 0.75
    elif name == "one row":
        scores = scores[:1]
    elif name == "ties":
        scores = np.round(scores * 8) / 8
    elif name == "all equal":
        scores = np.full(150, -4.6)
    elif name == "hard":
        scores, delta = np.round(scores * 8) / 8, 0.0
    elif name == "odd delta":
        delta = 0.3
    elif name == "tiny delta":
        scores[75:] = scores[:75] + rng.uniform(-2e-6, 2e-6, 75)
        delta = 1e-6
    elif name == "huge delta":
        delta = 1e30
    elif name == "huge delta and scores":
        scores, delta = scores * 1e36, 2.0**120
    elif name == "far from zero":
        scores, delta = scores * 3 + 1e6, 1.0
    elif name == "jumps":
        scores, delta = np.round(scores * 8) / 8 + 1e6, 1e-3  # float32 has steps of 1 / 16 there
    elif name == "jumps and slopes":
        scores = np.concatenate([rng.normal(size=50) * 10.0**e for e in (-2, 0, 5)] + [scores[:20].repeat(2) + 3e5])
        delta = 0.01
    elif name == "clusters":  # around edges and middles of cells, which are of a power of two
        scores = (
            np.arange(-20, 20)[:, None] * 2.0 + rng.choice([-1e-6, 0, 1e-6, 0.4999, -0.4999, 0.25], (40, 9))
        ).ravel()
    elif name == "huge range":
        scores = scores * 10.0 ** rng.integers(-30, 30, 150)
    elif name == "around zero":
        scores[:6] = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38]
        delta = 2.0**-126
    elif name == "groups":
        groups = np.sort(rng.choice([3, 5, 6, 9, 20], 150))
        groups[-1] = 21
    elif name == "hard groups":
        groups, delta = np.arange(150) // 7, 0.0
        scores = np.round(scores * 4) / 4
    elif name == "groups far apart":
        groups, delta = np.arange(150) // 40, 1.0
        scores += np.array([1e6, -1e6, 0, 3e3])[groups]
    elif name == "far in float64":
        scores, delta = 1e6 + scores * 1e-5, 1e-6
    if name != "far in float64" or dtype != torch.float64:
        scores = _single(scores)
    order = np.lexsort((scores, groups if groups is not None else np.zeros(len(scores))))
    return Rows(scores[order], groups, delta)


NAMES = [
    "random", "more than a block", "one row", "ties", "all equal", "hard", "odd delta", "tiny delta", "huge delta",
    "huge delta and scores", "far from zero", "jumps", "jumps and slopes", "clusters", "huge range", "around zero",
    "groups", "hard groups", "groups far apart", "far in float64",
]  # fmt: skip


def step(x: Floats, s: Floats, delta: float) -> Floats:
    """H of rows s and columns x."""
    distance = x[None, :] - s[:, None]
    if delta == 0:
        return (distance >= 0).astype(np.float64)
    with np.errstate(over="ignore"):
        return np.clip(distance / delta / 2 + 0.5, 0.0, 1.0)


def rounded(s: Floats, delta: float, dtype: torch.dtype) -> Floats:
    """How far h is off where s - delta is rounded to float64; a jump has no such knots."""
    jumps = delta <= abs(s) * torch.finfo(dtype).eps / 2
    return 2.0**-50 + np.where(jumps, 0.0, 2.0**-53 * abs(s) / (delta or np.inf))


class Table(NamedTuple):
    knots: Floats
    rise: NDArray[np.int64]
    done: NDArray[np.int64]
    columns: list[Floats]  # of each segment
    bins: list[NDArray[np.int64]]
    positions: list[Floats]


def tabulate(rows: Rows, dtype: torch.dtype) -> Table:
    """Knots, and columns with their bins, where they matter: around all knots."""
    rng = np.random.default_rng(1)
    number = np.float64 if dtype == torch.float64 else np.float32
    parts = Table(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64), [], [], [])
    for here in rows.segments():
        with np.errstate(over="ignore", invalid="ignore"):
            s = rows.scores[here]
            known = make_knots(s, rows.delta, dtype)
            x = rng.choice(s, COLUMNS) + rng.uniform(-2, 2, COLUMNS) * rows.delta
            x[::3] = rng.choice(known.values, len(x[::3]))
            x[1::9] = rng.choice(s, len(x[1::9]))
            x = np.clip(x, -3.4e38, 3.4e38).astype(number).astype(np.float64)
            knots = known.values.astype(np.float64)
            bins = knots.searchsorted(x, "right") - 1
            x, bins = x[bins >= 0], bins[bins >= 0]
            position = np.minimum((x - knots[bins]) / (rows.delta or np.inf) / 2, 2.0)
        parts = Table(
            np.concatenate([parts.knots, knots]),
            np.concatenate([parts.rise, known.rise - 1 + 2 * here.start]),
            np.concatenate([parts.done, known.done - 1 + 2 * here.start]),
            [*parts.columns, x],
            [*parts.bins, bins + 2 * here.start],
            [*parts.positions, position],
        )
    return parts


class Launch(NamedTuple):
    """What both kernels take, on the device."""

    rows: Tensor
    groups: Tensor | None
    knots: Tensor
    rise: Tensor
    done: Tensor
    delta: float

    @staticmethod
    def of(rows: Rows, table: Table, dtype: torch.dtype, device: str) -> "Launch":
        groups = None if rows.groups is None else torch.tensor(rows.groups, device=device)
        return Launch(
            torch.tensor(rows.scores, device=device), groups, torch.tensor(table.knots, dtype=dtype, device=device),
            torch.tensor(table.rise, dtype=torch.int32, device=device),
            torch.tensor(table.done, dtype=torch.int32, device=device), rows.delta,
        )  # fmt: skip

    def sums(self, table: Tensor, nan: Tensor, unit: float) -> Floats:
        from alrp_triton.backends import triton_sums

        return triton_sums.sum_bins(*self[:5], table, nan, self.delta, unit).cpu().numpy()

    def lines(self, weights: Tensor, scale: Tensor | None) -> tuple[Floats, Floats]:
        from alrp_triton.backends import triton_sums
        from alrp_triton.backends.triton_gradients import PositiveGradients

        lines, below = triton_sums.lines_of(*self[:5], weights, PositiveGradients(ranking_scale=scale), self.delta)
        return lines.double().cpu().numpy(), below.double().cpu().numpy()


@pytest.fixture(autouse=True)
def triton() -> None:
    or_skip("triton")


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_sums_over_bins(name: str, dtype: torch.dtype, signed: bool, device: str) -> None:
    rows = draw(name, dtype)
    table = tabulate(rows, dtype)
    launch = Launch.of(rows, table, dtype, device)
    rng = np.random.default_rng(2)
    columns = sum(map(len, table.columns))
    scale = 2.0 ** (60 - columns.bit_length())
    counts, moments = np.zeros((2, 3, len(table.knots)), np.int64)
    expected, larger = np.zeros((2, len(rows.scores)))
    for here, x, bins, position in zip(rows.segments(), table.columns, table.bins, table.positions, strict=True):
        weight = rng.uniform(-1, 1, len(x)) if signed else np.ones(len(x))
        copy = rng.integers(0, 3, len(x))
        np.add.at(counts, (copy, bins), np.trunc(weight * scale).astype(np.int64))
        np.add.at(moments, (copy, bins), np.trunc(weight * position * scale).astype(np.int64))
        h = step(x, rows.scores[here], rows.delta)
        expected[here] = h @ weight
        larger[here] = (h > 0).sum(1)
    nan = torch.zeros(len(rows.scores), dtype=torch.int64, device=device)
    sums = np.stack([counts, moments], 1)
    out = launch.sums(torch.tensor(sums, device=device), nan, 1 / scale)
    # Of each column so much is rounded, of its own position as of the knots.
    bound = larger * (8 / scale + rounded(rows.scores, rows.delta, dtype))
    assert (abs(out - expected) <= bound).all(), (abs(out - expected) / (bound + 1e-300)).max()
    again = launch.sums(torch.tensor(sums.sum(0)[None], device=device), nan, 1 / scale)
    assert np.array_equal(out, again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_lines_of_bins(name: str, dtype: torch.dtype, device: str) -> None:
    rows = draw(name, dtype)
    table = tabulate(rows, dtype)
    launch = Launch.of(rows, table, dtype, device)
    w = np.random.default_rng(3).lognormal(size=len(rows.scores))
    lines, below = launch.lines(torch.tensor(w, device=device), None)
    assert (below == 0).all()
    info = torch.finfo(dtype)
    for here, x, bins, position in zip(rows.segments(), table.columns, table.bins, table.positions, strict=True):
        # A column whose bin ends where it begins, as ties make it, is in another one.
        g = lines[bins, 0] + lines[bins, 1] * position
        h = step(x, rows.scores[here], rows.delta)
        # Rounded to the dtype are value and slope, of which the greatest ones cancel.
        share = w[here]
        # At the lower knot, too, which may have been rounded down.
        distance, last_place = x - rows.scores[here][:, None], np.spacing(abs(rows.scores[here]))[:, None]
        near = distance >= -rows.delta * (1 + 1e-6) - last_place
        bound = 4 * info.eps * (share @ near) + 2.0**-57 * len(w) * w.max() * near.sum(0)
        bound += share * rounded(rows.scores[here], rows.delta, dtype) @ near
        off = abs(g - share @ h)
        assert (off <= bound).all(), (off / (bound + 1e-300)).max()
    assert np.array_equal(launch.lines(torch.tensor(w, device=device), None)[0], lines)


@pytest.mark.parametrize("size", [1e-250, 1e-30, 1e5, 1e200])
def test_weights_of_any_size_and_an_incoming_gradient(size: float, device: str) -> None:
    rows = draw("groups")
    table = tabulate(rows, torch.float64)
    launch = Launch.of(rows, table, torch.float64, device)
    w = torch.linspace(-1, 2, len(rows.scores), dtype=torch.float64, device=device)
    plain, scaled = launch.lines(w, None)[0], launch.lines(w * size, None)[0]
    np.testing.assert_allclose(scaled / size, plain, rtol=0, atol=1e-11)
    first = torch.tensor(-0.25, device=device)
    assert np.array_equal(launch.lines(w, first)[0], plain * -0.25)
    assert not launch.lines(w * 0, None)[0].any()


def test_a_column_at_the_lower_knot_of_a_row_is_nothing_to_it(device: str) -> None:
    """Exactly: what a false positive of 1e-13 is divided by is no longer small."""
    for dtype in DTYPES:
        rows = Rows(np.array([-1000.0, 0.25, 0.25, 7.0]), None, 0.3)
        table = tabulate(rows, dtype)
        launch = Launch.of(rows, table, dtype, device)
        sums = np.zeros((1, 2, 8), np.int64)
        sums[0, 0, 3] = 3 << 50  # at both knots of 0.25, which lie above the exact one in float32
        out = launch.sums(torch.tensor(sums, device=device), torch.zeros(4, dtype=torch.int64, device=device), 2.0**-50)
        exact = 3 * (table.knots[3] - (0.25 - 0.3)) / 0.6
        assert out[0] == 3
        assert out[1] == out[2] == pytest.approx(exact, rel=1e-6, abs=0)
        assert out[3] == 0
        assert (exact == 0) == (dtype == torch.float64)
        lines, _ = launch.lines(torch.tensor([0.0, 1 / 3, 0.7, 0.9], dtype=torch.float64, device=device), None)
        assert lines[3, 0] == pytest.approx((1 / 3 + 0.7) * exact / 3, rel=1e-6, abs=0)


@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "count", "weight"])
def test_what_is_not_finite_is_nan_in_its_group_alone(bad: str, delta: float, device: str) -> None:
    rows = draw("groups")._replace(delta=delta)
    assert rows.groups is not None
    segments = rows.segments()
    which = segments[2]
    table = tabulate(rows, torch.float32)
    rng = np.random.default_rng(4)
    sums = torch.tensor(rng.integers(0, 1 << 40, (1, 2, len(table.knots))), device=device)
    nan = torch.zeros(len(rows.scores), dtype=torch.int64, device=device)
    w = torch.tensor(rng.random(len(rows.scores)), device=device)
    launch = Launch.of(rows, table, torch.float32, device)
    before = launch.sums(sums, nan, 2.0**-40), *launch.lines(w, None)
    if bad == "count":
        nan[which.start] = 2
    elif bad == "weight":
        w[which.start + 4] = torch.inf
    else:
        launch.rows[which.start if bad == "-inf" else which.stop - 1] = float(bad)
        # What a search among NaN makes of them is in range, and nothing else is sure.
        knots = slice(2 * which.start, 2 * which.stop)
        launch.knots[knots] = torch.tensor(rng.choice([np.nan, np.inf, -np.inf, 0.0], knots.stop - knots.start))
        launch.rise[which], launch.done[which] = 0, 2 * len(rows.scores)
    after = launch.sums(sums, nan, 2.0**-40), *launch.lines(w, None)
    of_group = np.zeros(len(rows.scores), bool)
    of_group[which] = True
    of_sums, of_lines = of_group & (bad != "weight"), of_group & (bad != "count")
    for new, old, broken in zip(after, before, (of_sums, of_lines.repeat(2), of_lines), strict=True):
        assert np.isnan(new[broken]).all()
        assert np.array_equal(new[~broken], old[~broken])


def exactly(rows: Rows, v: Floats, i: int) -> tuple[float, float, float, int]:
    """Sums of h, h v and v ranked for row i, of terms in float64 that math.fsum adds up; and of how many terms."""
    here = next(segment for segment in rows.segments() if segment.start <= i < segment.stop)
    s, own = rows.scores[here], i - here.start
    h = step(s, s[own : own + 1], rows.delta)[0]
    place = np.where(s > s[own], 1.0, np.where(s == s[own], 0.5 if rows.delta else 1.0, 0.0))
    place[own] = 1.0
    return math.fsum(h), math.fsum(h * v[here]), math.fsum(place * v[here]), int((h > 0).sum())


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "4000"])
def test_rows_among_themselves(name: str, hostile: bool, device: str) -> None:
    """Each term is off by at most 2**-57 P of the largest |v|, whatever was added up before; and the transpose's, too."""
    from alrp_triton.backends import triton_positives

    rng = np.random.default_rng(5)
    rows = draw(name) if name != "4000" else Rows(np.sort(_single(rng.normal(size=4000) * 4 + 1e3)), None, 0.7)
    p = len(rows.scores)
    v = rng.uniform(0, 1, p)
    if hostile:  # all but the highest rows have used up 53 bits
        v = rng.normal(size=p) * 1e6 * (rng.random(p) < 0.9)
    s = torch.tensor(rows.scores, device=device)
    groups = None if rows.groups is None else torch.tensor(rows.groups, device=device)
    count, soft, ranked = (
        out.cpu().numpy() for out in triton_positives.among_rows(s, groups, torch.tensor(v, device=device), rows.delta)
    )
    below = triton_positives.below_rows(s, groups, torch.tensor(v, device=device), rows.delta).cpu().numpy()
    term, largest = 2.0**-57 * p + 2.0**-50, abs(v).max()
    for i in {*range(0, p, 1 + p // 150), p - 1, p - 2} - {-1}:
        of_count, of_soft, of_ranked, terms = exactly(rows, v, i)
        assert abs(count[i] - of_count) <= terms * term
        assert abs(soft[i] - of_soft) <= terms * term * largest
        assert abs(ranked[i] - of_ranked) <= terms * term * largest
    wanted = np.zeros(p)
    for here in rows.segments():
        s_ = rows.scores[here]
        place = np.where(s_[:, None] < s_, 1.0, np.where(s_[:, None] == s_, 0.5 if rows.delta else 1.0, 0.0))
        np.fill_diagonal(place, 1.0)
        wanted[here] = np.asarray(v[here], np.longdouble) @ place
    assert (abs(below - wanted) <= p * term * largest).all()


def test_alone_in_its_window_a_row_has_its_own_value_to_the_last_digit(device: str) -> None:
    """Its error is box_above - box_error / 2, by which the gradient is scaled: 0 has to be 0."""
    from alrp_triton.backends import triton_positives

    rows = torch.tensor([-100.1, 0.3, 1e5 + 0.7, 1e9 + 0.1], dtype=torch.float64, device=device)
    v = torch.tensor([0.9, 1 / 3, 1e-9, 0.7], dtype=torch.float64, device=device)
    count, soft, _ = triton_positives.among_rows(rows, None, v, 0.3)
    assert count[3] == 0.5
    assert soft[3] == 0.35
    assert torch.equal(count, torch.tensor([3.5, 2.5, 1.5, 0.5], dtype=torch.float64, device=device))


def test_few_forms_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is compiled once; and which it is changes at few numbers of positives, of which a training stays clear."""
    or_skip("triton")
    from alrp_triton.backends import triton_prefix

    monkeypatch.setattr(torch.version, "hip", None)
    of = [triton_prefix.launch(count) for count in range(1, 5000)]
    changes = [count for count, (form, after) in enumerate(pairwise(of), 1) if form != after]
    assert changes == [256, 512, 1024, 1536]
    assert {form["BLOCK"] for form in of} == {256, 512, 1024}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))  # there MANY spills
    assert {triton_prefix.launch(count)["BLOCK"] for count in (1, 300, 5000)} == {256, 512}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert all(triton_prefix.launch(count) == triton_prefix.AMD for count in (1, 300, 5000))


@pytest.mark.parametrize("delta", [1e-12, 1e-9, 0.1])
def test_h_is_a_half_at_a_rows_own_score(delta: float, device: str) -> None:
    """Where a score less delta is no float64, too: an H200 found it off by 1e-5."""
    or_skip("triton")
    rows = torch.arange(1, 60, device=device).double() / 3  # no two within delta
    matrix = ComparisonMatrix(rows, rows.clone(), delta=delta, backend="triton_binned")
    wanted = torch.arange(len(rows), device=device).double() + 0.5
    assert (matrix.rmatvec(torch.ones_like(rows)) - wanted).abs().max() <= 1e-9
    assert (matrix.matvec() - wanted.flip(0)).abs().max() <= 1e-9
