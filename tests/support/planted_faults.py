"""Commands that fail in every way there is, for `attacks` to find: prints a verdict on each.

A program of its own, because it forks before anything is computed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import click

from abl_mlx.cli.main import cli
from attacks import pool, worker
from attacks.case import Attack, Case
from attacks.kinds import KINDS
from convert.base.errors import UserError


def succeed(out: Path) -> None:
    click.echo("done")


def fail(out: Path) -> None:
    raise UserError("model.gguf is damaged: fetch it again.")


def blow_up(out: Path) -> None:
    raise KeyError("model")


def hang(out: Path) -> None:
    while True:
        pass


def crash(out: Path) -> None:
    os.abort()


def leave(out: Path) -> None:
    os._exit(0)


def paint(out: Path) -> None:
    click.echo("the tensor \x1b[31mw\x1b[0m is fine")


def paint_from_native_code(out: Path) -> None:
    os.write(2, b"warning: \x1b[31mw\n")


def fill(out: Path) -> None:
    click.echo(len(bytearray(os.urandom(1)) * (300 << 20)))


def leave_a_part(out: Path) -> None:
    out.write_text("half")
    raise UserError("the disk is full: make room.")


def say_nothing(out: Path) -> None:
    sys.exit(1)


FAULTS: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        succeed, fail, blow_up, hang, crash, leave, paint, paint_from_native_code, fill,
        leave_a_part, say_nothing,
    )
}  # fmt: skip


def _attack(name: str) -> Attack:
    def attack(base: Path, to: Path, rng: Random) -> Case:
        return Case((name, str(to / "out")), 1000, (to / "out",))

    return attack


def _command(name: str, function: Callable[[Path], None]) -> click.Command:
    @click.command(name)
    @click.argument("out", type=click.Path(path_type=Path))
    def command(out: Path) -> None:
        function(out)

    return command


def main() -> None:
    worker.SECONDS = 1.0
    for name, function in FAULTS.items():
        cli.add_command(_command(name, function))
        KINDS[name] = _attack(name)
    # A good case after each bad one: nothing of that may be left.
    tasks = [task for name in FAULTS for task in ((name, 0, None), ("succeed", 1, None))]
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as base:
        for (name, number, _), verdict in pool.run(Path(base), "0", iter(tasks), 1):
            found.setdefault(f"{name} {number}", []).append(verdict.kind)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
