"""Processes that do the work: started, read, ended in time, and started again where one crashed.

A kernel that fails can leave a process without a device for good, and one that hangs can only be killed; so whatever
touches the device is done by a process that may be lost.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..run import ROOT
from .work import Record
from .worker import POISONED

MAX_CRASHES = 5
_TO_END = 10.0  # seconds that a process has to end once it has said that it is done


class Job(NamedTuple):
    """A shard of a step."""

    step: str
    shard: str

    @property
    def name(self) -> str:
        return f"{self.step} [{self.shard}]"


class Outcome(NamedTuple):
    """How a job ended."""

    status: str  # done, out of time, failed, skipped
    seconds: float
    reason: str = ""
    left_out: tuple[str, ...] = ()
    crashed: tuple[str, ...] = ()  # units in which a process was lost


Command = Callable[[Job, float, int, int], list[str]]
"""From a job, the seconds it has, how many units are done, and how many processes were lost."""


def command_of(rehearse: bool) -> Command:
    """How a worker is started."""

    def command(job: Job, seconds: float, done: int, attempt: int) -> list[str]:
        # A point in time, for to import torch takes seconds.
        options = ["--until", f"{time.time() + seconds:.1f}", "--done", str(done), "--attempt", str(attempt)]
        options += ["--parent", str(os.getpid()), *(["--rehearse"] if rehearse else [])]
        return [sys.executable, "-m", "bench.gpu.worker", job.step, job.shard, *options]

    return command


class Pool:
    """Starts processes and knows which are alive.

    Args:
        command: what is run.
        environment: of the processes.
        log: the file that takes what they print beside records.
        on_record: called with a job and a record, or an error; from several threads.
    """

    def __init__(
        self,
        command: Command,
        environment: dict[str, str],
        log: Path,
        on_record: Callable[[Job, Record], None],
    ) -> None:
        self.command, self.environment, self.on_record = command, environment, on_record
        self._log = log.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._alive: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def close(self) -> None:
        """Kill what is alive, and start nothing more."""
        with self._lock:
            self._stopped = True
            alive = list(self._alive)
        for process in alive:
            kill(process)

    def close_log(self) -> None:
        """When no job runs any more."""
        with self._lock:
            self._log.close()

    def run(self, job: Job, end: float, grace: float) -> Outcome:
        """Do a job until ``end`` on the monotonic clock, where it is killed; it is told to stop by itself before."""
        begin, done, crashed = time.monotonic(), 0, list[str]()
        while True:
            left = end - time.monotonic()
            if left - grace <= 0:
                return Outcome("out of time", time.monotonic() - begin, "not begun", ("all",), tuple(crashed))
            attempt = _Attempt(self, job, done, len(crashed), left, grace)
            outcome = attempt.run()
            if self._stopped:
                raise InterruptedError("the run is being ended")
            if outcome is not None:
                return outcome._replace(seconds=time.monotonic() - begin, crashed=tuple(crashed))
            if not attempt.expected:
                crashed.append(attempt.unit)
                self.on_record(job, {"error": attempt.unit, "text": attempt.why()})
            done = attempt.index + 1
            if len(crashed) > MAX_CRASHES or attempt.index < 0:
                return Outcome("failed", time.monotonic() - begin, attempt.why(), (), tuple(crashed))

    def start(self, job: Job, seconds: float, done: int, attempt: int) -> "subprocess.Popen[str]":
        with self._lock:
            if self._stopped:
                raise InterruptedError("the run is being ended")
            process = subprocess.Popen(
                self.command(job, seconds, done, attempt),
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            self._alive.add(process)
        return process

    def ended(self, process: "subprocess.Popen[str]") -> None:
        kill(process)  # and what it started
        with suppress(subprocess.TimeoutExpired):  # one that the driver does not let go of is left to itself
            process.wait(_TO_END)
        with self._lock:
            self._alive.discard(process)

    def log(self, job: Job, line: str) -> None:
        with self._lock:
            if not self._log.closed:  # of a process that did not let go of its stderr
                self._log.write(f"{job.name} {line.rstrip()}\n")
                self._log.flush()


class _Attempt:
    """One process of a job."""

    def __init__(self, pool: Pool, job: Job, done: int, attempt: int, seconds: float, grace: float) -> None:
        self.pool, self.job, self.done, self.attempt = pool, job, done, attempt
        self.seconds, self.grace = seconds, grace
        self.unit, self.index = "its start", done - 1
        self.expected = False
        """The process ended because the device was left with errors by a unit whose records all came."""
        self.last: deque[str] = deque(maxlen=12)
        self.killed = False
        self.code: int | None = None
        self._said_so = False

    def run(self) -> Outcome | None:
        """The job's outcome, or None: the process was lost, and another may go on behind ``index``."""
        process = self.pool.start(self.job, max(self.seconds - self.grace, 0.1), self.done, self.attempt)
        assert process.stdout is not None
        assert process.stderr is not None
        timer = threading.Timer(self.seconds, self._kill, [process])
        reader = threading.Thread(target=self._read_errors, args=[process.stderr], daemon=True)
        timer.start()
        reader.start()
        outcome: Outcome | None = None
        try:
            for line in process.stdout:
                outcome = self._take(line, outcome)
                if self._said_so:
                    break
            try:
                self.code = process.wait(_TO_END)
            except subprocess.TimeoutExpired:
                self.code = None
        finally:
            timer.cancel()
            self.pool.ended(process)
            process.stdout.close()
            reader.join(_TO_END)
        if self._said_so:
            return outcome or Outcome("done", 0.0)
        if self.killed:
            return Outcome("out of time", 0.0, f"killed in {self.unit}", (self.unit, "and all after it"))
        self.expected = self.code == POISONED
        return None

    def why(self) -> str:
        """How the process was lost."""
        code = self.code
        how = "hung at its end" if code is None else f"signal {-code}" if code < 0 else f"exit status {code}"
        return f"{how}; {' | '.join(self.last)}"[-1500:]

    def _kill(self, process: "subprocess.Popen[str]") -> None:
        self.killed = True
        kill(process)

    def _read_errors(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self.last.append(line.rstrip()[:300])
                self.pool.log(self.job, line)

    def _take(self, line: str, outcome: Outcome | None) -> Outcome | None:
        try:
            said: Any = json.loads(line)
            if not isinstance(said, dict):
                raise ValueError("no object")
        except ValueError:
            self.pool.log(self.job, f"printed what is no record: {line[:300]}")
            return outcome
        if "begin" in said:
            self.unit, self.index = str(said["begin"]), int(said["index"])
        elif "record" in said:
            self.pool.on_record(self.job, said["record"])
        elif "error" in said:
            self.pool.on_record(self.job, said)
        elif "left_out" in said:
            return Outcome("out of time", 0.0, "", tuple(said["left_out"]))
        elif "skipped" in said:
            return Outcome("skipped", 0.0, str(said["skipped"]))
        elif "end" in said:
            self._said_so = True
        return outcome


def kill(process: "subprocess.Popen[str]") -> None:
    """The process, and all of the group that it has made for itself, or is about to."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
