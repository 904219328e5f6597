"""The oracle against itself, and against the paper."""

import numpy as np
import pytest

import reference.dense
import reference.loop
from tests.cases import FINITE, NOT_FINITE
from tests.compare import assert_balanced, assert_near


@pytest.mark.parametrize("name", [*FINITE, "nan_negative", "nan_box_error"])
def test_dense_and_loop_agree(name: str) -> None:
    case = {**FINITE, **NOT_FINITE}[name]
    if name in NOT_FINITE:  # the loop defines no gradient there, the value it does
        dense, loop = (m.alrp_loss(*case) for m in (reference.dense, reference.loop))
        assert np.isnan(dense.classification + dense.localisation)
        assert np.isnan(loop.classification + loop.localisation)
        return
    dense, loop = (m.alrp_loss(*case) for m in (reference.dense, reference.loop))
    assert abs(loop.classification - dense.classification) <= 1e-12  # 1 - precision: digits are those of 1
    assert_near(loop.localisation, dense.localisation, 1e-12)
    assert_near(loop.rank, dense.rank, 1e-12)
    assert np.array_equal(loop.order, dense.order)
    assert_near(loop.grad_logits, dense.grad_logits, 1e-12)
    assert_near(loop.grad_box_errors, dense.grad_box_errors, 1e-12)


@pytest.mark.parametrize("name", NOT_FINITE)
def test_not_finite_is_nan(name: str) -> None:
    case = NOT_FINITE[name]
    result = reference.dense.alrp_loss(*case)
    assert np.isnan(result.classification) == (name != "nan_box_error")
    assert np.isnan(result.localisation)
    assert np.isnan(result.grad_logits[case.targets == 0]).all()
    at_rest = (case.targets == 1) & (result.grad_logits == 0)  # FP <= eps: no update, whatever the box errors
    assert np.isnan(result.grad_logits[(case.targets == 1) & ~at_rest]).all()
    assert name == "nan_box_error" or not at_rest.any()
    assert not result.grad_logits[case.targets < 0].any()


@pytest.mark.parametrize("name", FINITE)
def test_theorem_2(name: str) -> None:
    assert_balanced(reference.dense.alrp_loss(*FINITE[name]).grad_logits, 1e-12)


def test_gradient_is_the_stated_update() -> None:
    """Two positives and one negative, by hand: s = 0, 1; x = 0.5; delta = 1; E = 0.2, 0.6."""
    result = reference.dense.alrp_loss([0.0, 1.0, 0.5], [1, 1, 0], [0.2, 0.6])
    # H: to the negative 0.75 and 0.25; first to second positive 1, second to first 0.
    assert_near(result.rank, [1 + 1 + 0.75, 1 + 0 + 0.25], 1e-12)
    assert_near(result.classification, (0.75 / 2.75 + 0.25 / 1.25) / 2, 1e-12)
    assert_near(result.localisation, (0.8 / 2.75 + 0.6 / 1.25) / 2, 1e-12)
    first, second = (0.75 + 0.6) / 2.75 / 2, 0.25 / 1.25 / 2
    assert_near(result.grad_logits, [-first, -second, first + second], 1e-12)
    assert_near(result.grad_box_errors, [1 / 2.75 / 2, (1 / 2.75 + 1 / 1.25) / 2], 1e-12)
