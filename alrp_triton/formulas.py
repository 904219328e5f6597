"""The losses' formulas for a positive, each stated once and run by NumPy and by Triton.

They take float64 arrays of any one kind with an element for each positive, and work element by element with operators
and ``where(condition, this, that)``, which the caller brings. So :mod:`.backends.losses` calls them with NumPy arrays,
and :mod:`.backends.triton_losses` compiles the same text into a kernel.
"""

# Triton's compiler reads annotations too, and knows none that NumPy has.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false


def alrp(false_positives, positives_above, box_above, ranked_box, box_error, at_zero, eps, where):
    """ALRP Loss (Oksuz et al., NeurIPS 2020, Equations 9 to 11 and Theorem 1) for positive i.

    Args:
        false_positives: FP_i = sum of H_ij over negatives j.
        positives_above: sum of H_ik over all positives k, i itself included.
        box_above: sum of H_ik E_k over the same.
        ranked_box: sum of E_k over all k with s_k >= s_i.
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
    share = where(idle, 0.0, error / false_positives)
    return rank, false_positives / rank, ranked_box / rank, error, share
