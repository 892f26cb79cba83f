"""Freed memory that serves the next arrays, instead of going back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Parameters of glibc's mallopt: the size of an array that gets pages of its own, of which 32 MB is
# the largest, and how much freed memory is kept.
_OWN_PAGES, _KEPT = -3, -1
_LARGEST = 32 << 20


@contextmanager
def kept_memory(size: int = 512 << 20) -> Iterator[None]:
    """Context manager in which up to ``size`` freed bytes are kept for the next arrays.

    Work on slabs makes arrays of the same sizes again and again. glibc gives each new pages, which
    the system first fills with zeros: a twelfth of the time of an edit. Elsewhere than in glibc
    nothing changes.
    """
    _set(size)
    try:
        yield
    finally:
        _set(2 * _LARGEST)  # where glibc itself arrives after it has freed an array of 32 MB
        _glibc("malloc_trim", 0)


def _set(kept: int) -> None:
    _glibc("mallopt", _OWN_PAGES, _LARGEST)
    _glibc("mallopt", _KEPT, kept)


def _glibc(name: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            getattr(ctypes.CDLL(None), name)(*arguments)
