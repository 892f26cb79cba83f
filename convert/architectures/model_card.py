"""The metadata of a GGUF that the model card in its folder gives: licence, languages, base models.

gguf-py knows which keys llama.cpp's converter makes of the front matter of README.md; here they are
made safe of whatever that may hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from gguf.metadata import Metadata

from convert.gguf.values import Value

# Bytes of a card beyond which it is not read; those of the hub have a few ten thousand.
_MOST = 1 << 20


def card_keys(folder: Path) -> dict[str, Value]:
    """The keys ``general.*`` that the folder's model card gives, as llama.cpp's converter has them.

    They are without ``general.name``. A card without front matter, or with one that is no YAML,
    gives none; values that are no text are left out.

    Args:
        folder: the model's folder.
    """
    card = _front_matter(folder)
    if not card:
        return {}
    found = Metadata.apply_metadata_heuristic(Metadata(), card)
    found.name = ""
    # The writer has no file: it only collects the keys.
    writer = gguf.GGUFWriter(None, "")
    found.set_gguf_meta_model(writer)
    keys = {key: one.value for part in writer.kv_data for key, one in part.items()}
    lists = ("general.tags", "general.languages")
    kept = {key: [one for one in keys[key] if isinstance(one, str)] for key in lists if key in keys}
    kept |= {key: value for key, value in keys.items() if isinstance(value, str | int)}
    names = ("general.name", "general.architecture")
    return {key: value for key, value in kept.items() if key not in names}


def _front_matter(folder: Path) -> dict[str, Any]:
    path = folder / "README.md"
    try:
        if path.stat().st_size > _MOST:
            return {}
        card = Metadata.load_model_card(folder)
    except Exception:  # no such file, no YAML, or whatever its reader trips over
        return {}
    return {key: one for key, value in card.items() if (one := _texts(value)) is not None}


def _texts(value: Any) -> Any:
    """A value of the card with only texts in it: a text, a list, or a list of base models."""
    if isinstance(value, list):
        entries = [_of_list(one) for one in value]
        return [one for one in entries if one is not None]
    return _text(value)


def _of_list(value: Any) -> Any:
    if isinstance(value, Mapping):
        parts = {str(key): _text(one) for key, one in value.items()}
        return {key: one for key, one in parts.items() if one is not None}
    return _text(value)


def _text(value: Any) -> str | None:
    """A text or a number, such as a version, as a text; None for anything else."""
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return str(value).encode("utf-8", "replace").decode() if plain else None
