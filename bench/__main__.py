"""Command line of the benchmark: check, time, store, report; or compile and read what came out."""

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alrp_triton.functional import EPS

from . import side_by_side
from .contenders import RULE
from .gate import TOLERANCE, check
from .problems import sizes
from .report import fill, markdown, pages, render
from .run import RESULTS, ROOT, describe_run, store
from .timing import SECONDS, STEADY, TRIES, sweep

GROUPS = tuple(dict.fromkeys(size.group for size in sizes(quick=False, cuda=False)))


def _count(text: str) -> int:
    try:
        number = float(text)  # 1e6 is a whole number, too
    except ValueError:
        number = 0.5
    if number < 1 or not number.is_integer():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(number)


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return Path(text)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"Check, then time aLRP Loss beside its baselines. {RULE}",
        epilog="A full run is stored in bench/results; one with --groups, --max-anchors or --quick only with --out.",
    )
    parser.set_defaults(command=None)
    of = ", ".join(map(repr, GROUPS))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, metavar="GROUP", help=f"only these, of {of}")
    parser.add_argument("--max-anchors", type=_count, metavar="N", help="leave out what is larger")
    parser.add_argument("--repeats", type=_count, default=15, metavar="N", help="turns of each at a size (default 15)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random problems (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--threads", type=_count, metavar="N", help="of torch on the CPU (default: torch's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file (default bench/results/<device>.json)")
    parser.add_argument("--quick", action="store_true", help="few and small sizes, in less than a minute")
    if len(sys.argv) > 1 and sys.argv[1] in ("report", "show", "compiled"):
        parser = argparse.ArgumentParser(prog="python -m bench")
        commands = parser.add_subparsers(dest="command")
        commands.add_parser("report", help="make the tables of README and docs, and the plots, from bench/results")
        show = commands.add_parser("show", help="print all tables of a result file")
        show.add_argument("file", type=_file, help="JSON file of a run")
        compiled = commands.add_parser(
            "compiled", help="compile all kernels for GPUs that are not there, and read them"
        )
        compiled.add_argument("--out", type=Path, default=RESULTS / "compiled.json", metavar="FILE", help="JSON file")
    else:
        parser.epilog = f"{parser.epilog} Other commands, as first word: report, show FILE, compiled."
    return parser.parse_args()


def _run(options: argparse.Namespace) -> int:
    device = torch.device(["cpu", "cuda"][torch.cuda.is_available()] if options.device == "auto" else options.device)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    run = describe_run(device)
    wanted = [
        size
        for size in sizes(options.quick, device.type == "cuda")
        if size.group in (options.groups or [size.group]) and size.anchors <= (options.max_anchors or size.anchors)
    ]
    if not wanted:
        print("No size is left by --groups, --max-anchors and --quick.", file=sys.stderr)
        return 2
    if run["load_average_before"] > 0.5:
        print(f"Others are using this machine (load average {run['load_average_before']}).", file=sys.stderr)
    checks = check(device, options.seed)
    failed = [one for one in checks if not one.passed]
    if failed:
        print(f"Nothing was timed. Beyond the tolerance of {TOLERANCE:g}:", *failed, sep="\n  ", file=sys.stderr)
        return 1
    report: dict[str, Any] = {
        "run": run,
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
        "rows": [asdict(row) for row in sweep(wanted, device, options.repeats, options.seed)],
    }
    if device.type == "cuda":
        from .machine_code import TARGETS, matrix

        target = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        report["machine"] = matrix((target,), ("fp32",)) if target in TARGETS else []
    name = re.sub(r"[^a-z0-9]+", "-", run["device"].lower()) if device.type == "cuda" else "cpu"
    print(markdown(report))
    partial = options.groups or options.max_anchors or options.quick
    if options.out or not partial:
        store(report, options.out or RESULTS / f"{name}.json")
    else:
        print("A partial run: not stored without --out.", file=sys.stderr)
    return 0


def _report() -> int:
    from .plots import draw

    for page in pages():
        page.write_text(fill(page.read_text()))
        print(page)
    for file in sorted(RESULTS.glob("*.json")):
        report = json.loads(file.read_text())
        if "rows" in report or "comparison" in report:
            plots = draw if "rows" in report else side_by_side.draw
            print(*plots(report, ROOT / "docs" / "plots", file.stem), sep="\n")
    return 0


def _compiled(out: Path) -> int:
    from .machine_code import matrix

    kernels = matrix(("sm_80", "sm_90", "sm_100", "gfx942"), ("fp32",))
    report = {"run": describe_run(torch.device("cpu")), "kernels": kernels}
    print(render(report, "all"), render(report, "model"), sep="\n\n")
    store(report, out)
    return 0


def main() -> int:
    """Run the command; the exit status is 1 if the correctness gate failed."""
    options = _parse()
    if options.command == "report":
        return _report()
    if options.command == "show":
        report = json.loads(options.file.read_text())
        tables = [render(report, "all"), render(report, "model")] if "kernels" in report else [markdown(report)]
        print(*tables, sep="\n\n")
        return 0
    return _compiled(options.out) if options.command == "compiled" else _run(options)


if __name__ == "__main__":
    sys.exit(main())
