"""The losses' formulas for a positive, each stated once and run by NumPy and by Triton.

They take float64 arrays of any one kind with an element for each positive, and work element by element with operators
and ``where(condition, this, that)``, which the caller brings. So :mod:`.backends.positives` calls them with NumPy
arrays, and numba (:mod:`.backends.numba_positives`) and Triton (:mod:`.backends.triton_positives`) compile the text.
"""

# Triton's compiler reads annotations too, and knows none that NumPy has.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

MAX_GRADE = 1 + 2.0**-7
"""The greatest IoU that is taken for one: rounding may lift 1, by so much in bfloat16, and a class index is no IoU."""


def at_zero(delta: float) -> float:
    """h(0), the entry of a row against its own score, and against others that tie with it."""
    return 0.5 if delta > 0 else 1.0


def alrp(false_positives, positives_above, box_above, ranked_box, box_error, at_zero, eps, where):
    """ALRP Loss (Oksuz et al., NeurIPS 2020, Equations 9 to 11 and Theorem 1) for positive i.

    Args:
        false_positives: FP_i = sum of H_ij over negatives j.
        positives_above: sum of H_ik over all positives k, i itself included.
        box_above: sum of H_ik E_k over the same.
        ranked_box: sum of E_k over all k with s_k > s_i, of h(0) E_k over others with s_k = s_i, and E_i.
        box_error: E_i.
        at_zero: h(0), what i itself contributes to the sums.
        eps: with no more false positives than this, i causes no gradient.
        where: ``where(condition, this, that)`` of the arrays' kind.

    Returns:
        ``rank_i``; its terms of the classification and the localisation loss; its error, by which it is to be pulled
        up; and that error per false positive, by which the negatives that outrank it are to be pushed down.
    """
    rank = positives_above + (1 - at_zero) + false_positives  # all but itself by h, and 1 for itself
    idle = false_positives <= eps  # NaN is not idle
    error = where(idle, 0.0, (false_positives + (box_above - at_zero * box_error)) / rank)
    error_per_fp = where(idle, 0.0, error / false_positives)
    return rank, false_positives / rank, ranked_box / rank, error, error_per_fp


def precision_error(false_positives, positives_above, at_zero):
    """1 - precision of AP Loss (Chen et al., CVPR 2019, Section 3) for positive i.

    Args:
        false_positives: FP_i = sum of H_ij over negatives j.
        positives_above: sum of H_ik over all positives k, i itself included.
        at_zero: h(0), what i itself contributes to that sum.

    Returns:
        FP_i / rank_i.
    """
    return false_positives / (positives_above + (1 - at_zero) + false_positives)


def rank_sort(false_positives, kept, kept_error, missorted, missorted_error, eps, where):
    """Rank & Sort Loss (Oksuz et al., ICCV 2021, Section 4) for positive i, which counts itself by h(0).

    Args:
        false_positives: FP_i = sum of H_ij over negatives j.
        kept: sum of H_ik over the positives k whose IoU is not below that of i, i itself included.
        kept_error: sum of H_ik (1 - IoU_k) over the same.
        missorted: sum of H_ik over the positives k of lower IoU.
        missorted_error: sum of H_ik (1 - IoU_k) over the same.
        eps: with no more false positives than this, i causes no gradient of the ranking error; with no more missorted
            positives, none of the sorting error.
        where: ``where(condition, this, that)`` of the arrays' kind.

    Returns:
        The ranking error, the sorting error; of each, what i is to be pulled up by, and that per false positive or per
        missorted positive, by which those are to be pushed down.
    """
    above = kept + missorted
    ranking = false_positives / (above + false_positives)
    # Current minus target, (kept_error + missorted_error) / above - kept_error / kept, without their difference.
    sorting = (missorted_error - missorted * (kept_error / kept)) / above
    sorting = where(sorting < 0, 0.0, sorting)  # by rounding; NaN stays
    ranked = false_positives <= eps  # NaN is not
    sorted_ = missorted <= eps
    return (
        ranking,
        sorting,
        where(ranked, 0.0, ranking),
        where(ranked, 0.0, ranking / false_positives),
        where(sorted_, 0.0, sorting),
        where(sorted_, 0.0, sorting / missorted),
    )
