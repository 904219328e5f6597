"""ALRP Loss is the average of LRP over the scores of the positives, false negatives left out (docs/alrp.md)."""

import numpy as np
import pytest
import torch

from alrp_triton import alrp_loss, localisation_error
from alrp_triton.metrics import lrp_at


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.0])
@pytest.mark.parametrize("seed", range(5))
def test_alrp_at_delta_0_is_an_average_of_lrp(seed: int, tau: float) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permutation(400).astype(np.float64)  # no ties
    is_tp = rng.random(400) < 0.15
    ious = np.where(is_tp, rng.uniform(tau, 1, 400), 0.0)
    p = int(is_tp.sum())

    expected: list[float] = []
    for score in scores[is_tp]:
        lrp = float(lrp_at(scores, is_tp, ious, p, score, tau=tau).lrp)
        kept = scores >= score
        false_negatives = p - int((kept & is_tp).sum())
        total = int(kept.sum()) + false_negatives  # TP + FP + FN
        expected.append((total * lrp - false_negatives) / (total - false_negatives))

    errors = localisation_error(torch.tensor(ious[is_tp]), tau)
    out = alrp_loss(torch.tensor(scores), torch.tensor(is_tp), errors, delta=0.0)
    assert float(out.classification + out.localisation) == pytest.approx(np.mean(expected), rel=1e-12)
    # At the lowest positive nothing is missed: its term is LRP itself.
    lowest = scores[is_tp].min()
    at_lowest = int(np.argmin(scores[is_tp]))
    assert expected[at_lowest] == pytest.approx(float(lrp_at(scores, is_tp, ious, p, lowest, tau=tau).lrp), rel=1e-12)
