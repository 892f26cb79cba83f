"""SIGINT and SIGTERM stop the work at the next check; a second signal stops it at once.

Python raises KeyboardInterrupt at whatever point it has reached. Inside a destructor or a callback
from native code the exception is printed and lost, so the request is also kept here and checked
between steps. And while native code computes, Python does not handle signals at all. So the first
signal also wakes a thread that restores the signal's default action, which is to end the process;
a second signal then ends it without Python's help.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

#: Seconds in which a repeated signal counts as the same request: `timeout` and some launchers
#: signal the process and its group, so that one Ctrl-C arrives twice.
SAME = 0.3

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# The signals that were received, and the times; both threads use these under the lock.
_requested: list[int] = []
_lock = threading.Lock()
_forgotten = 0.0
_asked_at = -SAME
_watching = False


def listen() -> None:
    """Handle SIGINT and SIGTERM. Only the command line calls this, because it owns the process."""
    global _watching
    for number in _SIGNALS:
        signal.signal(number, _stop)
    if not _watching:
        _watching = True
        awake, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(awake,), name="signals", daemon=True).start()


def check() -> None:
    """Stop now if a signal has been received.

    Raises:
        KeyboardInterrupt: after SIGINT.
        SystemExit: after SIGTERM.
    """
    if _requested:
        _raise(_requested[-1])


def forget() -> None:
    """Clear a received signal, after it was handled in another way than by stopping."""
    global _forgotten, _asked_at
    with _lock:
        _forgotten, _asked_at = time.monotonic(), -SAME
        _requested.clear()
        # Python lets only the main thread set handlers.
        if _watching and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    global _asked_at
    now = time.monotonic()
    again = now - _asked_at < SAME
    _asked_at = now
    _requested.append(number)
    if not again:
        _raise(number)


def _watch(awake: int) -> None:
    """Wait for signals; after each, make the next signal of its kind end the process."""
    system = ctypes.CDLL(None)
    system.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    system.signal.restype = ctypes.c_void_p
    while number := os.read(awake, 1):
        heard = time.monotonic()
        time.sleep(SAME)
        with _lock:
            # The main thread may have handled the request before this thread was woken.
            met = _forgotten > heard - SAME
            # The C function, because Python's works in the main thread only. Null is SIG_DFL.
            if number[0] in _SIGNALS and not met:
                system.signal(number[0], None)


def _raise(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
