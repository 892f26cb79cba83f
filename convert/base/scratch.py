"""Temporary folders, removed at the end, or by a later process if theirs was killed."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from convert.base.errors import UserError
from convert.base.locks import Busy, LockFile

if TYPE_CHECKING:
    import numpy as np

_PREFIX, _LOCK = "abl-mlx-", "lock"

# Seconds for which a folder without a lock file is left alone: its process may just be making it.
_FRESH = 3600.0

# Bytes of zeros written at a time on systems without posix_fallocate.
_PIECE = 1 << 24


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


def array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A new float32 array in a mapped file, whose space on the disk is allocated at once.

    Without that, writing to the mapped file on a full disk would kill the process.

    Raises:
        UserError: when the disk has too little space.
    """
    import numpy as np  # lazily: a command's help needs none

    _take_room(path, 4 * math.prod(shape))
    return np.memmap(path, np.float32, "r+", shape=shape)


class RowsFile:
    """A float32 array (count, width) in a file, read and written some rows at a time."""

    def __init__(self, path: Path, count: int, width: int) -> None:
        """Allocate the file's space on the disk.

        Raises:
            UserError: when the disk has too little space.
        """
        self._path, self._width = path, width
        _take_room(path, 4 * count * width)

    def write(self, first: int, rows: np.ndarray) -> None:
        """Write rows (n, width) to the rows from ``first`` on."""
        import numpy as np  # lazily: a command's help needs none

        with open(self._path, "r+b") as stream:
            stream.seek(4 * first * self._width)
            stream.write(np.ascontiguousarray(rows, np.float32).data)

    def read(self, first: int, count: int) -> np.ndarray:
        """The ``count`` rows from ``first`` on, float32 (count, width)."""
        import numpy as np  # lazily: a command's help needs none

        start = 4 * first * self._width
        found = np.fromfile(self._path, np.float32, count * self._width, offset=start)
        return found.reshape(count, self._width)


def _take_room(path: Path, size: int) -> None:
    try:
        with open(path, "wb") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, size)
            else:
                for start in range(0, size, _PIECE):
                    stream.write(bytes(min(_PIECE, size - start)))
    except OSError as error:
        raise UserError(
            f"{tempfile.gettempdir()} has no room for {size / 1e9:.2f} GB ({error.strerror}): free "
            "some space, or set TMPDIR to a larger disk."
        ) from None


def sweep() -> None:
    """Remove the temporary folders that killed processes of this user left behind."""
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
