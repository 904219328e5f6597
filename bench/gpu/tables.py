"""Tables of a run on a GPU, as pages have them: one for each device."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..run import RESULTS
from ..speed.contenders import BASELINES, BUCKETED, FLOOR, FOCAL, FOCAL_COMPILED, LOOP
from ..tables import commit, number, table
from .fit import BINNED, TILED, fit, points
from .results import by_kind, load, newest, records
from .times import WAITING
from .work import Record

NOTHING = "No GPU has run this yet: `python -m bench gpu` on a machine with one, then `make tables`."
_FASTER = {LOOP: "loop", BUCKETED: "bucketed", FOCAL: "focal", FOCAL_COMPILED: "focal, compiled"}
WRONG = "**wrong result**"
_LITTLE = 2.5  # microseconds


def spread(quantiles: list[float] | None) -> str:
    """p50 (p20 to p80)."""
    if not quantiles:
        return ""
    low, middle, high = quantiles
    return f"{number(middle)} ({number(low)} to {number(high)})"


def failures(report: Record) -> list[str]:
    """The names of the checks that failed."""
    return [
        " ".join(str(one[key]) for key in ("check", "backend", "dtype") if key in one)
        for one in records(report, "correctness", passed=False)
    ]


def warning(report: Record) -> str:
    """That checks failed, which, and why if that is known; "" where none did."""
    wrong = failures(report)
    if not wrong:
        return ""
    some = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
    text = f"**{len(wrong)} checks failed: {some}.**"
    return f"{text} {report.get('cause', 'Times of a backend that failed are marked.')}"


def _marks(report: Record) -> str:
    """The warning, where rows are marked: once the cause is known it stands with the checks alone."""
    return "" if "cause" in report else warning(report)


def head(report: Record) -> str:
    """Card, commit, versions, date, and what was not done."""
    run, device = report["run"], (records(report, "environment", what="device") or [{}])[0]
    asked = (records(report, "environment", what="nvidia-smi") or [{}])[0]
    card = f"**{run['device']}**"
    if "multi_processor_count" in device:
        card += f" ({device['multi_processor_count']} multiprocessors, {device['total_mib'] / 1024:.0f} GiB)"
    driver = f", driver {asked['driver_version']}" if "driver_version" in asked else ""
    text = f"{card}{driver}, torch {run['torch']}, triton {run['triton']}, Python {run['python']}, {commit(run)}."
    undone = [f"{name} ({of['status']})" for name, of in report["steps"].items() if of["status"] != "done"]
    if not report["finished"]:
        undone.append("the run was cut short")
    return f"{text}{' Not done: ' + ', '.join(undone) + '.' if undone else ''}"


def _run(report: Record) -> str:
    parts = [head(report), warning(report)]
    copies, launches = records(report, "environment", what="copy"), records(report, "environment", what="launch")
    if copies:
        parts.append(
            f"A copy from device to device moves {copies[0]['bytes_per_s'] / 1e12:.3g} TB/s, read and written."
        )
    if launches:
        lines = [[one["of"], *(number(one[key]) for key in ("host_us", "device_us", "graph_us"))] for one in launches]
        parts.append(table(["a launch of", "host µs", "device µs, back to back", "in a graph µs"], lines))
    lines = [
        [
            one["of"] or "others",
            one["dtype"],
            str(one["checks"]),
            f"**{one['failed']}**" if one["failed"] else "0",
            "" if one["share"] is None else f"{one['share']:.2f}",
        ]
        for one in by_kind(report)
    ]
    if lines:
        parts.append(
            table(["correctness", "dtype", "checks", "failed", "largest difference / tolerance"], lines, left=2)
        )
    compiled = records(report, "correctness", what="compilations")
    if compiled:
        lines = [
            [one["loss"], one["backend"], str(one["first_steps"]), str(one["later"]), number(one["seconds"]),
             number(one["slowest_step_s"]), ", ".join(f"{name} {n}" for name, n in one["kernels"].items())]
            for one in compiled
        ]  # fmt: skip
        names = [
            "compilations while P changes",
            "backend",
            "in the first 3 steps",
            "later",
            "seconds",
            "slowest step s",
        ]
        parts.append(table([*names, "kernels"], lines, left=2))
    return "\n\n".join(part for part in parts if part)


def _ratio(rows: list[Record], other: str, mine: Record) -> str:
    """How many times faster this row is than another contender at its size."""
    of = [row for row in rows if row["contender"] == other and _size(row) == _size(mine) and "device_ms" in row]
    return number(of[0]["device_ms"][1] / mine["device_ms"][1]) if of else ""


def _size(row: Record) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("group", "case", "anchors", "positives", "delta", "scores", "dtype", "targets"))


def _cells(row: Record, rows: list[Record], compared: list[str]) -> list[str]:
    """Of a row: who, times, rates, memory, and how it compares."""
    own = row["contender"] not in BASELINES
    name = f"**{row['contender']}**" if own else row["contender"]
    name += f" {WRONG}" if row.get("wrong") else ""
    if "missing" in row:
        return [f"{name}: {row['missing']}", *[""] * (6 + len(compared))]
    cells = [
        name,
        spread(row["device_ms"]) + ("" if row["backlog"] or row["contender"] in WAITING else ", host in it"),
    ]
    cells += [spread(row["graph_ms"]), spread(row["host_ms"]), number(row["gb_per_s"])]
    cells.append("" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}")
    cells += [_ratio(rows, other, row) if own else "" for other in compared]
    floor = _ratio(rows, FLOOR, row)
    return [*cells, number(1 / float(floor.replace(",", ""))) if floor and row["contender"] != FLOOR else ""]


def _heads(compared: list[str]) -> list[str]:
    names = ["contender", "device ms (p20 to p80)", "by graph replay ms", "host ms", "GB/s", "MiB"]
    return [*names, *(f"x {_FASTER[name]}" for name in compared), "/ copy"]


def rows_of(report: Record, *groups: str) -> list[Record]:
    """The times of some groups of sizes."""
    return [row for row in records(report, "times") if row.get("group") in groups]


def _missing(what: str) -> str:
    return f"Not measured in this run: {what}."


def _modelled(report: Record, row: Record) -> str:
    """What :mod:`bench.machine_code.model` expects of both products, for a card that it knows."""
    from ..machine_code import model  # needs triton

    gpu = next((gpu for gpu in model.GPUS if gpu.name in report["run"]["device"]), None)
    if gpu is None or row["contender"] not in (TILED, BINNED) or row["dtype"] != "float32":
        return ""
    kernels = json.loads((RESULTS / "compiled.json").read_text())["kernels"]
    of = model.model(gpu, kernels, row["anchors"], row["positives"])
    return number(1e3 * sum(of.tiled if row["contender"] == TILED else of.binned))


def _cases(report: Record) -> str:
    rows = rows_of(report, "cases")
    if not rows:
        return f"{head(report)}\n\n{_missing('named cases')}"
    compared = [name for name in _FASTER if any(row["contender"] == name for row in rows)]
    lines = [
        [
            row["case"],
            f"{row['anchors']:,}",
            f"{row['positives']:,}",
            *_cells(row, rows, compared),
            _modelled(report, row),
        ]
        for row in rows
    ]
    text = table(["detector", "N", "P", *_heads(compared), "modelled ms"], lines)
    note = (
        "Forward + backward, float32, class indices, scores as in mid-training. Device: between two events, with a "
        "backlog, the L2 cache emptied before; contenders that wait for the device (torch, loop, dense, bucketed) "
        "have the host's time in it. Host: to enqueue a step. GB/s: of the 12 N bytes that have to be moved. Modelled: "
        "both products of size N alone, from the machine code (`make compiled`)."
    )
    return "\n\n".join(part for part in (head(report), _marks(report), text, note) if part)


def _sizes(report: Record) -> str:
    parts = [head(report), _marks(report)]
    titles = {
        "distributions": "scores, dtype, targets",
        "anchors": "number of logits",
        "positives": "number of positives",
    }
    for group, title in titles.items():
        rows = rows_of(report, group)
        if not rows:
            parts.append(_missing(title))
            continue
        compared = [name for name in _FASTER if any(row["contender"] == name for row in rows)]
        lines = [
            [f"{row['case']} {row['scores']}".strip(), row["dtype"], row["targets"], f"{row['anchors']:,}",
             f"{row['positives']:,}", *_cells(row, rows, compared)]
            for row in rows
        ]  # fmt: skip
        parts.append(table([title, "dtype", "targets", "N", "P", *_heads(compared)], lines, left=3))
    return "\n\n".join(part for part in parts if part)


def _crossover(report: Record) -> str:
    of = points(rows_of(report, "crossover"))
    if not of:
        return f"{head(report)}\n\n{_missing('the crossover of tiled and binned')}"
    many, counts = (sorted({getattr(point, key) for point in of}) for key in ("anchors", "positives"))
    by_size = {(point.anchors, point.positives): point for point in of}
    lines: list[list[str]] = []
    for n in many:
        cells: list[str] = []
        for p in counts:
            point = by_size.get((n, p))
            text = "" if point is None else number(point.tiled / point.binned)
            cells.append(f"**{text}**" if point is not None and point.faster != point.expected else text)
        lines.append([f"N = {n:,}", *cells])
    parts = [head(report), _marks(report), table(["time of tiled / binned", *(f"P = {p:,}" for p in counts)], lines)]
    wrong = sum(point.faster != point.expected for point in of)
    lost = [max(p.tiled, p.binned) / min(p.tiled, p.binned) for p in of if p.faster != p.expected]
    text = f"Above 1 binned is faster. The cost model of that commit takes the slower one at {wrong} of {len(of)} sizes"
    parts.append(f"{text}{f' (bold), at worst {max(lost):.2f} times the time of the other' if lost else ''}.")
    if found := fit(of):
        parts.append(
            f"Fitted: tiled {found.pair_ns:.3g} ns a pair and {found.tiled_start_us:.3g} µs, binned "
            f"{found.column_ns:.3g} ns a logit and {found.binned_start_us:.3g} µs; equal at P = "
            f"{found.positives:.0f} where N is large."
        )
    return "\n\n".join(part for part in parts if part)


_COUNTERS: dict[str, tuple[str, float]] = {
    "gpu__time_duration.sum": ("µs", 1e6),
    "dram__bytes_read.sum": ("MB read", 1e-6),
    "dram__bytes_write.sum": ("MB written", 1e-6),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("% of memory", 1.0),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("% of multiprocessors", 1.0),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("% of warps", 1.0),
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": ("sectors a load", 1.0),
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio": ("sectors a store", 1.0),
    "launch__registers_per_thread": ("registers", 1.0),
}


def _counters(report: Record) -> str:
    kernels = records(report, "counters", what="kernel")
    if not kernels:
        reason = report["steps"].get("counters", {}).get("reason", "")
        return f"{head(report)}\n\n{_missing('the counters')[:-1]}{f' ({reason})' if reason else ''}."
    lines: list[list[str]] = []
    for one in kernels:
        values = [None if one.get(key) is None else one[key] * scale for key, (_, scale) in _COUNTERS.items()]
        lines.append([one["setting"], one["kernel"], one["grid"], *map(number, values)])
    names = ["step", "kernel", "grid", *(name for name, _ in _COUNTERS.values())]
    return f"{head(report)}\n\n{table(names, lines, left=3)}"


_SHORT = (r"void |at::native::|\(anonymous namespace\)::|[<(].*", "")  # what is long in the names of torch's kernels


def _launches(report: Record) -> str:
    steps = records(report, "launches", what="step")
    if not steps:
        return f"{head(report)}\n\n{_missing('single launches')}"
    lines: list[list[str]] = []
    for step in steps:
        of = records(report, "launches", what="launch", setting=step["setting"])
        kernels = Counter[str]()
        for one in of:
            kernels[re.sub(*_SHORT, one["kernel"])] += one["us"]
        rest = sum(us for us in kernels.values() if us < _LITTLE)
        text = ", ".join(f"{name} {number(us)}" for name, us in kernels.most_common() if us >= _LITTLE)
        lines.append([step["setting"], f"{step['anchors']:,}", f"{step['positives']:,}", str(step["launches"]),
                      number(step["us"]), f"{text}, others {number(rest)}"])  # fmt: skip
    names = ["a step by graph replay", "N", "P", "launches and copies", "µs", "of it"]
    return f"{head(report)}\n\n{table(names, lines)}"


def _training(report: Record) -> str:
    found = records(report, "training", what="training")
    if not found:
        return f"{head(report)}\n\n{_missing('training')}"
    lines = [
        [f"{one['loss']}{f' {WRONG}' if one.get('wrong') else ''}", str(one["steps"]), spread(one["step_ms"]),
         spread(one["loss_ms"]), f"{100 * one['share']:.1f} %", number(one["images_per_s"]),
         f"{one['first']:.3f} to {one['last']:.3f}{'' if one['falls'] else ': does not fall'}"]
        for one in found
    ]  # fmt: skip
    names = ["loss", "steps", "step ms (p20 to p80)", "of it the loss ms", "share", "images/s", "classification loss"]
    first = found[0]
    of = f"{first['batch']} images a step, {first['logits']:,} logits, {first['positives']} positives in the last"
    return f"{head(report)}\n\n{table(names, lines)}\n\nThe demo's RetinaNet, bfloat16 autocast; {of}."


TABLES: dict[str, Callable[[Record], str]] = {
    "run": _run,
    "cases": _cases,
    "sizes": _sizes,
    "crossover": _crossover,
    "launches": _launches,
    "counters": _counters,
    "training": _training,
}


def render(name: str, folder: Path = RESULTS) -> str:
    """A block of a page: the table of the newest run of each device."""
    reports = [load(file) for file in newest(folder)]
    return "\n\n".join(TABLES[name](report) for report in reports) if reports else NOTHING


def markdown(report: Record) -> str:
    """All tables of a run."""
    return "\n\n".join(f"## {name}\n\n{make(report)}" for name, make in TABLES.items())
