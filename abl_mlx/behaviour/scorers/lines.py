"""The lines of a file that is given to a scorer."""

from __future__ import annotations

from pathlib import Path

from abl_mlx.inputs.prompt_files import read_text
from convert.base.errors import UserError


def lines_of(path: Path, scorer: str, holds: str) -> tuple[str, ...]:
    """The lines that are not empty and do not begin with ``#``.

    Args:
        path: the file.
        scorer: the scorer's name, for messages.
        holds: what each line holds, for messages.

    Raises:
        UserError: when the file cannot be read, or has no such line.
    """
    where = f"--scorer {scorer}:{path}"
    text = read_text(path, where, f"give {holds} on each line")
    found = (line.strip() for line in text.split("\n"))
    kept = tuple(line for line in found if line and not line.startswith("#"))
    if not kept:
        raise UserError(f"{where} is empty: give {holds} on each line.")
    return kept
