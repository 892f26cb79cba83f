"""Gemma 4, text only: windows with heads of their own size, per-layer inputs, experts."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    Stream,
    words,
)
from convert.architectures.families.gemma import POST_NORMS
from convert.architectures.hf_keys import (
    Config,
    count,
    head_dim,
    kv_heads,
    real,
    sliding_pattern,
)
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    short,
    unsupported,
)
from convert.architectures.stored import Shape, Stored, halves
from convert.architectures.weights import (
    EXPERTS,
    OUTSIDE,
    Names,
    Weight,
    halved_experts,
    renamed,
)
from convert.tokenizers.to_gguf import Form

_GEMMA4_OUTSIDE = {
    **OUTSIDE,
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}


_GEMMA4_BLOCK = {
    **POST_NORMS,
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    **{
        name: module.replace("mlp.switch_mlp", "experts.switch_glu")
        for name, module in EXPERTS.items()
        if name.endswith("_exps")
    },
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}


_SHARED = r"^blk\.\d+\.attn_(k|v|k_norm)\.weight$"
"""Tensors that files have for the last layers, which use keys and values of another layer."""


def _gemma4_config(keys: Keys) -> dict[str, Any]:
    layers = keys.layers
    sliding = [bool(one) for one in keys.per_layer("attention.sliding_window_pattern")]
    first_shared = layers - _shared_layers(keys, sliding)
    widths = keys.per_layer("feed_forward_length")
    width = widths[0]
    doubled = layers > first_shared and widths[first_shared] == 2 * width
    if widths != [width * (1 + (doubled and n >= first_shared)) for n in range(layers)]:
        raise unsupported(
            keys,
            f"has feed-forward networks of the widths {sorted(set(widths))}, but mlx-lm's gemma4 "
            "can only double the width of the layers that share keys and values",
        )
    experts = keys.integer("expert_count", 0)
    config = {
        "model_type": "gemma4_text",
        "hidden_size": keys.integer("embedding_length"),
        "num_hidden_layers": layers,
        "intermediate_size": width,
        "num_attention_heads": keys.integer("attention.head_count"),
        "head_dim": keys.integer("attention.key_length_swa"),
        "global_head_dim": keys.integer("attention.key_length"),
        **_key_heads(keys, sliding, first_shared),
        "rms_norm_eps": short(keys.number("attention.layer_norm_rms_epsilon")),
        "vocab_size": keys.vocabulary,
        "vocab_size_per_layer_input": keys.vocabulary,
        "hidden_size_per_layer_input": keys.integer("embedding_length_per_layer_input"),
        "num_kv_shared_layers": layers - first_shared,
        "use_double_wide_mlp": doubled,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
        "sliding_window": keys.integer("attention.sliding_window"),
        "rope_parameters": _gemma4_rotary(keys, sliding),
        "max_position_embeddings": keys.integer("context_length"),
        "final_logit_softcapping": short(keys.number("final_logit_softcapping", 30.0)) or None,
        "tie_word_embeddings": keys.tied,
        "enable_moe_block": bool(experts),
    }
    if experts:
        config |= {
            "num_experts": experts,
            "top_k_experts": keys.integer("expert_used_count"),
            "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        }
    return config


def _shared_layers(keys: Keys, sliding: list[bool]) -> int:
    """How many layers, the last ones, use the keys and values of a layer before them.

    Raises:
        UserError: where llama.cpp would take them from another layer than mlx-lm.
    """
    count = int(keys.integer("attention.shared_kv_layers", 0))
    own = keys.layers - count
    # mlx-lm shares with the last layer of the same kind, llama.cpp with the last or the one before.
    if count and not (own >= 2 and sliding[own - 2 : own] == [True, False]):
        raise unsupported(
            keys,
            f"shares keys and values over its last {count} layers, but the two layers before them "
            "are not a sliding and a full one, and mlx-lm would take them from another layer than "
            "llama.cpp",
        )
    return count


def _key_heads(keys: Keys, sliding: list[bool], first_shared: int) -> dict[str, Any]:
    heads = keys.per_layer("attention.head_count_kv", keys.integer("attention.head_count"))
    by_kind = {
        kind: {heads[n] for n, slides in enumerate(sliding) if slides == kind}
        for kind in (True, False)
    }
    owners = [n for n in range(first_shared) if not sliding[n]]
    without = [n for n in owners if f"blk.{n}.attn_v.weight" not in keys.tensors]
    if any(len(found) > 1 for found in by_kind.values()) or without not in ([], owners):
        raise unsupported(
            keys,
            "has layers of one kind that differ in their key and value heads, which mlx-lm's "
            "gemma4 cannot have",
        )
    full = next(iter(by_kind[False] or by_kind[True]))
    found = {
        "num_key_value_heads": next(iter(by_kind[True] or by_kind[False])),
        "num_global_key_value_heads": full,
        "attention_k_eq_v": bool(without),
    }
    if full != found["num_key_value_heads"] and not without:
        raise unsupported(
            keys,
            "has more or fewer key heads in its full layers than in its sliding ones, which "
            "mlx-lm's gemma4 can have only where the keys are the values as well",
        )
    return found


def _gemma4_rotary(keys: Keys, sliding: list[bool]) -> dict[str, Any]:
    """The rotary embeddings of both kinds of layers; rotated dimensions have the factor 1."""
    if keys.number("rope.scaling.factor", 1.0) not in (0.0, 1.0):
        raise unsupported(keys, "stretches its rotary embedding, which no published gemma4 does")
    for slides, kind in ((True, "_swa"), (False, "")):
        if slides in sliding and keys.integer(
            f"rope.dimension_count{kind}", keys.integer(f"attention.key_length{kind}")
        ) != keys.integer(f"attention.key_length{kind}"):
            raise unsupported(
                keys,
                "rotates only the first dimensions of its heads, but mlx-lm's gemma4 rotates all "
                "of them",
            )
    share = 1.0
    if False in sliding:
        table = keys.values("rope_freqs.weight").reshape(-1)
        turning = int(np.sum(table == 1.0))
        if not (np.all(table[:turning] == 1.0) and np.all(table[turning:] >= 1e10)):
            raise unsupported(
                keys,
                "has a rope_freqs.weight that does more than to keep some dimensions from "
                "turning, which mlx-lm's gemma4 cannot do",
            )
        share = turning / len(table)
        head = 2 * len(table)
        if int(head * share) != 2 * turning:
            share = (2 * turning + 0.5) / head
    return {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": keys.number("rope.freq_base", 10000.0),
            "partial_rotary_factor": share,
        },
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": keys.number("rope.freq_base_swa", 10000.0),
            "partial_rotary_factor": 1.0,
        },
    }


def _gemma4_weights(keys: Keys, names: Names) -> list[Weight]:
    first_shared = keys.layers - int(keys.integer("attention.shared_kv_layers", 0))
    shared = tuple(
        _SHARED.replace(r"\d+", str(layer)) for layer in range(first_shared, keys.layers)
    )
    skip = (*shared, r"\.ffn_gate_up_exps\.weight$")
    return renamed(keys, names, skip=skip) + _gemma4_experts(keys)


def _gemma4_experts(keys: Keys) -> list[Weight]:
    return [
        weight
        for name in keys.tensors
        if (layer := re.fullmatch(r"blk\.(\d+)\.ffn_gate_up_exps\.weight", name))
        for weight in halved_experts(keys, name, f"model.layers.{layer[1]}.experts.switch_glu")
    ]


def _gemma4_keys(flat: Config) -> dict[str, Any]:
    layers = count(flat, "num_hidden_layers")
    sliding = sliding_pattern(flat)
    shared = int(flat.get("num_kv_shared_layers") or 0)
    head, whole = head_dim(flat), count(flat, "global_head_dim")
    values = {
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": int(flat.get("hidden_size_per_layer_input") or 0),
        "attention.sliding_window": count(flat, "sliding_window"),
        "attention.sliding_window_pattern": sliding,
        "attention.key_length": whole,
        "attention.value_length": whole,
        "attention.key_length_swa": head,
        "attention.value_length_swa": head,
        "rope.dimension_count": whole,
        "rope.dimension_count_swa": head,
    }
    if flat.get("use_double_wide_mlp"):
        width = count(flat, "intermediate_size")
        values["feed_forward_length"] = [
            width * (1 + (layer >= layers - shared)) for layer in range(layers)
        ]
    if flat.get("num_global_key_value_heads") is not None and flat.get("attention_k_eq_v"):
        both = count(flat, "num_global_key_value_heads"), kv_heads(flat)
        values["attention.head_count_kv"] = [both[slides] for slides in sliding]
    if flat.get("moe_intermediate_size") is not None:
        values["expert_feed_forward_length"] = count(flat, "moe_intermediate_size")
    if flat.get("final_logit_softcapping"):
        values["final_logit_softcapping"] = real(flat, "final_logit_softcapping")
    return values


def _gemma4_factors(flat: Config) -> dict[str, np.ndarray]:
    """Rotated dimensions have the factor 1; others are turned so slowly that they do not turn."""
    full = (flat.get("rope_parameters") or {}).get("full_attention") or {}
    head = count(flat, "global_head_dim")
    turning = int(head * float(full.get("partial_rotary_factor", 1.0)) / 2)
    factors = np.full(head // 2, 1e30, dtype=np.float32)
    factors[:turning] = 1.0
    return {"rope_freqs.weight": factors}


def _gemma4_tensors(named: dict[str, Shape], others: dict[str, Shape]) -> dict[str, Shape]:
    """The tensors, with gate and up of the experts in one, as files have them."""
    found: dict[str, Shape] = {}
    for name, shape in named.items():
        if ".ffn_gate_exps." in name:
            experts, rows, width = shape
            found[name.replace("gate_exps", "gate_up_exps")] = (experts, 2 * rows, width)
        elif ".ffn_up_exps." not in name:
            found[name] = shape
    return found


def _gemma4_all(keys: Keys, names: Names) -> list[Weight]:
    """As `_gemma4_weights`, with the tensors that the last layers have and no runtime uses."""
    found = renamed(keys, names, skip=(r"\.ffn_gate_up_exps\.weight$",))
    return found + _gemma4_experts(keys)


_GEMMA4_STORED = Stored(
    {
        r"\.experts\.(gate_up|down)_proj(\.weight)?$": r".experts.switch_glu.\1_proj.weight",
    },
    {r"\.switch_glu\.gate_up_proj\.weight$": halves},
)


ARCHITECTURES = (
    Architecture(
        "gemma4",
        Stream(
            {
                "attn_output": ("post_attention_norm",),
                "ffn_down": ("post_ffw_norm_1?", "post_ffw_norm"),
                "ffn_down_exps": ("post_ffw_norm_2", "post_ffw_norm"),
                "proj": ("post_norm",),
            },
            words(
                "inp_gate layer_output_scale per_layer_token_embd per_layer_model_proj "
                "per_layer_proj_norm pre_ffw_norm_2"
            ),
            note="per-layer inputs write through proj; experts through two norms",
        ),
        InMlx(
            _gemma4_config,
            Names(_GEMMA4_BLOCK, _GEMMA4_OUTSIDE),
            _gemma4_weights,
            unused=(_SHARED,),
        ),
        (
            FromFolder(
                ("gemma4", "gemma4_text"),
                _gemma4_keys,
                _GEMMA4_STORED,
                arranged=_gemma4_all,
                tensors=_gemma4_tensors,
                made=_gemma4_factors,
                scalings=("proportional",),
                tokenizer=lambda flat: Form(model="gemma4"),
                tied_by_default=True,
            ),
        ),
    ),
)
