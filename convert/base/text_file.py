"""Text files that others wrote."""

from __future__ import annotations

from pathlib import Path

from convert.base.errors import UserError
from convert.base.schema import Refused

#: Characters of a licence, a chat template or the like that anyone reads.
LONGEST = 1 << 24


def read(path: Path, *, longest: int = LONGEST) -> str:
    """A file's text with "\\n" line ends, which has to be UTF-8 and of a bounded length.

    Raises:
        UserError: naming the file, and the place where it is no UTF-8.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(longest + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if len(data) > longest:
        raise UserError(f"{path} is longer than {longest} bytes: put a shorter one in its place.")
    try:
        return decoded(data).replace("\r\n", "\n").replace("\r", "\n")
    except Refused as refused:
        raise UserError(f"{path} cannot be used: {refused}; save it as UTF-8.") from None


def decoded(data: bytes) -> str:
    """UTF-8 as text.

    Raises:
        Refused: saying where it is none.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Refused(f"it is not UTF-8 at byte {error.start}, line {line}") from None
