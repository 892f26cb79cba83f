"""One pool of threads shares work, while BLAS uses a single thread."""

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from convert.base import cores


def of_blas() -> list[int]:
    """How many threads each BLAS of this process may use now."""
    return [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]


@pytest.fixture
def two_threads():
    np.ones((2, 2)) @ np.ones((2, 2))
    if not of_blas():
        pytest.skip("NumPy's BLAS here does not tell its threads (Apple's Accelerate)")
    # By this thread, which threadpoolctl then takes for the one that sets limits.
    with threadpool_limits(2, user_api="blas"):
        if of_blas() != [2] * len(of_blas()):
            pytest.skip("this BLAS has one thread")
        yield


def test_blas_is_held_to_one_thread_from_whichever_thread(two_threads) -> None:
    seen: list[list[int]] = []

    def work() -> None:
        with cores.blas_of_one():
            with cores.blas_of_one():
                seen.append(of_blas())
            seen.append(of_blas())
        seen.append(of_blas())

    for _ in range(2):
        one = threading.Thread(target=work)
        one.start()
        one.join()
    work()
    count = len(of_blas())
    assert seen == [[1] * count, [1] * count, [2] * count] * 3


def test_the_last_thread_that_leaves_gives_blas_its_threads_back(two_threads) -> None:
    count, inside, leave = len(of_blas()), threading.Event(), threading.Event()

    def stays() -> None:
        with cores.blas_of_one():
            inside.set()
            leave.wait(60)

    other = threading.Thread(target=stays)
    other.start()
    assert inside.wait(60)
    with cores.blas_of_one():
        pass
    assert of_blas() == [1] * count
    leave.set()
    other.join()
    assert of_blas() == [2] * count
