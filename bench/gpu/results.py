"""Result files of runs on GPUs: their names, what is in them, and which is the newest of each device.

A run is a file ``<device>_<commit>_<date>-<time>.json``, and a log of the same name; none is ever written again by
another run. ``rehearsal`` is no device, and its times are reported nowhere.
"""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from ..run import RESULTS
from .work import Record

REHEARSAL = "rehearsal"
_NAME = re.compile(r"([a-z0-9-]+)_([a-z0-9]{1,10})_(\d{8}-\d{6})\.json")


def slug(device: str) -> str:
    """A device's name in letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def claim(folder: Path, device: str, commit: str | None) -> Path:
    """The file of a run that begins now, made empty, so that no other has it."""
    folder.mkdir(parents=True, exist_ok=True)
    short = re.sub(r"[^a-z0-9]", "", (commit or "").lower())[:10] or "nocommit"
    while True:
        file = folder / f"{slug(device)}_{short}_{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
        try:
            file.open("x").close()
        except FileExistsError:
            time.sleep(0.2)
        else:
            return file


def _text(head: Record, states: dict[str, Record], lines: dict[str, list[str]]) -> str:
    """A file: a line a record."""
    steps: list[str] = []
    for name, state in states.items():
        records = ",\n".join(lines[name])
        steps.append(f'{json.dumps(name)}: {json.dumps(state)[:-1]}, "records": [\n{records}\n]}}')
    of_steps = ",\n".join(steps)
    return f'{json.dumps(head)[:-1]}, "steps": {{\n{of_steps}\n}}}}\n'


class Report:
    """What a run has found so far, and its file, which is whole at any time."""

    def __init__(self, file: Path, head: Record) -> None:
        self.file, self.head = file, head
        self.steps: dict[str, Record] = {}
        self._lines: dict[str, list[str]] = {}
        self._written = 0.0

    def begin(self, step: str) -> Record:
        """A step's own record, to be changed as it goes on."""
        self.steps[step], self._lines[step] = {"status": "running"}, []
        return self.steps[step]

    def add(self, step: str, record: Record) -> None:
        """A record of a step. It is in the file within a second."""
        self._lines[step].append(json.dumps(record, allow_nan=False))
        if time.monotonic() - self._written > 1:
            self.write()

    def text(self) -> str:
        """The file: a line a record."""
        return _text(self.head, self.steps, self._lines)

    def write(self) -> None:
        """Whole or not at all."""
        partial = self.file.with_suffix(".partial")
        partial.write_text(self.text())
        os.replace(partial, self.file)
        self._written = time.monotonic()

    def as_dict(self) -> Record:
        """As it would be read from its file."""
        return json.loads(self.text())


def by_kind(report: Record) -> list[Record]:
    """How many checks there were of each backend and dtype, how many failed, and the largest difference in tolerances.

    Of a file that :func:`compact` made they are in it.
    """
    if kept := records(report, "correctness", what="checks"):
        return kept
    of: dict[tuple[str, str], list[Record]] = {}
    for check in records(report, "correctness"):
        if "passed" in check:
            of.setdefault((check.get("backend", ""), check.get("dtype", "")), []).append(check)
    found: list[Record] = []
    for (backend, dtype), checks in of.items():
        shares = [one["difference"] / one["tolerance"] for one in checks if one.get("difference") and one["tolerance"]]
        failed, share = sum(not one["passed"] for one in checks), max(shares, default=None)
        found.append(
            {"what": "checks", "of": backend, "dtype": dtype, "checks": len(checks), "failed": failed, "share": share}
        )
    return found


def compact(report: Record, cause: str = "") -> Record:
    """A report as it is kept: of the checks that passed their number.

    Args:
        report: as a run wrote it.
        cause: why checks failed, where that is known and no time is of a wrong result; their marks are taken away.
    """
    kept = json.loads(json.dumps(report))
    steps = kept["steps"]
    if "correctness" in steps:
        others = [one for one in records(kept, "correctness") if not one.get("passed") and one.get("what") != "checks"]
        steps["correctness"]["records"] = by_kind(report) + others
    if cause:
        kept["cause"] = cause
        for step in ("times", "training"):
            for row in steps.get(step, {}).get("records", []):
                if not row.get("disagrees"):
                    row.pop("wrong", None)
    return kept


def text_of(report: Record) -> str:
    """A report as its file has it."""
    head = {key: value for key, value in report.items() if key != "steps"}
    lines = {name: [json.dumps(record) for record in step["records"]] for name, step in report["steps"].items()}
    states = {
        name: {key: value for key, value in step.items() if key != "records"} for name, step in report["steps"].items()
    }
    return _text(head, states, lines)


def is_gpu(report: Record) -> bool:
    """Whether it is one of these."""
    return "steps" in report


def newest(folder: Path = RESULTS) -> list[Path]:
    """The newest file of each device, by their names; of rehearsals none."""
    found: dict[str, tuple[str, Path]] = {}
    for file in folder.glob("*.json"):
        name = _NAME.fullmatch(file.name)
        if name and name[1] != REHEARSAL:
            found[name[1]] = max(found.get(name[1], ("", file)), (name[3], file))
    return [file for _, (_, file) in sorted(found.items())]


def load(file: Path) -> Record:
    """A result file.

    Raises:
        ValueError: it is none, or of a run that was cut off before its first result.
    """
    try:
        report: Any = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no result file: {error}") from error
    if not isinstance(report, dict):
        raise ValueError(f"{file} is no result file: it holds no object")
    return report


def records(report: Record, step: str, **wanted: Any) -> list[Record]:
    """The records of a step that have these values; none where the step was not run."""
    found: list[Record] = report["steps"].get(step, {}).get("records", [])
    return [one for one in found if all(one.get(key) == value for key, value in wanted.items())]
