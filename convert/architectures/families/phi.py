"""Phi-3, Phi-3.5 and Phi-4 (phi3), whose matrices stay fused in mlx-lm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    edited,
    plain,
)
from convert.architectures.hf_keys import Config, original_context, rotary_dim
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import base_config, rope_scaling, rotary_factor, unsupported
from convert.architectures.weights import Names

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}

_TABLES = ("rope_factors_short.weight", "rope_factors_long.weight")


def _config(keys: Keys) -> dict[str, Any]:
    # Both runtimes ignore attention.sliding_window.
    config = base_config(keys, "phi3")
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise unsupported(
            keys,
            f"has heads of {config['head_dim']} dimensions, but mlx-lm's phi3 has heads that make "
            "up the hidden size together",
        )
    return config | {
        "partial_rotary_factor": rotary_factor(keys),
        "original_max_position_embeddings": _original_context(keys),
        "rope_scaling": _scaling(keys),
    }


def _original_context(keys: Keys) -> int:
    given = keys.integer("rope.scaling.original_context_length", 0)
    return int(given or keys.integer("context_length"))


def _scaling(keys: Keys) -> dict[str, Any] | None:
    """The two tables of longrope factors, as in the publisher's config.json.

    mlx-lm always uses the long table. llama.cpp uses the long table in contexts longer than the
    original one and the short table in others. So the two agree in the file's own, long context,
    which is llama.cpp's default.
    """
    if not any(name in keys.tensors for name in _TABLES):
        scaling = rope_scaling(keys)
        if scaling is None:
            return None
        if scaling["type"] != "linear":
            raise unsupported(
                keys,
                f"stretches its rotary embedding by the method {scaling['type']!r}, which mlx-lm's "
                "phi3 does not know",
            )
        # mlx-lm requires this key but does not use it.
        return scaling | {"long_factor": []}
    short, long = (_table(keys, name) for name in _TABLES)
    if keys.number("rope.scaling.factor", 0.0) not in (0.0, 1.0):
        raise unsupported(
            keys, "stretches its rotary embedding by a factor beside the tables of longrope"
        )
    original, context = _original_context(keys), int(keys.integer("context_length"))
    ratio = context / original
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    given = keys.number("rope.scaling.attn_factor", 1.0)
    if abs(given - usual) > 1e-4 * usual:
        raise unsupported(
            keys,
            f"multiplies its rotary embedding by {given:g} (rope.scaling.attn_factor), but mlx-lm "
            f"by {usual:g}, which follows from its contexts of {original} and {context} tokens",
        )
    return {"type": "longrope", "short_factor": short, "long_factor": long}


def _table(keys: Keys, name: str) -> list[float]:
    """Factors in the shortest decimal form that gives the same float32."""
    values = keys.values(name).reshape(-1)
    rotated = keys.integer(
        "rope.dimension_count",
        keys.integer("embedding_length") // keys.integer("attention.head_count"),
    )
    if len(values) != rotated // 2 or not np.all(np.isfinite(values) & (values > 0)):
        raise unsupported(
            keys,
            f"has {len(values)} values in {name} where {rotated // 2} positive ones belong, one "
            "for each pair of rotated dimensions",
        )
    return [float(str(value)) for value in values]


def _phi3_keys(flat: Config) -> dict[str, Any]:
    return {
        "attention.key_length": None,
        "attention.value_length": None,
        "rope.dimension_count": rotary_dim(flat),
        "attention.sliding_window": max(0, int(flat.get("sliding_window") or 0)),
        "rope.scaling.original_context_length": original_context(flat),
    }


ARCHITECTURES = (
    Architecture(
        "phi3",
        plain(),
        InMlx(_config, Names(_BLOCK)),
        (FromFolder(("phi3",), _phi3_keys, longrope=True),),
    ),
    *edited("phi2 phimoe", plain()),
)
