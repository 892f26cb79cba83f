"""Records as strict JSON, which has no word for NaN or infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from convert.base import escape


def to_json(record: Mapping[str, Any]) -> str:
    """The one object that `--json` prints and that a record's file holds.

    What a terminal would obey and half characters (of file names that are no text) are written as
    JSON's escapes. A figure that is not finite never keeps a record from being written: it becomes
    ``null``, and ``not_finite`` at the end of the object says which it was: ``{"kl.k1": "nan"}``
    (or ``"inf"``, ``"-inf"``), by the keys and places of lists that lead to it, joined by points.
    """
    lost = dict(_not_finite(record, ""))
    whole = {**finite(record), "not_finite": lost} if lost else dict(record)
    return escape.json_text(json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False))


def finite(value: Any) -> Any:
    """The same JSON value with None in place of every figure that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """(place, ``nan``, ``inf`` or ``-inf``) of every figure that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, str(float(value))
        return
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    for key, part in parts:
        yield from _not_finite(part, f"{place}.{key}" if place else str(key))
