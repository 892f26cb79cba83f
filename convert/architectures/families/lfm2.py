"""LFM2: short convolutions, and attention in some layers; with experts as lfm2moe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    plain,
)
from convert.architectures.hf_keys import Config, count, kv_heads, real
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import short, unscaled_rotary, unsupported, whole_rotary
from convert.architectures.stored import EXPERTS, Stored, kernels
from convert.architectures.weights import Names, Weight, renamed
from convert.base.errors import UserError

_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    # In spite of its name, this is the final norm.
    "token_embd_norm": "model.embedding_norm",
}

_BLOCK = {
    "attn_norm": "operator_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.conv": "conv.conv",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
}

_DENSE = {
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}

_EXPERTS = {
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
    "ffn_gate_inp": "feed_forward.gate",
    "ffn_gate_exps": "feed_forward.switch_mlp.gate_proj",
    "ffn_up_exps": "feed_forward.switch_mlp.up_proj",
    "ffn_down_exps": "feed_forward.switch_mlp.down_proj",
    "exp_probs_b.bias": "feed_forward.expert_bias",
}

_SIGMOID = 2


def _config(keys: Keys, model_type: str) -> dict[str, Any]:
    name = keys.source.parts[0]
    unscaled_rotary(keys)
    whole_rotary(keys)
    if keys.integer("attention.sliding_window", 0):
        raise unsupported(keys, "has a sliding window, which mlx-lm's model for LFM2 does not have")
    if not keys.get("attention.causal", True):
        raise unsupported(keys, "looks ahead, to make embeddings and not text")
    if not keys.tied:
        raise unsupported(
            keys,
            "holds an output.weight, but mlx-lm's model for LFM2 always takes the embedding for "
            "its output head",
        )
    width, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    # Layers of convolution have 0 key/value heads.
    per_layer = [int(one) for one in keys.per_layer("attention.head_count_kv", heads)]
    counts = set(per_layer) - {0}
    if len(counts) != 1:
        raise UserError(
            f"{name} has {sorted(counts) or 'no'} key-value heads in its layers of attention, "
            "where one number is expected: get the file again."
        )
    return {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": keys.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": counts.pop(),
        "vocab_size": keys.vocabulary,
        "max_position_embeddings": keys.integer("context_length"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "norm_eps": short(keys.number("attention.layer_norm_rms_epsilon")),
        "conv_bias": False,
        "conv_L_cache": keys.integer("shortconv.l_cache"),
        "layer_types": ["full_attention" if one else "conv" for one in per_layer],
        "intermediate_size": keys.integer("feed_forward_length"),
        "tie_word_embeddings": True,
    }


def _dense_config(keys: Keys) -> dict[str, Any]:
    config = _config(keys, "lfm2")
    return config | {
        "block_dim": config["hidden_size"],
        "block_ff_dim": config["intermediate_size"],
        # The width in the file is final: it must not be adjusted again.
        "block_auto_adjust_ff_dim": False,
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
    }


def _moe_config(keys: Keys) -> dict[str, Any]:
    if keys.integer("expert_gating_func") != _SIGMOID:
        raise unsupported(
            keys, "does not choose its experts by a sigmoid, as mlx-lm's model for LFM2 does"
        )
    return _config(keys, "lfm2_moe") | {
        "num_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "num_dense_layers": keys.integer("leading_dense_block_count", 0),
        "norm_topk_prob": True,
        "use_expert_bias": True,
    }


def _weights(keys: Keys, names: Names) -> list[Weight]:
    return [
        # One kernel for each channel.
        replace(one, shape=(*keys.tensor(one.pieces[0].tensor).shape, 1))
        if one.path.endswith(".conv.conv.weight")
        else one
        for one in renamed(keys, names)
    ]


def _keys(flat: Config) -> dict[str, Any]:
    heads = kv_heads(flat)
    kinds = flat.get("layer_types") or []
    return {
        "attention.head_count_kv": [0 if kind == "conv" else heads for kind in kinds],
        "vocab_size": count(flat, "vocab_size"),
        "shortconv.l_cache": count(flat, "conv_L_cache"),
    }


def _dense_keys(flat: Config) -> dict[str, Any]:
    """The keys of a dense model, whose width config.json may give before it is adjusted."""
    width = count(flat, "block_ff_dim" if flat.get("block_ff_dim") else "intermediate_size")
    if flat.get("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        if flat.get("block_ffn_dim_multiplier") is not None:
            width = int(real(flat, "block_ffn_dim_multiplier") * width)
        step = count(flat, "block_multiple_of") if flat.get("block_multiple_of") else 256
        width = step * -(-width // step)
    return _keys(flat) | {"feed_forward_length": width}


def _moe_keys(flat: Config) -> dict[str, Any]:
    return _keys(flat) | {
        "expert_feed_forward_length": count(flat, "moe_intermediate_size"),
        "leading_dense_block_count": int(flat.get("num_dense_layers") or 0),
        "expert_gating_func": _SIGMOID,
    }


_KERNELS = {r"\.conv\.conv\.weight$": kernels}
_STORED_MOE = Stored(
    {
        **EXPERTS,
        r"\.feed_forward\.w1\.": ".feed_forward.gate_proj.",
        r"\.feed_forward\.w2\.": ".feed_forward.down_proj.",
        r"\.feed_forward\.w3\.": ".feed_forward.up_proj.",
    },
    _KERNELS,
)

_STREAM = plain(
    "shortconv.out_proj",
    reads="shortconv.conv shortconv.in_proj token_embd_norm dense_2",
    note="token_embd_norm is the final norm",
)

ARCHITECTURES = (
    Architecture(
        "lfm2",
        _STREAM,
        InMlx(_dense_config, Names({**_BLOCK, **_DENSE}, _OUTSIDE), _weights),
        (FromFolder(("lfm2",), _dense_keys, Stored(rules=_KERNELS), always_tied=True),),
    ),
    Architecture(
        "lfm2moe",
        _STREAM,
        InMlx(_moe_config, Names({**_BLOCK, **_EXPERTS}, _OUTSIDE), _weights),
        (FromFolder(("lfm2_moe",), _moe_keys, _STORED_MOE, always_tied=True),),
    ),
)
