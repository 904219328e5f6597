"""Markdown."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np


def number(value: float | None) -> str:
    """Three digits, never in exponent form; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def mean_and_range(values: Sequence[float], digits: int, sign: str = "") -> str:
    """The mean, and the least and the greatest behind it; ``"+"``: with the sign of a difference."""
    least, mean, most = (format(float(f(values)), f"{sign}.{digits}f") for f in (np.min, np.mean, np.max))
    return f"{mean} ({least} to {most})"


def commit(run: dict[str, Any]) -> str:
    """Of what code a result is, and when it was made."""
    of = f"commit {run['commit'][:10]}" if run["commit"] else "no commit"
    return f"{of}{' with changes' if run['dirty'] else ''}, {run['date']}"


_NUMBER = re.compile(r"\*{0,2}[-+]?\d|$")


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are text, and others in which something is no number."""
    text = [index < left or not all(_NUMBER.match(row[index]) for row in rows) for index in range(len(head))]
    marks = ["---" if of_text else "---:" for of_text in text]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))
