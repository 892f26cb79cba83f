"""Ends this process when another rank is lost, even where native code waits for it forever.

MLX reports a lost connection to the exchange that was under way. Exchanges that were asked for with
it, such as those of the other layers of a split model, then wait without an end, and Python with
them. So a thread looks whether another process closed its end of a connection.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

#: Seconds in which this process may end by itself after a connection was lost.
GRACE = 10.0

# Milliseconds between two looks for the end of the watch.
_LOOK = 500

# What a connection shows whose other end was closed: the first on Linux, the second on macOS.
_CLOSED = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


def sockets() -> set[tuple[int, int]]:
    """The sockets of this process: descriptors, with the numbers that no later socket has."""
    found = set()
    with suppress(OSError):
        for name in os.listdir("/dev/fd"):
            with suppress(OSError, ValueError):
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode):
                    found.add((int(name), status.st_ino))
    return found


class Watch:
    """Looks at connections to other ranks from `start` to `stop`.

    If all are closed and the process still runs `GRACE` seconds later, the process ends with exit
    code 1. All, because MLX may keep a connection of an attempt that was made again.
    """

    def __init__(
        self, connections: Iterable[tuple[int, int]], message: str, tidy: Callable[[], None]
    ) -> None:
        """Nothing is looked at yet.

        Args:
            connections: the sockets, as from `sockets`.
            message: what is said on stderr before the process ends.
            tidy: removes what the process has begun to write.
        """
        self._message, self._tidy = message, tidy
        self._stopped = threading.Event()
        self._poll = select.poll()
        self._watched = dict(connections)
        for descriptor in self._watched:
            self._poll.register(descriptor, _CLOSED)

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._look, name="lost ranks", daemon=True).start()

    def stop(self) -> None:
        """End the watch: the command is over."""
        self._stopped.set()

    def _look(self) -> None:
        left = dict(self._watched)
        while left and not self._stopped.is_set():
            for descriptor, _ in self._poll.poll(_LOOK):
                self._poll.unregister(descriptor)
                del left[descriptor]
                if not self._is_open(descriptor):  # MLX needs it no more
                    del self._watched[descriptor]
        if self._watched and not self._stopped.wait(GRACE):
            self._end()

    def _is_open(self, descriptor: int) -> bool:
        """Whether a descriptor is still that of the socket, and not of another file by now."""
        try:
            return os.fstat(descriptor).st_ino == self._watched[descriptor]
        except OSError:
            return False

    def _end(self) -> None:
        with suppress(OSError):
            self._tidy()
        print(f"Error: {self._message}", file=sys.stderr, flush=True)
        os._exit(1)
