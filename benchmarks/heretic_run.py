"""Run Heretic (PyPI `heretic-llm`) unattended, and save the model that it ranks first.

    python benchmarks/heretic_run.py VENV MODEL OUT PROMPTS TOLD.json --system TEXT --cpu-seconds N

VENV is a virtual environment with Heretic, which runs as a separate program and is no part of
abl-mlx. PROMPTS is a folder with {bad,good}-{train,evaluation}.txt. Heretic asks questions in a
terminal, so it gets a pseudo-terminal. After its CPU seconds it is interrupted, as its users do. It
then offers the Pareto-optimal trials, and the first, which refuses least, is saved. Its settings
are the defaults, except for four that make it faster here: 32 tokens per reply instead of 100, all
evaluation prompts in one batch instead of a timed search for the best size, no search for an
opening that all replies share (Qwen's have none), and float32.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

REPLY_TOKENS, BATCH = 32, 42

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_OFFER = re.compile(r"\[Trial +(\d+)\] Refusals: +(\d+)/(\d+), KL divergence: ([\d.]+)")
_DONE = re.compile(r"^ +\* Refusals: ", re.MULTILINE)


def command_in(venv: Path) -> Path:
    """Heretic's command in a virtual environment."""
    return venv / "bin" / "heretic"


def arguments(model: Path, prompts: Path, system: str, checkpoints: Path) -> list[str]:
    """Heretic's arguments."""
    given = {
        "model": str(model),
        "device-map": "cpu",
        "dtypes": '["float32"]',
        "batch-size": str(BATCH),
        "max-response-length": str(REPLY_TOKENS),
        "response-prefix": "",
        "seed": "0",
        "export-strategy": "MERGE",
        "study-checkpoint-dir": str(checkpoints),
        "system-prompt": system,
    }
    for kind in ("good", "bad"):
        for option, part in (("prompts", "train"), ("evaluation-prompts", "evaluation")):
            given[f"{kind}-{option}.dataset"] = str(prompts / f"{kind}-{part}.txt")
            given[f"{kind}-{option}.split"] = "null"
    return [text for name, value in given.items() for text in (f"--{name}", value)]


class Terminal:
    """A program in a pseudo-terminal.

    Attributes:
        text: its output so far, without escape sequences.
    """

    def __init__(self, command: list[str]) -> None:
        self.text = ""
        self._seen = 0
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            # Background jobs of a shell ignore SIGINT, and so would their children.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            plain = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "HF_HUB_OFFLINE": "1"}
            os.execve(command[0], command, {**os.environ, **plain})
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))

    def wait(self, words: str, *, seconds: float | None = None) -> bool:
        """Read until ``words`` are printed; with ``seconds``, for at most that much CPU time.

        Raises:
            SystemExit: when the program ends before.
        """
        while words not in self.text[self._seen :]:
            if seconds is not None and self._used() > seconds:
                return False
            if not select.select([self._file], [], [], 1)[0]:
                continue
            with contextlib.suppress(OSError):  # Linux reports the end of the program by an error
                if read := os.read(self._file, 1 << 16).decode("utf-8", "replace"):
                    print(read, end="", flush=True)
                    self.text += _ESCAPES.sub("", read)
                    continue
            raise SystemExit(f"Heretic ended before it said {words!r}")
        self._seen = self.text.index(words, self._seen) + len(words)
        return True

    def type(self, text: str) -> None:
        """Type a line."""
        os.write(self._file, f"{text}\r".encode())

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        os.kill(self._pid, signal.SIGINT)

    def end(self) -> None:
        """Stop the program."""
        os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)

    def _used(self) -> float:
        """CPU seconds of the program: ps writes [[days-]hours:]minutes:seconds."""
        shown = subprocess.run(
            ["ps", "-o", "time=", "-p", str(self._pid)], capture_output=True, text=True, check=True
        ).stdout.strip()
        days, _, clock = shown.rpartition("-")
        total = 0.0
        for part in clock.split(":"):
            total = 60 * total + float(part)
        return total + 86400 * int(days or 0)


def main() -> None:
    """Run Heretic, answer its questions, and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("venv", "model", "out", "prompts", "told"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--system", required=True, help="system prompt of all prompts")
    parser.add_argument("--cpu-seconds", type=float, required=True)
    given = parser.parse_args()
    checkpoints = given.out.with_name("heretic-checkpoints")
    # Heretic would ask whether to continue from earlier results.
    shutil.rmtree(checkpoints, ignore_errors=True)
    options = arguments(given.model, given.prompts, given.system, checkpoints)
    terminal = Terminal([str(command_in(given.venv)), *options])
    if not terminal.wait("Which trial do you want to use?", seconds=given.cpu_seconds):
        if not _DONE.search(terminal.text):
            terminal.end()
            sys.exit(f"Heretic ended no trial in {given.cpu_seconds:.0f} CPU seconds")
        terminal.interrupt()
        terminal.wait("Which trial do you want to use?")
    terminal.wait("Exit program")
    offer = _OFFER.search(terminal.text, terminal.text.rindex("Which trial"))
    assert offer is not None
    terminal.type("")
    terminal.wait("What do you want to do")
    terminal.wait("Return to the trial")
    terminal.type("")
    terminal.wait("Path to the folder")
    terminal.type(str(given.out))
    terminal.wait("Model saved to")
    terminal.end()
    trial, refused, asked, kl = offer.groups()
    told = {
        "trials": len(_DONE.findall(terminal.text)),
        "reply_tokens": REPLY_TOKENS,
        "chosen": int(trial),
        "refused": int(refused),
        "asked": int(asked),
        "kl": float(kl),
    }
    given.told.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
