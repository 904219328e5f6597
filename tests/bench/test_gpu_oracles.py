"""`python -m bench gpu`: what is right, and how long it may take to tell."""

import json
import math

import numpy as np
import torch

from bench.gpu import oracles
from bench.gpu.work import Context
from tests.support import compare, losses
from tests.support.cases import draw


def test_a_thousandth_of_a_gradient_is_missed_by_no_comparison() -> None:
    case = draw(0, 2000, 40)
    sample = oracles.Sample(case.logits.astype(np.float64), case.targets, case.box_errors)
    for loss in oracles.LOSSES:
        values = torch.tensor(oracles.ious_of(case.box_errors) if loss == oracles.RANK_SORT else case.box_errors)
        x = torch.tensor(case.logits, requires_grad=True)
        values.requires_grad_(loss == oracles.ALRP)
        right = oracles.measured(loss, x, torch.tensor(case.targets), values, 1.0, backend="torch")
        wanted = oracles.expected(loss, sample)
        assert oracles.compare(right, wanted, torch.float32).passed
        for name in (name for name in wanted if name.startswith("grad")):
            gradient = right[name]
            active = torch.as_tensor(np.flatnonzero(wanted[name]))
            broken = gradient.clone()
            broken[active[len(active) // 2]] = 0
            for change in (broken, gradient * 1.001, gradient * torch.nan, gradient[:-1]):
                assert not oracles.compare(right | {name: change}, wanted, torch.float32).passed


def test_what_is_not_0_where_0_is_wanted_differs() -> None:
    assert oracles.difference(np.array([0.0, -3e-17]), np.zeros(2)) == math.inf
    assert oracles.difference(np.zeros(2), np.zeros(2)) == 0.0
    assert oracles.difference(np.array([1e-40]), np.zeros(1)) == 0.0  # below float32's normal numbers


def test_a_verdict_can_be_written_down() -> None:
    """Tolerances of float16 are NumPy's."""
    of = oracles.Comparison("x", 0.5, np.float64(1.0))  # pyright: ignore[reportArgumentType]
    assert json.loads(json.dumps({"passed": of.passed})) == {"passed": True}


def test_float16_loses_half_of_its_smallest_number_an_entry() -> None:
    """Gradients of 1e6 negatives, each below float16's normal numbers: their sum is off, and nothing is wrong."""
    n = 1_000_000
    wanted = np.full(n, -2.7e-7)
    wanted[:50] = 2.7e-7 * (n - 50) / 50
    found = torch.as_tensor(wanted).half()
    passed = oracles.compare({"grad_logits": found}, {"grad_logits": wanted}, torch.float16)
    assert oracles.imbalance(found) > 0.04
    assert passed.passed
    found[0] *= 1.5  # a row's gradient
    assert not oracles.compare({"grad_logits": found}, {"grad_logits": wanted}, torch.float16).passed
    single = torch.as_tensor(wanted).float()
    assert oracles.below_normal(wanted, torch.float32) == 0
    single[100:120_000] = 0  # negatives that were lost
    assert not oracles.compare({"grad_logits": single}, {"grad_logits": wanted}, torch.float32).passed


def test_groups_of_the_oracle() -> None:
    """One group is no group; and of two, each is by itself."""
    case = draw(1, 400, 30)
    sample = oracles.Sample(case.logits.astype(np.float64), case.targets, case.box_errors)
    groups = np.arange(400) % 2
    for loss in oracles.LOSSES:
        alone, one = (oracles.expected(loss, sample._replace(groups=g)) for g in (None, np.zeros(400, np.int64)))
        assert all(np.allclose(one[name], alone[name], rtol=1e-12) for name in one)
        values = torch.tensor(oracles.ious_of(case.box_errors) if loss == oracles.RANK_SORT else case.box_errors)
        values.requires_grad_(loss == oracles.ALRP)
        x = torch.tensor(case.logits, requires_grad=True)
        apart = oracles.measured(loss, x, torch.tensor(case.targets), values, 1.0, groups=torch.tensor(groups))
        wanted = oracles.expected(loss, sample._replace(groups=groups))
        assert oracles.compare(apart, wanted, torch.float32).passed
        assert not oracles.compare(apart, alone, torch.float32).passed


def test_tolerances_are_those_of_the_tests() -> None:
    assert losses.SMALL_FP == oracles.SMALL_FP
    assert compare.TOLERANCE == oracles.GRADIENT
    assert oracles.least_tolerance("below_eps", "torch", torch.float32, 1.0) == 0
    assert oracles.least_tolerance("below_eps", "torch", torch.float64, 1.0) == 1e-9
    assert oracles.least_tolerance("random", "triton_tiled", torch.float64, 0.5) == 0
    assert oracles.least_tolerance("odd_step", "triton_tiled", torch.float64, 0.3) == oracles.AMONG


def test_a_context_tells_the_time_that_is_left() -> None:
    context = Context(True, 1000.0)
    assert 0 < context.left <= 1000
    assert Context(True, 0.0).left <= 0
    assert (context.some([1, 2, 3], 2), Context(False, 1.0).some([1, 2, 3], 2)) == ([1, 2], [1, 2, 3])
