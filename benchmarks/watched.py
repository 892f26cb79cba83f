"""The cost of a command: seconds, CPU seconds, peak memory, and how busy the machine was.

    python benchmarks/watched.py COST.json COMMAND ARGUMENT...

runs the command and writes its cost, with that of the child processes that it waited for. This is a
program of its own, because a child's peak memory begins with the memory of its parent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """The cost of a command.

    Attributes:
        seconds: from its start to its end.
        cpu: seconds of all cores together, in user and system mode.
        memory: bytes resident at the peak, of the largest process.
        load: mean length of the run queue in the last minute, before and after.
    """

    seconds: float
    cpu: float
    memory: int
    load: tuple[float, float]

    @staticmethod
    def of(log: Path) -> Cost:
        """The cost of the command whose output is in ``log``."""
        return Cost(**json.loads(_beside(log).read_text()))


def _beside(log: Path) -> Path:
    return log.with_suffix(".cost.json")


def cost_of(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Cost:
    """Run a command to its end, with its output in ``log``.

    Raises:
        SystemExit: when it fails, with the end of what it printed.
    """
    with open(log, "wb") as stream:
        done = subprocess.run(
            [sys.executable, __file__, str(_beside(log)), *command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text(errors='replace')[-2000:]}")
    return Cost.of(log)


def main() -> None:
    """Run the command of the arguments, and write its cost."""
    place, *command = sys.argv[1:]
    before, start = os.getloadavg()[0], time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    cost = Cost(
        time.perf_counter() - start,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        (before, os.getloadavg()[0]),
    )
    Path(place).write_text(json.dumps(asdict(cost)))
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
