"""Turns a row of a prompt file into a prompt.

A row holds a text or a conversation. The fields are ``system`` (the system message), ``prefix`` and
``suffix`` (texts directly before and behind the prompt), ``tools`` (functions that the model may
call, as in OpenAI's API), and ``messages`` (a list of ``{"role", "content"}`` that ends with the
user's message) instead of a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abl_mlx.inputs.sets import Prompt
from abl_mlx.inputs.tools import Tool, tools_of
from convert.base import json_text
from convert.base.errors import UserError
from convert.base.schema import Refused

#: The field of a whole conversation.
MESSAGES = "messages"

ROLES = ("system", "user", "assistant")
"""The roles of messages; only the first message may have the first role."""


def prompt_of_row(row: Mapping[str, Any], name: str, where: str) -> Prompt | None:
    """The prompt of one row; None if it has none.

    Args:
        row: field -> cell.
        name: the field of the prompt's text. A row without it may have `MESSAGES`.
        where: the file and the line, for errors.

    Raises:
        UserError: when a field has a wrong type or value.
    """
    category = row.get("category") if name != "category" else None
    known = category.strip() if isinstance(category, str) else ""
    system = _text(row, "system", where) if name != "system" else None
    earlier: tuple[tuple[str, str], ...] = ()
    text = _text(row, name, where) if name != MESSAGES else None
    if text is None and row.get(MESSAGES) is not None:
        turns = _turns(row[MESSAGES], where)
        if turns[0][0] == "system":
            system = turns.pop(0)[1]
        if any(role == "system" for role, _ in turns):
            raise UserError(f"{where}: a system message stands at the beginning of messages only.")
        if not turns or turns[-1][0] != "user":
            raise UserError(f"{where}: the last of its messages has to be the user's.")
        text, earlier = turns.pop()[1], tuple(turns)
    if text is None:
        return None
    around = [
        "" if name == field else _as_it_is(row, field, where) for field in ("prefix", "suffix")
    ]
    tools = _tools(row.get("tools"), where) if name != "tools" else ()
    return Prompt(
        f"{around[0]}{text}{around[1]}", known, system=system, earlier=earlier, tools=tools
    )


def _tools(value: Any, where: str) -> tuple[Tool, ...]:
    """The tools of a row: a list, or its JSON if cells are text.

    Raises:
        UserError: when the value is no list of tools.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json_text.parse(value)
        except Refused as refused:
            raise UserError(f"{where}: tools cannot be used: {refused}.") from None
    return tools_of(value, f"{where}: tools") if value else ()


def _turns(value: Any, where: str) -> list[tuple[str, str]]:
    """The (role, content) of each message in a list.

    Raises:
        UserError: when the value is no list of messages.
    """
    turns = []
    for message in value if isinstance(value, list) else [None]:
        known = message if isinstance(message, Mapping) else {}
        role = known.get("role")
        content = _text(known, "content", where)
        if role not in ROLES or content is None:
            raise UserError(
                f'{where}: messages has to be a list of {{"role": "user", "content": "..."}}, with '
                f"one of the roles {', '.join(ROLES)} each."
            )
        turns.append((role, content))
    if not turns:
        raise UserError(f"{where}: messages is empty.")
    return turns


def _text(row: Mapping[str, Any], name: str, where: str) -> str | None:
    """The text of a cell without surrounding white space; None if it is missing or blank."""
    return _as_it_is(row, name, where).strip() or None


def _as_it_is(row: Mapping[str, Any], name: str, where: str) -> str:
    """The text of a cell with its white space; "" if it is missing."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where} holds a value of type {type(value).__name__} in {name}, where a text belongs."
        )
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise UserError(f"{where} holds a NUL or half a character in {name}: mend or remove it.")
    return value
