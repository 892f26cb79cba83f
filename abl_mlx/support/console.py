"""Messages and progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from convert.base import escape

T = TypeVar("T")

_hushed = False


def hush() -> None:
    """Say nothing from now on, and show no progress: another process does."""
    global _hushed
    _hushed = True


def say(text: str) -> None:
    """Print a line, or a table of several lines, on stderr."""
    if _hushed:
        return
    print(escape.block(text), file=sys.stderr, flush=True)


def percent(share: float | None) -> str:
    """A share as text in percent; a dash for None."""
    return "–" if share is None else f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def progress(total: int | None, label: str, unit: str = "prompt") -> Any:
    """A progress bar on stderr, without an end if ``total`` is None.

    Nothing is shown where stderr is no terminal; `running` tells of it all the same.
    """
    return _bar()(
        total=total, desc=escape.line(label), unit=unit, file=sys.stderr,
        disable=True if _hushed else None, leave=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """How far a piece of work is.

    Attributes:
        done: of ``total`` units.
        total: None where the end is not known.
    """

    label: str
    done: int
    total: int | None


#: The bars that run, the innermost last.
_bars: list[Any] = []


def running() -> Progress | None:
    """The innermost progress bar that runs; any thread may ask."""
    for bar in _bars[-1:]:
        return Progress(bar.label, int(bar.n), None if bar.total is None else int(bar.total))
    return None


@cache
def _bar() -> Any:
    from tqdm import tqdm

    class Bar(tqdm):
        """A bar that also counts what it does not show."""

        def __init__(self, *, desc: str, **how: Any) -> None:
            super().__init__(desc=desc, **how)
            self.label = desc

        def __enter__(self) -> Any:
            _bars.append(self)
            return super().__enter__()

        def __exit__(self, *error: Any) -> Any:
            _bars[:] = [one for one in _bars if one is not self]  # tqdm compares by position
            return super().__exit__(*error)

        def update(self, n: float | None = 1) -> bool | None:
            if self.disable:
                self.n += n or 0
            return super().update(n)

    return Bar


def in_order(
    found: Iterable[tuple[int, T]], count: int, label: str, unit: str = "prompt"
) -> list[T]:
    """The values of (number, value) pairs that come in any order, by number, with a progress bar.

    Args:
        found: pairs with every number from 0 to ``count`` - 1.
        label, unit: as for `progress`.
    """
    values: dict[int, T] = {}
    with progress(count, label, unit) as bar:
        for number, value in found:
            values[number] = value
            bar.update()
    return [values[number] for number in range(count)]


@contextmanager
def progress_to(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Context manager of a progress bar; it yields a function to call with (done, total)."""
    with progress(1, label, unit) as bar:

        def moved(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield moved
