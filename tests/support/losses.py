"""Each loss of the family as the tests see it: what a named case gives, and what the oracle says of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alrp_triton import ALRPLossOutput, alrp_loss, ap_loss, rank_sort_loss
from alrp_triton.dispatch import Backend
from reference import dense
from tests.support.cases import Case
from tests.support.compare import as_numpy, assert_balanced, assert_near


class Outcome(NamedTuple):
    """Of the package, in tensors, or of the oracle, in arrays."""

    losses: dict[str, Any]
    gradients: dict[str, Any]
    """Of the losses that have one in the logits, by itself."""
    others: dict[str, Any]


class LossUnderTest(NamedTuple):
    run: Callable[[Case, Backend, str, torch.dtype], Outcome]
    """By backend, device and dtype of the logits."""
    oracle: Callable[[Case], Outcome]


def ious_of(case: Case) -> NDArray[np.float32]:
    """IoUs in (0, 1], half of them with ties."""
    ious = np.clip(1 - np.nan_to_num(case.box_errors) / 2, 0.01, 1).astype(np.float32)
    ious[::2] = np.ceil(ious[::2] * 8) / 8
    return ious


def run_alrp(
    case: Case, backend: Backend = "auto", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[ALRPLossOutput, Tensor, Tensor]:
    """Loss and both gradients, each of its own loss with incoming gradient 1."""
    logits = torch.tensor(case.logits, device=device, dtype=dtype, requires_grad=True)
    targets = torch.tensor(case.targets, device=device)
    box_errors = torch.tensor(case.box_errors, device=device, requires_grad=True)
    out = alrp_loss(logits, targets, box_errors, delta=case.delta, eps=case.eps, backend=backend)
    (out.classification + out.localisation).backward()
    assert logits.grad is not None
    assert box_errors.grad is not None
    return out, logits.grad, box_errors.grad


def outcome_of_alrp(out: ALRPLossOutput, grad_logits: Tensor, grad_errors: Tensor) -> Outcome:
    losses = {"classification": out.classification, "localisation": out.localisation}
    others = {"rank": out.rank, "order": out.order, "gradient of box errors": grad_errors}
    return Outcome(losses, {"classification": grad_logits}, others)


def outcome_of_oracle(expected: dense.Result) -> Outcome:
    losses = {"classification": expected.classification, "localisation": expected.localisation}
    others = {"rank": expected.rank, "order": expected.order, "gradient of box errors": expected.grad_box_errors}
    return Outcome(losses, {"classification": expected.grad_logits}, others)


def _run_alrp(case: Case, backend: Backend, device: str, dtype: torch.dtype) -> Outcome:
    return outcome_of_alrp(*run_alrp(case, backend, device, dtype))


def _alrp_oracle(case: Case) -> Outcome:
    return outcome_of_oracle(dense.alrp_loss(*case))


def _ap(interpolate: bool) -> LossUnderTest:
    def run(case: Case, backend: Backend, device: str, dtype: torch.dtype) -> Outcome:
        logits = torch.tensor(case.logits, device=device, dtype=dtype, requires_grad=True)
        targets = torch.tensor(case.targets, device=device)
        loss = ap_loss(logits, targets, interpolate=interpolate, delta=case.delta, backend=backend)
        return Outcome({"loss": loss}, {"loss": torch.autograd.grad(loss, logits)[0]}, {})

    def oracle(case: Case) -> Outcome:
        expected = dense.ap_loss(case.logits, case.targets, interpolate, case.delta)
        return Outcome({"loss": expected.loss}, {"loss": expected.grad_logits}, {})

    return LossUnderTest(run, oracle)


def _run_rank_sort(case: Case, backend: Backend, device: str, dtype: torch.dtype) -> Outcome:
    logits = torch.tensor(case.logits, device=device, dtype=dtype, requires_grad=True)
    targets, ious = torch.tensor(case.targets, device=device), torch.tensor(ious_of(case), device=device)
    out = rank_sort_loss(logits, targets, ious, delta=case.delta, backend=backend)
    of_ranking, of_sorting = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in out)
    gradients = {"ranking": of_ranking, "sorting": of_sorting}
    return Outcome({"ranking": out.ranking, "sorting": out.sorting}, gradients, {})


def _rank_sort_oracle(case: Case) -> Outcome:
    expected = dense.rank_sort_loss(case.logits, case.targets, ious_of(case), case.delta)
    gradients = {"ranking": expected.grad_ranking, "sorting": expected.grad_sorting}
    return Outcome({"ranking": expected.ranking, "sorting": expected.sorting}, gradients, {})


LOSSES = {
    "alrp": LossUnderTest(_run_alrp, _alrp_oracle),
    "ap": _ap(interpolate=True),
    "ap without interpolation": _ap(interpolate=False),
    "rank_sort": LossUnderTest(_run_rank_sort, _rank_sort_oracle),
}

# Where all of FP is one small h, float32 resolves it to an absolute 1e-7 only, in the published formula too.
SMALL_FP = {"below_eps": 5e-2, "above_eps": 5e-3, "small_fp": 1e-3, "small_fp_wide_step": 1e-3}


def tolerance_of(name: str, backend: Backend) -> float:
    """For a named case, relative to the largest entry of a result."""
    return SMALL_FP.get(name, 1e-6) if backend.startswith("triton") else 1e-6


def assert_matches(found: Outcome, expected: Outcome, tolerance: float, of_gradient: float | None = None) -> None:
    """Elementwise and in balance. ``of_gradient``: tolerance of the logits' gradients, where they have fewer digits."""
    for name, wanted in expected.losses.items():
        if name == "sorting" and np.isfinite(wanted):  # a difference of means of at most 1: its digits are those of 1
            assert abs(as_numpy(found.losses[name]) - wanted) <= 1e-7
        else:
            assert_near(found.losses[name], wanted, tolerance, name)
    for name, wanted in expected.gradients.items():
        least = 1e-13 / max(np.abs(as_numpy(wanted)).max(initial=0), 1e-30) if name == "sorting" else 0.0
        assert_near(found.gradients[name], wanted, max(of_gradient or tolerance, least), f"gradient of {name}")
        if np.isfinite(as_numpy(wanted)).all() and name != "sorting" and of_gradient is None:
            assert_balanced(found.gradients[name], tolerance)
    for name, wanted in expected.others.items():
        if name == "order":
            assert np.array_equal(as_numpy(found.others[name]), wanted)
        else:
            assert_near(found.others[name], wanted, tolerance, name)
