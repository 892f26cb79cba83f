"""Temporary folders that go with their process, or with the next one where that was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convert.locks import Busy, LockFile

_PREFIX, _LOCK = "abl-mlx-", "lock"

# A folder without a lock file may be one that is just being made.
_FRESH = 3600.0


@contextmanager
def scratch() -> Iterator[Path]:
    """A new, empty temporary folder, removed at the end."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        lock = LockFile(folder / _LOCK)
        try:
            inside = folder / "files"
            inside.mkdir()
            yield inside
        finally:
            lock.close(remove=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep() -> None:
    """Remove what killed processes of this user left among the temporary folders."""
    with suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError, Busy):
                    _remove_if_left(Path(entry.path), entry.stat(follow_symlinks=False))


def _remove_if_left(folder: Path, status: os.stat_result) -> None:
    if status.st_uid != os.getuid():
        return
    if (folder / _LOCK).exists():
        lock = LockFile(folder / _LOCK)
        lock.close(remove=False)
        if not lock.certain:
            return
    elif time.time() - status.st_mtime < _FRESH:
        return
    shutil.rmtree(folder, ignore_errors=True)
