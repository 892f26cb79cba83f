"""Work shared among the cores by threads of our own, in which NumPy's BLAS works alone.

BLAS, and numba's parallel loops, have threads that wait for more work without letting go of their
core. Where two such pools take turns, as unpacking and multiplying do, each turn costs some
milliseconds of the scheduler's: on two cores a model of half a billion weights then generates four
times as slowly. So there is one pool, whose threads sleep when there is nothing to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]


def shared(work: Callable[[slice], None], count: int, least: int = 1) -> None:
    """Do ``work`` on as many slices as there are cores, which together cover ``range(count)``.

    Args:
        work: is called with one slice, in any thread; it must let go of the interpreter lock, and
            different calls must not write to the same place.
        least: items that a core takes at least.
    """
    cores = max(1, min(_cores(), count // max(1, least)))
    edges = [count * core // cores for core in range(cores + 1)]
    parts = [slice(first, last) for first, last in pairwise(edges)]
    with _blas_of_one():
        # This thread takes a part, too.
        others = [_pool().submit(work, part) for part in parts[1:]]
        try:
            work(parts[0])
        finally:
            for other in others:
                other.result()


@cache
def _cores() -> int:
    """How many cores may be used: NUMBA_NUM_THREADS, or all that this process has."""
    import numba  # lazily: a GPU multiplies without it

    return int(numba.config.NUMBA_NUM_THREADS)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, _cores() - 1), "cores")


class _Blas:
    """How many threads ask for a BLAS of one thread just now, and the limit that they share."""

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
    """NumPy's BLAS with one thread, in the whole process, as long as anybody is in here."""
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
