"""What the commands' options have in common."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from .errors import UserError

USAGE = """\
Trains a detector of torchvision with a ranking loss on data in COCO format, evaluates it, and detects with it.

    alrp-train fit --data.root DIR --out RUN          trains; ends with AP, oLRP and thresholds by category
    alrp-train fit --out RUN --resume                 goes on where RUN stopped, with its settings
    alrp-train fit --out RUN --resume --trainer.max_epochs 200     and makes it longer
    alrp-train validate --run RUN                     evaluates the best checkpoint of RUN, on its data or others
    alrp-train predict --run RUN --images FOLDER      detects; writes COCO's format of results, and pictures

Each command has --help, and takes --config FILE with options of its own: fit the config.yaml that a run leaves.
"""


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description."""


class Parser(LightningArgumentParser):
    """Options by their whole names; errors in one line, without the list of all options."""

    def __init__(self, *args: Any, **options: Any) -> None:
        of_ours: dict[str, Any] = {"description": USAGE, "usage": "%(prog)s [--OPTION VALUE ...]"}
        of_ours |= {"formatter_class": _Help, "allow_abbrev": False}
        super().__init__(*args, **of_ours | options)

    def format_help(self, *formatter: Any, **of_newer: Any) -> str:
        """Our own options before the many of Lightning's Trainer; texts from docstrings without their marks."""
        groups = cast("list[Any]", self._action_groups)
        groups.sort(key=lambda group: any(one.dest == "trainer" for one in group._group_actions))
        return re.sub(r":\w+:`([^`]*)`|``", r"\1", super().format_help(*formatter, **of_newer))

    def error(self, message: str, ex: Exception | None = None) -> Any:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        raise UserError(f"{' '.join(lines)}; see {self.prog} --help") from ex


def value_ahead(words: Sequence[str], name: str) -> str:
    """The value of an option that others take their defaults from; empty where it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, nargs="?", const="", default="", dest="value")
    return parser.parse_known_args(list(words))[0].value


def parser_of_run(command: str) -> Parser:
    """With the options of all commands that need a run."""
    parser = Parser(f"alrp-train {command}")
    parser.add_argument("--config", action="config", help="a file of these options")
    parser.add_argument("--run", type=Path, required=True, help="folder of a run, or one of its checkpoints")
    parser.add_argument("--accelerator", default="auto", help="Lightning's: cpu, gpu, mps, auto")
    return parser
