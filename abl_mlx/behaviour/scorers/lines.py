"""The lines of a file that is given to a scorer."""

from __future__ import annotations

from pathlib import Path

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
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--scorer {scorer}:{path} cannot be read: {why}.") from None
    found = (line.strip() for line in text.splitlines())
    kept = tuple(line for line in found if line and not line.startswith("#"))
    if not kept:
        raise UserError(f"--scorer {scorer}:{path} is empty: give {holds} on each line.")
    return kept
