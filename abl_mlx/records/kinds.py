"""The types that JSON values need to become parts of records, derived from the parts' classes."""

from __future__ import annotations

import typing
from typing import Any

from abl_mlx.records.record import Part, key, kinds_of, options_of, required
from convert.base import schema
from convert.base.schema import Kind

_PLAIN = {
    str: schema.TEXT,
    bool: schema.FLAG,
    int: schema.whole(-(1 << 53), 1 << 53),
    # A figure that is not finite is null in JSON.
    float: schema.either(schema.number(), schema.NULL),
}


def kind_of(part: type[Part]) -> Kind:
    """The types that a part's JSON values need for `Part.of`."""
    needed = {key(name) for name in required(part)}
    every = fields_of(part)
    return schema.record(
        {name: kind for name, kind in every.items() if name not in needed},
        {name: kind for name, kind in every.items() if name in needed},
    )


def fields_of(part: type[Part]) -> dict[str, Kind]:
    """Key -> the type that its value needs."""
    return {key(name): _kind(kind) for name, kind in kinds_of(part).items()}


def _kind(kind: Any) -> Kind:
    options = [one for one in options_of(kind) if one is not type(None)]
    kinds = [_one_kind(one) for one in options]
    return kinds[0] if len(kinds) == 1 else schema.either(*kinds)


def _one_kind(kind: Any) -> Kind:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return schema.list_of(_kind(inner[0]))
    if origin is dict:
        return schema.map_of(_kind(inner[1]))
    if isinstance(kind, type) and issubclass(kind, Part):
        return kind_of(kind)
    return schema.ANYTHING if kind is Any else _PLAIN[kind]
