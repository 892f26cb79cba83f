"""The process in which chat templates are rendered, and what is heard from it.

One process for all templates, started when the first is rendered, started anew when one has ended
it. It takes about a tenth of a second once, and about a ten thousandth for each prompt.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

# Seconds on the clock, for a machine that is busy with other things. The process has a limit of its
# own, in CPU seconds, which is the one that is met.
_PATIENCE = 60.0

_WORKER = Path(__file__).with_name("template_worker.py")

# Nothing is imported in it but the worker: no start-up files, no environment, the same path.
_START = (
    "import runpy, sys; worker = sys.argv[1]; sys.path[:] = sys.argv[2:]; "
    "runpy.run_path(worker, run_name='__main__')"
)


class Ended(Exception):
    """The process died, or was ended, while it rendered; ``late`` when it took too long."""

    def __init__(self, *, late: bool = False) -> None:
        super().__init__()
        self.late = late


class _Process:
    """One child process; not to be shared by threads or by forks."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        path = [os.path.abspath(folder) for folder in sys.path if folder]
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, str(_WORKER), *path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the tool
        )

    def ask(self, request: bytes) -> bytes:
        """Its answer, one line each way.

        Raises:
            Ended: when it does not answer.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        deadline = time.monotonic() + _PATIENCE
        try:
            self._child.stdin.write(request + b"\n")
            self._child.stdin.flush()
        except OSError:
            raise self._ended() from None
        pieces: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while not (pieces and pieces[-1].endswith(b"\n")):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise Ended(late=True)
                piece = os.read(self._child.stdout.fileno(), 1 << 16)
                if not piece:
                    raise self._ended()
                pieces.append(piece)
        return b"".join(pieces)

    def _ended(self) -> Ended:
        return Ended(late=self._child.wait() == -signal.SIGPROF)

    def close(self) -> None:
        """End it, if this is the process that started it."""
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self.owner == os.getpid():
            self._child.kill()
            self._child.wait()


_lock = threading.Lock()
_running: _Process | None = None


def _close() -> None:
    global _running
    if _running is not None:
        _running.close()
        _running = None


atexit.register(_close)


def render(source: str, values: dict[str, Any], today: str | None) -> dict[str, str]:
    """What `convert.tokenizers.template_worker.answer` says of a template.

    Raises:
        Ended: when the template ended the process, by its time, its memory or a crash.
    """
    request = json.dumps({"source": source, "values": values, "today": today}).encode()
    with _lock:
        if _running is not None and _running.owner != os.getpid():
            _close()  # of the process that this one was forked from
        fresh = _running is None
        try:
            return _asked(request)
        except Ended as ended:
            # It may have died in the meantime, for a reason that is not the template's.
            if fresh or ended.late:
                raise
        return _asked(request)


def _asked(request: bytes) -> dict[str, str]:
    global _running
    if _running is None:
        _running = _Process()
    try:
        return dict(json.loads(_running.ask(request)))
    except BaseException:
        _close()  # also when interrupted: what is still to come would answer the next request
        raise
