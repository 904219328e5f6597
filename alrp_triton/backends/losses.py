"""What a loss makes of its positives' sums, by NumPy, whose calls cost a fraction of torch's."""

import numpy as np
import torch
from torch import Tensor

from .. import formulas
from .knots import Floats, as_array

_quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")


def _mean(terms: Floats, like: Tensor, dtype: torch.dtype) -> Tensor:
    """0-d; 0 of no terms."""
    return torch.tensor(terms.sum() / max(len(terms), 1), dtype=dtype, device=like.device)


def _update(like: Tensor, *rows: Floats) -> Tensor:
    """What the gradients are made of, divided by P."""
    return torch.from_numpy(np.stack(rows) / max(len(rows[0]), 1)).to(like.device)


@_quiet
def alrp_terms(
    false_positives: Tensor,
    among: Tensor,
    box_errors: Tensor,
    order: Tensor,
    at_zero: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, ranks and update; contract in :mod:`alrp_triton.operators`."""
    fp, errors = as_array(false_positives), as_array(box_errors)
    above, box_above, ranked = as_array(among)
    rank, classification, localisation, error, share = formulas.alrp(
        fp, above, box_above, ranked, errors, at_zero, eps, np.where
    )
    as_given = np.empty_like(rank)
    as_given[as_array(order)] = rank
    losses = _mean(classification, among, dtype), _mean(localisation, among, dtype)
    return *losses, torch.from_numpy(as_given).to(among.device, dtype), _update(among, -error, share, 1 / rank)


@_quiet
def ap_terms(
    false_positives: Tensor, positives_above: Tensor, at_zero: float, interpolate: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss and update; contract in :mod:`alrp_triton.operators`."""
    fp = as_array(false_positives)
    error = formulas.precision_error(fp, as_array(positives_above), at_zero)
    if interpolate:  # 1 - the greatest precision so far is the least 1 - precision so far
        error = np.minimum.accumulate(error)
    share = np.where(fp == 0, 0.0, error / fp)
    return _mean(error, false_positives, dtype), _update(false_positives, -error, share)


@_quiet
def rank_sort_terms(
    false_positives: Tensor, among: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and update; contract in :mod:`alrp_triton.operators`."""
    kept, kept_error, missorted, missorted_error = as_array(among)
    ranking, sorting, pull, share, sort_pull, sort_share = formulas.rank_sort(
        as_array(false_positives), kept, kept_error, missorted, missorted_error, eps, np.where
    )
    losses = _mean(ranking, among, dtype), _mean(sorting, among, dtype)
    return *losses, _update(among, -pull, share, sort_share, -sort_pull)
