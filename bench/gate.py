"""The correctness gate: nothing is timed before every contender has given the right losses and gradients."""

from dataclasses import dataclass

import torch

from alrp_triton.functional import DELTA, EPS
from reference.dense import alrp_loss as dense_alrp_loss

from .steps import Problem, Step, contenders, make_problem, take_step

TOLERANCE = 1e-5  # float32 sums over 1e6 negatives and 1e3 positives stay well below
# (anchors, positives, ignored): small enough for the oracle's dense matrix, and no multiples of a block.
SMALL_CASES = ((203, 8, 0), (331, 150, 30), (1001, 40, 100), (4999, 1, 7))


@dataclass(frozen=True)
class Check:
    """One contender on one problem."""

    anchors: int
    positives: int
    contender: str
    against: str
    quantity: str  # the one that differs most
    difference: float  # largest absolute difference / largest entry of the reference
    imbalance: float  # |sum of the gradient of the logits| / sum of its absolute values; Theorem 2 says 0

    @property
    def passed(self) -> bool:
        """False for NaN, too."""
        return self.difference <= TOLERANCE and self.imbalance <= TOLERANCE


def _check(problem: Problem, contender: str, step: Step, against: str, expected: Step) -> Check:
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(step, expected, strict=True)]
    differences = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs])
    worst = int(differences.argmax())  # NaN counts as the largest
    # A few lost negatives hide below the tolerance of single entries, but not in the sum over all.
    gradient = step.grad_logits.double()
    imbalance = float(gradient.sum().abs() / gradient.abs().sum())
    sizes = problem.logits.numel(), problem.box_errors.numel()
    return Check(*sizes, contender, against, Step._fields[worst], float(differences[worst]), imbalance)


def check(sizes: list[tuple[int, int]], device: torch.device, seed: int) -> list[Check]:
    """Check all contenders: on the small cases against the dense float64 oracle, at ``sizes`` against each other."""
    checks: list[Check] = []
    for anchors, positives, ignored in SMALL_CASES:
        problem = make_problem(anchors, positives, device, seed, ignored)
        arrays = (tensor.detach().cpu().numpy() for tensor in problem)
        oracle = dense_alrp_loss(*arrays, delta=DELTA, eps=EPS)
        expected = Step(*(torch.as_tensor(getattr(oracle, name)) for name in Step._fields))
        for name, loss in contenders(anchors, positives, device).items():
            checks.append(_check(problem, name, take_step(loss, problem), "oracle", expected))
    for size in sizes:
        problem = make_problem(*size, device, seed)
        steps = {name: take_step(loss, problem) for name, loss in contenders(*size, device).items()}
        last = list(steps)[-1]  # the loop; where it is left out, at least the balance of the gradient is checked
        checks += [_check(problem, name, step, last, steps[last]) for name, step in steps.items()]
    return checks
