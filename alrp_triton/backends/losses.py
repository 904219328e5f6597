"""What a loss makes of its positives' sums, by NumPy, whose calls cost a fraction of torch's."""

import numpy as np
import torch
from torch import Tensor

from .. import formulas
from .knots import as_array


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def alrp_terms(
    false_positives: Tensor,
    among: Tensor,
    box_errors: Tensor,
    order: Tensor,
    at_zero: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, ranks and what the gradients are made of; contract in :mod:`alrp_triton.operators`."""
    sums, errors = as_array(false_positives), as_array(box_errors)
    above, box_above, ranked = as_array(among)
    rank, classification, localisation, error, share = formulas.alrp(
        sums, above, box_above, ranked, errors, at_zero, eps, np.where
    )
    count, device = max(len(rank), 1), false_positives.device
    as_given = np.empty_like(rank)
    as_given[as_array(order)] = rank
    update = np.stack([-error, share, 1 / rank]) / count
    return (
        torch.tensor(classification.sum() / count, dtype=dtype, device=device),
        torch.tensor(localisation.sum() / count, dtype=dtype, device=device),
        torch.from_numpy(as_given).to(device, dtype),
        torch.from_numpy(update).to(device),
    )
