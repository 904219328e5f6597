"""The cost model that chooses between pair by pair and linear, on a GPU and on a CPU, in one place.

On a GPU, between the tiled and the binned kernels.

Work is counted in cycles of one multiprocessor, which issues 128 instructions in each:

* tiled: 2.8 instructions a pair, 2.0 of them fp32 (read from the machine code of sm_90);
* binned: look-ups, and in the forward product integer atomics, a number of cycles a column that hardly depends on P;
  and some more launches, which cost the same whatever the size.

The constants are those of `python -m bench compiled` for an H100 (docs/performance.md; a test holds them to it). They
are modelled, not measured.
"""

# Mean of the two products. Most of it are the two 64-bit atomics of the forward product, at 8e10 in a second.
BINNED_CYCLES_A_COLUMN = 3.3
# Five launches more than tiled, 4 microseconds each, on 132 multiprocessors at 1.7 GHz (an H100).
BINNED_CYCLES_EXTRA = 5 * 4e-6 * 132 * 1.7e9
TILED_CYCLES_A_PAIR = 2.8 / 128


def prefer_binned(rows: int, columns: int) -> bool:
    """Whether the model expects a product of this size to take less time in the binned kernels."""
    tiled = TILED_CYCLES_A_PAIR * rows * columns
    return tiled > BINNED_CYCLES_A_COLUMN * columns + BINNED_CYCLES_EXTRA


# On a CPU with numba the tables of a product take about as long to make as so many pairs to compare, 0.2 ms (measured
# with `python -m bench --groups small`).
DENSE_PAIRS = 1 << 20


def prefer_dense(rows: int, columns: int) -> bool:
    """Whether a CPU is expected to compare so many pairs one by one in less time than the tables take."""
    return rows * columns <= DENSE_PAIRS
