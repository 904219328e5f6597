"""Benchmark of the whole aLRP Loss, forward and backward, behind a correctness gate; ``python -m bench --help``."""
