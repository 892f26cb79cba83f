"""Runs a program that must end when its parent process ends: `guard.py PROGRAM ARG...`.

The parent holds the other end of stdin. When that is closed, by intent or because the parent was
killed, the program is ended. This file is run by itself and imports nothing of this package.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

# Seconds that the program may take to end before it is killed.
_ENDING = 10


def main() -> None:
    """Run the program, and exit with its exit code."""
    try:
        program = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.exit(f"error: {sys.argv[1]} cannot be started: {error.strerror}.")
    threading.Thread(target=_end_with_the_parent, args=(program,), daemon=True).start()
    code = program.wait()
    # Returning would wait for the thread that reads stdin.
    os._exit(code if code >= 0 else 128 - code)


def _end_with_the_parent(program: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1024):
        pass
    program.terminate()
    try:
        program.wait(_ENDING)
    except subprocess.TimeoutExpired:
        program.kill()


if __name__ == "__main__":
    main()
