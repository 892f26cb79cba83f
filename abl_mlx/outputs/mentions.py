"""Finds words for edits, such as "abliterated", in a model's name, metadata and card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from abl_mlx.records.looks import Mention

#: Words that name this kind of edit.
_NAMES = re.compile(
    r"abliterat\w*|uncensored|orthogonali[sz]ed|heretic|derestricted|decensored|"
    r"refusal[ _-]?(?:removed|ablated|free)|unaligned|lobotomi[sz]ed",
    re.IGNORECASE,
)

#: The number of characters that are read of a card or a metadata value.
READ = 20_000


def mentions(said: Mapping[str, str]) -> list[Mention]:
    """Each ``place`` that names an edit, with the ``text`` of the first such word there.

    Args:
        said: place (such as a metadata key) -> its text.
    """
    found = ((place, _NAMES.search(text)) for place, text in said.items())
    return [Mention(place=place, text=match[0]) for place, match in found if match is not None]


def read_card(path: Path) -> str:
    """The beginning of a model card; empty if there is none."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(READ)
