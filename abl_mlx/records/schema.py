"""The JSON Schema of all records, derived from their classes (docs/records.schema.json)."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

from abl_mlx.flag_values import Choices
from abl_mlx.records import edits, evaluations, learned, looks
from abl_mlx.records.record import FORMAT_VERSION, Part, Record, key, kinds_of, options_of, required

#: Command -> its record.
COMMANDS: dict[str, type[Record]] = {
    "run": edits.RunRecord,
    "measure": edits.MeasureRecord,
    "apply": edits.ApplyRecord,
    "reproduce": edits.ReproduceRecord,
    "undo": edits.UndoRecord,
    "convert": edits.ConvertRecord,
    "push": edits.PushRecord,
    "publish": edits.PublishRecord,
    "eval": evaluations.EvalRecord,
    "audit": looks.AuditRecord,
    "audit --list": looks.AuditListRecord,
    "verify": looks.VerifyRecord,
    "learn": learned.LearnRecord,
    "inspect": looks.InspectRecord,
    "diff": looks.DiffRecord,
    "show": looks.ShowRecord,
}

_JSON_TYPES = {str: "string", Path: "string", int: "integer", bool: "boolean", type(None): "null"}

_NOT_FINITE = (
    "Figures that are not finite are null in the record, and listed here: place -> nan, inf, -inf."
)


def schema() -> dict[str, Any]:
    """One schema with a definition for each command, and for each part of their records."""
    parts: dict[str, Any] = {}
    commands = {name: _object(record, parts) for name, record in COMMANDS.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Records of abl-mlx",
        "description": "What each command prints with --json, and what abl.json holds: the "
        "definition of the same name. Written by `python -m tools.record_schema`.",
        "$defs": commands | dict(sorted(parts.items())),
    }


def _object(part: type[Part], parts: dict[str, Any]) -> dict[str, Any]:
    properties = {key(name): _kind(kind, parts) for name, kind in kinds_of(part).items()}
    needed = [key(name) for name in required(part)]
    if issubclass(part, Record):
        version = {"description": "Records without it are of version 0.", "const": FORMAT_VERSION}
        lost = {"description": _NOT_FINITE, "type": "object"}
        properties = {"format_version": version, **properties, "not_finite": lost}
        needed = ["format_version", *needed]
    return {
        "description": inspect.cleandoc(part.__doc__ or ""),
        "type": "object",
        "properties": properties,
        "required": needed,
        "additionalProperties": False,
    }


def _flags(choices: type[Choices], parts: dict[str, Any]) -> dict[str, Any]:
    kinds = choices.kinds()
    return {
        "description": "The value of every flag.",
        "type": "object",
        "properties": {name: _kind(kind, parts) for name, kind in kinds.items()},
        "required": list(kinds),
        "additionalProperties": False,
    }


def _kind(kind: Any, parts: dict[str, Any]) -> dict[str, Any]:
    options = options_of(kind)
    if len(options) > 1:
        found = [_kind(one, parts) for one in options]
        return (
            found[0]
            if found[1:] == [{"type": "null"}] and _nullable(found[0])
            else {"anyOf": found}
        )
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, frozenset):
        return {"type": "array", "items": _kind(inner[0], parts)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _kind(inner[1], parts)}
    if kind is Any:
        return {}
    if kind is float:
        return {"type": ["number", "null"]}
    if kind in COMMANDS.values():
        return {"$ref": f"#/$defs/{list(COMMANDS)[list(COMMANDS.values()).index(kind)]}"}
    if isinstance(kind, type) and issubclass(kind, Part | Choices):
        if kind.__name__ not in parts:
            parts[kind.__name__] = {}
            made = _object(kind, parts) if issubclass(kind, Part) else _flags(kind, parts)
            parts[kind.__name__] = made
        return {"$ref": f"#/$defs/{kind.__name__}"}
    return {"type": _JSON_TYPES[kind]}


def _nullable(found: dict[str, Any]) -> bool:
    return "null" in found.get("type", ())
