"""Seconds per step, printed on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from abl_mlx.support import interrupts
from abl_mlx.support.console import say


@dataclass
class Clock:
    """Seconds per step; each step is told on stderr as it begins, and where that is no terminal as
    it ends.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step; a name used twice adds up."""
        interrupts.check()
        say(f"· {name}")
        start = time.perf_counter()
        yield
        interrupts.check()
        elapsed = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + elapsed, 3)
        if not sys.stderr.isatty():  # in a terminal progress bars tell the time
            say(f"  {name}: {elapsed:.1f} s")
