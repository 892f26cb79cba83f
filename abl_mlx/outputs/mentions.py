"""Names of edits in what a model's publisher says of it: in its name, its metadata and its card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

#: Names under which edited models go.
_NAMES = re.compile(
    r"abliterat\w*|uncensored|orthogonali[sz]ed|heretic|derestricted|decensored|"
    r"refusal[ _-]?(?:removed|ablated|free)|unaligned|lobotomi[sz]ed",
    re.IGNORECASE,
)

#: How many characters of a card or of a metadata value are read.
READ = 20_000


def mentions(said: Mapping[str, str]) -> list[dict[str, str]]:
    """Each ``place`` in which an edit is named, and the ``text`` of the first name there.

    Args:
        said: place -> what stands there.
    """
    found = ((place, _NAMES.search(text)) for place, text in said.items())
    return [{"place": place, "text": match[0]} for place, match in found if match is not None]


def read_card(path: Path) -> str:
    """The beginning of a model card; empty where there is none."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(READ)
