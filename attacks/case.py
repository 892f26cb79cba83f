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
        size: bytes of what it reads, by which its memory is bounded.
        outputs: what must not be there when the command fails.
        environment: variables that it is given.
    """

    arguments: tuple[str, ...]
    size: int
    outputs: tuple[Path, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


#: Makes a case: from the sound inputs, an empty folder of its own, and chance.
Attack = Callable[[Path, Path, Random], Case]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(one.stat().st_size for one in files if one.is_file())


def linked(folder: Path, to: Path) -> Path:
    """The same folder, without a copy of its files: a file is replaced, never written into."""
    to.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            os.link(path, to / path.name)
        else:
            linked(path, to / path.name)
    return to


def put(path: Path, data: bytes) -> None:
    """Write a file in place of a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
