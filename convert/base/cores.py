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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

from threadpoolctl import (  # type: ignore[import-untyped]
    OpenBLASController,
    ThreadpoolController,
)

T = TypeVar("T")


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
    with blas_of_one():
        # The calling thread works on the first slice.
        others = [_pool().submit(work, part) for part in parts[1:]]
        try:
            work(parts[0])
        finally:
            for other in others:
                other.result()


def in_pieces(work: Callable[[slice], None], count: int, step: int) -> None:
    """Call ``work`` on slices of ``step`` items that together cover ``range(count)``.

    A core that is free takes the next slice, the calling thread among them. So it is no matter if
    other threads call this function meanwhile, or if ``work`` does.

    Args:
        work: as for `shared`.
        count: how many items there are.
        step: items in a slice; the last one may have fewer.
    """
    starts = iter(range(0, count, step))

    def some() -> None:
        for first in starts:
            work(slice(first, min(first + step, count)))

    helpers = min(_cores(), -(-count // step)) - 1
    others = [_pool().submit(some) for _ in range(helpers)]
    try:
        some()
    finally:
        for _ in starts:
            pass  # after an error nobody begins another slice
        for other in others:
            if not other.cancel():
                other.result()


def once(work: Callable[[], T]) -> Callable[[], T]:
    """A function that calls ``work`` when it is first called; other threads wait for its result."""
    lock = threading.Lock()
    found: list[T] = []

    def result() -> T:
        with lock:
            if not found:
                found.append(work())
        return found[0]

    return result


def beside(work: Callable[[], T]) -> Callable[[], T]:
    """Begin work in a thread of its own, which the process does not wait for when it ends.

    Returns:
        A function that waits for the result.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="beside", daemon=True).start()
    return future.result


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
    """How many threads are in `blas_of_one` at present, and the limit on BLAS that they share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self._controller = ThreadpoolController()
        self._limit: Any = None

    def limit(self) -> None:
        """Hold it to one thread."""
        self._take_over()
        self._limit = self._controller.limit(limits=1, user_api="blas")

    def release(self) -> None:
        """Let it have the threads that it had."""
        self._take_over()
        self._limit.restore_original_limits()

    def _take_over(self) -> None:
        """Let this thread set the limit, whichever thread did so before.

        From version 3.8 on threadpoolctl heeds the first thread only that sets the limit of an
        OpenBLAS, which is one for all threads. Here they take turns under a lock.
        """
        for library in self._controller.lib_controllers:
            if isinstance(library, OpenBLASController):
                take = getattr(library, "clear_controlling_thread", None)
                if take is not None:
                    take(force=True)


@cache
def _blas() -> _Blas:
    return _Blas()


@contextmanager
def blas_of_one() -> Iterator[None]:
    """Hold NumPy's BLAS to one thread, in the whole process, while any thread is in this block."""
    blas = _blas()
    with blas.lock:
        if not blas.users:
            blas.limit()
        blas.users += 1
    try:
        yield
    finally:
        with blas.lock:
            blas.users -= 1
            if not blas.users:
                blas.release()
