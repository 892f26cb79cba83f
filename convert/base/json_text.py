"""Reading JSON from files and servers that may be damaged or hostile.

Python's own reader accepts nesting until the stack overflows, numbers of any length, NaN, two
values under one name and lone surrogates, and needs up to 30 times a text's size in memory. Here a
document's size is limited before it is parsed, and afterwards its values are checked by a
`convert.base.schema.Kind`, so that later code can rely on their types and ranges.
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

#: Longest document, in bytes: twice the largest known tokenizer.json.
LONGEST = 1 << 26

# Deepest nesting. Real files reach about 20; serde_json, which reads tokenizer.json, stops at 128.
_DEEPEST = 100

# Most digits of a whole number. transformers writes int(1e30) for "no limit".
_DIGITS = 40

# Most values in a document, as each costs memory. The largest tokenizer.json holds 2 million.
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
        kind: the types and ranges that the value must have.
        mend: advice for the user, put at the end of the message about an unusable file.
        infinite: accept ``Infinity``, which the config.json of state-space models has as a limit.

    Raises:
        UserError: naming the file and the place in it.
        FileNotFoundError: when there is no such file.
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
        kind: the types and ranges that the value must have.
        infinite: accept ``Infinity``.
        longest: the largest accepted size of the text in bytes.

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
    """The object of these pairs; a name may come twice only with equal values.

    With two different values, different programs would read different objects.
    """
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
    """Refuse a lone surrogate (``"\\ud800"``), which cannot be written as UTF-8."""
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
