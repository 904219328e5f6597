"""``python -m bench run``: check, then time the loss beside its baselines on a CPU."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alrp_triton.functional import EPS

from ..report import markdown
from ..run import RESULTS, describe_run, store
from .contenders import RULE
from .gate import TOLERANCE, check
from .problems import sizes
from .timing import SECONDS, STEADY, TRIES, sweep

GROUPS = tuple(dict.fromkeys(size.group for size in sizes(quick=False)))


def count(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    try:
        number = float(text)  # 1e6 is a whole number, too
    except ValueError:
        number = 0.5
    if number < 1 or not number.is_integer():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(number)


def add_arguments(run: argparse.ArgumentParser) -> None:
    """Those of :func:`run`."""
    of = ", ".join(map(repr, GROUPS))
    run.add_argument("--groups", nargs="+", choices=GROUPS, metavar="GROUP", help=f"only these, of {of}")
    run.add_argument("--max-anchors", type=count, metavar="N", help="leave out what is larger")
    run.add_argument("--repeats", type=count, default=15, metavar="N", help="turns of each at a size (default 15)")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of the random problems (default 0)")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: says which command is for GPUs")
    run.add_argument("--threads", type=count, metavar="N", help="of torch (default: torch's)")
    run.add_argument("--out", type=Path, metavar="FILE", help="JSON file (default bench/results/cpu.json)")
    run.add_argument("--quick", action="store_true", help="few and small sizes, in less than a minute")


def run(options: argparse.Namespace) -> int:
    """The exit status: 1 if a result is wrong, 2 if nothing is left to time."""
    if options.device == "cuda":
        print("For a GPU there is another command: python -m bench gpu", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads or torch.get_num_threads())
    machine = describe_run(torch.device("cpu"))
    wanted = [
        size
        for size in sizes(options.quick)
        if size.group in (options.groups or [size.group]) and size.anchors <= (options.max_anchors or size.anchors)
    ]
    if not wanted:
        print("No size is left by --groups, --max-anchors and --quick.", file=sys.stderr)
        return 2
    if machine["load_average_before"] > 0.5:
        print(f"Others are using this machine (load average {machine['load_average_before']}).", file=sys.stderr)
    checks = check(options.seed)
    failed = [one for one in checks if not one.passed]
    if failed:
        print(f"Nothing was timed. Beyond the tolerance of {TOLERANCE:g}:", *failed, sep="\n  ", file=sys.stderr)
        return 1
    report: dict[str, Any] = {
        "run": machine,
        "settings": {
            "repeats": options.repeats,
            "seconds": SECONDS,
            "steady": STEADY,
            "tries": TRIES,
            "seed": options.seed,
            "eps": EPS,
            "dtype": "float32",
        },
        "rule": RULE,
        "gate": {"tolerance": TOLERANCE, "checks": [asdict(one) for one in checks]},
        "rows": [asdict(row) for row in sweep(wanted, options.repeats, options.seed)],
    }
    print(markdown(report))
    partial = options.groups or options.max_anchors or options.quick
    if options.out or not partial:
        store(report, options.out or RESULTS / "cpu.json")
    else:
        print("A partial run: not stored without --out.", file=sys.stderr)
    return 0
