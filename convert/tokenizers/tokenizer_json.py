"""What a tokenizer.json says, as far as several readers ask: its steps and its merges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    return any(
        step.get("type") == "ByteLevel"
        for part in ("pre_tokenizer", "decoder")
        for step in steps_of(tokenizer.get(part))
    )


def steps_of(part: Any) -> list[dict[str, Any]]:
    """A pre-tokenizer, normalizer, decoder or post-processor as a flat list of steps."""
    if not isinstance(part, Mapping):
        return []
    if part.get("type") != "Sequence":
        return [dict(part)]
    inner = next((value for value in part.values() if isinstance(value, list)), [])
    return [step for entry in inner for step in steps_of(entry)]


def merges_of(tokenizer: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for merge in tokenizer["model"].get("merges") or []:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs
