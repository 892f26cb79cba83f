"""Signals: the first stops the work at the next chance, the second ends the process at once."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from abl_mlx.support import interrupts
from abl_mlx.support.clock import Clock

# One evaluation of MLX that would take an hour, during which Python hears of no signal.
NATIVE = """
import mlx.core as mx
from abl_mlx.support import interrupts
interrupts.listen()
x = mx.random.normal((256, 256))
for _ in range(100_000):
    x = x @ x
    x = x / mx.abs(x).max()
mx.eval(mx.array(1.0))
print("begun", flush=True)
mx.eval(x)
"""

# A library that swallows the exception again and again.
SWALLOWS = """
import time
from abl_mlx.support import interrupts
interrupts.listen()
says = "begun"
while True:
    try:
        print(says, flush=True)
        while True:
            time.sleep(0.01)
    except BaseException:
        says = "swallowed"
"""

# What meets the request itself goes on, and the next one is the first again.
MEETS = """
import time
from abl_mlx.support import interrupts
interrupts.listen()
for says in ("begun", "met", "met again"):
    try:
        print(says, flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        interrupts.forget()
"""


@contextmanager
def running(code: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_native_code_at_once(number: signal.Signals) -> None:
    with running(NATIVE) as process:
        time.sleep(1)  # until it computes
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):  # MLX computes on
            process.wait(4 * interrupts.SAME)
        process.send_signal(number)
        assert process.wait(30) == -number


def test_the_second_signal_ends_what_swallows_the_first() -> None:
    with running(SWALLOWS) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "swallowed\n"
        time.sleep(4 * interrupts.SAME)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT


def test_a_signal_that_arrives_twice_at_once_is_one_request() -> None:
    """As `timeout -s INT` and launchers do, which signal the process and then its group."""
    with running(SWALLOWS) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "swallowed\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(4 * interrupts.SAME)


def test_a_request_that_was_met_is_no_first_one() -> None:
    with running(MEETS) as process:
        assert process.stdout is not None
        for says in ("met\n", "met again\n", ""):
            time.sleep(2 * interrupts.SAME)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == says
        assert process.wait(30) == 0


def test_a_swallowed_interrupt_is_seen_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt raised inside a destructor is printed and forgotten by Python."""
    monkeypatch.setattr(interrupts, "_requested", [])
    clock = Clock()
    with contextlib.suppress(KeyboardInterrupt):
        interrupts._stop(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt), clock.step("anything"):
        pytest.fail("the step must not begin")
