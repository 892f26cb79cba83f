"""The one exception that reaches a person."""

from __future__ import annotations

from collections.abc import Callable

OPTION = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Where a message names the caller's option; the caller decides how the option is spelled."""


class UserError(Exception):
    """Bad input, told in one sentence that names the file, tensor or option, and the mend.

    The command line prints the sentence and exits with 1; no traceback, no partial output.

    Attributes:
        option: the caller's option that the message is about, in Python's spelling, such as
            ``ollama_create``; None where it is about none. Its places in the message are `OPTION`.
    """

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option

    def told(self, spelled: Callable[[str], str]) -> str:
        """The message with its option as ``spelled`` spells it."""
        message = str(self.args[0])
        return message if self.option is None else message.replace(OPTION, spelled(self.option))

    def __str__(self) -> str:
        return self.told(lambda option: option)
