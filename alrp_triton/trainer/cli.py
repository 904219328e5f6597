"""The command ``alrp-train``."""

import io
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from .detecting import predict, validate
from .errors import UserError
from .fitting import fit
from .parsers import USAGE


def _without_noise() -> None:
    """What Lightning says of every run as this one, and a user can do nothing about."""
    for message in (
        "Checkpoint directory .* exists and is not empty",  # the logs are there before the checkpoints
        "The number of training batches .* is smaller than the logging interval",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
    for logger in ("utilities.rank_zero", "trainer.connectors.signal_connector"):
        logging.getLogger(f"lightning.pytorch.{logger}").addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    """Neither an advertisement, nor the name of a signal: a run that is stopped says so itself."""
    return not any(words in record.getMessage() for words in ("litlogger", "Received SIGTERM"))


COMMANDS = {"fit": fit, "validate": validate, "predict": predict}


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command; what a user can mend ends in one line, and status 2."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] not in COMMANDS:
        print(USAGE, file=sys.stdout if set(words) & {"-h", "--help"} else sys.stderr)
        return 0 if set(words) & {"-h", "--help"} else 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of categories need not be of the terminal's alphabet
            stream.reconfigure(errors="backslashreplace")
    _without_noise()
    try:
        return COMMANDS[words[0]](words[1:])
    except SIGTERMException:
        return 143
    except (MisconfigurationException, OSError, ValueError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts
        if not isinstance(error, (UserError, MisconfigurationException, OSError)) and "lightning" not in raised_in:
            raise  # Lightning refuses arguments by a ValueError, but others are faults
        # Of a process that loads images comes the whole traceback, as the text of the error.
        said = str(error).strip() or type(error).__name__
        print(f"error: {said.splitlines()[-1].removeprefix(f'{UserError.__module__}.UserError: ')}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}: try a lower --model.lr or a longer --model.warm_up", file=sys.stderr)
        return 1
