"""Worker processes, one per core, and the verdicts on the cases that they run."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from attacks import worker
from attacks.verdict import Verdict

# Seconds of wall time after which a worker is ended; the worker's own limit is in CPU seconds.
_PATIENCE = 90.0

Task = tuple[str, int, str | None]


@dataclass
class _Worker:
    pid: int
    requests: int
    answers: int
    task: Task | None = None
    since: float = 0.0


def run(base: Path, seed: str, tasks: Iterator[Task], size: int) -> Iterator[tuple[Task, Verdict]]:
    """Yield each task (kind, number, folder for its input) with the verdict on it, as they end.

    Args:
        base: the sound inputs.
        tasks: the caller ends this iterator.
        size: the number of processes.
    """
    idle: list[_Worker] = []
    busy: dict[int, _Worker] = {}
    more = True
    with selectors.DefaultSelector() as selector:
        try:
            while more or busy:
                while more and len(busy) < size:
                    task = next(tasks, None)
                    if task is None:
                        more = False
                        break
                    one = idle.pop() if idle else _start(base, seed, [*idle, *busy.values()])
                    one.task, one.since = task, time.monotonic()
                    with contextlib.suppress(BrokenPipeError):
                        os.write(one.requests, json.dumps(task).encode() + b"\n")
                    selector.register(one.answers, selectors.EVENT_READ, one)
                    busy[one.pid] = one
                for key, _ in selector.select(1.0):
                    one = key.data
                    selector.unregister(one.answers)
                    del busy[one.pid]
                    verdict, alive = _answer(one)
                    assert one.task is not None
                    yield one.task, verdict
                    if alive:
                        idle.append(one)
                for one in busy.values():
                    if time.monotonic() - one.since > _PATIENCE:
                        os.kill(one.pid, signal.SIGALRM)
        finally:
            for one in [*idle, *busy.values()]:
                os.kill(one.pid, signal.SIGKILL)
                _bury(one)


def _start(base: Path, seed: str, others: list[_Worker]) -> _Worker:
    theirs, requests = os.pipe()
    answers, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            for descriptor in (requests, answers):
                os.close(descriptor)
            for one in others:  # a pipe is at its end only when no process holds it open
                os.close(one.requests)
                os.close(one.answers)
            worker.serve(base, seed, theirs, said)
        finally:
            os._exit(0)
    os.close(theirs)
    os.close(said)
    return _Worker(pid, requests, answers)


def _answer(one: _Worker) -> tuple[Verdict, bool]:
    """A worker's verdict on its case, or that of its death; and whether the worker lives."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(one.answers, 1 << 16)
        if not piece:
            break
        line += piece
    if line.endswith(b"\n"):
        kind, detail, last = json.loads(line)
        if last:
            _bury(one)
        return Verdict(kind, detail), not last
    status = _bury(one)
    assert one.task is not None
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if ended in (signal.SIGPROF, signal.SIGALRM):
        return Verdict("hang", f"more than {worker.SECONDS:g} s"), False
    name = signal.Signals(ended).name if ended else f"exit {os.waitstatus_to_exitcode(status)}"
    return Verdict("crash", name), False


def _bury(one: _Worker) -> int:
    """Close a worker's pipes and wait until it has ended."""
    for descriptor in (one.requests, one.answers):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    # Its children (llama.cpp, templates) share its session, or end when their input is closed.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(one.pid, signal.SIGKILL)
    return os.waitpid(one.pid, 0)[1]
