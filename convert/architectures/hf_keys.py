"""Reads checked counts and numbers from the language model's config.json in mlx-lm's keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from convert.base.errors import UserError
from convert.base.schema import Kind, number, shown, whole

Config = Mapping[str, Any]
"""A parsed config.json."""


def head_dim(flat: Config) -> int:
    """The number of dimensions of an attention head. ``flat`` is `folder_config.text_config`'s."""
    if flat.get("head_dim") is not None:
        return count(flat, "head_dim")
    return count(flat, "hidden_size") // count(flat, "num_attention_heads")


def kv_heads(flat: Config) -> int:
    """The number of key/value heads. ``flat`` is the result of `folder_config.text_config`."""
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


def sliding_pattern(flat: Config, usual: int = 6) -> list[bool]:
    """For each layer, whether its attention is limited to a sliding window.

    Args:
        flat: the result of `folder_config.text_config`.
        usual: n, where without a pattern every n-th layer has no window.
    """
    layers = count(flat, "num_hidden_layers")
    types = flat.get("layer_types")
    every = flat.get("sliding_window_pattern") or flat.get("_sliding_window_pattern")
    if every is None and types:
        if len(types) != layers:
            raise UserError(
                f"config.json's layer_types are {len(types)} for {layers} layers: fetch it again."
            )
        return [kind == "sliding_attention" for kind in types]
    if isinstance(every, str) and every:
        return [every[layer % len(every)] == "L" for layer in range(layers)]
    every = _checked("sliding_window_pattern", every or usual, _COUNT)
    return [(layer + 1) % every != 0 for layer in range(layers)]


def every_nth(flat: Config, usual: int) -> dict[str, Any]:
    """The metadata for sliding windows in all layers but every n-th, which llama.cpp takes if the
    pattern is missing; else with the pattern, a list of bool.

    Args:
        flat: the result of `folder_config.text_config`, with sliding_window.
        usual: n.
    """
    found: dict[str, Any] = {"attention.sliding_window": count(flat, "sliding_window")}
    pattern = sliding_pattern(flat, usual)
    if pattern != [(layer + 1) % usual != 0 for layer in range(len(pattern))]:
        found["attention.sliding_window_pattern"] = pattern
    return found


def named(flat: Config, pairs: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of counts that both formats have, for those that config.json has.

    Args:
        flat: the result of `folder_config.text_config`.
        pairs: key of config.json -> key of the metadata.
    """
    return {new: count(flat, old) for old, new in pairs.items() if flat.get(old) is not None}


def rope_kind(scaling: Any) -> str:
    """The method that a rope_scaling names; "default" for none."""
    if not isinstance(scaling, Mapping):
        return "default"
    return str(scaling.get("type") or scaling.get("rope_type") or "default").lower()


def query_rescale(flat: Config, rescaled: str | None, largest: int, path: str) -> float:
    """The factor for the parameter ``rescaled``: 1 where no divisor of the queries is fixed.

    llama.cpp divides Gemma's queries by the root of the head size (in the 27B models of hidden /
    heads), whatever query_pre_attn_scalar config.json has.

    Args:
        flat: the result of `folder_config.text_config`.
        rescaled, largest: as in `FromFolder`.
        path: the parameter.
    """
    if rescaled is None or not path.endswith(rescaled):
        return 1.0
    wanted = float(flat.get("query_pre_attn_scalar") or 144.0)
    if count(flat, "num_hidden_layers") == largest:
        assumed = count(flat, "hidden_size") // count(flat, "num_attention_heads")
    else:
        assumed = head_dim(flat)
    return math.sqrt(assumed / wanted)


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


def count_or_none(flat: Config, key: str) -> int:
    """The value of ``key``, a whole number of at least 0: how many there are.

    Raises:
        UserError: as for `count`.
    """
    return int(_checked(key, _need(flat, key), _COUNT_OR_NONE))


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


_COUNT, _COUNT_OR_NONE, _NUMBER = whole(1), whole(0), number()
