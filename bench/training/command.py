"""Trains with the losses side by side: ``python -m bench train``, or ``make compare``.

Each study (``studies.py``) has its result file in ``bench/results``, from which tables and plots are made. Runs leave a
file each in ``--work``: what is left of an interrupted comparison is taken up again. Remove it when the code has
changed.
"""

import argparse
import logging
import sys
from pathlib import Path

from ..run import store
from .one import train_one
from .runs import Job, compare, repeat, result_file, write_json
from .studies import LOSSES, STUDIES


def _study(text: str) -> str:
    if text not in STUDIES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(STUDIES)}, got {text}")
    return text


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench train", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("comparison"), help="folder of pictures and runs")
    commands = parser.add_subparsers(dest="command")
    run = commands.add_parser("run", help="all runs of a study or several")
    run.add_argument("studies", nargs="*", type=_study, metavar="STUDY", help=f"of {', '.join(STUDIES)} (default: all)")
    again = commands.add_parser("repeat", help="runs once more, to compare them with the result file")
    again.add_argument("study", choices=STUDIES)
    again.add_argument("--loss", choices=LOSSES, help="one loss (default: all of the study)")
    again.add_argument("--seed", type=int, default=0, help="default %(default)s")
    one = commands.add_parser("one")  # in a process of its own, for the commands above
    for name, kind in {**Job.__annotations__, "data": Path, "file": Path}.items():
        one.add_argument(f"--{name}", type=kind, required=True)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Compare, or do one run of a comparison; the exit status is 1 if a result is not what it should be."""
    options = _parse(arguments)
    try:
        _do(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _do(options: argparse.Namespace) -> None:
    if options.command == "one":
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        job = Job(options.study, options.loss, options.lr, options.seed, options.steps)
        write_json(options.file, train_one(*job, options.data))
    elif options.command == "repeat":
        losses = [options.loss] if options.loss else STUDIES[options.study].losses
        report = repeat(options.study, losses, options.seed, options.work)
        end = {run["loss"]: run["evaluations"][-1] for run in report["comparison"] if run["seed"] == options.seed}
        for loss in losses:
            print(f"{loss}, seed {options.seed}: the same figures, AP {end[loss]['AP']:.4f}")
        if not options.loss:
            store(report, result_file(options.study))
    else:
        for study in getattr(options, "studies", None) or STUDIES:
            store(compare(study, options.work), result_file(study))
