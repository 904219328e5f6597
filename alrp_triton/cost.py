"""The cost model that chooses between pair by pair and linear on a GPU: the tiled and the binned kernels.

The constants are those of an NVIDIA H200, for forward and backward pass together, fitted to the times of both at 40
sizes (``python -m bench gpu``; docs/performance.md, "Tiled or binned"). A test holds them to the newest result, and the
choice to it: nowhere does it lose more than 5 %.
"""

TILED_NS_A_PAIR = 3.46e-4
# Most of it are the two 64-bit atomics of the forward product, at some 8e10 in a second.
BINNED_NS_A_COLUMN = 0.0304
# Tables and their launches, which cost the same whatever the size: what loses least at the sizes where both are close.
BINNED_EXTRA_NS = 4e3


def prefer_binned(rows: int, columns: int) -> bool:
    """Whether the model expects a product of this size to take less time in the binned kernels."""
    return TILED_NS_A_PAIR * rows * columns > BINNED_NS_A_COLUMN * columns + BINNED_EXTRA_NS
