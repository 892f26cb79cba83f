"""Llama 4: experts in some layers, attention in chunks, and no positions in every fourth layer.

Most of its numbers are fixed in llama.cpp: 8,192 tokens in a chunk, and queries without positions
that grow with every 8,192 tokens.
"""

from __future__ import annotations

from typing import Any

from convert.architectures.architecture import Architecture, FromFolder, InMlx, plain
from convert.architectures.families.llama import llama_keys
from convert.architectures.hf_keys import Config, count
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import base_config, rope_scaling, unsupported, whole_rotary
from convert.architectures.stored import Stored, halved_columns, swapped_down
from convert.architectures.weights import ATTENTION, OUTSIDE, Names
from convert.base.errors import UserError

_NAMES = Names(
    {
        **ATTENTION,
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "feed_forward.router",
        **{
            f"ffn_{part}{ending}": f"feed_forward.{module}{part}_proj"
            for part in ("gate", "up", "down")
            for ending, module in {"": "", "_exps": "experts.", "_shexp": "shared_expert."}.items()
        },
    },
    {name: f"language_model.{module}" for name, module in OUTSIDE.items()},
    "language_model.model.layers",
)

_CHUNK, _NO_POSITIONS = 8192, 4
"""Tokens in a chunk of attention; every so many layers have neither chunks nor positions."""

_UNNORMED = 128
"""The number of experts of the one model whose queries and keys llama.cpp does not normalize."""

_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (_CHUNK,),
    "attn_temperature_tuning": (True, 4),
    "floor_scale": (_CHUNK,),
    "attn_scale": (0.1,),
    "num_experts_per_tok": (1,),
    "attention_bias": (False,),
    "no_rope_layer_interval": (_NO_POSITIONS,),
}
"""Key of config.json -> its only values that llama.cpp can run."""


def _config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    experts = keys.integer("expert_count", 0)
    if keys.layers < _NO_POSITIONS:
        raise unsupported(
            keys, f"has {keys.layers} layers, and mlx-lm's model for llama4 needs at least 4"
        )
    if keys.get("attention.sliding_window") is not None:
        raise unsupported(
            keys, "has its own attention.sliding_window, which mlx-lm's model for llama4 has not"
        )
    if keys.tied:
        raise unsupported(keys, "has no output.weight, which mlx-lm's model needs")
    if keys.integer("expert_used_count", 1) != 1:
        raise unsupported(keys, "sends a token to several experts, and mlx-lm's model to one")
    text = base_config(keys, "llama4_text") | {
        "attention_bias": False,
        "attention_chunk_size": _CHUNK,
        "attn_temperature_tuning": True,
        "floor_scale": _CHUNK,
        "attn_scale": 0.1,
        "interleave_moe_layer_step": keys.count("interleave_moe_layer_step"),
        "intermediate_size": keys.count("expert_feed_forward_length"),
        "intermediate_size_mlp": keys.count("feed_forward_length"),
        "num_experts_per_tok": 1,
        "num_local_experts": experts,
        "rope_scaling": rope_scaling(keys),
        "use_qk_norm": experts != _UNNORMED,
    }
    return {"model_type": "llama4", "tie_word_embeddings": False, "text_config": text}


def _keys(flat: Config) -> dict[str, Any]:
    experts, layers = count(flat, "num_local_experts"), count(flat, "num_hidden_layers")
    fixed = _FIXED | {"use_qk_norm": (experts != _UNNORMED,)}
    for key, allowed in fixed.items():
        if flat.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"config.json's {key} is {flat[key]!r}, but llama.cpp always takes {allowed[0]!r} "
                f"for a llama4 with {experts} experts: the model has no GGUF."
            )
    turned = [int((layer + 1) % _NO_POSITIONS != 0) for layer in range(layers)]
    if flat.get("no_rope_layers") and list(flat["no_rope_layers"]) != turned:
        raise UserError(
            "config.json's no_rope_layers differ from every fourth layer, which llama.cpp leaves "
            "without positions: the model has no GGUF."
        )
    return llama_keys(flat) | {
        "feed_forward_length": count(flat, "intermediate_size_mlp"),
        "interleave_moe_layer_step": count(flat, "interleave_moe_layer_step"),
        "expert_feed_forward_length": count(flat, "intermediate_size"),
    }


_STORED = Stored(
    {r"\.experts\.(gate_up|down)_proj$": r".experts.\1_proj.weight"},
    {
        r"\.experts\.gate_up_proj\.weight$": halved_columns,
        r"\.experts\.down_proj\.weight$": swapped_down,
    },
)
"""Publishers store transposed stacks (E, in, out), the gate's columns before those of up."""

ARCHITECTURES = (
    Architecture(
        "llama4",
        plain(),
        InMlx(_config, _NAMES),
        (FromFolder(("llama4",), _keys, _STORED),),
    ),
)
