"""Hostile input of every kind against the oracle: a few cases in CI, any number by ``make fuzz``.

A case draws the loss, the backend, dtypes, shape and strides, delta, logits from several ranges of magnitude with ties,
NaN and infinities where they hurt, the form of targets and its dtype, masks, and groups.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from alrp_triton.dispatch import Backend
from reference import comparison_matrix
from tests.conftest import BACKENDS, DEVICE, cannot_run
from tests.losses.test_groups import LOSSES, Batch, Result, of_oracle, one_by_one, run
from tests.support.compare import as_numpy

SPECIAL = (0.0, -0.0, np.nan, np.inf, -np.inf, 1e-30, -1e-30, 1e30, -1e30)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Fuzz(NamedTuple):
    loss: str
    backend: Backend
    dtype: str
    delta: float
    batch: Batch
    as_seen: NDArray[np.float64]
    """The logits after rounding to their dtype, in float64."""
    how: tuple[Any, ...]
    """For the report."""


def backends(device_type: str) -> list[str]:
    """What runs there; on a CPU without Triton's, for the interpreter takes a third of a second a case."""
    return [b for b in BACKENDS if not cannot_run(b, device_type) and (device_type == "cuda" or "triton" not in b)]


@st.composite
def cases(draw: Any) -> Fuzz:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(7,), (1, 1, 1), (2, 5), (3, 11, 4), (2, 3, 4, 5), (300,), (4, 0), (40, 9)]))
    loss, backend = draw(st.sampled_from(LOSSES)), draw(st.sampled_from(backends(DEVICE)))
    dtype = draw(st.sampled_from(list(DTYPES)))
    magnitude = draw(st.sampled_from([1.0, 1.0, 1.0, 100.0, 1e-30, 1e30, "mixed"]))
    logits = rng.normal(size=shape)
    logits = logits * (10.0 ** rng.integers(-30, 31, shape) if magnitude == "mixed" else magnitude)
    ties = draw(st.sampled_from([0, 0, 2, 16]))
    if ties:  # few values
        scale = 1.0 if magnitude == "mixed" else magnitude
        logits = np.round(logits / scale * ties) / ties * scale
    if draw(st.integers(0, 3)) == 0 and logits.size:  # hurt some
        where = rng.integers(0, logits.size, draw(st.integers(1, 4)))
        logits.reshape(-1)[where] = rng.choice(SPECIAL, len(where))
    with np.errstate(over="ignore"):
        seen = torch.tensor(logits).to(DTYPES[dtype])
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    ignored = draw(st.sampled_from([0.0, 0.2, 0.9]))
    targets = np.where(rng.random(shape) < ignored, -1, (rng.random(shape) < share).astype(int))
    values = rng.uniform(0, 1, int((targets == 1).sum())).astype(np.float32)
    if draw(st.booleans()):
        values = np.round(values * 4) / 4
    if loss == "alrp" and len(values) and draw(st.integers(0, 7)) == 0:
        values[rng.integers(0, len(values))] = rng.choice([np.nan, np.inf, 1e6])
    dims = draw(st.integers(-1, len(shape)))
    groups = np.zeros((), np.int64) if dims < 0 else rng.integers(-2, 3, shape[:dims])
    delta = draw(st.sampled_from([1.0, 0.5, 0.3, 0.0, 1e-3, 1e-30, 1e30, 8.0]))
    batch = Batch(seen, targets, values, groups)  # pyright: ignore[reportArgumentType]
    how = shape, magnitude, ties, share, ignored, dims
    return Fuzz(loss, backend, dtype, delta, batch, seen.double().numpy(), how)


def near_a_jump(case: Fuzz) -> bool:
    """Whether the update of some positive jumps within rounding: FP at eps, or precision at 1."""
    logits, targets = case.as_seen.reshape(-1), case.batch.targets.reshape(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        sums = comparison_matrix(logits[targets == 1], logits[targets != -1], case.delta)
        h = sums * (targets[targets != -1] == 0)
    fp = h.sum(1)
    return bool(((fp > 0) & (fp < 1.1e-5)).any())


def compare(actual: Result, expected: Result, case: Fuzz) -> None:
    digits = {"float32": 2e-6, "float64": 2e-6, "bfloat16": 2**-7, "float16": 2**-10}[case.dtype]
    smallest = {"float16": 2.0**-24}.get(case.dtype, 1e-37)  # below it a gradient underflows
    for mine, theirs in zip(actual.losses, expected.losses, strict=True):
        a, e = as_numpy(mine), as_numpy(theirs)
        assert np.isnan(a) == np.isnan(e), (a, e)
        assert np.isnan(a) or a == e or abs(a - e) <= 2e-6 * max(abs(e), 1e-6), (a, e)
    for k, (mine, theirs) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        of_errors = case.loss == "alrp" and k == 1
        # Half precision may overflow.
        a, e = (
            as_numpy(mine),
            as_numpy(torch.tensor(as_numpy(theirs)).to(torch.float32 if of_errors else DTYPES[case.dtype])),
        )
        assert np.array_equal(np.isnan(a), np.isnan(e)), np.flatnonzero(np.isnan(a) != np.isnan(e))
        finite = np.isfinite(e)
        assert np.array_equal(a[~finite], e[~finite], equal_nan=True)
        largest = np.abs(e[finite]).max(initial=0)
        assert np.abs(a[finite] - e[finite]).max(initial=0) <= (2e-6 if of_errors else digits) * largest + smallest


@settings(deadline=None)
@given(case=cases())
def test_against_the_oracle(case: Fuzz) -> None:
    exact = case.batch._replace(logits=case.as_seen)  # pyright: ignore[reportArgumentType]
    with np.errstate(all="ignore"):
        expected = one_by_one(case.loss, exact, case.delta)
    if near_a_jump(case):
        event("left out: the update of a positive jumps within rounding")
        return
    event(f"{case.loss}, {case.backend}")
    compare(run(case.loss, case.batch, case.delta, DEVICE, case.backend), expected, case)


def test_the_oracle_is_asked() -> None:
    """A loss that is off by a part in a hundred thousand is seen."""
    rng = np.random.default_rng(0)
    batch = Batch(rng.normal(size=(2, 9)).astype(np.float32), rng.integers(-1, 2, (2, 9)), np.zeros(0, np.float32), np.arange(2))  # fmt: skip
    batch = batch._replace(values=rng.uniform(size=int((batch.targets == 1).sum())).astype(np.float32))
    case = Fuzz("alrp", "torch", "float32", 1.0, batch, batch.logits.astype(float), ())
    good = one_by_one("alrp", batch, 1.0)
    compare(good, good, case)
    for off in (good._replace(losses=(good.losses[0] * 1.00001, good.losses[1])), good._replace(gradients=(good.gradients[0] * 1.00001, good.gradients[1]))):  # fmt: skip
        with pytest.raises(AssertionError):
            compare(off, good, case)
    assert of_oracle("alrp", batch.logits, batch.targets, batch.values, 1.0).losses != good.losses
