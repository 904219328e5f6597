"""Command line of the benchmark: check, time, store, print."""

import argparse
import json
import re
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from alrp_triton.functional import DELTA, EPS

from .gate import TOLERANCE, check
from .report import ROOT, describe_run, markdown
from .steps import LOOP, RULE
from .sweep import sweep

ANCHORS, POSITIVES = [10_000, 100_000, 1_000_000, 3_000_000], [100, 1_000]
QUICK_ANCHORS, QUICK_POSITIVES = [10_000, 100_000], [100]


def _count(text: str) -> int:
    number = float(text)  # 1e6 is a whole number, too
    if number < 1 or not number.is_integer():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(number)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=f"Time aLRP Loss. {RULE}")
    parser.add_argument("--anchors", type=_count, nargs="+", metavar="N", help=f"default {ANCHORS}")
    parser.add_argument("--positives", type=_count, nargs="+", metavar="P", help=f"default {POSITIVES}")
    parser.add_argument("--repeats", type=_count, default=5, help="timed steps of each contender (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the random problems (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--threads", type=_count, help="of torch on the CPU; 1 is best on a machine in use by others")
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/<device>[-quick].json)")
    parser.add_argument("--quick", action="store_true", help="few and small sizes, in seconds")
    table = parser.add_subparsers(dest="command").add_parser("table", help="print the table of a stored run again")
    table.add_argument("file", type=Path)
    options = parser.parse_args()
    options.anchors = options.anchors or (QUICK_ANCHORS if options.quick else ANCHORS)
    options.positives = options.positives or (QUICK_POSITIVES if options.quick else POSITIVES)
    if max(options.positives) >= min(options.anchors):
        parser.error(f"no anchors are left for negatives: {options.anchors} anchors, {options.positives} positives")
    return options


def _run(options: argparse.Namespace) -> int:
    device = torch.device(["cpu", "cuda"][torch.cuda.is_available()] if options.device == "auto" else options.device)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    run = describe_run(device)
    sizes = list(product(options.anchors, options.positives))
    checks = check(sizes, device, options.seed)
    failed = [one for one in checks if not one.passed]
    if failed:
        print(f"Nothing was timed. Beyond the tolerance of {TOLERANCE:g}:", *failed, sep="\n  ", file=sys.stderr)
        return 1
    settings = {name: getattr(options, name) for name in ("anchors", "positives", "repeats", "seed")}
    report = {
        "run": run,
        "settings": settings | {"delta": DELTA, "eps": EPS, "dtype": "float32", "baseline": LOOP},
        "rule": RULE,
        "gate": {"tolerance": TOLERANCE, "checks": [asdict(one) for one in checks]},
        "rows": [asdict(row) for row in sweep(sizes, device, options.repeats, options.seed)],
    }
    name = re.sub(r"[^a-z0-9]+", "-", run["device"].lower()) + ("-quick" if options.quick else "")
    out: Path = options.out or ROOT / "bench" / "results" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))
    print(f"{len(checks)} checks passed; stored in {out}", file=sys.stderr)
    return 0


def main() -> int:
    """Run the command; the exit status is 1 if the correctness gate failed."""
    options = _parse()
    if options.command == "table":
        print(markdown(json.loads(options.file.read_text())))
        return 0
    return _run(options)


if __name__ == "__main__":
    sys.exit(main())
