"""Named cases for every test of the loss. Values are float32, so that the oracle sees exactly what the package sees."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PRIOR = float(np.float32(-np.log(99)))  # the logit of a freshly initialised detector, prior 0.01


class Case(NamedTuple):
    logits: NDArray[np.float32]
    targets: NDArray[np.int64]
    box_errors: NDArray[np.float32]
    delta: float = 1.0
    eps: float = 1e-5

    @property
    def num_positives(self) -> int:
        return len(self.box_errors)


def make(logits: object, targets: object, delta: float = 1.0, box_errors: object = None) -> Case:
    x, t = np.asarray(logits, np.float32), np.asarray(targets, np.int64)
    count = int((t == 1).sum())
    if box_errors is None:
        box_errors = np.random.default_rng(count).uniform(0, 2, count)
    return Case(x, t, np.asarray(box_errors, np.float32), delta)


def draw(
    seed: int, n: int, p: int, ignored: float = 0.1, delta: float = 1.0, spread: float = 1.0, shift: float = 1.0
) -> Case:
    """n logits, normal; p of them positives, higher by ``shift``; a fraction ignored."""
    rng = np.random.default_rng(seed)
    targets = np.where(rng.random(n) < ignored, -1, 0)
    targets[rng.choice(n, p, replace=False)] = 1
    return make(rng.normal(size=n) * spread + shift * (targets == 1), targets, delta)


def _with(case: Case, where: int, which: int, value: float) -> Case:
    """The case with the ``which``-th logit of target ``where`` set to a value."""
    logits = case.logits.copy()
    logits[np.flatnonzero(case.targets == where)[which]] = value
    return case._replace(logits=logits)


def _finite() -> dict[str, Case]:
    rng = np.random.default_rng(7)
    base = draw(0, 1000, 37)
    rounded = draw(1, 500, 40)
    rounded = rounded._replace(logits=np.round(rounded.logits * 4) / 4)
    at_knots = draw(2, 300, 20, delta=0.5)
    at_knots = at_knots._replace(logits=np.round(at_knots.logits))
    equal_positives = base._replace(logits=np.where(base.targets == 1, 0.25, base.logits).astype(np.float32))
    equal_negatives = base._replace(logits=np.where(base.targets == 0, 0.25, base.logits).astype(np.float32))
    return {
        "random": base,
        "more_than_a_block": draw(3, 5003, 130),
        "narrow_step": draw(4, 1000, 37, delta=0.01),
        "tiny_step": draw(5, 1000, 37, delta=1e-12),
        "odd_step": draw(13, 1000, 37, delta=0.3),
        "wide_step": draw(6, 1000, 37, delta=10.0),
        "hard_step": draw(7, 1000, 37, delta=0.0),
        "wide_scores": draw(8, 1500, 100, spread=300.0),
        "shifted_scores": base._replace(logits=base.logits + np.float32(100)),
        "well_ranked": draw(9, 1000, 37, shift=20.0),
        "badly_ranked": draw(10, 1000, 37, shift=-20.0),
        "initialisation": make(np.full(2000, PRIOR), rng.random(2000) < 0.01),
        "hard_initialisation": make(np.full(300, PRIOR), rng.random(300) < 0.1, 0.0),
        "ties": rounded,
        "hard_ties": rounded._replace(delta=0.0),
        "ties_tiny_step": rounded._replace(delta=1e-12),
        "ties_at_knots": at_knots,
        "equal_positives": equal_positives,
        "equal_negatives": equal_negatives,
        "one_positive": draw(11, 200, 1),
        "one_negative": make([0.5, 0.0, 1.0], [1, 0, 1]),
        "one_pair": make([0.0, 0.5], [1, 0]),
        "only_one": make([0.3], [1]),
        "no_positives": make(rng.normal(size=50), np.zeros(50)),
        "no_negatives": make(rng.normal(size=30), np.where(rng.random(30) < 0.5, 1, -1)),
        "all_ignored": make(rng.normal(size=20), -np.ones(20)),
        "empty": make([], []),
        "nothing_ignored": draw(12, 257, 16, ignored=0.0),
        "below_eps": make([0.0, -1 + 1e-5, 2.0], [1, 0, 1]),  # FP = 5e-6
        "above_eps": make([0.0, -1 + 1e-4, 2.0], [1, 0, 1]),  # FP = 5e-5
        "small_fp": make([0.0, -0.3 + 0.6e-4, -0.3 + 0.6 * 3e-5], [1, 0, 0], 0.3),
        "small_fp_wide_step": make([0.0, -5 + 1e-3, -5 + 2e-3, 7.0], [1, 0, 0, 1], 5.0),
        "at_the_lower_knot": make([0.0, -5.0, 7.0], [1, 0, 1], 5.0),  # FP = 0, and 1 / (2 delta) is no short number
        "infinite_negatives": _with(_with(base, 0, 5, np.inf), 0, 9, -np.inf),
        "ignored_nan": _with(_with(base, -1, 0, np.nan), -1, 1, np.inf),
        "huge": base._replace(logits=base.logits * np.float32(1e30)),
        "minute": base._replace(logits=base.logits * np.float32(1e-30), delta=1e-30),
        "mixed_magnitudes": base._replace(
            logits=(base.logits * 10.0 ** rng.integers(-30, 30, 1000)).astype(np.float32)
        ),
        "zero_box_errors": base._replace(box_errors=np.zeros(37, np.float32)),
    }


def _not_finite() -> dict[str, Case]:
    base = draw(0, 300, 20)
    broken = base.box_errors.copy()
    broken[3] = np.nan
    return {
        "nan_negative": _with(base, 0, 4, np.nan),
        "nan_negative_hard": _with(base, 0, 4, np.nan)._replace(delta=0.0),
        "nan_positive": _with(base, 1, 4, np.nan),
        "minus_nan_positive": _with(base, 1, 4, np.copysign(np.nan, -1)),  # as a cast to bfloat16 makes of any NaN
        "inf_positive": _with(base, 1, 4, np.inf),
        "minus_inf_positive": _with(base, 1, 4, -np.inf),
        "minus_inf_positive_hard": _with(base, 1, 4, -np.inf)._replace(delta=0.0),
        "nan_box_error": base._replace(box_errors=broken),
        "inf_box_error": make([1.0, 2.0, 0.3, 0.2, 0.0, -0.5], [1, 1, 0, 0, -1, 0], box_errors=[0.5, np.inf]),
        "minus_inf_box_error": make([1.0, 1.0, 0.3, 0.2, 0.0, -0.5], [1, 1, 0, 0, -1, 0], box_errors=[-np.inf, 0.5]),
    }


FINITE = _finite()
NOT_FINITE = _not_finite()
