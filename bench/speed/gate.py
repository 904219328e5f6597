"""The correctness gate: nothing is timed before every contender has given the right losses and gradients."""

from dataclasses import dataclass

import torch

from alrp_triton.functional import EPS
from reference import dense as reference

from .contenders import AP, BUCKETED, RANK_SORT, LogitsStep, Step, contenders, family, ious_of
from .problems import Problem, Size, make_problem

TOLERANCE = 1e-5  # float32 sums over 1e6 negatives and 1e3 positives stay well below
# Small enough for the oracle's dense matrix, and no multiples of a block; with so many ignored.
_SMALL = ((203, 8, 0), (1001, 40, 100), (4999, 1, 7), (20_011, 150, 30))


@dataclass(frozen=True)
class Check:
    """One contender on one problem."""

    anchors: int
    positives: int
    delta: float
    contender: str
    against: str
    quantity: str  # the one that differs most
    difference: float  # largest absolute difference / largest entry of the reference
    imbalance: float  # |sum of the gradient of the logits| / sum of its absolute values; Theorem 2 says 0

    @property
    def passed(self) -> bool:
        """False for NaN, too. Buckets are no more than an approximation for delta > 0, but balanced."""
        exact = self.contender != BUCKETED or self.delta == 0
        return self.difference <= (TOLERANCE if exact else 1.0) and self.imbalance <= TOLERANCE


def _check(
    problem: Problem, contender: str, step: Step | LogitsStep, against: str, expected: Step | LogitsStep
) -> Check:
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(step, expected, strict=True)]
    differences = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs])
    worst = int(differences.argmax())  # NaN counts as the largest
    # A few lost negatives hide below the tolerance of single entries, but not in the sum over all.
    gradient = step.grad_logits.double()
    imbalance = float(gradient.sum().abs() / gradient.abs().sum())
    sizes = problem.logits.numel(), problem.box_errors.numel(), problem.delta
    return Check(*sizes, contender, against, step._fields[worst], float(differences[worst]), imbalance)


def _oracle(problem: Problem) -> dict[str, LogitsStep]:
    """AP Loss and Rank & Sort Loss by the oracle, at the steps of :func:`.contenders.family`."""
    logits, targets = (tensor.detach().cpu().numpy() for tensor in problem[:2])
    of_ap = reference.ap_loss(logits, targets, delta=problem.delta)
    of_rs = reference.rank_sort_loss(logits, targets, ious_of(problem).cpu().numpy(), problem.delta / 2)
    losses = torch.tensor([of_rs.ranking, of_rs.sorting])
    return {
        AP: LogitsStep(torch.tensor([of_ap.loss]), torch.as_tensor(of_ap.grad_logits)),
        RANK_SORT: LogitsStep(losses, torch.as_tensor(of_rs.grad_ranking + of_rs.grad_sorting)),
    }


def check(seed: int) -> list[Check]:
    """Check all contenders: on small problems against the float64 oracle, on a larger one against the first."""
    checks: list[Check] = []
    for delta in (1.0, 0.0):
        for anchors, positives, ignored in _SMALL:
            size = Size("gate", anchors, positives, delta)
            problem = make_problem(size, torch.device("cpu"), seed, ignored)
            arrays = (tensor.detach().cpu().numpy() for tensor in problem[:3])
            oracle = reference.alrp_loss(*arrays, delta=delta, eps=EPS)
            expected = Step(*(torch.as_tensor(getattr(oracle, name)) for name in Step._fields))
            for name, contender in contenders(size, problem).items():
                if (step := contender()) is not None:
                    checks.append(_check(problem, name, step, "oracle", expected))
            losses = family(problem)
            for name, wanted in _oracle(problem).items():
                if (step := losses[name]()) is not None:
                    checks.append(_check(problem, name, step, "oracle", wanted))
        size = Size("gate", 1_000_000, 100, delta)
        problem = make_problem(size, torch.device("cpu"), seed)
        steps = {name: contender() for name, contender in contenders(size, problem).items()}
        done = {name: step for name, step in steps.items() if step is not None}
        first = next(iter(done))
        checks += [_check(problem, name, step, first, done[first]) for name, step in done.items() if name != first]
    return checks
