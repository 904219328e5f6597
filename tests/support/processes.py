"""Processes that tests start, ended where they hang: told by the CPU time that they use, and not by the clock.

On a busy machine everything takes as much longer as there are others, so that no limit on the clock is right. What
waits for a core is not idle, though, and what waits for something that never comes is.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
"""Arguments of Python, before a script or ``-m`` and a module, that run it in two processes."""

IDLE = 120.0
"""Seconds without work after which processes hang. Those do not count in which one of them waits for a core or a disk."""
CPU = 3600.0
"""Seconds of CPU time, of all together, after which processes spin. The largest test takes less than a tenth."""
_SHARE = 0.01  # of a core, which is no work: what waits may look around now and then
_LOOK = 0.5  # seconds between two looks at /proc
_SHOWN = 4000  # characters of what a process that hung has said


Processes = list[subprocess.CompletedProcess[str]]


class HungError(AssertionError):
    """Processes that were ended because they would not have."""


class _Stat(NamedTuple):
    """What /proc/PID/stat says of a process."""

    pid: int
    began: int
    """A number is used again for another process, which began at another time."""
    state: str
    parent: int
    session: int
    seconds: float
    """CPU time, with that of the children that have ended and were waited for."""


def _stat(pid: str) -> _Stat:
    fields = Path("/proc", pid, "stat").read_text(errors="replace").rpartition(")")[2].split()
    seconds = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return _Stat(int(pid), int(fields[19]), fields[0], int(fields[1]), int(fields[3]), seconds)


def _everybody() -> list[_Stat]:
    found = list[_Stat]()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                found.append(_stat(name))
    return found


class _Family:
    """Processes, their descendants, and all who are in a session that one of them leads."""

    def __init__(self) -> None:
        self.members = list[_Stat]()
        self.sessions = set[int]()
        self.used = 0.0
        """CPU time in seconds, as seen at the last look."""

    def add(self, pid: int) -> None:
        """A child of this process, not waited for yet, which leads a session."""
        self.members.append(_stat(str(pid)))
        self.sessions.add(pid)

    def look(self) -> None:
        """Who is there now."""
        before, known = sum(one.seconds for one in self.members), {one[:2] for one in self.members}
        everybody = _everybody()
        pids = {one.pid for one in everybody if one[:2] in known or one.session in self.sessions}
        size = 0
        while size != len(pids):  # a child may be listed before its parent
            size = len(pids)
            pids |= {one.pid for one in everybody if one.parent in pids}
        self.members = [one for one in everybody if one.pid in pids]
        self.sessions = {one.session for one in self.members if one.session in self.sessions | pids}
        # One that has ended hands its time on to who waited for it; else it is gone.
        self.used += max(sum(one.seconds for one in self.members) - before, 0.0)

    def wait_for_the_machine(self) -> bool:
        """Whether one of them could go on, but for others: it is runnable, or waits for a disk."""
        return any(one.state in "RD" for one in self.members)

    def kill(self) -> None:
        """All of them, and what they start meanwhile."""
        self.look()
        while living := [one for one in self.members if one.state not in "ZX"]:
            for one in living:
                with suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)
            time.sleep(0.01)
            self.look()


def _wait(processes: list[subprocess.Popen[bytes]], family: _Family, idle: float, cpu: float) -> str:
    """Until all have ended; "", or why they are not waited for any longer."""
    looked, at_rest, marked = time.monotonic(), 0.0, 0.0
    while any(process.poll() is None for process in processes):
        time.sleep(0.02)
        elapsed = time.monotonic() - looked
        if elapsed < _LOOK:
            continue
        looked += elapsed
        family.look()
        if family.used > cpu:
            return f"used more than {cpu:.0f} s of CPU time and did not end"
        if family.used - marked >= _SHARE * idle:
            marked, at_rest = family.used, 0.0
        elif not family.wait_for_the_machine():
            at_rest += min(elapsed, 4 * _LOOK)  # of a time in which nobody looked nothing is known
        if at_rest > idle:
            return f"did nothing for {idle:.0f} s and did not end"
    return ""


def _start(
    command: list[str], variables: Mapping[str, str], stdout: IO[bytes], stderr: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def run_together(
    *commands: list[str], environment: Mapping[str, str] | None = None, idle: float = IDLE, cpu: float = CPU
) -> Processes:
    """Python with these arguments, all at once, from the repository's root.

    What they start and leave behind is ended. Where there is no Linux ``/proc``, they are waited for without limit.

    Args:
        commands: arguments of Python.
        environment: of all of them; None: that of the tests. Threads wait without spinning unless it says otherwise.
        idle: see :data:`IDLE`.
        cpu: see :data:`CPU`.

    Raises:
        HungError: they hung or spun; with what they have said.
    """
    variables = {"OMP_WAIT_POLICY": "PASSIVE", **(os.environ if environment is None else environment)}
    watched = sys.platform == "linux"
    with ExitStack() as files:
        # Into files: a pipe that nobody reads is full at some time, and one that a grandchild holds does not end.
        outputs = [[files.enter_context(tempfile.TemporaryFile()) for _ in range(2)] for _ in commands]
        processes, family, reason = list[subprocess.Popen[bytes]](), _Family(), ""
        try:
            for command, (stdout, stderr) in zip(commands, outputs, strict=True):
                processes.append(_start(command, variables, stdout, stderr))
                if watched:
                    family.add(processes[-1].pid)
            if watched:
                reason = _wait(processes, family, idle, cpu)
            else:
                for process in processes:
                    process.wait()
        finally:
            if watched:
                family.kill()
            for process in processes:
                process.kill()
                process.wait()
        said = [[_read(file) for file in of_one] for of_one in outputs]
    if reason:
        texts = [text[-_SHOWN:] for of_one in said for text in of_one if text]
        raise HungError("\n".join([f"{len(processes)} processes {reason}: {list(commands)}", *texts]))
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *of_one)
        for process, of_one in zip(processes, said, strict=True)
    ]


LONG = 1800.0
"""Seconds that gloo gives a group if nobody says otherwise. What hangs is told from what is slow without it."""


def run_ranks(jobs: list[str], world: int, store: Path, timeout: float = LONG) -> Processes:
    """Run jobs of tests/support/ranks.py on so many processes, and wait for them."""
    # torch 2.13 warns of deprecation where it compiles any autograd function.
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning"]
    command = [*warnings, "-m", "tests.support.ranks", str(world), str(store), str(timeout), *jobs]
    (done,) = run_together(command)
    assert done.returncode == 0, done.stderr
    said = [[Path(f"{store}.{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(world)]
    return [
        subprocess.CompletedProcess(command, status, *of_one)
        for status, of_one in zip(json.loads(done.stdout), said, strict=True)
    ]


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
