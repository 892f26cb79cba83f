"""gpt-oss: experts with biases, usually in MXFP4, and attention with sinks."""

from __future__ import annotations

from typing import Any

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    plain,
)
from convert.architectures.hf_keys import Config, count, every_nth
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    base_config,
    rope_scaling,
    sliding_layers,
    unsupported,
    whole_rotary,
)
from convert.architectures.stored import (
    Folder,
    Stored,
    alternate,
    alternate_columns,
    swapped_down,
)
from convert.architectures.weights import ATTENTION, Names, Weight

_BLOCK = {
    **ATTENTION,
    "attn_sinks.weight": "self_attn.sinks",
    # In spite of its name, this norm stands before the experts.
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}


def _config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    base = keys.number("rope.freq_base", 10000.0)
    if keys.number("rope.freq_base_swa", base) != base:
        raise unsupported(
            keys,
            "rotates its layers with a window at frequencies of their own, which mlx-lm's model "
            f"for {keys.architecture} does not do",
        )
    if keys.tied:
        raise unsupported(keys, "has no output.weight, which mlx-lm's model needs")
    slides = sliding_layers(keys, 2)
    if len(set(slides)) < 2:
        raise unsupported(
            keys,
            "does not have both layers with a sliding window and layers without, which mlx-lm's "
            f"model for {keys.architecture} needs",
        )
    return base_config(keys, "gpt_oss") | {
        "num_local_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "intermediate_size": keys.integer("expert_feed_forward_length"),
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if one else "full_attention" for one in slides],
        "rope_scaling": rope_scaling(keys),
    }


def _keys(flat: Config) -> dict[str, Any]:
    return every_nth(flat, 2) | {
        "expert_feed_forward_length": count(flat, "intermediate_size"),
    }


def _gate_and_up(folder: Folder, path: str, source: str) -> list[Weight]:
    rule = alternate if source.endswith("_blocks") else alternate_columns
    return rule(folder, path, source)


_STORED = Stored(
    {
        r"\.experts\.(gate_up|down)_proj_bias$": r".experts.\1_proj.bias",
        r"\.experts\.(gate_up|down)_proj(_blocks)?$": r".experts.\1_proj.weight",
    },
    {
        r"\.gate_up_proj\.(weight|bias)$": _gate_and_up,
        r"\.experts\.down_proj\.weight$": swapped_down,
    },
)
"""Publishers store transposed matrices (E, in, out), or blocks of MXFP4 that are not transposed."""

ARCHITECTURES = (
    Architecture(
        "gpt-oss",
        plain(
            reads="post_attention_norm",
            note="post_attention_norm stands before the feed-forward network",
        ),
        InMlx(_config, Names(_BLOCK)),
        (FromFolder(("gpt_oss",), _keys, _STORED),),
    ),
)
