"""File locks. The system releases those of a dead process, so a held lock shows a living one."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

# Errors with which a file system without locks answers.
_UNKNOWN = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


class Busy(Exception):
    """Another process, or another part of this one, holds the lock."""


def hold(descriptor: int) -> bool:
    """Lock an open file until it is closed or the process ends.

    Args:
        descriptor: of a file open for writing, which network file systems require.

    Returns:
        True when the file is locked; False where the file system has no locks.

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
    """A file that is locked until this object is closed, which also removes the file.

    Attributes:
        was_there: whether the file existed before; a killed process leaves its file behind.
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
                # Between open and lock, the process that held the file may have removed it.
                if os.path.samestat(os.fstat(self._descriptor), os.stat(path)):
                    return
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)

    def close(self, *, remove: bool = True) -> None:
        """Release the lock.

        Args:
            remove: whether to remove the file as well.
        """
        if remove:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
