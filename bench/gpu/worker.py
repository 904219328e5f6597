"""A process that does a shard of a step and prints what it finds, a JSON line each; :mod:`.runner` starts it.

Lines: ``begin`` a unit, a ``record`` of it, an ``error`` of it, what was ``left_out`` for want of time, ``skipped``
with the reason; the last is ``end``. What libraries print goes to stderr.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, TextIO

import torch

from tests.support.interpreter import hasten

from .work import Context, Skipped, explain, plain

POISONED = 3
"""Exit status: the device answers with errors only, and another process has to go on."""

STEPS = ("environment", "correctness", "times", "launches", "counters", "training")


def _take_stdout() -> TextIO:
    """What was stdout, for records alone; what prints from now on prints to stderr."""
    records = os.fdopen(os.dup(1), "w", buffering=1)  # not inherited by processes that are started from here
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return records


def _follow(parent: int) -> None:
    """Ends this process, and those that it started, soon after its parent has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _poisoned(context: Context) -> bool:
    """Whether the device answers every call with an error, as it does for good after some."""
    try:
        context.wait()
    except RuntimeError:
        return True
    return False


def work(step: str, shard: str, done: int, context: Context, say: Any) -> int:
    """Do the units of a shard from the ``done``-th on; the exit status."""
    module = importlib.import_module(f".{step}", __package__)
    try:
        units = list(module.units(shard, context))
    except Skipped as reason:
        say({"skipped": str(reason)})
        return 0
    for index, unit in enumerate(units[done:], done):
        if context.left <= 0:
            say({"left_out": [other.name for other in units[index:]]})
            return 0
        say({"begin": unit.name, "index": index})
        try:
            for record in unit.run():
                say({"record": record})
        except BrokenPipeError:
            raise
        except Skipped as reason:
            say({"skipped": str(reason)})
            return 0
        except subprocess.TimeoutExpired:
            say({"left_out": [other.name for other in units[index:]]})
            return 0
        except Exception as error:
            say({"error": unit.name, "text": explain(error)})
        if _poisoned(context):
            return POISONED
    return 0


def main() -> None:
    """Run the shard that the command line names."""
    os.setpgid(0, 0)  # so that all that is started from here can be ended at once
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.worker")
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("shard")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument(
        "--until", type=float, required=True, help="on the clock of time.time(): begin nothing after it"
    )
    parser.add_argument("--done", type=int, default=0, help="units that are not to be done again")
    parser.add_argument("--attempt", type=int, default=0)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    records = _take_stdout()
    _follow(options.parent)

    def say(line: Any) -> None:
        records.write(json.dumps(plain(line), allow_nan=False) + "\n")
        records.flush()

    if options.rehearse:
        torch.set_num_threads(1)  # beside others like this one
        hasten()
    context = Context(options.rehearse, options.until - time.time(), options.attempt)
    status = work(options.step, options.shard, options.done, context, say)
    if status == 0:
        say({"end": True})
    # Not by the interpreter's own end, in which a device with errors, or threads of libraries, can hang or crash.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
