"""Two runs side by side: medians, their ratio, and what changed in what is right."""

from typing import Any

from .gpu.results import is_gpu, records
from .tables import commit, number, table

Report = dict[str, Any]
_KEYS = ("group", "case", "anchors", "positives", "delta", "scores", "dtype", "targets", "contender")
_TIMES = {"device_ms": "device", "graph_ms": "graph", "host_ms": "host"}


def _times(report: Report) -> dict[tuple[Any, ...], list[float]]:
    """p20, p50, p80 by size, contender, and what was timed."""
    if not is_gpu(report):
        return {
            (*(row.get(key) for key in _KEYS), ""): [row["p20_ms"], row["p50_ms"], row["p80_ms"]]
            for row in report["rows"]
        }
    return {
        (*(row.get(key) for key in _KEYS), kind): row[field]
        for row in records(report, "times")
        for field, kind in _TIMES.items()
        if row.get(field)
    }


def _checks(report: Report) -> dict[str, bool]:
    if not is_gpu(report):
        return {}
    return {
        " ".join(str(one[key]) for key in ("check", "backend", "dtype") if key in one): bool(one["passed"])
        for one in records(report, "correctness")
        if "passed" in one
    }


def _check(report: Report, name: str) -> None:
    if not is_gpu(report) and "rows" not in report:
        raise ValueError(f"{name} holds no times")
    if report.get("rehearsal"):
        raise ValueError(f"{name} is a rehearsal, whose times mean nothing")


def diff(before: Report, after: Report, names: tuple[str, str] = ("A", "B")) -> str:
    """Markdown.

    Raises:
        ValueError: they are not of one device, or one of them holds no times, or is a rehearsal.
    """
    for report, name in zip((before, after), names, strict=True):
        _check(report, name)
    devices = [report["run"]["device"] for report in (before, after)]
    if devices[0] != devices[1] or is_gpu(before) != is_gpu(after):
        raise ValueError(
            f"times of two devices are not compared: {names[0]} is of {devices[0]}, {names[1]} is of {devices[1]}"
        )
    a, b = _times(before), _times(after)
    both = sorted((key for key in a if key in b), key=lambda key: b[key][1] / a[key][1])
    lines: list[list[str]] = []
    for key in both:
        group, case, anchors, positives, delta, scores, dtype, targets, contender, kind = key
        what = " ".join(str(part) for part in (group, case, scores, dtype, targets) if part)
        size = [f"{anchors:,}", f"{positives:,}", f"{delta:g}"]
        ratio = b[key][1] / a[key][1]
        least, most = b[key][0] / a[key][2], b[key][2] / a[key][0]
        times = [f"{number(q[1])} ({number(q[0])} to {number(q[2])})" for q in (a[key], b[key])]
        lines.append([what, contender, kind, *size, *times, f"{ratio:.3f}", f"{least:.3f} to {most:.3f}"])
    head = [
        "size",
        "contender",
        "time",
        "N",
        "P",
        "delta",
        f"{names[0]} ms",
        f"{names[1]} ms",
        "B / A",
        "p20/p80 to p80/p20",
    ]
    parts = [f"{devices[0]}. A: {commit(before['run'])}. B: {commit(after['run'])}.", table(head, lines, left=3)]
    alone = [f"{len(set(x) - set(y))} in {name} alone" for x, y, name in ((a, b, names[0]), (b, a, names[1]))]
    parts.append(f"{len(both)} times in both; {', '.join(alone)}.")
    return "\n\n".join([*parts, _correctness(_checks(before), _checks(after))])


def _correctness(before: dict[str, bool], after: dict[str, bool]) -> str:
    if not before and not after:
        return "No checks to compare."
    changed = [
        f"{name}: {'right' if before[name] else 'wrong'} in A, {'right' if after[name] else 'wrong'} in B"
        for name in before
        if name in after and before[name] != after[name]
    ]
    for mine, other, where in ((before, after, "A"), (after, before, "B")):
        changed += [f"{name}: wrong, and in {where} alone" for name, ok in mine.items() if name not in other and not ok]
    text = f"{len(before)} checks in A, {len(after)} in B; "
    return text + (f"changed:\n\n{chr(10).join(f'- {line}' for line in changed)}" if changed else "none changed.")
