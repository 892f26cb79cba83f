"""One attack: a command, and the input that it reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random


@dataclass(frozen=True)
class Case:
    """A command line, ready to run.

    Attributes:
        arguments: of `abl-mlx`.
        size: bytes of what it reads; the limit on its memory follows from it.
        outputs: paths that must not exist after the command failed.
        environment: environment variables for the command.
    """

    arguments: tuple[str, ...]
    size: int
    outputs: tuple[Path, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


#: A function that makes a case from the sound inputs, an empty folder and a random generator.
Attack = Callable[[Path, Path, Random], Case]


def size_of(path: Path) -> int:
    """The size in bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(one.stat().st_size for one in files if one.is_file())


def linked(folder: Path, to: Path) -> Path:
    """A folder of links to another folder's files. A file in it is replaced, never written into."""
    to.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            os.link(path, to / path.name)
        else:
            linked(path, to / path.name)
    return to


def put(path: Path, data: bytes) -> None:
    """Replace a link by a new file."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
