"""Declared types and ranges of values in JSON files, checked when a file is read.

A `Kind` describes in words which values it accepts and tests whether a value is one of them;
`check` names the place of the first value that is not.

Why not msgspec or pydantic: both decode into classes of their own and drop or copy every other key,
while most keys of a config.json are passed on unchanged to mlx-lm and transformers; neither limits
the digits of a number or refuses two values under one name; and a compiled dependency would save
only about a hundred lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.base.escape import shortened


class Refused(ValueError):
    """Why a document is not accepted: the part of a message that follows the file's name."""


def _nothing(value: Any) -> Iterator[tuple[str, Any, Kind]]:
    return iter(())


@dataclass(frozen=True)
class Kind:
    """A set of accepted values.

    Attributes:
        says: describes them in words that follow "must be".
        fits: whether a value is accepted, as far as can be told without looking at its members.
        inside: (place, value, kind) for each member of the value that must be checked as well.
    """

    says: str
    fits: Callable[[Any], bool]
    inside: Callable[[Any], Iterator[tuple[str, Any, Kind]]] = _nothing


_MISSING = object()


def check(value: Any, kind: Kind, where: str = "") -> None:
    """Check a value and all its members.

    Args:
        value: what was read.
        kind: which values are accepted.
        where: the value's place in the document, for the message; empty for the whole document.

    Raises:
        Refused: naming the place, what belongs there and what was found there.
    """
    waiting = [(where, value, kind)]
    while waiting:
        place, value, kind = waiting.pop()
        if value is _MISSING:
            raise Refused(f"{_named(place)} is missing")
        if not kind.fits(value):
            raise Refused(f"{_named(place)} must be {kind.says}, not {shown(value)}")
        inside = [(f"{place}{more}", one, inner) for more, one, inner in kind.inside(value)]
        waiting += reversed(inside)


def _named(place: str) -> str:
    return f"its {place.removeprefix('.')}" if place else "it"


def shown(value: Any) -> str:
    """A value in a sentence: short, and safe to print."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f'"{shortened(value, 40)}"'
    return shortened(str(value), 40)


ANYTHING = Kind("anything", lambda value: True)
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))


def whole(least: int = 0, most: int = 2**31 - 1) -> Kind:
    """A whole number from ``least`` to ``most``; true, false and 2.0 are not accepted."""

    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Kind(f"a whole number from {least} to {most}", fits)


def number(least: float = -math.inf, most: float = math.inf, *, open_end: bool = False) -> Kind:
    """A finite number from ``least`` (above it with ``open_end``) to ``most``."""

    def fits(value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        fine = abs(value) <= _LARGEST and value <= most
        return fine and (value > least if open_end else value >= least)

    bounds = "" if least == -math.inf else f" {'above' if open_end else 'of at least'} {least:g}"
    bounds += "" if most == math.inf else f"{',' if bounds else ''} at most {most:g}"
    return Kind(f"a finite number{bounds}", fits)


# The largest finite float32; a model turns every number into a float32.
_LARGEST = 3.4028234663852886e38


def text(pattern: str, says: str) -> Kind:
    """Text that a regular expression matches as a whole; ``says`` describes it."""
    expression = re.compile(pattern, re.ASCII | re.DOTALL)
    return Kind(
        says, lambda value: isinstance(value, str) and expression.fullmatch(value) is not None
    )


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """A list whose members are all of one kind, of any length unless ``length`` gives it."""
    says = f"a list of {length}" if length is not None else "a list"
    return Kind(
        says,
        lambda value: isinstance(value, (list, tuple)) and length in (None, len(value)),
        lambda value: (
            (f"[{n}]", one, kind) for n, one in enumerate(value) if _to_check(one, kind)
        ),
    )


def map_of(kind: Kind, *, names: Kind = TEXT) -> Kind:
    """An object whose names, and values, are all of one kind."""

    def inside(value: Mapping[str, Any]) -> Iterator[tuple[str, Any, Kind]]:
        for name, one in value.items():
            if not names.fits(name):
                yield " (the name of an entry)", name, names
            if _to_check(one, kind):
                yield _key(name), one, kind

    return Kind("an object", lambda value: isinstance(value, Mapping), inside)


def _to_check(value: Any, kind: Kind) -> bool:
    """Whether a member must be put on the list of values to check.

    A member that fits and has no members of its own is done with, which saves time where a
    vocabulary has hundreds of thousands of them.
    """
    return kind.inside is not _nothing or not kind.fits(value)


def record(
    optional: Mapping[str, Kind],
    needed: Mapping[str, Kind] | None = None,
    *,
    rest: Kind | None = None,
) -> Kind:
    """An object with these names, and possibly others.

    Args:
        optional: the kinds of values under names that may be missing or null.
        needed: the kinds of values under names that must be there.
        rest: the kind of values under all other names; None accepts any.
    """
    needed = needed or {}

    def inside(value: Mapping[str, Any]) -> Iterator[tuple[str, Any, Kind]]:
        for name, kind in needed.items():
            yield f".{name}", value.get(name, _MISSING), kind
        for name, kind in optional.items():
            if value.get(name) is not None:
                yield f".{name}", value[name], kind
        if rest is not None:
            for name, one in value.items():
                if name not in needed and name not in optional:
                    yield _key(name), one, rest

    return Kind("an object", lambda value: isinstance(value, Mapping), inside)


def either(*kinds: Kind) -> Kind:
    """A value of any of these kinds; its members are checked by the first kind that fits."""
    return Kind(
        " or ".join(kind.says for kind in kinds),
        lambda value: any(kind.fits(value) for kind in kinds),
        lambda value: next(kind for kind in kinds if kind.fits(value)).inside(value),
    )


def one_of(values: Sequence[Any]) -> Kind:
    """One of the given values."""
    return Kind(
        " or ".join(map(shown, values)),
        lambda value: any(type(value) is type(one) and value == one for one in values),
    )


NULL = Kind("null", lambda value: value is None)


def _key(name: Any) -> str:
    return f".{shortened(str(name), 60)}"
