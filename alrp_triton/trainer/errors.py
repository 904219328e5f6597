"""What a user can mend: reported in one line, without a traceback."""

from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """An argument, a file or an entry of a file that is not as it has to be; the message names it."""


def refuse_others(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """UserError: the settings of a checkpoint's run are not those of now; what it does not know may be anything."""
    other = [f"{name} {before[name]} (now {value})" for name, value in now.items() if before.get(name, value) != value]
    if other:
        raise UserError(f"the checkpoint is of a run with other settings: {', '.join(other)}")


def in_a_line(error: object) -> str:
    """What another library says, which may be of many lines and without end."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"
