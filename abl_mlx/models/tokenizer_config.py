"""Corrections of tokenizer_config.json before transformers reads it.

transformers does not check the file, and some forms that one of its versions wrote make another
version raise arbitrary exceptions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.base import json_text
from convert.base.errors import UserError
from convert.base.schema import OBJECT

_FILE = "tokenizer_config.json"

# Two names for the same key in different versions of transformers.
_KEYS = ("extra_special_tokens", "additional_special_tokens")


def amended(folder: Path) -> dict[str, Any]:
    """Values that replace those of a folder's tokenizer_config.json.

    Special tokens beyond the named ones may be a list of texts, a list of objects with the text
    under ``content``, one text, or an object of named ones, which is left as it is.

    Raises:
        UserError: when they have another form, or the file is no JSON object.
    """
    path = folder / _FILE
    try:
        config = json_text.read(path, OBJECT, infinite=True)
    except FileNotFoundError:
        return {}
    found: dict[str, Any] = {}
    for key in _KEYS:
        stored = config.get(key)
        if stored is None or isinstance(stored, Mapping):
            continue
        texts = list(_texts(stored, key, path))
        if texts != stored:
            found[key] = texts
    return found


def _texts(stored: Any, key: str, path: Path) -> Iterator[str]:
    for one in [stored] if isinstance(stored, str) else stored if isinstance(stored, list) else [0]:
        text = one.get("content") if isinstance(one, Mapping) else one
        if not isinstance(text, str):
            raise UserError(
                f"{path}: {key} is neither a list of tokens nor an object of named ones: fetch the "
                f"file again, or remove {key} (tokenizer.json has the tokens too)."
            )
        yield text
