"""``python -m attacks.full_disk``: a disk that becomes full at any point of a command that writes.

Two methods are used where they are available: a limit on the size of files (any user), and a small
file system in memory (root on Linux). Each grants more and more room until the command succeeds. Up
to there the command must say in one sentence that there is no room, and leave no partial file.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from attacks.base import digest
from attacks.commands import COMMANDS, Place, finish, start
from attacks.ground import build, warm

#: The room that is granted, as shares of what a command needs.
SHARES = (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.995)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", metavar="[COMMAND...]", nargs=-1, type=click.Choice([*COMMANDS]))
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), help="The longest time in minutes."
)
def main(names: tuple[str, ...], minutes: float | None) -> None:
    """Let abl-mlx run out of disk space, and check its message and the files that it leaves.

    COMMAND is one or several of those in attacks/commands.py; without COMMAND all are
    run. Exit code 1 if there was a fault.
    """
    faults: list[str] = []
    cases = 0
    end = None if minutes is None else time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="attacked-") as folder:
        place = Place.make(Path(folder))
        build(place.base)
        warm()
        sound = digest(place.base)
        disk = _can_mount(place.base.parent / "disk")
        if not disk:
            print("no file system can be mounted here: only the size of files is limited")
        for name in names or COMMANDS:
            for share in SHARES:
                if end is not None and time.monotonic() > end:
                    break
                for way, case in (("files of", _limited), ("a disk of", _mounted)):
                    if case is _mounted and not disk:
                        continue
                    cases += 1
                    for fault in case(place, name, share):
                        faults.append(f"{name}, {way} {share:.1%} of what it needs: {fault}")
                        print(faults[-1], flush=True)
        if digest(place.base) != sound:
            faults.append("the source changed")
    print(f"{cases:6} full disks, {len(faults)} faults")
    sys.exit(1 if faults else 0)


def _limited(place: Place, name: str, share: float) -> Iterator[str]:
    """Limit the size of files to a share of the largest file that the command writes."""
    place.empty()
    whole = _whole(place, name)
    need = max(map(len, whole.values()))
    place.empty()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(int(share * need), 1), most))

    yield from _verdict(place, name, whole, limit)


def _mounted(place: Place, name: str, share: float) -> Iterator[str]:
    """Put outputs and temporary files on a file system with a share of the room that they take."""
    whole = _whole(place, name)
    need = sum(map(len, whole.values()))
    with _disk(place.base.parent / "disk", int(share * need) + 65536) as folder:
        small = Place(place.base, folder / "out", folder / "temporary", place.cache)
        small.empty()
        yield from _verdict(small, name, whole, None)


def _verdict(
    place: Place, name: str, whole: Mapping[str, bytes], prepare: Callable[[], None] | None
) -> Iterator[str]:
    code, said = _run(place, name, prepare)
    if code == 0:
        return
    last = said.strip().rpartition("\n")[2]
    if code != 1 or "Traceback" in said or not last.startswith("Error: "):
        yield f"exit code {code}: {said[-600:]}"
    yield from place.wrong(whole)
    if left := [entry for entry in place.entries() if "/." in f"/{entry}"]:
        yield f"it left {left}"
    if left := sorted(path.name for path in place.temporary.iterdir()):
        yield f"it left temporary folders: {left}"


_wholes: dict[str, dict[str, bytes]] = {}


def _whole(place: Place, name: str) -> dict[str, bytes]:
    """What the command writes when there is enough room."""
    if name not in _wholes:
        place.empty()
        code, said = _run(place, name, None)
        if code:
            sys.exit(f"{name} ends with {code}: {said}")
        _wholes[name] = place.written()
    return _wholes[name]


def _run(place: Place, name: str, prepare: Callable[[], None] | None) -> tuple[int, str]:
    """Run it with its output in a pipe, to which no limit on files applies; exit code, output."""
    read, write = os.pipe()
    child = start(place, name, write, prepare)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        said = stream.read().decode(errors="replace")
    return finish(child), said


def _can_mount(folder: Path) -> bool:
    if sys.platform != "linux" or os.geteuid():
        return False
    try:
        with _disk(folder, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def _disk(folder: Path, size: int) -> Iterator[Path]:
    """Context manager with a file system of this many bytes in memory."""
    folder.mkdir(exist_ok=True)
    what = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(what, check=True, stderr=subprocess.DEVNULL)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


if __name__ == "__main__":
    main()
