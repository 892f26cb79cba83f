"""How the command line spells options, which of them are given, and what messages say of them."""

from __future__ import annotations

from collections.abc import Iterable

from convert.base.errors import UserError

_SHORT = {"output": "-o"}

#: The accepted values of ``--heads`` and ``--experts``, as a regular expression.
PARTS = r"[1-9][0-9]{0,6}|[0-9]{1,6}\.[0-9]{1,6}(,[0-9]{1,6}\.[0-9]{1,6})*"


def flag(option: str) -> str:
    """The flag of an option in Python's spelling: ``--ollama-create`` for ``ollama_create``."""
    return _SHORT.get(option) or "--" + option.replace("_", "-")


def first_given(flags: Iterable[tuple[str, object]]) -> str | None:
    """The first flag that is given; None if none is.

    A flag is given if its value is neither None nor False: ``--layer 0`` is given as well.

    Args:
        flags: each flag, as the message is to name it, with its value or whether it is given.
    """
    return next((flag for flag, value in flags if value is not None and value is not False), None)


def not_together(first: str, second: str) -> str:
    """The message that two flags do not go together."""
    return f"{first} and {second} do not go together: leave one of them out."


def said(error: UserError) -> str:
    """The message of an error, with its option spelled as a flag."""
    return error.told(flag)
