"""JSON that others wrote, read in one place.

Python's own reader takes any depth up to a crash of the stack, numbers of any length, NaN, two
values under one name and half characters, and needs up to 30 times a text's size in memory. Here a
document is bounded before it is parsed, and checked by a `convert.base.schema.Kind` afterwards, so
that whoever uses it finds what the schema promises.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from convert.base.errors import UserError
from convert.base.escape import shortened
from convert.base.schema import ANYTHING, Kind, Refused, check
from convert.base.text_file import decoded

#: Bytes of a document: twice the largest tokenizer.json that is known.
LONGEST = 1 << 26

# Nothing real nests deeper than about 20; serde_json, which reads tokenizer.json, stops at 128.
_DEEPEST = 100

# transformers writes int(1e30) for "no limit".
_DIGITS = 40

# Each costs memory, however short its text. The largest tokenizer.json holds 2 million.
_MOST_VALUES = 1 << 22


def read(
    path: Path,
    kind: Kind = ANYTHING,
    *,
    mend: str = "fetch the file again",
    infinite: bool = False,
) -> Any:
    """The value of a JSON file.

    Args:
        kind: what it has to be.
        mend: what one can do about a file that is not that.
        infinite: accept ``Infinity``, which state-space models' config.json has as a limit.

    Raises:
        UserError: naming the file and the place in it; FileNotFoundError passes.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(LONGEST + 1)
        return parse(data, kind, infinite=infinite)
    except Refused as refused:
        raise _unusable(path, refused, mend) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def checked(path: Path, value: Any, kind: Kind, *, mend: str = "fetch the file again") -> None:
    """Check a value that was read from a file.

    Raises:
        UserError: naming the file and the place in it.
    """
    try:
        check(value, kind)
    except Refused as refused:
        raise _unusable(path, refused, mend) from None


def _unusable(path: Path, refused: Refused, mend: str) -> UserError:
    return UserError(f"{path} cannot be used: {refused}; {mend}.")


def parse(
    data: bytes | str, kind: Kind = ANYTHING, *, infinite: bool = False, longest: int = LONGEST
) -> Any:
    """The value of a JSON text.

    Args:
        longest: of the text.

    Raises:
        Refused: saying where it breaks the rules of JSON, of this module or of ``kind``.
    """
    if len(data) > longest:
        raise Refused(f"it is longer than {longest} bytes")
    text = data if isinstance(data, str) else decoded(data)
    if text.count(",") + text.count("[") + 2 * text.count("{") > _MOST_VALUES:
        raise Refused(f"it holds more than {_MOST_VALUES} values")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_infinity if infinite else _constant,
        )
    except json.JSONDecodeError as error:
        raise Refused(
            f"it is not valid JSON ({error.msg} at line {error.lineno}, column {error.colno})"
        ) from None
    except RecursionError:
        raise Refused(f"it is not valid JSON here (nested deeper than {_DEEPEST})") from None
    _check_depth(value)
    if "\\u" in text:
        _check_characters(value)
    check(value, kind)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two equal values under one name are one; two that differ mean whatever the reader likes."""
    found = dict(pairs)
    if len(found) != len(pairs):
        first: dict[str, Any] = {}
        for name, value in pairs:
            if first.setdefault(name, value) != value:
                raise Refused(f'"{shortened(name, 60)}" appears twice in it, with two values')
    return found


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise Refused(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise Refused(f"it holds the number {shortened(digits, 30)}, which is too large")
    return value


def _constant(name: str) -> float:
    raise Refused(f"it holds {name}, which is no number")


def _infinity(name: str) -> float:
    return _constant(name) if name == "NaN" else float(name)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [one for part in level for one in _nested(part)]
        if not level:
            return
    raise Refused(f"it nests deeper than {_DEEPEST}")


def _nested(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in inside if isinstance(one, (dict, list))]


def _check_characters(value: Any) -> None:
    """Refuse half a character (``"\\ud800"``), which no file can be written with."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                raise Refused(f'it holds half a character ("{shortened(one, 40)}")') from None
