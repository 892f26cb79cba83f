"""Memory-mapped files."""

from __future__ import annotations

import mmap


def give_back(mapped: mmap.mmap, offset: int, size: int) -> None:
    """Let the system drop the pages of ``size`` bytes from ``offset`` on from memory.

    Views of these bytes stay valid: they are read from the file again when used. Without this call,
    reading through a large model would count its whole file as this process's memory. On systems
    without MADV_DONTNEED the function does nothing.
    """
    if size == 0 or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, start, offset + size - start)
