"""Command line of the benchmark: check, time, store, report; or compile and read what came out."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from alrp_triton.functional import EPS

from .training import tables as comparison_tables
from .speed.contenders import RULE
from .speed.gate import TOLERANCE, check
from .gpu import results
from .gpu import runner
from .speed.host import TURNS, measure
from .speed.host import markdown as host_markdown
from .speed.problems import sizes
from .report import fill, markdown, pages, render
from .run import RESULTS, ROOT, describe_run, store
from .speed.timing import SECONDS, STEADY, TRIES, sweep

GROUPS = tuple(dict.fromkeys(size.group for size in sizes(quick=False)))


def _count(text: str) -> int:
    try:
        number = float(text)  # 1e6 is a whole number, too
    except ValueError:
        number = 0.5
    if number < 1 or not number.is_integer():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(number)


def _report_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return Path(text)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="check, then time the loss beside its baselines on a CPU; the command where none is named",
        description=f"Check, then time aLRP Loss beside its baselines, on the CPU. {RULE}",
        epilog="A full run is stored in bench/results; one with --groups, --max-anchors or --quick only with --out. "
        "Other commands, as first word: gpu, keep FILE, report, show FILE, diff A B, compiled, host.",
    )
    of = ", ".join(map(repr, GROUPS))
    run.add_argument("--groups", nargs="+", choices=GROUPS, metavar="GROUP", help=f"only these, of {of}")
    run.add_argument("--max-anchors", type=_count, metavar="N", help="leave out what is larger")
    run.add_argument("--repeats", type=_count, default=15, metavar="N", help="turns of each at a size (default 15)")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of the random problems (default 0)")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: says which command is for GPUs")
    run.add_argument("--threads", type=_count, metavar="N", help="of torch (default: torch's)")
    run.add_argument("--out", type=Path, metavar="FILE", help="JSON file (default bench/results/cpu.json)")
    run.add_argument("--quick", action="store_true", help="few and small sizes, in less than a minute")
    gpu = commands.add_parser(
        "gpu",
        help="all that a GPU can tell, in some minutes",
        description="Environment, correctness, time, counters and training on a GPU, each step in processes of its own "
        "with a share of the time; every result is in the file at once. Exit status: 0, 1 a result is wrong, 3 a step "
        "was not done.",
    )
    gpu.add_argument("--out", type=Path, metavar="DIR", help="folder of the result file and its log (bench/results)")
    gpu.add_argument("--minutes", type=float, metavar="M", help=f"for all of it (default {runner.MINUTES:g})")
    gpu.add_argument("--commit", metavar="TEXT", help="of this code, where there is no git to ask")
    gpu.add_argument(
        "--steps", nargs="+", choices=runner.STEPS, default=runner.STEPS, metavar="STEP", help="only these"
    )
    gpu.add_argument(
        "--rehearse", action="store_true", help="every part on the CPU, at toy sizes; its times mean nothing"
    )
    commands.add_parser("report", help="make the tables of README and docs, and the plots, from bench/results")
    keep = commands.add_parser("keep", help="put a GPU's result file into bench/results, without what takes most space")
    keep.add_argument("file", type=_report_file, help="JSON file of a run of bench gpu")
    keep.add_argument("--cause", default="", metavar="TEXT", help="why checks failed, if no time is of a wrong result")
    show = commands.add_parser("show", help="print all tables of a result file")
    show.add_argument("file", type=_report_file, help="JSON file of a run")
    diff = commands.add_parser("diff", help="two runs of one device side by side: times, their ratios, what is right")
    for name in ("a", "b"):
        diff.add_argument(name, type=_report_file, metavar=name.upper(), help="JSON file of a run")
    compiled = commands.add_parser("compiled", help="compile all kernels for GPUs that are not there, and read them")
    compiled.add_argument("--out", type=Path, default=RESULTS / "compiled.json", metavar="FILE", help="JSON file")
    host = commands.add_parser(
        "host",
        help="what a step costs the host: on the GPU path with no GPU and no launches, and on the CPU's",
        description="Time of a step beside focal loss: the host's on the GPU path, where stubs stand for all launches, "
        "and the whole on the CPU; launches, operations and instructions counted. Stored with --out only.",
    )
    host.add_argument("--turns", type=_count, default=TURNS, metavar="N", help=f"default {TURNS}")
    host.add_argument("--no-instructions", action="store_true", help="do without valgrind, which takes minutes")
    host.add_argument("--out", type=Path, metavar="FILE", help="JSON file")
    if not arguments or arguments[0].startswith("-"):
        arguments = ["run", *arguments]
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    if options.device == "cuda":
        print("For a GPU there is another command: python -m bench gpu", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads or torch.get_num_threads())
    run = describe_run(torch.device("cpu"))
    wanted = [
        size
        for size in sizes(options.quick)
        if size.group in (options.groups or [size.group]) and size.anchors <= (options.max_anchors or size.anchors)
    ]
    if not wanted:
        print("No size is left by --groups, --max-anchors and --quick.", file=sys.stderr)
        return 2
    if run["load_average_before"] > 0.5:
        print(f"Others are using this machine (load average {run['load_average_before']}).", file=sys.stderr)
    checks = check(options.seed)
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
        "rows": [asdict(row) for row in sweep(wanted, options.repeats, options.seed)],
    }
    print(markdown(report))
    partial = options.groups or options.max_anchors or options.quick
    if options.out or not partial:
        store(report, options.out or RESULTS / "cpu.json")
    else:
        print("A partial run: not stored without --out.", file=sys.stderr)
    return 0


def _report() -> int:
    from .gpu import plots as gpu_plots
    from .speed.plots import draw

    for page in pages():
        page.write_text(fill(page.read_text()))
        print(page)
    folder = ROOT / "docs" / "plots"
    for file in sorted(RESULTS.glob("*.json")):
        report = results.load(file)
        if "rows" in report or "comparison" in report:
            plots = draw if "rows" in report else comparison_tables.draw
            print(*plots(report, folder, file.stem), sep="\n")
    for file in results.newest():
        print(*gpu_plots.draw(results.load(file), folder), sep="\n")
    return 0


def _compiled(out: Path) -> int:
    from .machine_code.reading import matrix

    with TemporaryDirectory() as folder, patch.dict(os.environ, TRITON_CACHE_DIR=folder):  # all are compiled here
        kernels = matrix(("sm_80", "sm_90", "sm_100", "gfx942"), ("fp32",))
    report = {"run": describe_run(torch.device("cpu")), "kernels": kernels}
    print(render(report, "all"), render(report, "model"), render(report, "seconds"), sep="\n\n")
    store(report, out)
    return 0


def _show(file: Path) -> int:
    report = json.loads(file.read_text())
    print(
        *([render(report, "all"), render(report, "model")] if "kernels" in report else [markdown(report)]), sep="\n\n"
    )
    return 0


def _keep(file: Path, cause: str, folder: Path = RESULTS) -> int:
    report = results.load(file)
    if not results.is_gpu(report) or report["rehearsal"]:
        print(f"{file} is no run of a GPU", file=sys.stderr)
        return 2
    kept = folder / file.name
    kept.write_text(results.text_of(results.compact(report, cause)))
    print(kept)
    return 0


def _host(options: argparse.Namespace) -> int:
    report = measure(options.turns, not options.no_instructions)
    print(host_markdown(report))
    if options.out:
        store(report, options.out)
    return 0


def _diff(a: Path, b: Path) -> int:
    from .diff import diff

    try:
        print(diff(results.load(a), results.load(b), (a.name, b.name)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 if the correctness gate failed."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    if options.command == "gpu":
        chosen = tuple(step for step in runner.STEPS if step in options.steps)
        return runner.main(runner.Options(options.out, options.minutes, options.rehearse, options.commit, chosen))
    if options.command == "diff":
        return _diff(options.a, options.b)
    if options.command == "keep":
        return _keep(options.file, options.cause)
    if options.command == "show":
        return _show(options.file)
    if options.command == "host":
        return _host(options)
    if options.command == "compiled":
        return _compiled(options.out)
    return _report() if options.command == "report" else _run(options)


if __name__ == "__main__":
    sys.exit(main())
