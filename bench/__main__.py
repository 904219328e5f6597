"""One command for all that is measured: speed, machine code, training, endurance; and the tables made of it."""

import argparse
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from . import endurance
from .gpu import results, runner
from .report import fill, markdown, pages, render
from .run import RESULTS, ROOT, describe_run, store
from .speed import command as speed
from .speed.command import count
from .speed.contenders import RULE
from .speed.host import TURNS, measure
from .speed.host import markdown as host_markdown
from .training import tables as comparison_tables


def _report_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return Path(text)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="check, then time the loss beside its baselines on a CPU; the command where none is named",
        description=f"Check, then time aLRP Loss beside its baselines, on the CPU. {RULE}",
        epilog="A full run is stored in bench/results; one with --groups, --max-anchors or --quick only with --out.",
    )
    speed.add_arguments(run)
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
    host.add_argument("--turns", type=count, default=TURNS, metavar="N", help=f"default {TURNS}")
    host.add_argument("--no-instructions", action="store_true", help="do without valgrind, which takes minutes")
    host.add_argument("--out", type=Path, metavar="FILE", help="JSON file")
    soak = commands.add_parser("soak", help="many steps on changing sizes, all losses, memory watched")
    soak.add_argument("--steps", type=count, default=50_000, metavar="N", help="default %(default)s")
    soak.add_argument("--most", type=count, default=100_000, metavar="N", help="logits of a step (default %(default)s)")
    large = commands.add_parser("large", help="one step on 3e8 and on 2.2e9 logits, checked by hand; 14 GiB")
    for endless in (soak, large):
        endless.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    commands.add_parser("train", help="the losses side by side in training; train --help has more", add_help=False)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["run", *arguments]
    return parser.parse_args(arguments)


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


def _endure(options: argparse.Namespace) -> int:
    report: dict[str, Any] = {"run": describe_run(torch.device("cpu"))}
    if options.command == "soak":
        report["soak"] = endurance.soak(options.steps, options.most, options.seed)
    else:
        report["large"] = [endurance.large(*size, options.seed) for size in endurance.LARGE]
    print(endurance.render(report))
    store(report, RESULTS / f"{options.command}.json")
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
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:
        from .training import command as training  # needs a trainer

        return training.main(arguments[1:])
    options = _parse(arguments)
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
    if options.command in ("soak", "large"):
        return _endure(options)
    return _report() if options.command == "report" else speed.run(options)


if __name__ == "__main__":
    sys.exit(main())
