"""Records as strict JSON, which cannot represent NaN or infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from convert.base import escape


def to_json(record: Mapping[str, Any]) -> str:
    """A record as the JSON object that ``--json`` prints and that a record's file holds.

    Terminal controls and lone surrogates (in names of files that are not UTF-8) are written as JSON
    escapes. A number that is not finite becomes ``null``, and ``not_finite`` at the end of the
    object says what it was: ``{"kl.k1": "nan"}`` (or ``"inf"``, ``"-inf"``). There the number's
    place is given as the keys and list indices that lead to it, joined by points.
    """
    lost = dict(_not_finite(record, ""))
    whole = {**finite(record), "not_finite": lost} if lost else dict(record)
    return escape.json_text(json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False))


def finite(value: Any) -> Any:
    """A JSON value with None in place of every number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield (place, ``nan``, ``inf`` or ``-inf``) for every number that is not finite."""
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
