"""Encoding Python values as metadata of a GGUF file."""

from __future__ import annotations

import struct
from typing import Any

from gguf import GGUFValueType

from convert.base.errors import UserError

Value = str | int | float | bool | list[str]
"""Python types that can be the value of a metadata key."""

_V = GGUFValueType

FORMATS: dict[GGUFValueType, str] = {
    _V.UINT8: "<B",
    _V.INT8: "<b",
    _V.UINT16: "<H",
    _V.INT16: "<h",
    _V.UINT32: "<I",
    _V.INT32: "<i",
    _V.FLOAT32: "<f",
    _V.BOOL: "<?",
    _V.UINT64: "<Q",
    _V.INT64: "<q",
    _V.FLOAT64: "<d",
}
"""The types of a fixed length -> their format letters in struct and NumPy."""

U64 = struct.Struct("<Q")
"""The struct format of lengths and counts."""

VALUE_TYPES = {int(kind): kind for kind in GGUFValueType}
"""The number that stands for a type in a file -> the type."""

SIGNED = "general.sampling."
"""What keys begin with whose whole numbers are signed in files of llama.cpp's converter."""

_FLOATS = ("<f", "<d")


def value_type(key: str, value: Any) -> tuple[GGUFValueType, GGUFValueType | None]:
    """The GGUF type of a value and, for a list, that of its items (None for other values).

    An int becomes uint32, or int64 where it does not fit; in a list, and under `SIGNED`, it becomes
    int32. A float becomes float32.

    Raises:
        UserError: naming the key, when the value has another type, or a list mixes types.
    """
    if isinstance(value, (list, tuple)):
        inner = {value_type(key, item)[0] for item in value} or {_V.STRING}
        if len(inner) > 1:
            raise UserError(f"the metadata {key} mixes types in one list: make them the same.")
        only = inner.pop()
        # Programs that write GGUF files store lists of whole numbers (token types) as signed.
        return _V.ARRAY, _V.INT32 if only == _V.UINT32 else only
    if isinstance(value, bool):
        return _V.BOOL, None
    if isinstance(value, int):
        if key.startswith(SIGNED) and -(2**31) <= value < 2**31:
            return _V.INT32, None
        fits = 0 <= value < 2**32
        return (_V.UINT32 if fits else _V.INT64), None
    if isinstance(value, float):
        return _V.FLOAT32, None
    if isinstance(value, str):
        return _V.STRING, None
    raise UserError(
        f"the metadata {key} is a {type(value).__name__}: give str, int, float or bool."
    )


def encode_pair(
    key: str,
    value: Any,
    old: tuple[GGUFValueType, GGUFValueType | None] | None = None,
) -> bytes:
    """The bytes of one metadata pair: key, type and value.

    Args:
        key: 1 to 65535 bytes of UTF-8.
        value: as for `value_type`.
        old: the type of the key's value in the source, and that of a list's items. A value that
            fits is written in this type, because llama.cpp refuses some keys in another type.

    Raises:
        UserError: naming the key, when the value fits no type.
    """
    kind, inner = value_type(key, value)
    if old is not None:
        if kind == _V.ARRAY:
            if old[1] is not None and all(_fits(item, old[1]) for item in value):
                kind, inner = old
        elif _fits(value, old[0]):
            kind, inner = old
    try:
        name = _string(key)
        if not 8 < len(name) <= 8 + 65535:
            raise UserError(f"the metadata key {key[:40]!r} must be of 1 to 65535 bytes.")
        head = name + struct.pack("<I", kind)
        if inner is None:
            return head + _scalar(value, kind)
        head += struct.pack("<IQ", inner, len(value))
        return head + b"".join(_scalar(item, inner) for item in value)
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise UserError(f"the metadata {key} cannot be written ({error}): change it.") from None


def _fits(value: Any, kind: GGUFValueType) -> bool:
    """Whether a value can be stored in this type and remain a number, a bool or a text."""
    if kind in (_V.STRING, _V.BOOL):
        return isinstance(value, str if kind == _V.STRING else bool)
    if kind not in FORMATS or isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if isinstance(value, float) and FORMATS[kind] not in _FLOATS and not value.is_integer():
        return False
    try:
        _scalar(value, kind)
    except (struct.error, OverflowError):
        return False
    return True


def _scalar(value: Any, kind: GGUFValueType) -> bytes:
    if kind == _V.STRING:
        return _string(value)
    spelled = FORMATS[kind]
    number = value if spelled in _FLOATS or kind == _V.BOOL else int(value)
    return struct.pack(spelled, number)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
