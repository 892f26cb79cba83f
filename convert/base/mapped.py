"""Memory-mapped files."""

from __future__ import annotations

import mmap


def give_back(mapped: mmap.mmap, offset: int, size: int) -> None:
    """Give the pages of ``size`` bytes that were looked at back to the system, where it takes them.

    Views of them stay valid: what is looked at again is read again. Without this, a walk through
    a large model would look as if the whole of it were held.
    """
    if size == 0 or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, start, offset + size - start)
