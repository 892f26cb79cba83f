"""A process that runs cases one after another, until one kills it or it is told to stop.

It is forked from a process that has imported the tool and computed nothing, so it starts quickly
and a case takes no longer than its command. If it dies, the parent process derives the verdict on
the current case from the exit status.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random
from typing import Any

from attacks.kinds import KINDS
from attacks.verdict import Verdict, of_output

#: CPU seconds for one command.
SECONDS = 20.0

#: Bytes of memory that a command may use beyond twice its input.
MEMORY = 200 << 20

# Bytes of address space that a worker may add before allocations fail.
_SPACE = 6 << 30

# The number of cases, and the growth in bytes, after which a new process takes over.
_CASES, _GROWTH = 400, 500 << 20


def serve(base: Path, seed: str, read: int, write: int) -> None:
    """Answer lines "KIND NUMBER" with a verdict in JSON; ends when it is time for a new process."""
    log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    # The tool's output goes there too, in a terminal's encoding.
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="strict", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    _limit_space()
    start = _status("VmRSS")
    with os.fdopen(read, "rb") as requests, os.fdopen(write, "wb") as answers:
        for done, line in enumerate(requests, start=1):
            kind, number, kept = json.loads(line)
            verdict = attack(base, seed, kind, number, log.fileno(), kept)
            # Garbage of one case must not count for the next.
            gc.collect()
            last = done >= _CASES or _status("VmRSS") > start + _GROWTH
            answers.write(json.dumps([verdict.kind, verdict.detail, last]).encode() + b"\n")
            answers.flush()
            if last:
                return


def attack(
    base: Path, seed: str, kind: str, number: int, log: int, kept: str | None = None
) -> Verdict:
    """Make one case and run it.

    Args:
        log: descriptor of the file that standard output and error go to.
        kept: the folder that keeps its input and its command; None to keep nothing.
    """
    rng = Random(f"{seed} {kind} {number}")
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        to = Path(name)
        try:
            case = KINDS[kind](base, to, rng)
        except Exception as error:
            return Verdict(
                "crash", f"of the attack itself: {of_output(1, error, '').detail} {error}"
            )
        if kept is not None:
            _keep(Path(kept), to, case.arguments, case.environment)
        os.environ.update(case.environment)
        os.environ["XDG_CACHE_HOME"] = str(to / "cache")
        os.ftruncate(log, 0)
        os.lseek(log, 0, os.SEEK_SET)
        _reset_peak()
        before = _status("VmRSS")
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        code, error = _run(case.arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = _status("VmHWM") - before
        sys.stdout.flush()
        sys.stderr.flush()
        os.lseek(log, 0, os.SEEK_SET)
        output = os.read(log, 10_000_000).decode("utf-8", "surrogateescape")
        verdict = of_output(code, error, output)
        if not verdict.is_fault and grown > 2 * case.size + MEMORY:
            verdict = Verdict(
                "memory", f"{grown >> 20} MB for {case.size >> 10} KB {case.arguments[0]}"
            )
        if code != 0 and not verdict.is_fault:
            left = [path.name for path in case.outputs if path.exists()]
            if left:
                verdict = Verdict("partial", f"{case.arguments[0]} left {left[0]}")
        for variable in case.environment:
            os.environ.pop(variable, None)
        return verdict


def _run(arguments: tuple[str, ...]) -> tuple[int, BaseException | None]:
    from abl_mlx.cli.main import cli

    try:
        # As in a terminal, because elsewhere click removes escape sequences.
        cli.main(list(arguments), prog_name="abl-mlx", color=True)
    except SystemExit as end:
        code: Any = end.code
        return (code if isinstance(code, int) else 1 if code else 0), None
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        return 1, error
    return 0, None


def _keep(to: Path, folder: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    """Copy a case's input, and write down the command that read it."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    said = json.dumps({"arguments": arguments, "environment": environment}, indent=1)
    (to / "command.json").write_text(said.replace(str(folder), str(to)))


def _limit_space() -> None:
    most = _status("VmSize") + _SPACE
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _reset_peak() -> None:
    """Reset the kernel's record of the process's peak memory (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """A figure from /proc/self/status in bytes; 0 where there is no such file, as on macOS."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) << 10
    return 0
