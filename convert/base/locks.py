"""Locks by which a living process is told from a dead one: the system lets go of a dead one's."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

# What a file system without locks answers.
_UNKNOWN = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


class Busy(Exception):
    """Another process, or another part of this one, holds the lock."""


def hold(descriptor: int) -> bool:
    """Lock an open file until it is closed, or the process ends.

    Args:
        descriptor: open for writing, as network file systems ask for.

    Returns:
        False where the file system has no locks, so that nothing is known.

    Raises:
        Busy: when it is locked already.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNKNOWN:
            return False
        raise Busy from None
    return True


class LockFile:
    """A file that is locked while this object is open, and removed at its end.

    Attributes:
        was_there: whether the file was there before, as a process that was killed leaves it.
        certain: whether the lock holds; False where the file system has none.
    """

    def __init__(self, path: Path) -> None:
        """Create the file where it is missing, and lock it.

        Raises:
            Busy: when it is locked already.
            OSError: when it cannot be created.
        """
        self._path = path
        while True:
            self.was_there = path.exists()
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self.certain = hold(self._descriptor)
                # It may have been removed by the one who held it, between the two lines above.
                if os.path.samestat(os.fstat(self._descriptor), os.stat(path)):
                    return
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)

    def close(self, *, remove: bool = True) -> None:
        """Let go of the lock.

        Args:
            remove: the file as well.
        """
        if remove:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
