"""The choice between pair by pair and linear on a GPU: the tiled and the binned kernels.

The constant is that of an NVIDIA H200, for forward and backward pass together, in the middle between the sizes at which
the one and the other took less time (``python -m bench gpu``; docs/performance.md, "Tiled or binned"). A test holds it
to the newest result, and the choice: nowhere does it lose more than 5 %.
"""

# Below it both are launches and little else, and the binned kernels have more of them. Beyond it a column of the tiled
# ones takes longer even where there are few rows: a tile has 32.
PAIRS = 3.5e6


def prefer_binned(rows: int, columns: int) -> bool:
    """Whether a product of this size is expected to take less time in the binned kernels."""
    return rows * columns > PAIRS
