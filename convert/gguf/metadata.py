"""The metadata of a GGUF file as a mapping, decoded key by key from a checked header."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gguf import GGUFValueType

from convert.gguf.layout import Part
from convert.gguf.values import FORMATS, U64, VALUE_TYPES


class Metadata(Mapping[str, Any]):
    """The metadata of one file; each value is decoded from the header when it is first read."""

    def __init__(self, part: Part) -> None:
        self._header = part.header
        self._fields = part.fields
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            field = self._fields[key]
            self._decoded[key], _ = _decode(self._header, field.type, field.value)
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, key: object) -> bool:
        return key in self._fields


def _decode(header: bytes, kind: GGUFValueType, at: int) -> tuple[Any, int]:
    """Decode the value at byte ``at`` of a checked header; return it and the byte after it."""
    if kind == GGUFValueType.STRING:
        start = at + 8
        end = start + U64.unpack_from(header, at)[0]
        return str(header[start:end], "utf-8"), end
    if kind != GGUFValueType.ARRAY:
        spelled = FORMATS[kind]
        return struct.unpack_from(spelled, header, at)[0], at + struct.calcsize(spelled)
    number, count = struct.unpack_from("<IQ", header, at)
    item, at = VALUE_TYPES[number], at + 12
    if item in FORMATS:
        found = np.frombuffer(header, FORMATS[item], count=count, offset=at)
        return found.tolist(), at + found.nbytes
    items = []
    for _ in range(count):
        one, at = _decode(header, item, at)
        items.append(one)
    return items, at
