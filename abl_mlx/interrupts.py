"""Ctrl-C and a polite kill stop the work, even where a library swallows the exception.

Python raises KeyboardInterrupt wherever it happens to be: inside a destructor or a callback of
native code it is printed and forgotten. So the request is remembered too, and looked for between
steps.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

_requested: list[int] = []


def listen() -> None:
    """Take over SIGINT and SIGTERM; for the command line, which owns the process."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)


def check() -> None:
    """Stop now if a signal has asked for it before.

    Raises:
        KeyboardInterrupt: after SIGINT.
        SystemExit: after SIGTERM.
    """
    if _requested:
        _raise(_requested[-1])


def forget() -> None:
    """Take back a request that has been met in another way than by stopping."""
    _requested.clear()


def _stop(number: int, frame: FrameType | None) -> None:
    _requested.append(number)
    _raise(number)


def _raise(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
