"""The benchmark: its baselines are what they say, its gate lets nothing wrong through, its figures are computed right."""

import json
from functools import partial

import pytest
import torch

from bench.machine_code import model
from bench.speed import baselines, gate, timing
from bench.speed.contenders import ALRP, AP, BUCKETED, DENSE, FLOOR, FOCAL, LOOP, RANK_SORT, SEARCH, Step, contenders
from bench.speed.problems import CASES, SCORES, WORST, Problem, Size, make_problem, sizes
from reference import dense
from tests.support.processes import run_together

CPU = torch.device("cpu")


def small(scores: str = "random normal", delta: float = 1.0) -> tuple[Size, Problem]:
    size = Size("test", 5000, 40, delta, scores)
    return size, make_problem(size, CPU, seed=0)


@pytest.mark.parametrize("scores", [*SCORES, *WORST])
def test_problems_are_what_they_say(scores: str) -> None:
    size, problem = small(scores)
    assert (problem.targets == 1).sum() == size.positives == problem.box_errors.numel()
    assert problem.logits.shape == problem.targets.shape == (size.anchors,)
    twin = make_problem(size, CPU, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(problem[:3], twin[:3], strict=True))


@pytest.mark.parametrize(
    ("how", "delta"), [("loop", 1.0), ("dense", 1.0), ("loop", 0.0), ("dense", 0.0), ("bucketed", 0.0)]
)
def test_baselines_are_exact(how: str, delta: float) -> None:
    _, problem = small(delta=delta)
    x, targets, errors = problem[:3]
    loss = baselines.alrp_loss(x, targets, errors, how=how, delta=delta, eps=1e-5)
    gradients = torch.autograd.grad(loss[0] + loss[1], (x, errors))
    oracle = dense.alrp_loss(*(tensor.detach().numpy() for tensor in problem[:3]), delta=delta, eps=1e-5)
    assert float(loss[0].detach()) == pytest.approx(oracle.classification, rel=1e-6)
    assert float(loss[1].detach()) == pytest.approx(oracle.localisation, rel=1e-6)
    for gradient, expected in zip(gradients, (oracle.grad_logits, oracle.grad_box_errors), strict=True):
        assert (gradient - torch.tensor(expected)).abs().max() <= 1e-6 * abs(expected).max()


def test_buckets_are_an_approximation_where_the_step_is_soft() -> None:
    _, problem = small()
    x, targets, errors = problem[:3]
    loss = baselines.alrp_loss(x, targets, errors, how="bucketed", delta=1.0, eps=1e-5)
    (gradient,) = torch.autograd.grad(loss[0], x)
    oracle = dense.alrp_loss(*(tensor.detach().numpy() for tensor in problem[:3]), delta=1.0, eps=1e-5)
    difference = (gradient - torch.tensor(oracle.grad_logits)).abs().max() / abs(oracle.grad_logits).max()
    assert 1e-4 < difference < 0.5


def test_gate_catches_a_lost_negative_and_a_nan() -> None:
    size, problem = small()
    right = contenders(size, problem)["torch"]()
    assert isinstance(right, Step)
    check = partial(gate._check, problem, "x")  # pyright: ignore[reportPrivateUsage]
    assert check(right, "itself", right).passed
    gradient = right.grad_logits
    for change in (gradient * 1.001, gradient * (torch.arange(len(gradient)) % 1000 != 7), gradient * torch.nan):
        assert not check(right._replace(grad_logits=change), "right", right).passed
    unbalanced = Step(*right[:2], torch.where(gradient > gradient.median(), 0, gradient), right.grad_box_errors)
    assert not check(unbalanced, "itself", unbalanced).passed


def test_gate_sees_nan_in_an_approximation() -> None:
    check = partial(gate.Check, 1, 1, 1.0, BUCKETED, "oracle", "grad_logits")
    assert check(0.2, 0.0).passed
    assert not check(float("nan"), 0.0).passed


def test_contenders_follow_the_stated_rule() -> None:
    def names(size: Size) -> set[str]:
        empty = torch.zeros(4)
        return set(contenders(size, Problem(empty, empty.long(), empty, 1.0)))

    assert {LOOP, DENSE, BUCKETED, FLOOR} <= names(Size("x", 10_000, 50))
    assert LOOP in names(Size("x", 3_000_000, 1000))
    assert DENSE not in names(Size("x", 3_000_000, 1000))
    assert LOOP not in names(Size("x", 3_000_001, 1000))
    assert names(Size("family", 10, 5)) >= {ALRP, AP, RANK_SORT, FLOOR}
    assert names(Size("worst cases", 10, 5)) >= {"torch", "numba", SEARCH}
    assert {size.case for size in sizes(quick=False)} >= set(CASES)


def test_sweep_times_everything_and_keeps_ratios() -> None:
    rows = timing.sweep([Size("anchors", 3000, 20)], repeats=3, seed=0)
    by_name = {row.contender: row for row in rows}
    assert {"torch", "numba", LOOP, DENSE, BUCKETED, FLOOR} <= set(by_name)
    for row in rows:
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.anchors_per_s == pytest.approx(3e6 / row.p50_ms)
    assert by_name["torch"].ratios[LOOP] == pytest.approx(by_name[LOOP].p50_ms / by_name["torch"].p50_ms)
    assert FOCAL not in by_name or by_name["torch"].ratios[FOCAL] > 0


def test_exponents_of_growth() -> None:
    rows = [
        timing.Row("anchors", n, 10, 1.0, "", "", name, 3, 1, 1, n**power, 1, 1, None, {})
        for n in (100, 1000, 10_000, 100_000)
        for name, power in (("linear", 1.0), ("root", 0.5))
    ]
    found = timing.exponents(rows, "anchors", "anchors", least=1000)
    assert found == {"linear": pytest.approx(1.0), "root": pytest.approx(0.5)}
    assert timing.exponents(rows, "positives", "positives", least=1) == {}


def test_peak_memory_is_that_of_the_process() -> None:
    _, problem = small()

    def take() -> None:
        torch.ones(20 * 2**20)

    for _ in range(2):
        peak = timing.peak_memory(take, problem)
        assert peak is None or peak == pytest.approx(80, abs=8)


PEAKS = """
import json, torch
from bench.speed import timing
from bench.speed.contenders import contenders
from bench.speed.problems import Size, make_problem
size = Size("test", 8_000_000, 300)
problem = make_problem(size, torch.device("cpu"), seed=0)
found = {}
for backend in ("torch", "numba"):
    step = contenders(size, problem)[backend]
    step()
    found[backend] = [timing.peak_memory(step, problem) for _ in range(3)]
print(json.dumps(found))
"""


def test_peak_memory_of_a_step_is_gradient_and_mask() -> None:
    """5 bytes a logit, and some MiB whatever N: the chunk at hand, tables. Other threads' pages come on top, at times.

    In a process of its own: what another test has left in the allocator changes what is given back.
    """
    (done,) = run_together(["-c", PEAKS])
    assert done.returncode == 0, done.stderr
    for backend, peaks in json.loads(done.stdout).items():
        assert None in peaks or min(peaks) <= 5 * 8_000_000 / 2**20 + 12, (backend, peaks)


def test_model_is_the_busiest_pipe() -> None:
    gpu = model.GPU("x", "sm_90", 10, 1e9, bytes_per_s=1e9, fp32=128, fp64=64)
    cycle = 1 / (10 * 1e9)
    assert model.seconds(gpu, {"fp32": 2.0}, 1e6, 0, 1.0) == pytest.approx(1e6 * cycle * 2 / 128)
    assert model.seconds(gpu, {"fp32": 2.0}, 1e6, 0, 0.5) == pytest.approx(1e6 * cycle * 2 / 64)
    assert model.seconds(gpu, {"fp32": 2.0, "integer": 64.0}, 1e6, 0, 1.0) == pytest.approx(1e6 * cycle)
    assert model.seconds(gpu, {"fp32": 2.0}, 1e6, moved=5e8, reached=0.5) == pytest.approx(0.5)
