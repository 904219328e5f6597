"""Every loss of the family against the oracle on every named case and backend, and what must hold for each."""

import numpy as np
import pytest
import torch

from alrp_triton.dispatch import Backend
from tests.conftest import BACKENDS
from tests.support.cases import FINITE, NOT_FINITE, Case, draw
from tests.support.compare import TOLERANCE, as_numpy, assert_balanced, assert_gradient, assert_near
from tests.support.losses import LOSSES, Outcome, assert_matches, tolerance_of

CASES = {**FINITE, **NOT_FINITE}
# What is of size N is the operator's, which has tests of its own for all backends: once it is looked at here, too.
of_all_losses = pytest.mark.parametrize(
    ("loss", "backend"),
    [(loss, backend) for loss in LOSSES for backend in (BACKENDS if loss == "alrp" else ("torch", "numba", "triton"))],
)


@of_all_losses
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(loss: str, name: str, backend: Backend, device: str) -> None:
    run, oracle = LOSSES[loss]
    found = run(CASES[name], backend, device, torch.float32)
    assert_matches(found, oracle(CASES[name]), tolerance_of(name, backend))


@of_all_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "name", ["random", "hard_ties", "initialisation", "no_positives", "infinite_negatives", "nan_negative"]
)
def test_dtypes(loss: str, name: str, dtype: torch.dtype, backend: Backend, device: str) -> None:
    run, oracle = LOSSES[loss]
    case = CASES[name]._replace(logits=torch.tensor(CASES[name].logits).to(dtype).float().numpy())
    found = run(case, backend, device, dtype)
    assert {value.dtype for value in found.losses.values()} == {torch.promote_types(dtype, torch.float32)}
    assert {gradient.dtype for gradient in found.gradients.values()} == {dtype}
    if loss == "alrp":
        assert found.others["rank"].dtype == torch.promote_types(dtype, torch.float32)
        assert found.others["gradient of box errors"].dtype == torch.float32  # as they are
    assert_matches(found, oracle(case), 1e-6, of_gradient=TOLERANCE[dtype])


def _close(found: Outcome, wanted: Outcome, what: str) -> None:
    for name, gradient in wanted.gradients.items():
        assert_near(found.gradients[name], gradient, 1e-6, f"{what}, {name}")


@of_all_losses
@pytest.mark.parametrize("name", ["random", "ties", "hard_ties", "wide_scores", "more_than_a_block"])
def test_invariants(loss: str, name: str, backend: Backend, device: str) -> None:
    case = FINITE[name]

    def run(case: Case) -> Outcome:
        return LOSSES[loss].run(case, backend, device, torch.float32)

    found = run(case)
    assert all(0 <= value <= 1 for key, value in found.losses.items() if key != "localisation")
    if loss == "alrp":
        assert (found.others["rank"] >= 1).all()
        assert (found.others["gradient of box errors"] >= 0).all()
    negative, positive = (torch.tensor(case.targets == target, device=device) for target in (0, 1))
    for key, gradient in found.gradients.items():
        assert_balanced(gradient, 1e-6)
        assert not gradient[~negative & ~positive].any()
        if key == "sorting":  # among positives alone
            assert not gradient[negative].any()
        else:
            assert (gradient[positive] <= 0).all()
            assert (gradient[negative] >= 0).all()

    exact = case._replace(logits=np.round(case.logits * 64) / 64)  # so that a shift by 32 rounds nothing
    _close(run(exact._replace(logits=exact.logits + 32)), run(exact), "shift")

    if loss == "rank_sort" and case.num_positives % 2 == 0:
        return  # which IoUs are rounded changes with the order
    logits, targets, errors = (a[::-1].copy() for a in case[:3])
    turned = run(case._replace(logits=logits, targets=targets, box_errors=errors))
    flipped = {key: gradient.flip(0) for key, gradient in turned.gradients.items()}
    _close(turned._replace(gradients=flipped), found, "permutation")


@pytest.mark.parametrize("loss", LOSSES)
def test_mutations_are_caught(loss: str) -> None:
    """The comparer fails on no gradient, and on one that lost a thousandth of its negatives or an entry of sorting."""
    case = draw(0, 20_000, 101)
    found = LOSSES[loss].run(case, "auto", "cpu", torch.float32)
    for name, expected in LOSSES[loss].oracle(case).gradients.items():
        good = found.gradients[name]
        assert_gradient(good, expected, 1e-6)
        with pytest.raises(AssertionError, match="off by"):
            assert_gradient(torch.zeros_like(good), expected, 1e-6)
        among = case.targets == (1 if name == "sorting" else 0)
        active = np.flatnonzero(among & (np.abs(expected) > np.abs(expected).max() / 100))
        dropped = good.clone()
        dropped[torch.tensor(active[:: min(len(active), 1000)])] = 0
        with pytest.raises(AssertionError):
            assert_gradient(dropped, expected, 1e-6)
        with pytest.raises(AssertionError, match="sum to"):
            assert_balanced(dropped, 1e-6)


def test_what_is_close_may_be_out_of_balance() -> None:
    """A loose elementwise tolerance passes what the balance sees."""
    case = draw(0, 20_000, 100)
    expected = LOSSES["alrp"].oracle(case).gradients["classification"]
    good = LOSSES["alrp"].run(case, "auto", "cpu", torch.float32).gradients["classification"]
    active = np.flatnonzero((case.targets == 0) & (expected > expected.max() / 100))
    smallest = active[np.argsort(expected[active])[: len(active) // 1000]]
    dropped = good.clone()
    dropped[torch.tensor(smallest)] = 0
    assert_near(dropped, expected, 2e-2)
    with pytest.raises(AssertionError, match="sum to"):
        assert_balanced(dropped, 1e-6)


def test_the_comparer_sees_nan_and_shape() -> None:
    with pytest.raises(AssertionError, match="NaN at"):
        assert_near([1.0, float("nan")], [1.0, 2.0], 1e-6)
    with pytest.raises(AssertionError, match="shape"):
        assert_near([1.0], [[1.0]], 1e-6)
    assert as_numpy(torch.tensor([1.5], dtype=torch.bfloat16)).dtype == np.float64
