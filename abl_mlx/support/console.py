"""Messages and progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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

    Nothing is shown where stderr is no terminal.
    """
    from tqdm import tqdm

    return tqdm(
        total=total, desc=escape.line(label), unit=unit, file=sys.stderr,
        disable=True if _hushed else None, leave=False,
    )  # fmt: skip


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
