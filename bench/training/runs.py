"""All runs of a study, each in a process of its own, two at a time; what an interrupted call left is not run again."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..run import RESULTS, describe_run
from .one import time_all
from .studies import RATES, STUDIES, TUNING_SEED, Tuned, data_of, settings_of

CPU = torch.device("cpu")


class Job(NamedTuple):
    """Arguments of :func:`.one.train_one`."""

    study: str
    loss: str
    lr: float
    seed: int
    steps: int


def result_file(study: str) -> Path:
    """Where the results of a study are kept."""
    return RESULTS / f"comparison_{study}.json"


def write_json(file: Path, result: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(file)


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a former call left in the file, or what is made and left there now."""
    if not file.exists():
        write_json(file, make())
    return json.loads(file.read_text())


def run_apart(jobs: Sequence[Job], data: Path, work: Path) -> list[dict[str, Any]]:
    """The runs, in the order of the jobs.

    Raises:
        ValueError: a file in ``work`` is of a run with other settings.
    """

    def run(job: Job) -> dict[str, Any]:
        file = work / f"{job.loss.replace(' ', '_')}-{job.lr:g}-{job.seed}-{job.steps}.json"
        if not file.exists():
            command = [sys.executable, "-m", "bench", "train", "one", "--data", str(data), "--file", str(file)]
            command += [word for name, value in job._asdict().items() for word in (f"--{name}", str(value))]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        result = json.loads(file.read_text())
        if result["settings"] != settings_of(*job):
            raise ValueError(f"{file} is of a run with other settings: remove {work}")
        return result

    with ThreadPoolExecutor(2) as pool:
        return list(tqdm(pool.map(run, jobs), total=len(jobs), desc=f"{jobs[0].study}: runs", unit="run"))


def tune(study: str, run: Callable[[Sequence[Job]], Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """How short runs ended: until no loss is best at an end of the learning rates that it was given."""
    losses, of = STUDIES[study].losses, STUDIES[study].rates
    assert isinstance(of, Tuned)
    ends: dict[str, dict[float, dict[str, Any] | None]] = {loss: {} for loss in losses}
    wanted = [(loss, lr) for loss in losses for lr in RATES[of.first : of.first + 3]]
    while wanted:
        jobs = [Job(study, loss, lr, TUNING_SEED, of.steps) for loss, lr in wanted]
        for (loss, lr), one in zip(wanted, run(jobs), strict=True):
            ends[loss][lr] = None if one["diverged"] else one["evaluations"][-1]
        wanted = []
        for loss, tried in ends.items():
            best = RATES.index(_best(tried))
            wanted += [(loss, lr) for lr in RATES[max(best - 1, 0) : best + 2] if lr not in tried]
    return [{"loss": loss, "lr": lr, "end": tried[lr]} for loss, tried in ends.items() for lr in sorted(tried)]


def _best(ends: Mapping[float, dict[str, Any] | None]) -> float:
    """The learning rate with the highest AP; a run that diverged has none."""
    return max(ends, key=lambda lr: end["AP"] if (end := ends[lr]) else -1.0)


def best_rates(tuning: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By loss, of what :func:`tune` gave."""
    losses = dict.fromkeys(entry["loss"] for entry in tuning)
    return {loss: _best({entry["lr"]: entry["end"] for entry in tuning if entry["loss"] == loss}) for loss in losses}


def compare(study: str, work: Path) -> dict[str, Any]:
    """A whole study.

    Raises:
        ValueError: a run diverged at the learning rate that was chosen; the rates are those of a study that is missing;
            what a former call left is of other settings.
    """
    of, run = STUDIES[study], describe_run(CPU)
    folder, data = work / study, data_of(of.data, work)
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"run": run, "command": f"python -m bench train run {study}", "about": of.about}
    if of.turns:
        report["times"] = kept(folder / "times.json", lambda: time_all(study, data))
        if report["times"]["turns"] != of.turns:
            seen = f"{report['times']['turns']} turns, not of {of.turns}"
            raise ValueError(f"{folder / 'times.json'} is of {seen}: remove {folder}")
    if isinstance(of.rates, Tuned):
        to_tune = data_of(of.data, work, tuning=True)
        report["tuning"] = tune(study, lambda jobs: run_apart(jobs, to_tune, folder))
        rates = best_rates(report["tuning"])
    else:
        file = result_file(of.rates)
        if not file.exists():
            raise ValueError(f"{study} takes the learning rates of {of.rates}: run that first, {file} is missing")
        rates = best_rates(json.loads(file.read_text())["tuning"])
    jobs = [Job(study, loss, rates[loss], seed, of.steps) for seed in range(of.seeds) for loss in of.losses]
    report["comparison"] = run_apart(jobs, data, folder)
    ended = [one for one in report["comparison"] if one["diverged"]]
    if ended:
        diverged = [f"{one['loss']}, seed {one['seed']}, step {one['diverged']}" for one in ended]
        raise ValueError(f"not finite at the learning rate of the best short run: {'; '.join(diverged)}")
    return report


def repeat(study: str, losses: Sequence[str], seed: int, work: Path) -> dict[str, Any]:
    """Runs of a study once more, with the code as it is now; the study's report, with a note of that.

    The same processor and versions give the same figures, bit for bit.

    Raises:
        ValueError: a run ended elsewhere than the report says, or is not in it.
    """
    report = json.loads(result_file(study).read_text())
    before = {run["loss"]: run for run in report["comparison"] if run["seed"] == seed}
    if missing := [loss for loss in losses if loss not in before]:
        raise ValueError(f"{result_file(study)} has no run of {', '.join(missing)} with seed {seed}")
    data = data_of(STUDIES[study].data, work)
    of = {loss: before[loss]["settings"] for loss in losses}
    jobs = [Job(study, loss, of[loss]["lr"], seed, of[loss]["steps"]) for loss in losses]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        repeated = run_apart(jobs, data, Path(folder))
    for run in repeated:
        ends = [_texts(one) for one in (run, before[run["loss"]])]
        if ends[0] != ends[1]:
            where = f"on {describe_run(CPU)['device']}, {report['run']['device']}"
            raise ValueError(f"{run['loss']} ended at {ends[0]}, the result file says {ends[1]} ({where})")
    now = describe_run(CPU)
    of_now = {key: now[key] for key in ("device", "torch", "commit", "dirty", "date")}
    return {**report, "repeated": {"losses": list(losses), "seed": seed, **of_now}}


def _texts(run: Mapping[str, Any]) -> dict[str, str] | None:
    """Where a run ended. As text, for NaN is no equal of NaN."""
    if run["diverged"]:
        return None
    return {key: str(np.float32(value)) for key, value in run["evaluations"][-1].items()}
