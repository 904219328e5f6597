"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter, on the same tests."""

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from hypothesis import HealthCheck, settings

from alrp_triton import hints
from tests.support.interpreter import hasten
from tests.support.processes import ROOT as ROOT
from tests.support.processes import TORCHRUN as TORCHRUN
from tests.support.processes import run_together as run_together


def version_of(package: str) -> tuple[int, ...] | None:
    """The first two numbers of its version; None where it is not installed."""
    try:
        return tuple(map(int, version(package).split(".")[:2]))
    except PackageNotFoundError:
        return None


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = version_of("triton")
BACKENDS = ("torch", "numba", "triton_tiled", "triton_binned")


def environment_for(device_type: str) -> dict[str, str]:
    """What has to be in the environment before the first use of Triton's kernels, and of CUDA."""
    if device_type == "cpu":
        # To compile in processes of its own takes torch longer than what is compiled here.
        return {"TRITON_INTERPRET": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # cuBLAS is deterministic with it alone, and torch refuses products of matrices without.
    return {"CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")}


os.environ.update(environment_for(DEVICE))
if DEVICE == "cpu" and TRITON is not None:
    hasten()
if sys.platform == "linux":  # all processes are on this machine, whose name need not be known to any network
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def cannot_run(backend: str, device_type: str, triton: tuple[int, ...] | None = TRITON) -> str | None:
    """Why a backend does not run on tensors of a device; None: it has to. Triton's do on a CPU, in its interpreter."""
    if backend.startswith("numba") and device_type != "cpu":
        return f"backend={backend!r} needs a CPU"
    if backend.startswith("triton") and (triton is None or triton < (3, 4)):
        return f"backend={backend!r} needs {'the package triton' if triton is None else 'triton 3.4'}"
    return None


def or_skip(backend: str, device_type: str = DEVICE) -> str:
    """The backend, in a test that hands it tensors of the device; where it cannot run, the test is skipped."""
    if reason := cannot_run(backend, device_type):
        pytest.skip(reason)
    return backend


# Tests that do not say themselves how many random cases they take: tests/losses/test_fuzz.py.
settings.register_profile("some", max_examples=400)
settings.register_profile("ci", max_examples=400, derandomize=True)  # what fails in CI fails for everybody
settings.register_profile("fuzz", max_examples=20_000, print_blob=True, suppress_health_check=list(HealthCheck))
settings.load_profile("ci" if "CI" in os.environ else "some")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The trainer's tests, which start processes, come first: at the end one of two workers would wait for them."""
    items.sort(key=lambda item: item.path.parent.name != "trainer")


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


@pytest.fixture(autouse=True)
def of_this_place(request: pytest.FixtureRequest) -> None:
    """A test for a named backend, by its parameter, runs where that does."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    for name in ("backend", "kernels"):
        or_skip(parameters.get(name, "auto"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@contextmanager
def deterministic() -> Generator[None]:
    """Uninitialised memory reads as NaN, and an operation without a deterministic form is an error."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(autouse=True)
def no_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come once a process, and so in one test or another; tests/losses/test_hints.py asks for them."""
    monkeypatch.setattr(hints, "_to_look", False)
    monkeypatch.setattr(hints, "_to_watch", 0)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with deterministic():
        yield
