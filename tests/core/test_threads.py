"""Python calls on torch's threads: all are made, on several threads, and what one raises arrives."""

import os
import threading
import time
from collections.abc import Callable, Generator
from functools import partial

import pytest
import torch

from alrp_triton.backends import threads
from tests.support.processes import run_together

PATIENCE = 600
"""Seconds after which threads that wait for each other give up; no machine is so busy."""


@pytest.fixture(params=["openmp", "threads"], autouse=True)
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    if request.param == "threads":  # as where torch has no OpenMP library
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield request.param
    torch.set_num_threads(before)


def test_all_tasks_run_and_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=PATIENCE)
    done: list[int] = []
    others: list[Callable[[], object]] = [partial(done.append, i) for i in range(20)]
    threads.run([meeting.wait, meeting.wait, *others])
    assert sorted(done) == list(range(20))


def test_number_of_threads_is_torchs() -> None:
    torch.set_num_threads(1)
    seen: set[int] = set()
    threads.run([lambda: seen.add(threading.get_ident()) for _ in range(50)])
    assert seen == {threading.get_ident()}


def test_what_a_task_raises_is_raised() -> None:
    done: list[int] = []

    def fail() -> None:
        raise ZeroDivisionError("seen")

    with pytest.raises(ZeroDivisionError, match="seen"):
        threads.run([fail, lambda: done.append(1)])
    assert done == [1]


# In a process of its own: coverage, too, runs in the calls, and its locks do not stand interrupts.
INTERRUPTS = """
import signal
from functools import partial
from alrp_triton.backends import threads

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
raised = 0
for attempt in range(300):
    done = [False] * 400
    tasks = [partial(done.__setitem__, i, True) for i in range(len(done))]
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + attempt % 50 * 5e-6)
        threads.run(tasks)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert all(done)
    except KeyboardInterrupt:
        raised += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
print(raised)
"""


def test_an_interrupt_is_raised_wherever_it_comes(team: str) -> None:
    """Of a signal's handler: at no point of the call is it dropped, or a task lost without an error."""
    if team == "threads":
        pytest.skip("interrupts in Python's own pool are Python's business")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
    (done,) = run_together(["-c", INTERRUPTS], environment=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_many_callers_at_once() -> None:
    done: list[int] = []

    def caller(i: int) -> None:
        threads.run([lambda: time.sleep(0.001), lambda: done.append(i)])

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(PATIENCE)
    assert sorted(done) == list(range(8))
