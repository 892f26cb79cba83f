"""Timing of a command's steps, reported on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from abl_mlx.support import interrupts
from abl_mlx.support.console import say

#: The step that runs, of whatever clock; "" before the first one.
_now = ""


def now() -> str:
    """The step that runs; any thread may ask."""
    return _now


@dataclass
class Clock:
    """Measures the seconds of each step of a command.

    A line on stderr announces each step; where stderr is no terminal, another reports its time.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Context manager that times a step; the times of steps with the same name are added."""
        global _now
        interrupts.check()
        say(f"· {name}")
        _now = name
        start = time.perf_counter()
        yield
        interrupts.check()
        elapsed = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + elapsed, 3)
        if not sys.stderr.isatty():  # in a terminal, progress bars show the time
            say(f"  {name}: {elapsed:.1f} s")
