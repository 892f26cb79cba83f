"""Reading text files that may be damaged or hostile."""

from __future__ import annotations

from pathlib import Path

from convert.base.errors import UserError
from convert.base.schema import Refused

#: Longest text file that is read, in bytes; a licence or a chat template is far shorter.
LONGEST = 1 << 24


def read(path: Path, *, longest: int = LONGEST) -> str:
    """The text of a UTF-8 file of at most ``longest`` bytes, with "\\n" as line ends.

    Raises:
        UserError: when the file is missing, too long or not UTF-8.
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
    """The text of these UTF-8 bytes.

    Raises:
        Refused: naming the first byte and line that are not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Refused(f"it is not UTF-8 at byte {error.start}, line {line}") from None
