"""Messages and progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from convert.base import escape


def say(text: str) -> None:
    """Print a line, or a table of several lines, on stderr."""
    print(escape.block(text), file=sys.stderr, flush=True)


def percent(share: float | None) -> str:
    """A share as text in percent; a dash for None."""
    return "–" if share is None else f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def progress(total: int, label: str, unit: str = "prompt") -> Any:
    """A progress bar on stderr; nothing is shown where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total, desc=escape.line(label), unit=unit, file=sys.stderr, disable=None, leave=False
    )


@contextmanager
def progress_to(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Context manager of a progress bar; it yields a function to call with (done, total)."""
    with progress(1, label, unit) as bar:

        def moved(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield moved
