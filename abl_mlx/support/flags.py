"""How the command line spells options, also in the messages of errors."""

from __future__ import annotations

from convert.base.errors import UserError

_SHORT = {"output": "-o"}

#: The accepted values of ``--heads`` and ``--experts``, as a regular expression.
PARTS = r"[1-9][0-9]{0,6}|[0-9]{1,6}\.[0-9]{1,6}(,[0-9]{1,6}\.[0-9]{1,6})*"


def flag(option: str) -> str:
    """The flag of an option in Python's spelling: ``--ollama-create`` for ``ollama_create``."""
    return _SHORT.get(option) or "--" + option.replace("_", "-")


def said(error: UserError) -> str:
    """The message of an error, with its option spelled as a flag."""
    return error.told(flag)
