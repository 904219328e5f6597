"""What a run prints: a line for what it finds, and a short table at its end."""

from ..tables import number, table
from . import tables
from .work import Record


def short(report: Record) -> str:
    """What a run ends with: the steps, what failed, and the main times."""
    steps = [
        [name, of["status"], f"{of.get('seconds', 0):.0f}", str(len(of["records"])), of.get("reason", "")[:200]]
        for name, of in report["steps"].items()
    ]
    parts = [tables.head(report), table(["step", "status", "s", "records", "why"], steps, left=2)]
    rows = [row for row in tables.rows_of(report, "cases") if "device_ms" in row]
    lines = [
        [row["case"], row["contender"] + (" WRONG" if row.get("wrong") else "")]
        + [number(of[1]) if (of := row[key]) else "" for key in ("device_ms", "graph_ms", "host_ms")]
        for row in rows
    ]
    if lines:
        parts.append(table(["detector", "contender", "device ms", "graph ms", "host ms"], lines, left=2))
    for text in (
        tables.TABLES["crossover"](report) if tables.rows_of(report, "crossover") else "",
        tables.TABLES["training"](report),
    ):
        parts += text.split("\n\n")[1:]
    return "\n\n".join(part for part in (*parts, tables.warning(report)) if part)


def progress(step: str, record: Record) -> str:
    """A line for a record as it comes; of checks that passed none."""
    if "error" in record and "check" not in record:
        return f"  {record['error']}: {record.get('text', '')}"
    if record.get("passed") is False:
        detail = record.get("error") or {key: record[key] for key in record if key not in ("check", "passed")}
        return f"  WRONG: {record['check']}: {detail}"
    if step == "times" and "device_ms" in record:
        what = f"{record['case'] or record['group']} N {record['anchors']} P {record['positives']} {record['dtype']}"
        graph = number(record["graph_ms"][1]) if record["graph_ms"] else "-"
        times = f"device {number(record['device_ms'][1])} graph {graph} host {number(record['host_ms'][1])} ms"
        return f"  {what}: {record['contender']} {times}{' WRONG' if record.get('wrong') else ''}"
    if "what" in record:
        return "  " + " ".join(f"{key}={value}" for key, value in record.items())[:300]
    return ""
