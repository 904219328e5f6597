"""How a result is held against the oracle: elementwise, scaled to the largest entry, and by what must balance."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def as_numpy(value: ArrayLike | Tensor) -> NDArray[np.float64]:
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, np.float64)


def assert_near(
    actual: ArrayLike | Tensor, expected: ArrayLike | Tensor, tolerance: float, what: str = "value"
) -> None:
    """|actual - expected| <= tolerance * max |expected|, entry by entry; NaN and infinities in the same places."""
    a, e = as_numpy(actual), as_numpy(expected)
    assert a.shape == e.shape, f"{what}: shape {a.shape}, expected {e.shape}"
    assert np.array_equal(np.isnan(a), np.isnan(e)), f"{what}: NaN at {np.flatnonzero(np.isnan(a) != np.isnan(e))[:5]}"
    a, e = a[~np.isnan(a)], e[~np.isnan(e)]
    if e.size == 0:
        return
    bound = tolerance * np.abs(e).max() + np.finfo(np.float32).tiny  # float32 has no digits below its normal numbers
    worst = np.abs(a - e).max()
    assert worst <= bound, f"{what}: off by {worst:.3e}, allowed {bound:.3e} (largest entry {np.abs(e).max():.3e})"


def assert_balanced(grad_logits: ArrayLike | Tensor, tolerance: float) -> None:
    """Theorem 2: the gradients of positives and negatives sum to zero. Sees a few lost entries that closeness does not."""
    g = as_numpy(grad_logits)
    off = abs(g.sum())
    assert off <= tolerance * np.abs(g).sum() + np.finfo(np.float32).tiny, (
        f"gradients sum to {off:.3e} of {np.abs(g).sum():.3e}"
    )


def assert_gradient(actual: ArrayLike | Tensor, expected: ArrayLike | Tensor, tolerance: float) -> None:
    """Elementwise and in balance."""
    assert_near(actual, expected, tolerance, "gradient")
    if np.isfinite(as_numpy(expected)).all():
        assert_balanced(actual, tolerance)


def assert_blend(
    found: Sequence[Tensor], own: Sequence[Tensor], ranked: Sequence[Tensor], share: float, rounded: int = 0
) -> None:
    """What a step of a warm start gives is what one without a ranking loss and one with it alone give, by their shares.

    Where one of them has all of it, bit for bit; elsewhere the last values are left out that are ``rounded`` too much.
    """
    if share in (0, 1):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, ranked if share else own, strict=True))
    for ours, first, second in list(zip(found, own, ranked, strict=True))[: len(found) - rounded]:
        assert_near(ours, (1 - share) * first.double() + share * second.double(), 1e-6, f"with {share} of the ranking")


# Half a unit in the last place of the output, doubled for the float32 sums of the tiled kernels.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
