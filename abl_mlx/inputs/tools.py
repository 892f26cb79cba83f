"""Functions that a model may call, in OpenAI's form: the field ``tools`` of a chat request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.base import json_text
from convert.base.errors import UserError
from convert.base.schema import OBJECT, TEXT, Refused, check, list_of, map_of, one_of, record, text

_NAME = text(r"[A-Za-z0-9_.-]{1,64}", "a name of letters, digits, points, dashes and underscores")
_FUNCTION = record(
    {"description": TEXT, "parameters": record({"properties": map_of(OBJECT)})}, {"name": _NAME}
)
_TOOL = record({"type": one_of(["function"])}, {"function": _FUNCTION})


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        text: its description in OpenAI's form, as JSON: ``{"type": "function", "function": {"name",
            "description", "parameters"}}``, where the parameters are a JSON schema.
    """

    text: str

    @property
    def json(self) -> dict[str, Any]:
        """The description as JSON values."""
        return dict(json.loads(self.text))

    @property
    def name(self) -> str:
        """The name of the function."""
        return str(self.json["function"]["name"])

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Parameter -> its JSON schema."""
        return dict((self.json["function"].get("parameters") or {}).get("properties") or {})


def tool_of(value: Any, where: str) -> Tool:
    """A tool from its description in OpenAI's form, or from the part under ``function``.

    Args:
        value: the description as JSON values.
        where: the file and the place in it, for errors.

    Raises:
        UserError: when the value describes no tool.
    """
    bare = isinstance(value, Mapping) and "function" not in value
    whole = {"type": "function", "function": value} if bare else value
    try:
        check(whole, _TOOL)
    except Refused as refused:
        raise UserError(
            f"{where} is no tool: {refused}. A tool is "
            '{"type": "function", "function": {"name": ..., "description": ..., "parameters": '
            "...}}, with a JSON schema of the parameters."
        ) from None
    return Tool(json.dumps({"type": "function", **whole}, ensure_ascii=False))


def tools_of(values: Any, where: str) -> tuple[Tool, ...]:
    """Tools from a list of descriptions.

    Raises:
        UserError: when the value is no list of tools, or two tools have the same name.
    """
    try:
        check(values, list_of(OBJECT))
    except Refused as refused:
        raise UserError(f"{where} is no list of tools: {refused}.") from None
    tools = tuple(tool_of(one, f"{where}: number {n}") for n, one in enumerate(values, 1))
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where} has two tools with the name {twice}: rename or remove one.")
    if not tools:
        raise UserError(f"{where} has no tools: add one, or leave the list out.")
    return tools


def read(path: Path) -> tuple[Tool, ...]:
    """The tools in a JSON file.

    Raises:
        UserError: when the file holds no list of tools.
    """
    try:
        values = json_text.read(path, mend="write a JSON list of tools")
    except FileNotFoundError:
        raise UserError(f"--tools {path}: there is no such file.") from None
    except UserError as error:
        raise UserError(f"--tools {error}") from None
    return tools_of(values, f"--tools {path}")
