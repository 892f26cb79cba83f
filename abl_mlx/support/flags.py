"""How the command line spells an option, and messages that name one."""

from __future__ import annotations

from convert.base.errors import UserError

_SHORT = {"output": "-o"}


def flag(option: str) -> str:
    """The flag of an option in Python's spelling: ``--ollama-create`` of ``ollama_create``."""
    return _SHORT.get(option) or "--" + option.replace("_", "-")


def said(error: UserError) -> str:
    """The sentence of an error, its option spelled as the flag."""
    return error.told(flag)
