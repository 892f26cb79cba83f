"""Several processes of one command, as ``mlx.launch`` starts them on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

COMMAND = sys.executable, "-m", "abl_mlx"


#: Ports that a system gives to nobody who does not ask for them by number.
PORTS = range(20000, 32000)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing uses, one after the other.

    They are bound again only when the ranks have started, seconds later: ports that the system
    gives away by itself may be another server's by then.
    """
    while True:
        first = random.choice(PORTS)
        with ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))


def started(
    place: Path,
    commands: Sequence[Sequence[str]],
    more: Mapping[str, str] | None = None,
    largest: Mapping[int, int] | None = None,
) -> list[subprocess.Popen[str]]:
    """One process for each command, which together are the ranks of MLX's ring.

    Args:
        place: a folder for the list of addresses.
        commands: the arguments of `abl-mlx` for each rank.
        more: further environment variables.
        largest: for some ranks the bytes of the largest file that they may write, beyond which they
            find the disk full.
    """

    def limit(rank: int) -> None:
        if largest is not None and rank in largest:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest[rank], largest[rank]))

    hosts = place / f"hosts-{free_ports(1)[0]}.json"
    ports = free_ports(len(commands))
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    return [
        subprocess.Popen(
            [*COMMAND, *arguments],
            env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank), **(more or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(limit, rank),
        )
        for rank, arguments in enumerate(commands)
    ]


def wait_for(process: subprocess.Popen[str], said: str) -> None:
    """Wait until a process has said something on stderr."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        if said in line:
            return
        lines.append(line)
    raise AssertionError("".join(lines))


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, last line of stderr without MLX's own, stdout) of each process."""
    found = []
    for process in processes:
        out, errors = process.communicate(timeout=300)
        lines = [line for line in errors.splitlines() if not line.startswith("[ring]")]
        found.append((process.returncode, lines[-1] if lines else "", out))
    return found


def by_mlx_launch(count: int, *arguments: str) -> dict[str, Any]:
    """The record that `abl-mlx` prints when ``mlx.launch`` starts it ``count`` times."""
    launch = Path(sys.executable).with_name("mlx.launch")
    # Each rank listens on ports of its own, from the first on.
    first = free_ports(8)[0]
    result = subprocess.run(
        [
            launch, "-n", str(count), "--backend", "ring", "--starting-port", str(first), "--",
            *COMMAND, *arguments, "--json",
        ],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    record: dict[str, Any] = json.loads(result.stdout)
    return record
