"""Tables and plots from result files, and the blocks in README.md and docs/ that hold them.

A block begins with a line ``<!-- FILE NAME -->`` and ends with ``<!-- end -->``; what is between is made from the
result file, relative to the repository, by :func:`render`. Where FILE is ``gpu`` it is made from the newest run of each
GPU, by :mod:`.gpu.tables`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import endurance
from .gpu import results
from .gpu import tables as gpu_tables
from .run import RESULTS, ROOT
from .speed.contenders import BASELINES, BUCKETED, DENSE, FLOOR, FOCAL, LOOP, SEARCH
from .speed.problems import HEADLINE
from .speed.timing import Row, exponents
from .tables import commit, mean_and_range, number, table
from .training import tables as comparison_tables

PAGES = (
    "README.md",
    "docs/performance.md",
    "docs/alrp.md",
    "docs/training.md",
    "docs/comparison.md",
    "docs/family.md",
    "docs/integrations.md",
)
_BLOCK = re.compile(r"(<!-- (bench/results/\S+\.json|gpu) ([a-z ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

# Columns that say how many times faster a contender is than a baseline.
_FASTER = {LOOP: "loop", DENSE: "dense", BUCKETED: "bucketed", SEARCH: "bucketize", FOCAL: "focal"}


def rows_of(report: dict[str, Any], group: str | None = None) -> list[Row]:
    """The rows of a report, of one group or all."""
    return [row for row in (Row(**fields) for fields in report["rows"]) if group in (None, row.group)]


def _conditions(report: dict[str, Any]) -> str:
    run, settings = report["run"], report["settings"]
    return (
        f"{run['device']} ({run['device_type']}; {run['cores']} cores, torch threads: {run['threads']}, load average "
        f"{run['load_average_before']} before the run), torch {run['torch']}, triton {run['triton']}, numba "
        f"{run['numba']}, Python {run['python']}, {commit(run)}. "
        f"Forward + backward of the whole loss, {settings['dtype']}, int64 targets, seed {settings['seed']}; "
        f"{settings['repeats']} turns each, fewer where a contender used up {settings['seconds']:g} s; a size is "
        f"measured again, up to {settings['tries']} times, where a p80 exceeds {settings['steady']:g} times its p20. "
        f"{report['rule']}"
    )


def _size(row: Row) -> list[str]:
    return [f"{row.anchors:,}", f"{row.positives:,}"]


_LABELS = {"delta": "delta", "scores": "scores", "worst cases": "scores", "cases": "case"}


def _label(row: Row) -> str:
    field = _LABELS.get(row.group)
    return "" if field is None else f"{value:g}" if isinstance(value := getattr(row, field), float) else value


def _memory(row: Row) -> str:
    return "" if row.peak_extra_mib is None else f"{row.peak_extra_mib:,.1f}"


def _times(report: dict[str, Any], group: str) -> str:
    rows = rows_of(report, group)
    if not rows:
        raise ValueError(f"the result file has no sizes of the group {group!r}: was it made by a partial run?")
    labelled = any(_label(row) for row in rows)
    compared = [name for name in _FASTER if any(name == row.contender for row in rows)]
    head = [{"cases": "detector"}.get(group, group)] * labelled + ["N", "P", "contender", "p20 ms", "p50 ms", "p80 ms"]
    head += ["M logits/s", "MiB", *(f"x {_FASTER[name]}" for name in compared), "/ copy"]
    lines: list[list[str]] = []
    for row in rows:
        line = [_label(row)] * labelled + _size(row) + [f"**{row.contender}**" if own(row) else row.contender]
        line += [*map(number, (row.p20_ms, row.p50_ms, row.p80_ms, row.anchors_per_s / 1e6)), _memory(row)]
        line += [number(row.ratios.get(name)) if own(row) else "" for name in compared]
        line.append(number(1 / row.ratios[FLOOR]) if FLOOR in row.ratios else "")
        lines.append(line)
    return table(head, lines, left=1)


def _headline(report: dict[str, Any]) -> str:
    rows = [row for row in rows_of(report, "anchors") if (row.anchors, row.positives) == HEADLINE]
    if not rows:
        raise ValueError(f"the result file has no {HEADLINE[0]:,} anchors: was it made by a partial run?")
    against = LOOP, BUCKETED, FOCAL
    head = [f"N = {HEADLINE[0]:,}, P = {HEADLINE[1]:,}", "ms (p20 to p80)", "million logits/s", "peak extra MiB"]
    lines = [
        [
            f"**{row.contender}**" if own(row) else row.contender,
            f"{number(row.p50_ms)} ({number(row.p20_ms)} to {number(row.p80_ms)})",
            number(row.anchors_per_s / 1e6),
            _memory(row),
            *(f"{number(row.ratios[name])} x" if own(row) and name in row.ratios else "" for name in against),
        ]
        for row in rows
    ]
    return table([*head, *(f"faster than {name}" for name in against)], lines)


def _growth(report: dict[str, Any]) -> str:
    rows = rows_of(report)
    in_n = exponents(rows, "anchors", "anchors", 100_000)
    in_p = exponents(rows, "positives", "positives", 1)
    lines = [[name, *(f"{of[name]:.2f}" if name in of else "" for of in (in_n, in_p))] for name in in_n | in_p]
    return table(["exponent of growth (1: linear)", "in N, from 1e5 on", "in P, at N = 1e6"], lines) if lines else ""


def _gate(report: dict[str, Any]) -> str:
    checks = report["gate"]["checks"]
    lines: list[list[str]] = []
    for name in dict.fromkeys(check["contender"] for check in checks):
        for delta in dict.fromkeys(check["delta"] for check in checks):
            mine = [c for c in checks if (c["contender"], c["delta"], c["against"]) == (name, delta, "oracle")]
            worst = [f"{max(check[key] for check in mine):.1e}" for key in ("difference", "imbalance")]
            note = " (an approximation there)" if name == BUCKETED and delta > 0 else ""
            lines.append([name + note, f"{delta:g}", *worst])
    return table(["against the float64 oracle", "delta", "largest difference", "imbalance"], lines)


def render(report: dict[str, Any], name: str) -> str:
    """The Markdown of a block."""
    if "kernels" in report:
        from .machine_code import model  # needs triton

        return model.render(report, name)
    if "comparison" in report:
        return comparison_tables.render(report, name)
    if "soak" in report or "large" in report:
        return endurance.render(report)
    if "warm_start" in report:
        return _warm_start(report)
    special = {"run": _conditions, "headline": _headline, "growth": _growth, "gate": _gate}
    return special[name](report) if name in special else _times(report, name)


def _warm_start(report: dict[str, Any]) -> str:
    """AP by the length of the warm start: the mean over seeds, and the range."""
    lines: list[list[str]] = []
    for length in dict.fromkeys(run["warm_start"] for run in report["runs"]):
        runs = [run["evaluations"] for run in report["runs"] if run["warm_start"] == length]
        cells = [[each["AP"] for each in at_step] for at_step in zip(*runs, strict=True)]
        lines.append([str(length), *(mean_and_range(aps, 3) for aps in cells)])
    steps = [f"step {each['step']}" for each in report["runs"][0]["evaluations"]]
    return table(["`warm_start`", *steps], lines, left=0)


def markdown(report: dict[str, Any]) -> str:
    """All tables of a run."""
    if results.is_gpu(report):
        return gpu_tables.markdown(report)
    names = dict.fromkeys(row.group for row in rows_of(report))
    parts = [_conditions(report), _gate(report), *(f"## {name}\n\n{_times(report, name)}" for name in names)]
    parts.append(_growth(report))
    return "\n\n".join(part for part in parts if part)


def _short() -> str:
    """The named cases on a CPU and on each GPU, in milliseconds: this package, focal loss, the loop."""
    cpu = json.loads((RESULTS / "cpu.json").read_text())
    rows = rows_of(cpu, "cases")
    columns = {f"{cpu['run']['cores']} CPU cores": {(row.case, row.contender): row.p50_ms for row in rows}}
    for report in map(results.load, results.newest()):
        columns[report["run"]["device"]] = {
            (row["case"], row["contender"]): row["device_ms"][1]
            for row in gpu_tables.rows_of(report, "cases")
            if "device_ms" in row
        }
    names = {"here": ("numba", "auto"), "focal": (FOCAL,), "loop": (LOOP,)}
    lines = [
        [case, f"{logits:,}"]
        + [
            number(next((times[case, one] for one in contenders if (case, one) in times), None))
            for times in columns.values()
            for contenders in names.values()
        ]
        for case, logits in {row.case: row.anchors for row in rows}.items()
    ]
    return table(["ms a step", "logits", *(f"{device}: {name}" for device in columns for name in names)], lines)


def fill(text: str) -> str:
    """A page with all of its blocks made again."""

    def block(found: re.Match[str]) -> str:
        if found[3] == "short":
            text = _short()
        elif found[2] == "gpu":
            text = gpu_tables.render(found[3])
        else:
            text = render(json.loads((ROOT / found[2]).read_text()), found[3])
        return f"{found[1]}{text}\n{found[5]}"

    return _BLOCK.sub(block, text)


def pages() -> Iterator[Path]:
    """The pages that hold blocks."""
    yield from (ROOT / page for page in PAGES)


def own(row: Row) -> bool:
    """Whether the row's contender is one of the package's backends."""
    return row.contender not in BASELINES
