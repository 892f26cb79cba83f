"""The context length of a model, in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.base.errors import UserError

# Keys of config.json with the context length; the first one that exists counts.
_NAMES = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"),
    *("seq_length", "model_max_length"),
)


def of_config(config: Mapping[str, Any]) -> int | None:
    """The context length from config.json, with its rope scaling; None if it is not given."""
    text = config.get("text_config")
    flat = {**config, **text} if isinstance(text, dict) else dict(config)
    length = next((n for name in _NAMES if (n := _whole(flat.get(name))) is not None), None)
    scaling = flat.get("rope_scaling") or flat.get("rope_parameters")
    if length is None or not isinstance(scaling, dict):
        return length
    original = _whole(scaling.get("original_max_position_embeddings")) or length
    return _extended(length, original, scaling.get("factor"))


def of_metadata(metadata: Mapping[str, Any]) -> int | None:
    """The context length from a GGUF's metadata, with its rope scaling; None if it is not given."""
    prefix = metadata.get("general.architecture")
    length = _whole(metadata.get(f"{prefix}.context_length"))
    if length is None:
        return None
    original = _whole(metadata.get(f"{prefix}.rope.scaling.original_context_length")) or length
    return _extended(length, original, metadata.get(f"{prefix}.rope.scaling.factor"))


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _extended(length: int, original: int, factor: object) -> int:
    """The longer of the stated and the scaled length: some models state the length before rope
    scaling, others the length after it."""
    if isinstance(factor, int | float) and 1 < factor < 1e6:
        return max(length, int(original * factor))
    return length


def check(count: int, config: Mapping[str, Any], place: Path) -> None:
    """Check that a prompt fits into a loaded model's context.

    Raises:
        UserError: when it does not, with the prompt's tokens and the context length.
    """
    longest = of_config(config)
    if longest is not None and count > longest:
        raise UserError(
            f"a prompt has {count:,} tokens in the chat template, and the context of {place} is "
            f"{longest:,}: shorten it."
        )
