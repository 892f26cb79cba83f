"""`UserError`: the exception whose message is shown to the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

OPTION = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Placeholder in a message for the name of an option, which the caller fills in."""


class UserError(Exception):
    """Bad input. The message is one sentence: which file, tensor or option, and what to do.

    The command line prints the message and exits with 1, without a traceback or a partial output.

    Attributes:
        option: the caller's option that the message is about, in Python's spelling, such as
            ``ollama_create``, or None. The message has `OPTION` wherever it names that option.
    """

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option

    def told(self, spelled: Callable[[str], str]) -> str:
        """The message, with ``spelled(option)`` in every place of `OPTION`."""
        message = str(self.args[0])
        return message if self.option is None else message.replace(OPTION, spelled(self.option))

    def __str__(self) -> str:
        return self.told(lambda option: option)


class UsageError(UserError):
    """Flags or values of flags that make no sense together; the command line exits with 2."""


@contextmanager
def of(path: Path) -> Iterator[None]:
    """Put a file's name in front of what is said inside of its values, which does not name it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
