"""The command: one step after the other, each with its share of the time, every result in the file at once."""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from ..run import RESULTS, describe_run
from . import printed
from .processes import Command, Job, Outcome, Pool, command_of
from .results import REHEARSAL, Report, claim
from .work import Record, plain
from .worker import STEPS

MINUTES, REHEARSAL_MINUTES = 8.0, 60.0
_GRACE = 6.0  # seconds between a process' own end and the one that is made
SHARES = {
    "environment": 10.0,
    "correctness": 30.0,
    "times": 40.0,
    "launches": 5.0,
    "counters": 10.0,
    "training": 15.0,
}
"""Of the time. What a step leaves over is for the steps after it."""
_FAILED, _USAGE = 3, 2
_WORST = ("done", "skipped", "out of time", "failed")


class Options(NamedTuple):
    """What the command line says."""

    out: Path | None = None
    minutes: float | None = None
    rehearse: bool = False
    commit: str | None = None
    steps: tuple[str, ...] = STEPS


def limits(steps: tuple[str, ...], step: str, left: float) -> float:
    """Seconds for a step, of those that are left for it and the steps after it."""
    later = steps[steps.index(step) :]
    return left * SHARES[step] / sum(SHARES[name] for name in later)


def workers_for(step: str, cores: int, compute_mode: str) -> int:
    """Processes at a time: compiling and comparing take cores, and what is timed is to be alone."""
    if step != "correctness" or compute_mode not in ("", "Default"):  # a card may let one process in only
        return 1
    return max(2, min(8, cores // 2))


class Run:
    """A run in progress.

    Args:
        report: its file.
        options: of the command line.
        command: how workers are started.
        jobs_of: the shards of a step.
    """

    def __init__(self, report: Report, options: Options, command: Command, jobs_of: Callable[[str], list[str]]) -> None:
        self.report, self.options, self.jobs_of = report, options, jobs_of
        self.lock = threading.Lock()
        self.wrong: list[str] = []
        self.wrong_backends: set[str] = set()
        self.errors: dict[str, list[str]] = {}
        self.compute_mode = ""
        self.scratch = tempfile.TemporaryDirectory(prefix="bench-gpu-")
        environment = os.environ | {"TMPDIR": self.scratch.name, "PYTHONUNBUFFERED": "1"}
        if options.rehearse:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:
            environment.pop("TRITON_INTERPRET", None)
        self.environment = environment
        self.pool = Pool(command, environment, report.file.with_suffix(".log"), self.add)

    def add(self, job: Job, record: Record) -> None:
        """A record as it comes from a process; one of a crash or of an exception, too."""
        with self.lock:
            if "error" in record and job.step == "correctness":
                record = {"check": record["error"], "passed": False, "shard": job.shard, "error": record["text"]}
                backend, _, dtype = job.shard.partition(" ")
                record |= {"backend": backend, "dtype": dtype} if dtype in dir(torch) else {}
            elif "error" in record:
                self.errors.setdefault(job.step, []).append(f"{record['error']}: {record['text']}")
            if record.get("passed") is False:
                name = " ".join(str(record[key]) for key in ("check", "backend", "dtype") if key in record)
                self.wrong.append(name)
                self.wrong_backends |= {record["backend"]} if "backend" in record else set()
                self.report.head["wrong"] = self.wrong
            if job.step in ("times", "training"):
                record = marked(record, self.wrong_backends)
            self.compute_mode = record.get("compute_mode", self.compute_mode)
            if line := printed.progress(job.step, record):
                print(line, flush=True)
            self.report.add(job.step, plain(record))

    def take_step(self, step: str, end: float, grace: float) -> None:
        """All shards of a step, several at a time; its status is that of the worst."""
        with self.lock:
            state = self.report.begin(step)
            state["limit_s"] = round(end - time.monotonic(), 1)
            self.report.write()
        begin = time.monotonic()
        print(f"{step}: up to {end - begin:.0f} s", flush=True)
        shards = self.jobs_of(step)
        count = workers_for(step, len(os.sched_getaffinity(0)), self.compute_mode)
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        if count > 1:  # NumPy's and torch's threads of all processes together are as many as there are cores
            self.environment["OMP_NUM_THREADS"] = str(threads)
        else:
            self.environment.pop("OMP_NUM_THREADS", None)
        with ThreadPoolExecutor(count) as executor:
            jobs = [Job(step, shard) for shard in shards]
            try:
                outcomes = list(executor.map(partial(self.pool.run, end=end, grace=grace), jobs))
            except BaseException:
                self.pool.close()  # before the executor waits for its threads, which wait for processes
                raise
        with self.lock:
            state |= summary(shards, outcomes, self.errors.get(step, []))
            state["seconds"] = round(time.monotonic() - begin, 1)
            self.report.write()
        print(f"{step}: {state['status']} after {state['seconds']:.0f} s {state.get('reason', '')}", flush=True)

    def close(self) -> None:
        """End what is alive, and write what there is."""
        self.pool.close()
        self.pool.close_log()
        with self.lock:
            self.report.write()
        self.scratch.cleanup()


def marked(record: Record, wrong: set[str]) -> Record:
    """A time of what gave a wrong result says so."""
    of = record.get("contender", record.get("loss"))
    mine = {"auto": {"triton_tiled", "triton_binned"}, "aLRP": {"triton_tiled", "triton_binned"}}.get(str(of), {of})
    return record | {"wrong": True} if mine & wrong or record.get("disagrees") else record


def summary(shards: list[str], outcomes: list[Outcome], errors: list[str]) -> Record:
    """A step's status, why, and what became of its shards."""
    worst = max((outcome.status for outcome in outcomes), key=_WORST.index, default="done")
    if worst == "skipped" and any(outcome.status == "done" for outcome in outcomes):
        worst = "done"  # a shard of several had a reason
    reasons = [f"{shard}: {of.reason}" for shard, of in zip(shards, outcomes, strict=True) if of.reason] + errors
    state: Record = {"status": "failed" if errors else worst}
    if reasons:
        state["reason"] = "; ".join(reasons)[:2000]
    state["shards"] = [
        {"shard": shard, **{key: value for key, value in outcome._asdict().items() if value not in ("", ())}}
        for shard, outcome in zip(shards, outcomes, strict=True)
    ]
    return state


def status_of(report: Record) -> int:
    """The exit status: 1 if a result was wrong, 3 if a step was not done, else 0."""
    if report["wrong"]:
        return 1
    complete = all(step["status"] in ("done", "skipped") for step in report["steps"].values())
    return 0 if complete and report["finished"] else _FAILED


def shards_of(rehearse: bool) -> Callable[[str], list[str]]:
    """The shards of a step, by its module."""
    return lambda step: import_module(f".{step}", __package__).shards(rehearse)


def _refuse(options: Options) -> str:
    """Why it cannot be done, or ""."""
    if sys.platform != "linux":
        return "bench gpu runs on Linux only"
    if options.minutes is not None and not options.minutes > 0:
        return f"--minutes must be more than 0, got {options.minutes:g}"
    if not options.rehearse and not torch.cuda.is_available():
        return (
            "There is no GPU that torch can use here. `python -m bench gpu --rehearse` tries the command without one."
        )
    return ""


def main(options: Options, command: Command | None = None, jobs_of: Callable[[str], list[str]] | None = None) -> int:
    """Run all steps; the exit status is that of :func:`status_of`, or 2 where nothing can be run."""
    if reason := _refuse(options):
        print(reason, file=sys.stderr)
        return _USAGE
    out = options.out
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="bench-gpu-rehearsal-")) if options.rehearse else RESULTS
    end = time.monotonic() + 60 * (options.minutes or (REHEARSAL_MINUTES if options.rehearse else MINUTES))
    run = describe_run(torch.device("cpu" if options.rehearse else "cuda"))
    run["commit"] = options.commit or run["commit"]
    if options.rehearse:
        run["rehearsed_on"], run["device"] = run["device"], REHEARSAL
    file = claim(out, run["device"], run["commit"])
    head: Record = {"run": run, "rehearsal": options.rehearse, "finished": False, "wrong": list[str]()}
    report = Report(file, plain(head))
    report.head["minutes"] = round((end - time.monotonic()) / 60, 1)
    print(
        f"{'A rehearsal on the CPU, whose times mean nothing' * options.rehearse or run['device']}: {file}", flush=True
    )
    work = Run(report, options, command or command_of(options.rehearse), jobs_of or shards_of(options.rehearse))

    def stop(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for step in options.steps:
            left = end - time.monotonic()
            seconds = limits(options.steps, step, left)
            work.take_step(step, time.monotonic() + seconds, min(_GRACE, seconds / 4))
        report.head["finished"] = True
    except KeyboardInterrupt as reason:
        print(f"ended by {reason}", file=sys.stderr)
        report.head["ended_by"] = str(reason)
        for step in report.steps.values():
            step["status"] = "cut short" if step["status"] == "running" else step["status"]
    finally:
        work.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    found = report.as_dict()
    print(printed.short(found), flush=True)
    print(f"{file}\n{file.with_suffix('.log')}", flush=True)
    return status_of(found)
