"""What a command prints and writes."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

OF_CATEGORY = ("AP", "oLRP", "threshold")


def print_rows(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str], title: str = "") -> None:
    """A table of these columns, each row by its name."""
    print(f"\n{title:<24}" + "".join(f"{name:>11}" for name in columns))
    for name, row in rows.items():
        print(f"{name:<24.24}" + "".join(f"{row[column]:>11.3f}" for column in columns))


def prepare_file(file: Path) -> None:
    """What cannot be written is found before the work."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{file} cannot be written to")


def write_json(file: Path, content: Any, **options: Any) -> None:
    """JSON has no NaN: what is undefined is null."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    file.write_text(json.dumps(content, **options) + "\n", encoding="utf-8")
