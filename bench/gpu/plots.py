"""Plots of a run on a GPU: those of a CPU's run, of times of the device."""

from pathlib import Path
from typing import Any

from ..speed import plots
from ..speed.timing import Row
from .results import slug
from .work import Record


def _row(record: Record) -> dict[str, Any]:
    """As a row of a CPU's run."""
    names = ("group", "anchors", "positives", "delta", "scores", "case", "contender")
    low, middle, high = record["device_ms"]
    return {name: record[name] for name in names} | {
        "repeats": record["samples"],
        "tries": 1,
        "p20_ms": low,
        "p50_ms": middle,
        "p80_ms": high,
        "anchors_per_s": 1e3 * record["anchors"] / middle,
        "peak_extra_mib": record["peak_mib"],
        "ratios": {},
    }


def rows_of(report: Record) -> list[dict[str, Any]]:
    """The times of right results, float32, class indices."""
    return [
        _row(record)
        for record in report["steps"].get("times", {}).get("records", [])
        if "device_ms" in record
        and not record.get("wrong")
        and (record["dtype"], record["targets"]) == ("float32", "classes")
        and record["group"] in ("anchors", "positives", "cases")
    ]


def draw(report: Record, folder: Path) -> list[Path]:
    """Draw them; the files written."""
    rows = sorted(rows_of(report), key=lambda row: (row["group"], row["contender"], row["anchors"], row["positives"]))
    assert all(Row(**row) for row in rows)
    return plots.draw({"run": report["run"], "rows": rows}, folder, slug(report["run"]["device"]))
