"""Reads checked counts and numbers from the language model's config.json in mlx-lm's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.base.errors import UserError
from convert.base.schema import Kind, number, shown, whole

Config = Mapping[str, Any]
"""A parsed config.json."""


def head_dim(flat: Config) -> int:
    """The number of dimensions of an attention head. ``flat`` is `hf_to_gguf.text_config`'s."""
    if flat.get("head_dim") is not None:
        return count(flat, "head_dim")
    return count(flat, "hidden_size") // count(flat, "num_attention_heads")


def kv_heads(flat: Config) -> int:
    """The number of key/value heads. ``flat`` is the result of `hf_to_gguf.text_config`."""
    return count(
        flat, "num_key_value_heads" if flat.get("num_key_value_heads") else "num_attention_heads"
    )


def rope_theta(flat: Config) -> float:
    """The base of the rotary embedding; 10000 where config.json gives none."""
    return real(flat, "rope_theta") if flat.get("rope_theta") else 10000.0


def rotary_dim(flat: Config) -> int:
    """How many dimensions of a head, counted from the first, the rotary embedding rotates."""
    factor = flat.get("partial_rotary_factor")
    return int(head_dim(flat) * (1.0 if factor is None else float(factor)))


def sliding_pattern(flat: Config) -> list[bool]:
    """For each layer, whether its attention is limited to a sliding window."""
    layers = count(flat, "num_hidden_layers")
    types = flat.get("layer_types")
    every = flat.get("sliding_window_pattern") or flat.get("_sliding_window_pattern")
    if every is None and types:
        if len(types) != layers:
            raise UserError(
                f"config.json's layer_types are {len(types)} for {layers} layers: fetch it again."
            )
        return [kind == "sliding_attention" for kind in types]
    every = _checked("sliding_window_pattern", every or 6, _COUNT)
    return [(layer + 1) % every != 0 for layer in range(layers)]


def rope_kind(scaling: Any) -> str:
    """The method that a rope_scaling names; "default" for none."""
    if not isinstance(scaling, Mapping):
        return "default"
    return str(scaling.get("type") or scaling.get("rope_type") or "default").lower()


def original_context(flat: Config) -> int:
    """The context length in tokens before rope_scaling extended it."""
    scaling = flat.get("rope_scaling") or {}
    return int(
        flat.get("original_max_position_embeddings")
        or scaling.get("original_max_position_embeddings")
        or count(flat, "max_position_embeddings")
    )


def _need(flat: Config, key: str) -> Any:
    if flat.get(key) is None:
        raise UserError(f"config.json has no {key}: add it as the model's publisher gives it.")
    return flat[key]


def count(flat: Config, key: str) -> int:
    """The value of ``key``, a whole number of at least 1.

    Raises:
        UserError: naming the key, when it is missing or its value is anything else.
    """
    return int(_checked(key, _need(flat, key), _COUNT))


def real(flat: Config, key: str) -> float:
    """The value of ``key``, a finite number.

    Raises:
        UserError: naming the key, when it is missing or its value is anything else.
    """
    return float(_checked(key, _need(flat, key), _NUMBER))


def _checked(key: str, value: Any, kind: Kind) -> Any:
    if not kind.fits(value):
        raise UserError(
            f"config.json's {key} must be {kind.says}, not {shown(value)}: change it to what the "
            "model's publisher gives."
        )
    return value


_COUNT, _NUMBER = whole(1), number()
