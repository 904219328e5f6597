"""Random cases of every kind against the oracle."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alrp_triton import ComparisonMatrix, ap_loss, rank_sort_loss
from reference import comparison_matrix
from reference.dense import alrp_loss as oracle
from reference.dense import ap_loss as ap_oracle
from reference.dense import rank_sort_loss as rank_sort_oracle
from tests.conftest import DEVICE, or_skip
from tests.support.cases import make
from tests.support.compare import assert_near
from tests.support.losses import assert_matches, outcome_of_alrp, outcome_of_oracle, run_alrp

# Few distinct values make ties; many make none.
LOGITS = st.one_of(
    st.integers(-8, 8).map(lambda k: k / 4), st.floats(-20, 20, width=32), st.floats(-(2.0**100), 2.0**100, width=32)
)
DELTAS = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(2.0**-20, 50))


@settings(max_examples=200, deadline=None)
@given(
    entries=st.lists(st.tuples(LOGITS, st.sampled_from([1, 0, 0, -1]), st.floats(0, 2, width=32)), max_size=60),
    delta=DELTAS,
)
def test_loss_against_the_oracle(entries: list[tuple[float, int, float]], delta: float) -> None:
    logits = np.array([e[0] for e in entries], np.float32)
    targets = np.array([e[1] for e in entries], np.int64)
    case = make(logits, targets, delta, [e[2] for e in entries if e[1] == 1])
    expected = oracle(*case)
    # The threshold eps makes the update jump: leave out what rounding may push across it.
    near = [
        h for h in comparison_matrix(logits[targets == 1], logits[targets == 0], delta).sum(1) if 0.9e-5 < h < 1.1e-5
    ]
    if not near:
        assert_matches(outcome_of_alrp(*run_alrp(case, "torch", DEVICE)), outcome_of_oracle(expected), 2e-6)


@settings(max_examples=150, deadline=None)
@given(
    entries=st.lists(
        st.tuples(LOGITS, st.sampled_from([1, 0, 0, -1]), st.integers(0, 8).map(lambda k: k / 8)), max_size=40
    ),
    delta=DELTAS,
    interpolate=st.booleans(),
)
def test_ap_and_rank_sort_against_the_oracle(entries: list[tuple[float, int, float]], delta: float, interpolate: bool) -> None:  # fmt: skip
    logits = np.array([e[0] for e in entries], np.float32)
    targets = np.array([e[1] for e in entries], np.int64)
    ious = np.array([e[2] for e in entries if e[1] == 1], np.float32)
    x, t = torch.tensor(logits, device=DEVICE, requires_grad=True), torch.tensor(targets, device=DEVICE)
    of_ap, of_rs = ap_oracle(logits, targets, interpolate, delta), rank_sort_oracle(logits, targets, ious, delta, 1e-5)
    loss = ap_loss(x, t, interpolate=interpolate, delta=delta, backend="torch")
    assert_near(loss, of_ap.loss, 2e-6)
    assert_near(torch.autograd.grad(loss, x)[0], of_ap.grad_logits, 2e-6)
    out = rank_sort_loss(x, t, torch.tensor(ious, device=DEVICE), delta=delta, eps=1e-5, backend="torch")
    positives = logits[targets == 1]
    sums = comparison_matrix(positives, logits[targets == 0], delta).sum(1)
    lower = comparison_matrix(positives, positives, delta) * (ious[None, :] < ious[:, None])
    if not any(0.9e-5 < h < 1.1e-5 for h in (*sums, *lower.sum(1))):  # where the update jumps
        for part in ("ranking", "sorting"):
            (gradient,) = torch.autograd.grad(getattr(out, part), x, retain_graph=True)
            assert abs(float(getattr(out, part).detach()) - getattr(of_rs, part)) <= 1e-6
            assert np.abs(gradient.cpu().numpy() - getattr(of_rs, f"grad_{part}")).max(initial=0) <= 1e-6


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    p=st.integers(1, 80),
    n=st.integers(1, 600),
    delta=DELTAS,
    grid=st.sampled_from([0, 1, 8]),
)
def test_backends_agree(seed: int, p: int, n: int, delta: float, grid: int) -> None:
    or_skip("triton")
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(k, generator=generator) * 3 for k in (p, n))
    if grid:
        rows, columns = ((t * grid).round() / grid for t in (rows, columns))
    mask = torch.rand(n, generator=generator) < 0.9
    w = torch.rand(p, generator=generator)
    rows, columns, mask, w = (t.to(DEVICE) for t in (rows, columns, mask, w))
    binned, tiled = (ComparisonMatrix(rows, columns, mask=mask, delta=delta, backend=b) for b in ("torch", "triton"))
    assert_near(tiled.matvec(), binned.matvec(), 2e-6)
    assert_near(tiled.rmatvec(w), binned.rmatvec(w), 2e-6)
