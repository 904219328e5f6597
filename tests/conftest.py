"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter, on the same tests."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported, that is before their first use


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
"""Arguments of Python, before a script or ``-m`` and a module, that run it in two processes."""


def run_together(*commands: list[str], timeout: float = 200) -> list[subprocess.CompletedProcess[str]]:
    """Python with these arguments, all at once, from the repository's root."""
    processes = [
        subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    done: list[subprocess.CompletedProcess[str]] = []
    for process in processes:
        output, errors = process.communicate(timeout=timeout)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, output, errors))
    return done


# Tests that do not say themselves how many random cases they take: tests/test_fuzz.py.
settings.register_profile("some", max_examples=400)
settings.register_profile("ci", max_examples=400, derandomize=True)  # what fails in CI fails for everybody
settings.register_profile("fuzz", max_examples=20_000, print_blob=True, suppress_health_check=list(HealthCheck))
settings.load_profile("ci" if "CI" in os.environ else "some")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that they wait for threads more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=["torch", "numba_dense", "numba_binned", "triton_tiled", "triton_binned"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Uninitialised memory reads as NaN, and an operation without a deterministic form is an error."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
