"""Figure 1 of the paper, from the package and from the oracle."""

import numpy as np
import pytest

from examples import figure1
from reference.dense import alrp_loss as oracle


@pytest.mark.parametrize("ranking", figure1.IOUS)
def test_figure_1(ranking: str, capsys: pytest.CaptureFixture[str]) -> None:
    ap, alrp = figure1.losses(ranking)
    assert round(ap, 2) == 0.36
    assert round(alrp, 2) == {"R1": 0.53, "R2": 0.69, "R3": 0.89}[ranking]
    errors = (1 - np.array(figure1.IOUS[ranking])) / 0.5
    expected = oracle(figure1.SCORES, figure1.TARGETS, errors, delta=0.0)
    assert abs(ap - expected.classification) < 1e-6
    assert abs(alrp - expected.classification - expected.localisation) < 1e-6
    figure1.main()
    assert f"{ranking}" in capsys.readouterr().out
