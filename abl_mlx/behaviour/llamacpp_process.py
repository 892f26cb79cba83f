"""Starts, watches and ends the process in which llama.cpp runs."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from convert.base import escape
from convert.base.errors import UserError

_PROGRAM = Path(__file__).with_name("llamacpp_child.py")

#: CPU seconds that a model may take to load: 8, and one more for each 20 MB. No sound model takes
#: so long; a damaged one may make llama.cpp compute forever.
COMPUTING, BYTES_PER_SECOND = 8.0, 20e6

#: The limit of the elapsed time, which allows for a slow disk or a busy machine: this many seconds
#: plus this multiple of the CPU seconds.
WAITING, TIMES = 60.0, 10.0

#: The setting of GNU's OpenMP with which llama.cpp's threads soon sleep while they wait for each
#: other. By default they keep their cores busy for longer, and beside other programs each waits for
#: one that is not running: a reply then takes twice the time and twice the CPU time.
RESTING = {"GOMP_SPINCOUNT": "10000"}

#: The characters that are quoted at most of what llama.cpp says.
_LONGEST_REASON = 300


class LlamaProcess:
    """A process with llama.cpp and a model, reachable at a local address until `stop`."""

    def __init__(self, what: str, settings: dict[str, Any], size: int) -> None:
        """Start the process and wait until the model is loaded.

        Args:
            what: the model's name, for messages.
            settings: the settings for `llamacpp_child`.
            size: the model's size in bytes, which limits the time to load.

        Raises:
            UserError: when the model does not load, in llama.cpp's own words if it has any.
        """
        self._what = what
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        computing = COMPUTING + size / BYTES_PER_SECOND
        settings = {**settings, "loading": computing, "modules": sys.path}
        # It has its own session: Ctrl-C in a terminal goes to the parent, which ends this process.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            # Otherwise ggml would start a debugger for a backtrace when an assertion fails.
            env={**RESTING, **os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        try:
            #: The address of its server.
            self.address: str = self._load(settings, computing)
        except BaseException:
            self.stop()
            raise

    def _load(self, settings: dict[str, Any], computing: float) -> str:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass
        waiting = WAITING + TIMES * computing
        end = time.monotonic() + waiting
        while not select.select([process.stdout], [], [], 1)[0]:
            if time.monotonic() > end:
                raise UserError(f"llama.cpp did not load {self._what} within {waiting:.0f} s.")
        line = process.stdout.readline()
        if not line:
            if process.wait() == -signal.SIGXCPU:
                raise UserError(
                    f"llama.cpp did not load {self._what} within {computing:.0f} s of computing: "
                    "the file is damaged, or not what its metadata say."
                )
            raise UserError(f"llama.cpp cannot load {self._what}: {self.ended()}")
        answer = json.loads(line)
        if "address" in answer:
            return str(answer["address"])
        raise UserError(f"llama.cpp cannot load {self._what}: {self._said() or answer['error']}")

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def died(self) -> bool:
        """Whether the process has ended by itself; waits a moment to find out."""
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ended(self) -> str:
        """How the process ended and the last lines of its log; only valid after its end."""
        code = self._process.returncode
        if code == -signal.SIGKILL:
            return "its process was killed, as the system does when memory runs out."
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = self._said()
        return f"its process crashed ({how}){': ' + said if said else '.'}"

    def _said(self) -> str:
        self._log.seek(0)
        return reason(self._log.read().decode(errors="replace"))

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None and not stream.closed:
                stream.close()


def reason(log: str) -> str:
    """The line of llama.cpp's log that gives the reason of a failure; empty if there is none.

    llama.cpp quotes names from the file, which may be of any length: the line is shortened.
    """
    lines = [line.strip() for line in log.splitlines()]
    for marks in (
        ("ggml_assert", "what():"),
        ("error loading model", "failed to", "error:", "invalid", "unknown", "missing"),
    ):
        for line in lines:
            if any(mark in line.lower() for mark in marks):
                # Drop a prefix such as "0.00.012.345 E llama_model_load: " or a source file.
                return escape.shortened(line.split(": ", 1)[-1], _LONGEST_REASON)
    return ""
