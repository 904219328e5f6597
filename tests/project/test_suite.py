"""What the tests run on: the choice of backends and settings for a CPU and for a GPU, which need not be there."""

import os
from typing import get_args

import pytest
import torch

from alrp_triton import dispatch
from alrp_triton.dispatch import Backend, check_backend
from tests.conftest import BACKENDS, DEVICE, cannot_run, deterministic, environment_for, or_skip
from tests.losses import test_ap_and_rank_sort as test_family
from tests.losses import test_fuzz

NAMES = set(get_args(Backend))


def test_all_backends_are_tested() -> None:
    assert set(BACKENDS) == set(dispatch._PRODUCTS)  # pyright: ignore[reportPrivateUsage]
    assert set(test_family.BACKENDS) < NAMES


@pytest.mark.parametrize("triton", [(3, 10), (3, 6), (3, 4), (3, 3), None])
def test_what_is_skipped(triton: tuple[int, int] | None) -> None:
    """numba's backends on a GPU, and Triton's where it is old or missing; nothing else."""
    skipped = {device: {name for name in NAMES if cannot_run(name, device, triton)} for device in ("cpu", "cuda")}
    of_triton = set() if triton and triton >= (3, 4) else {"triton", "triton_tiled", "triton_binned"}
    assert skipped == {"cpu": of_triton, "cuda": of_triton | {"numba"}}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_skip_says_what_the_package_says(name: str) -> None:
    """For a test that is skipped the package has an error, for that reason; and for no other."""
    seen: str | None = None
    try:
        check_backend(name, torch.device("cuda"))
    except ValueError as error:
        seen = str(error)
    reason = cannot_run(name, "cuda")
    assert seen is None if reason is None else str(seen).startswith(reason), seen
    if DEVICE == "cpu" and not cannot_run(name, "cpu"):  # Triton's kernels run there in its interpreter alone
        check_backend(name, torch.device("cpu"))


def test_a_skip_is_one() -> None:
    with pytest.raises(pytest.skip.Exception, match="backend='numba' needs a CPU"):
        or_skip("numba", "cuda")
    assert or_skip("numba", "cpu") == "numba"
    assert or_skip("torch", "cuda") == "torch"


def test_what_random_cases_run_on() -> None:
    """Triton's kernels where they are compiled, for its interpreter is slow."""
    assert test_fuzz.backends("cpu") == ["torch", "numba"]
    compiled = [name for name in ("triton_tiled", "triton_binned") if not cannot_run(name, "cuda")]
    assert test_fuzz.backends("cuda") == ["torch", *compiled]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment_for(DEVICE).items() <= os.environ.items()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert environment_for("cpu") == {"TRITON_INTERPRET": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    assert environment_for("cuda") == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the other one that is deterministic
    assert environment_for("cuda") == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}


@pytest.mark.parametrize(("enabled", "warn_only"), [(False, False), (True, False), (True, True)])
def test_determinism_is_put_back(enabled: bool, warn_only: bool) -> None:
    def now() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    def fail() -> None:
        with deterministic():
            assert torch.empty(5).isnan().all()
            raise ZeroDivisionError

    assert now() == (True, False)  # in every test
    with deterministic():  # which puts back what this test changes
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        with deterministic():
            assert now() == (True, False)
        assert now() == (enabled, warn_only)
        with pytest.raises(ZeroDivisionError):
            fail()
        assert now() == (enabled, warn_only)
