"""The oracle against itself, and against the paper."""

import numpy as np
import pytest

import reference.dense
import reference.loop
from tests.support.cases import FINITE, NOT_FINITE
from tests.support.compare import assert_balanced, assert_near


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
    assert np.isnan(result.classification) == ("box_error" not in name)
    assert np.isnan(result.localisation)
    assert np.isnan(result.grad_logits[case.targets == 0]).all()
    at_rest = (case.targets == 1) & (result.grad_logits == 0)  # FP <= eps: no update, whatever the box errors
    assert np.isnan(result.grad_logits[(case.targets == 1) & ~at_rest]).all()
    assert "box_error" in name or not at_rest.any()
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


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("interpolate", [True, False])
def test_ap_dense_and_loop_agree(name: str, interpolate: bool) -> None:
    case = FINITE[name]
    dense, loop = (
        m.ap_loss(case.logits, case.targets, interpolate, case.delta) for m in (reference.dense, reference.loop)
    )
    assert abs(loop.loss - dense.loss) <= 1e-12
    assert np.abs(loop.grad_logits - dense.grad_logits).max(initial=0) <= 1e-12  # 1 - precision: digits are those of 1
    if interpolate is False:
        assert_near(dense.loss, reference.dense.alrp_loss(*case[:3], case.delta).classification, 1e-9)


@pytest.mark.parametrize("name", FINITE)
def test_rank_sort_dense_and_loop_agree(name: str) -> None:
    case = FINITE[name]
    ious = np.round(1 - case.box_errors / 2, 1)  # with ties
    dense, loop = (
        m.rank_sort_loss(case.logits, case.targets, ious, case.delta) for m in (reference.dense, reference.loop)
    )
    for what in ("ranking", "sorting", "grad_ranking", "grad_sorting"):
        assert np.abs(getattr(loop, what) - getattr(dense, what)).max(initial=0) <= 1e-12, what
    assert_balanced(dense.grad_ranking, 1e-12)
    assert np.abs(dense.grad_sorting.sum()) <= 1e-12


def test_rank_sort_by_hand() -> None:
    """Two positives and a negative: s = 0, 1, 0.25; t = 0.9, 0.5; delta = 0.5. The second is missorted."""
    result = reference.dense.rank_sort_loss([0.0, 1.0, 0.25], [1, 1, 0], [0.9, 0.5])
    # H: first to negative 0.75, second to negative 0; first to second positive 1; itself 0.5.
    first = (0.5 * 0.1 + 1.0 * 0.5) / 1.5 - 0.1  # now, less what it would be with only itself above
    assert_near(result.ranking, 0.75 / (1.5 + 0.75) / 2, 1e-12)
    assert_near(result.sorting, first / 2, 1e-12)
    assert_near(result.grad_ranking, [-1 / 6, 0, 1 / 6], 1e-12)
    assert_near(result.grad_sorting, [-first / 2, first / 2, 0], 1e-12)


def test_interpolation_by_hand() -> None:
    """Hard step: positives at 0 (three negatives above: 2/5) and 2 (one above: 1/2); the first precision is the lower."""
    result = reference.dense.ap_loss([0.0, 2.0, 1.0, 1.0, 3.0], [1, 1, 0, 0, 0], True, 0.0)
    assert_near(result.loss, 1 - (2 / 5 + 1 / 2) / 2, 1e-12)
    # And positives at 0 (one negative above: 2/3) and 2 (that one above, too: 1/2, raised to 2/3).
    result = reference.dense.ap_loss([0.0, 2.0, 3.0], [1, 1, 0], True, 0.0)
    assert_near(result.loss, 1 / 3, 1e-12)
    assert_near(result.grad_logits, [-1 / 6, -1 / 6, 1 / 3], 1e-12)
