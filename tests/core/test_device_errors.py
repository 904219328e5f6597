"""Bad values of tensors: an error at once on a CPU, on a GPU an assertion on the device that surfaces later.

That one ends all use of the GPU by the process, so each case has a process of its own.
"""

import pytest

from tests.conftest import DEVICE
from tests.support.processes import run_together

# What is called, what a CPU says, and what stands in the assertion on a GPU.
CASES = {
    "too few box errors": (
        "alrp_loss(logits, targets, ones[:1])",
        "got 1 box_errors, but targets mark 2 positives",
        "alrp_triton: targets do not mark 1 positives",
    ),
    "a target that means nothing": (
        "alrp_loss(logits, targets * 7, ones[:0])",
        "dense targets must be 1 (positive), 0 (negative) or -1 (ignored), got [7] among 2",
        "alrp_triton: dense targets must be 1 (positive), 0 (negative) or -1 (ignored)",
    ),
    "an IoU beyond 1": (
        "rank_sort_loss(logits, targets, ones * 2)",
        "ious must be in [0, 1], got [2.0, 2.0] among 2",
        "alrp_triton: ious must be in [0, 1]",
    ),
    "another number of positives": (
        "ap_loss(logits, targets, num_positives=3)",
        "num_positives is 3, but targets mark 2 positives",
        "alrp_triton: targets do not mark 3 positives",
    ),
}
CODE = f"""
import os
import sys
import torch
from alrp_triton import alrp_loss, ap_loss, rank_sort_loss
device = {DEVICE!r}
logits, targets = torch.randn(6, device=device), torch.tensor([1, 0, 0, 0, 1, 0], device=device)
ones = torch.ones(2, device=device)
for loss in (alrp_loss(logits, targets, ones)[0], ap_loss(logits, targets, num_positives=2), rank_sort_loss(logits, targets, ones)[0]):
    assert 0 <= loss <= 1
try:
    eval(sys.argv[1])
    print("nothing is wrong", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
except Exception as error:
    print(type(error).__mro__, error, flush=True)
os._exit(0)  # there is nothing left that CUDA could tidy up
"""


@pytest.fixture(scope="module")
def said() -> dict[str, tuple[str, str]]:
    """What each case printed, and what stood on stderr."""
    done = run_together(*(["-c", CODE, call] for call, _, _ in CASES.values()))
    assert all(process.returncode == 0 for process in done), [process.stderr for process in done]
    return {name: (process.stdout, process.stderr) for name, process in zip(CASES, done, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_bad_values(said: dict[str, tuple[str, str]], name: str) -> None:
    _, at_once, on_the_device = CASES[name]
    output, errors = said[name]
    if DEVICE == "cpu":
        assert "nothing is wrong" not in output
        assert "'ValueError'" in output
        assert at_once in output
    else:
        assert "'RuntimeError'" in output  # of whatever call was the first to hear of it
        assert "device-side assert" in output
        assert on_the_device in errors
