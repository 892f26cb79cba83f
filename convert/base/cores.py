"""Work shared among the cores by one pool of threads, while NumPy's BLAS uses a single thread.

The threads of BLAS and of numba's parallel loops keep their core busy while they wait for work.
Where two such pools take turns, as unpacking and multiplying do, each turn costs some milliseconds:
on two cores a model of half a billion weights then generates at a quarter of its speed. So there is
one pool, whose threads sleep when there is nothing to do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]


def shared(work: Callable[[slice], None], count: int, least: int = 1) -> None:
    """Call ``work`` on one slice per core; together the slices cover ``range(count)``.

    Args:
        work: called with one slice, in any thread; it must release the interpreter lock, and
            different calls must not write to the same place.
        count: how many items there are.
        least: the smallest number of items for which another core is used.
    """
    cores = max(1, min(_cores(), count // max(1, least)))
    edges = [count * core // cores for core in range(cores + 1)]
    parts = [slice(first, last) for first, last in pairwise(edges)]
    with _blas_of_one():
        # The calling thread works on the first slice.
        others = [_pool().submit(work, part) for part in parts[1:]]
        try:
            work(parts[0])
        finally:
            for other in others:
                other.result()


@cache
def _cores() -> int:
    """How many cores may be used: NUMBA_NUM_THREADS, or all that this process has.

    numba counts them in the same way, and takes a third of a second to import.
    """
    asked = os.environ.get("NUMBA_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, _cores() - 1), "cores")


class _Blas:
    """How many threads are in `_blas_of_one` at present, and the limit on BLAS that they share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.controller = ThreadpoolController()
        self.limit: Any = None


@cache
def _blas() -> _Blas:
    return _Blas()


@contextmanager
def _blas_of_one() -> Iterator[None]:
    """Hold NumPy's BLAS to one thread, in the whole process, while any thread is in this block."""
    blas = _blas()
    with blas.lock:
        if not blas.users:
            blas.limit = blas.controller.limit(limits=1, user_api="blas")
        blas.users += 1
    try:
        yield
    finally:
        with blas.lock:
            blas.users -= 1
            if not blas.users:
                blas.limit.restore_original_limits()
