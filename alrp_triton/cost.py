"""The cost model that chooses between the tiled and the binned kernels on a GPU, in one place.

Work is counted in cycles of one streaming multiprocessor, which issues 128 fp32 instructions in each:

* tiled: two instructions a pair (read from the machine code), P N / 64 cycles;
* binned: look-ups that meet in the first-level cache, and in the forward product integer atomics, a number of cycles a
  column that hardly depends on P; and some more launches, which cost the same whatever the size.
"""

# Of the binned kernels, per column, both products together halved; `python -m bench compiled` prints what it rests on.
BINNED_CYCLES_A_COLUMN = 4.0
# Five launches more than tiled, 4 microseconds each, on 132 multiprocessors at 1.7 GHz (an H100).
BINNED_CYCLES_EXTRA = 5 * 4e-6 * 132 * 1.7e9
TILED_CYCLES_A_PAIR = 2 / 128


def prefer_binned(rows: int, columns: int) -> bool:
    """Whether the model expects a product of this size to take less time in the binned kernels."""
    tiled = TILED_CYCLES_A_PAIR * rows * columns
    return tiled > BINNED_CYCLES_A_COLUMN * columns + BINNED_CYCLES_EXTRA
