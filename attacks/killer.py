"""``python -m attacks.killer``: SIGKILL at random moments of every command that writes.

After each kill no partial file may have a final name, and the source must be unchanged. After the
same command has run again, only its outputs may be left: no staged file, no temporary folder, no
process.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import click

from attacks.base import digest
from attacks.commands import COMMANDS, Place, finish, start
from attacks.ground import build, warm

#: Files that belong to a GGUF and must not exist without it.
_COMPANIONS = (".README.md", ".abl.json", ".Modelfile")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", metavar="[COMMAND...]", nargs=-1, type=click.Choice([*COMMANDS]))
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Minutes to run.")
@click.option("--kills", type=click.IntRange(1), help="Kills.  [default: 200]")
@click.option("--seed", default="0", help="Seed of the moments of the kills.")
def main(names: tuple[str, ...], minutes: float | None, kills: int | None, seed: str) -> None:
    """Kill abl-mlx at random moments, and check the files and processes that are left.

    COMMAND is one or several of those in attacks/commands.py; without COMMAND all are
    run. Exit code 1 if there was a fault.
    """
    random = Random(seed)
    faults: list[str] = []
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="attacked-") as folder:
        place = Place.make(Path(folder))
        build(place.base)
        warm()
        sound = digest(place.base)
        whole = {name: Whole(place, name) for name in names or COMMANDS}
        end = None if minutes is None else time.monotonic() + 60 * minutes
        for number in range(kills or (200 if end is None else sys.maxsize)):
            if end is not None and time.monotonic() > end:
                break
            name = list(whole)[number % len(whole)]
            moment = random.random()
            for fault in whole[name].kill(moment):
                faults.append(f"{name}, killed at {moment:.3f} of its time: {fault}")
                print(faults[-1], flush=True)
            if digest(place.base) != sound:
                faults.append(f"{name}, killed at {moment:.3f} of its time: the source changed")
                print(faults[-1], flush=True)
                break
            counts[name] += 1
    for name, count in counts.items():
        print(f"{count:6} kills of {name}")
    print(f"{counts.total():6} kills, {len(faults)} faults")
    sys.exit(1 if faults else 0)


class Whole:
    """A command, and what it writes when it is not killed."""

    def __init__(self, place: Place, name: str) -> None:
        self._place, self._name = place, name
        self._log = place.base.parent / "log"
        place.empty()
        before = time.monotonic()
        if code := self._run():
            sys.exit(f"{name} ends with {code}: {self._said()}")
        self._seconds = time.monotonic() - before
        self._files = place.written()
        self._entries = place.entries()

    def _run(self) -> int:
        return finish(start(self._place, self._name, self._log))

    def kill(self, moment: float) -> Iterator[str]:
        """Kill the command after a share of its duration, run it again, and yield each fault."""
        place = self._place
        place.empty()
        child = start(place, self._name, self._log)
        time.sleep(moment * self._seconds)
        os.kill(child, signal.SIGKILL)
        finish(child)
        yield from self._orphans()
        yield from place.wrong(self._files)
        code = self._run()
        if code == 1 and (refused := re.search(r"(\S+) already exists", self._said())):
            # An output that was complete before the kill is in the way of the next run.
            if refused[1].endswith(_COMPANIONS):
                yield f"the next run finds {refused[1]}"
            place.empty_outputs()
            code = self._run()
        if code:
            yield f"the next run ends with {code}: {self._said()}"
            return
        if (entries := place.entries()) != self._entries:
            yield f"after the next run there is {sorted(set(entries) ^ set(self._entries))}"
        if left := sorted(path.name for path in place.temporary.iterdir()):
            yield f"after the next run temporary folders are left: {left}"
        yield from place.wrong(self._files)

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-1000:]

    def _orphans(self) -> Iterator[str]:
        """Yield each process that the killed one has left behind (Linux)."""
        wanted = f"TMPDIR={self._place.temporary}".encode()
        end = time.monotonic() + 10
        left: list[str] = []
        while time.monotonic() < end:
            left = [str(process) for process in _with(wanted)]
            if not left:
                return
            time.sleep(0.05)
        yield f"it left the processes {', '.join(left)}"


def _with(wanted: bytes) -> Iterator[int]:
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (place / "environ").read_bytes().split(b"\0"):
                yield int(place.name)
        except OSError:
            continue


if __name__ == "__main__":
    main()
