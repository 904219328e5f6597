"""Processes that tests start: what hangs or spins is ended with all its children, and what is slow or loud is not."""

import os
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import HungError, run_together

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are watched in Linux's /proc")

STARTS = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]], start_new_session=sys.argv[3] == "alone")
print("child", child.pid, flush=True)
open(sys.argv[1], "w").write(str(child.pid))
"""
SLEEPS = "import time; time.sleep(10**6)"
SPINS = "while True: pass"


def is_there(pid: int) -> bool:
    """Whether a process runs, or waits; not whether its parent has yet to hear of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_output_status_and_environment() -> None:
    code = "import os, sys; print(os.environ['A'], os.environ['OMP_WAIT_POLICY']); print('ü', file=sys.stderr); sys.exit(3)"
    first, second = run_together(
        ["-c", code], ["-c", code], environment={**os.environ, "A": "b", "OMP_WAIT_POLICY": "ACTIVE"}
    )
    assert first.args[1:] == ["-c", code]
    assert (first.returncode, first.stdout, first.stderr) == (3, "b ACTIVE\n", "ü\n")
    assert (second.returncode, second.stdout, second.stderr) == (3, "b ACTIVE\n", "ü\n")


def test_one_that_waits_for_ever_is_ended() -> None:
    """With what it has said; and the other one, which waits for nothing, has ended long since."""
    with pytest.raises(HungError, match=r"2 processes did nothing for 1 s and did not end(.|\n)*before it hung\n"):
        run_together(["-c", f"print('before it hung', flush=True); {SLEEPS}"], ["-c", ""], idle=1)


def test_one_that_looks_around_now_and_then_is_ended() -> None:
    """As the agent of torchrun does for its processes."""
    with pytest.raises(HungError, match="did nothing for 3 s"):
        run_together(["-c", "import time\nwhile True: time.sleep(0.1)"], idle=3)


def test_one_that_spins_is_ended() -> None:
    with pytest.raises(HungError, match="used more than 1 s of CPU time"):
        run_together(["-c", SPINS], idle=1, cpu=1)


def test_one_that_works_for_longer_than_it_may_rest_is_not() -> None:
    """While it says more than a pipe holds, and though the process that is waited for only waits for its child."""
    work = """
import sys, time
end = time.process_time() + 2.5
while time.process_time() < end:
    sys.stdout.write("x" * 100_000)
    for _ in range(10**6):
        pass
"""
    waits = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
    (done,) = run_together(["-c", waits, work], idle=1)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 1_000_000


@pytest.mark.parametrize("session", ["alone", "together"])
@pytest.mark.parametrize("then", ["ends", "waits"])
def test_children_are_ended_too(session: str, then: str, tmp_path: Path) -> None:
    """Whether their parent has ended or not, and in a session of their own as those of torchrun are."""
    waits = STARTS + ("child.wait()" if then == "waits" else "import time; time.sleep(1)")
    command = ["-c", waits, str(tmp_path / "pid"), SLEEPS, session]
    if then == "waits":
        with pytest.raises(HungError, match=r"child \d+\n"):
            run_together(command, idle=1)
    else:
        (done,) = run_together(command)
        assert done.returncode == 0, done.stderr
    child = int((tmp_path / "pid").read_text())
    assert child > 0
    assert not is_there(child)


def test_children_count_where_their_parent_waits(tmp_path: Path) -> None:
    """One that spins in a session of its own is no rest of its parent, and its CPU time is that of all."""
    command = ["-c", STARTS + "child.wait()", str(tmp_path / "pid"), SPINS, "alone"]
    with pytest.raises(HungError, match="used more than 2 s of CPU time"):
        run_together(command, idle=1, cpu=2)
    assert not is_there(int((tmp_path / "pid").read_text()))


def test_an_interrupt_ends_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        sleep(seconds)
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            monkeypatch.setattr(time, "sleep", sleep)
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_together(["-c", STARTS + "child.wait()", str(tmp_path / "pid"), SLEEPS, "together"])
    assert not is_there(int((tmp_path / "pid").read_text()))
