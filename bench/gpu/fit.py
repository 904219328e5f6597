"""What the crossover's times say of the constants of the cost model."""

from typing import NamedTuple

import numpy as np

from .work import Record

TILED, BINNED = "triton_tiled", "triton_binned"


class Point(NamedTuple):
    """Both backends at a size, in milliseconds: by graph replay where there is one, else by events."""

    anchors: int
    positives: int
    tiled: float
    binned: float
    expected: str

    @property
    def faster(self) -> str:
        return TILED if self.tiled <= self.binned else BINNED


class Fit(NamedTuple):
    """Least squares of relative errors: tiled = pair P N + start, binned = column N + start, forward and backward."""

    pair_ns: float
    tiled_start_us: float
    column_ns: float
    binned_start_us: float

    @property
    def positives(self) -> float:
        """From so many on the linear way is faster, where N is large."""
        return self.column_ns / self.pair_ns


def median_ms(row: Record) -> float:
    """Of a row, without the launches of the host where a graph could be made of it."""
    return (row.get("graph_ms") or row["device_ms"])[1]


def points(rows: list[Record]) -> list[Point]:
    """The sizes at which both were timed, by N and P."""
    found: dict[tuple[int, int], dict[str, Record]] = {}
    for row in rows:
        if row["contender"] in (TILED, BINNED) and "missing" not in row:
            found.setdefault((row["anchors"], row["positives"]), {})[row["contender"]] = row
    return [
        Point(*size, median_ms(of[TILED]), median_ms(of[BINNED]), of[TILED]["expected"])
        for size, of in sorted(found.items())
        if len(of) == 2
    ]


def _line(work: list[float], ms: list[float]) -> tuple[float, float]:
    """Slope and start, neither below 0."""
    x, y = np.array(work), np.array(ms)
    columns = np.stack([x / y, 1 / y], 1)
    slope, start = np.linalg.lstsq(columns, np.ones(len(y)), rcond=None)[0]
    if start < 0:
        return float((x / y).sum() / ((x / y) ** 2).sum()), 0.0
    return max(float(slope), 0.0), float(start)


def fit(of: list[Point]) -> Fit | None:
    """None where there are too few sizes."""
    if len({point.anchors for point in of}) < 2 or len(of) < 4:
        return None
    pair, tiled = _line([point.anchors * point.positives for point in of], [point.tiled for point in of])
    column, binned = _line([point.anchors for point in of], [point.binned for point in of])
    return Fit(1e6 * pair, 1e3 * tiled, 1e6 * column, 1e3 * binned) if pair > 0 and column > 0 else None
