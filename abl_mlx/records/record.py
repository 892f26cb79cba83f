"""Turns records into JSON and back, in one place; each record's class defines its keys."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cached_property
from typing import Any, TypeVar

from abl_mlx.flag_values import Choices

#: The version of every record that is written. Records of earlier versions of abl-mlx have none,
#: which means version 0, with the same keys. The version rises when a key is removed or changes its
#: meaning, and not when a key is added.
FORMAT_VERSION = 1

PartOf = TypeVar("PartOf", bound="Part")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a record. A field whose default is None is left out of the JSON while it is None.

    Attributes:
        nulls: the fields that are written as null all the same.
        more: keys that are not known, with their values.
    """

    @classmethod
    def of(cls: type[PartOf], values: Mapping[str, Any]) -> PartOf:
        """A part from its JSON values; unknown keys are kept, and written again.

        Raises:
            TypeError: when a key is missing.
        """
        kinds = kinds_of(cls)
        known = {name: values[key(name)] for name in kinds if key(name) in values}
        read = {"format_version", *map(key, known)}
        return cls(
            **{name: _made(kinds[name], one) for name, one in known.items()},
            nulls=frozenset(name for name, one in known.items() if one is None),
            more={name: value for name, value in values.items() if name not in read},
        )

    nulls: frozenset[str] = field(default=frozenset(), repr=False)
    more: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def values_by_field(self) -> dict[str, Any]:
        """Field -> value, for making a part that has these and more fields."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @cached_property
    def json(self) -> dict[str, Any]:
        """As JSON values."""
        found: dict[str, Any] = {}
        for one in _fields(type(self)):
            value = getattr(self, one.name)
            if value is not None or one.default is not None or one.name in self.nulls:
                found[key(one.name)] = plain(value)
        return found | plain(dict(self.more))


@dataclass(frozen=True, kw_only=True)
class Record(Part, Mapping[str, Any]):
    """What a command returns. Its keys can be read as in its JSON: ``record["source"]``."""

    @cached_property
    def json(self) -> dict[str, Any]:
        """As JSON values, with the version of the format."""
        return {"format_version": FORMAT_VERSION, **super().json}

    def __getitem__(self, name: str) -> Any:
        return self.json[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.json)

    def __len__(self) -> int:
        return len(self.json)


def key(name: str) -> str:
    """The JSON key of a field: ``from`` for ``from_``, because ``from`` is a keyword of Python."""
    return name.rstrip("_")


def kinds_of(part: type[Part]) -> dict[str, Any]:
    """Field -> its type."""
    hints = typing.get_type_hints(part)
    return {one.name: hints[one.name] for one in _fields(part)}


def _fields(part: type[Part]) -> list[Field[Any]]:
    """The fields that are keys of the JSON."""
    return [one for one in fields(part) if one.name not in ("nulls", "more")]


def required(part: type[Part]) -> list[str]:
    """The fields that are never left out."""
    return [
        one.name
        for one in _fields(part)
        if one.default is MISSING and one.default_factory is MISSING
    ]


def options_of(kind: Any) -> tuple[Any, ...]:
    """The members of a union type; any other type itself."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _made(kind: Any, value: Any) -> Any:
    """A JSON value as an object of a field's type; of several parts, the first that fits."""
    if isinstance(value, Part | Choices):
        return value
    parts = [one for one in options_of(kind) if _is(one, Part)]
    if parts and isinstance(value, Mapping):
        filled = (one for one in parts if set(map(key, required(one))) <= set(value))
        return next(filled, parts[-1]).of(value)
    for one in options_of(kind):
        origin, inner = typing.get_origin(one), typing.get_args(one)
        if _is(one, Choices) and isinstance(value, Mapping):
            return one.of_record(value)
        if origin is list and isinstance(value, list | tuple):
            return [_made(inner[0], each) for each in value]
        if origin is dict and isinstance(value, Mapping):
            return {name: _made(inner[1], each) for name, each in value.items()}
    return value


def _is(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def plain(value: Any) -> Any:
    """Records inside a value as JSON values."""
    if isinstance(value, Part):
        return value.json
    if isinstance(value, Choices):
        return value.record()
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value
