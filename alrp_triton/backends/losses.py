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
    negative, above, errors = as_array(false_positives), as_array(among), as_array(box_errors)
    rank, classification, localisation, error, share = formulas.alrp(negative, *above, errors, at_zero, eps, np.where)
    count = max(len(rank), 1)
    as_given = np.empty_like(rank)
    as_given[as_array(order)] = rank
    update = np.stack([-error, share, 1 / rank]) / count
    losses = (torch.tensor(terms.sum() / count, dtype=dtype) for terms in (classification, localisation))
    results = *losses, torch.from_numpy(as_given).to(dtype), torch.from_numpy(update)
    return results if false_positives.is_cpu else tuple(result.to(false_positives.device) for result in results)
