"""Python calls on several threads at once: those that torch computes with, where they can be had.

torch's CPU operations run on a team of OpenMP threads, which wait actively for some milliseconds after each of them. A
second team of threads would have to compete with the first one for the cores (measured: half the speed in a training
step). So the team itself is asked, through the entry that compiled code uses, ``GOMP_parallel``: part of the stable
interface of GNU's OpenMP library, and of LLVM's and Intel's. Where torch has none of them (macOS, Windows), threads are
started.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import get_ident
from typing import Any

import torch

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> Any:
    """``GOMP_parallel(body, data, threads, flags)`` of the library that torch loaded, or None."""
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    entry.argtypes, entry.restype = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return entry


def cut(count: int, most: int) -> list[slice]:
    """So many things in runs of about one length: one run for each of torch's threads, at most ``most``, at least 1."""
    runs = max(min(torch.get_num_threads(), most), 1)
    return [slice(count * run // runs, count * (run + 1) // runs) for run in range(runs)]


def run(tasks: Sequence[Callable[[], object]]) -> None:
    """Call all tasks, on as many threads as torch uses; raise what one of them raised.

    A task should spend its time outside of Python, without Python's lock.
    """
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        for task in tasks:
            task()
        return
    parallel = _openmp()
    waiting, failures = list(tasks), list[BaseException]()
    caller, returned = get_ident(), False

    def work(_: object = None) -> None:
        nonlocal returned
        try:
            while True:
                try:
                    task = waiting.pop()  # atomic
                except IndexError:
                    break
                task()
        except BaseException as failure:  # must not reach the compiled code that called
            failures.append(failure)
        if get_ident() == caller:
            returned = True

    if parallel is not None:
        parallel(_Body(work), None, threads, 0)
        if not returned and not failures:
            # A signal's handler raised at the very beginning of this thread's call, where ctypes drops exceptions.
            raise KeyboardInterrupt
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(threads):
                pool.submit(work)
    if failures:
        raise failures[0]
