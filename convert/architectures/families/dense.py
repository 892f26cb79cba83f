"""Dense relatives of llama: glm4, starcoder2, smollm3, exaone4, olmo2, nemotron and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    plain,
    post_norm,
)
from convert.architectures.families.llama import biases, unpermuted
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    base_config,
    experts_used,
    rope_scaling,
    rotary_factor,
    short,
    sliding_layers,
    sliding_window,
    unscaled_rotary,
    unsupported,
    whole_rotary,
)
from convert.architectures.weights import ATTENTION, EXPERTS, FEED_FORWARD, Weight, changed, renamed

_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _attention_bias(keys: Keys) -> dict[str, bool]:
    return {"attention_bias": "blk.0.attn_q.bias" in keys.tensors}


def _layer_norm_eps(keys: Keys) -> float:
    return short(keys.number("attention.layer_norm_epsilon"))


def _tables(*tables: Mapping[str, str]) -> Callable[[Keys], list[Weight]]:
    """Weights of an architecture whose tensors are only renamed."""
    together = {name: module for table in tables for name, module in table.items()}
    return lambda keys: renamed(keys, together)


# --------------------------------------------------------------------------------------------------
# GLM-4 (0414): norms before and behind each half of a layer


def _glm4_config(keys: Keys) -> dict[str, Any]:
    unscaled_rotary(keys)
    if keys.tied:
        raise unsupported(
            keys,
            "has no output.weight, because its embedding is the output head as well, but mlx-lm's "
            "glm4 has a head of its own",
        )
    sections = keys.get("rope.dimension_sections", [])
    # With rotary sections for images, llama.cpp rotates dimension i with i + d/2.
    pictures = isinstance(sections, list) and all(sections[:2]) and len(sections) > 1
    return (
        base_config(keys, "glm4")
        | _attention_bias(keys)
        | {"partial_rotary_factor": rotary_factor(keys), "rope_traditional": not pictures}
    )


_GLM4 = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_self_attn_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_up": "mlp.gate_up_proj",
}


# --------------------------------------------------------------------------------------------------
# StarCoder2: LayerNorm and biases everywhere


def _starcoder2_config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    unscaled_rotary(keys)
    return base_config(keys, "starcoder2") | {"norm_epsilon": _layer_norm_eps(keys)}


# --------------------------------------------------------------------------------------------------
# SmolLM3: every fourth layer without a rotary embedding


def _smollm3_config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    return (
        base_config(keys, "smollm3")
        | biases(keys)
        | {
            "rope_scaling": rope_scaling(keys),
            "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(keys.layers)],
        }
    )


def _smollm3_weights(keys: Keys) -> list[Weight]:
    return unpermuted(keys, renamed(keys, {**ATTENTION, **FEED_FORWARD}))


# --------------------------------------------------------------------------------------------------
# EXAONE 4: norms behind each half of a layer; the 32B has windows, and no rotation without them

_EXAONE4_32B = 64
"""The number of layers of the model in which llama.cpp uses sliding windows; no other has them."""


def _exaone4_config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    config = base_config(keys, "exaone4") | {
        "rope_scaling": rope_scaling(keys),
        "sliding_window": None,
        "sliding_window_pattern": None,
    }
    if keys.layers != _EXAONE4_32B:
        return config
    slides = sliding_layers(keys, 4)
    if len(set(slides)) != 2:
        raise unsupported(
            keys,
            "has not both layers with and layers without a sliding window, as mlx-lm's exaone4 "
            "needs",
        )
    return config | {
        "sliding_window": sliding_window(keys, 4096),
        "sliding_window_pattern": "".join("L" if one else "G" for one in slides),
    }


# --------------------------------------------------------------------------------------------------
# OLMo 2, and OLMo 3, which is an olmo2 with windows


def _olmo2_config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    config = (
        base_config(keys, "olmo2") | _attention_bias(keys) | {"rope_scaling": rope_scaling(keys)}
    )
    window = keys.integer("attention.sliding_window", 0)
    if not window:
        return config
    slides = sliding_layers(keys, 4)
    if len(set(slides)) != 2:
        raise unsupported(
            keys,
            "has not both layers with and layers without a sliding window, as mlx-lm's olmo3 needs",
        )
    kinds = {True: "sliding_attention", False: "full_attention"}
    return config | {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": [kinds[one] for one in slides],
    }


# --------------------------------------------------------------------------------------------------
# Nemotron: LayerNorm of 1 + w, squared ReLU


def _nemotron_config(keys: Keys) -> dict[str, Any]:
    scaling = rope_scaling(keys)
    if scaling and scaling["type"] != "linear":
        raise unsupported(
            keys,
            f"stretches its rotary embedding by the method {scaling['type']}, but mlx-lm's "
            "nemotron knows linear only",
        )
    return (
        base_config(keys, "nemotron")
        | biases(keys)
        | {
            "hidden_act": "relu2",
            "norm_eps": _layer_norm_eps(keys),
            "partial_rotary_factor": rotary_factor(keys),
            "rope_scaling": scaling,
        }
    )


def _less_one(values: np.ndarray) -> np.ndarray:
    return values - np.float32(1)


def _nemotron_weights(keys: Keys) -> list[Weight]:
    return changed(renamed(keys, {**ATTENTION, **FEED_FORWARD}), r"norm\.weight$", _less_one)


# --------------------------------------------------------------------------------------------------
# ERNIE 4.5


def _ernie_config(model_type: str) -> Callable[[Keys], dict[str, Any]]:
    def config(keys: Keys) -> dict[str, Any]:
        whole_rotary(keys)
        unscaled_rotary(keys)
        return base_config(keys, model_type) | {"use_bias": False}

    return config


def _ernie_moe_config(keys: Keys) -> dict[str, Any]:
    for layer in range(keys.layers):
        name = f"blk.{layer}.exp_probs_b.bias"
        if name in keys.tensors and np.ptp(keys.values(name)) > 0:
            raise unsupported(
                keys,
                f"corrects its router's choice by {name}, which mlx-lm's ernie4_5_moe leaves out",
            )
    if keys.integer("interleave_moe_layer_step", 1) != 1:
        raise unsupported(
            keys,
            "has experts in every n-th layer only (ernie4_5-moe.interleave_moe_layer_step), which "
            "llama.cpp cannot load either",
        )
    width = keys.count("expert_feed_forward_length")
    shared = f"blk.{keys.layers - 1}.ffn_down_shexp.weight"
    return _ernie_config("ernie4_5_moe")(keys) | {
        "moe_num_experts": keys.integer("expert_count"),
        "moe_k": experts_used(keys),
        "moe_layer_start_index": keys.integer("leading_dense_block_count", 0),
        "moe_intermediate_size": width,
        "moe_num_shared_experts": (
            keys.tensor(shared).shape[-1] // width if shared in keys.tensors else 0
        ),
    }


_SHARED_EXPERT = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}


_CORRECTION = r"\.exp_probs_b\."
"""A tensor that some files have and that neither runtime uses."""


def _ernie_moe_weights(keys: Keys) -> list[Weight]:
    table = {**ATTENTION, **FEED_FORWARD, **EXPERTS, **_SHARED_EXPERT}
    return renamed(keys, table, skip=[_CORRECTION])


# --------------------------------------------------------------------------------------------------
# Seed-OSS


def _seed_config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    return (
        base_config(keys, "seed_oss")
        | _attention_bias(keys)
        | {
            "attention_out_bias": "blk.0.attn_output.bias" in keys.tensors,
            "rope_scaling": rope_scaling(keys),
        }
    )


# --------------------------------------------------------------------------------------------------
# HunYuan: norms of queries and keys behind the rotation, whose base holds the stretching


def _hunyuan_config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    unscaled_rotary(keys)
    if keys.number("rope.scaling.alpha", 0.0) > 0:
        raise unsupported(
            keys,
            "gives its rotary embedding's alpha besides the base that should hold it "
            "(hunyuan-dense.rope.scaling.alpha)",
        )
    return base_config(keys, "hunyuan_v1_dense") | _attention_bias(keys) | {"use_qk_norm": True}


_HUNYUAN = {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}


# --------------------------------------------------------------------------------------------------
# Mistral Small 3 and Ministral 3, whose queries grow with their position


def _mistral3_config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    beta = keys.number("attention.temperature_scale", 0.0)
    config = base_config(keys, "llama") | biases(keys) | {"rope_scaling": _mistral3_rope(keys)}
    if not beta:
        return config
    scaling = config.pop("rope_scaling") or {"type": "default", "rope_type": "default"}
    if scaling["type"] == "llama3":
        raise unsupported(
            keys,
            "lets queries grow with their position and stretches its rotary embedding by a table, "
            "of which mlx-lm can do one only",
        )
    return config | {
        "model_type": "ministral3",
        "rope_parameters": scaling
        | {
            "rope_theta": config["rope_theta"],
            "llama_4_scaling_beta": short(beta),
            "original_max_position_embeddings": keys.integer(
                "rope.scaling.original_context_length", config["max_position_embeddings"]
            ),
        },
    }


def _mistral3_rope(keys: Keys) -> dict[str, Any] | None:
    """rope_scaling with the additional keys that llama.cpp reads for mistral3."""
    scaling = rope_scaling(keys)
    if scaling is None or scaling["type"] != "yarn":
        return scaling
    for key in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{key}" in keys:
            scaling[key] = short(keys.number(f"rope.scaling.yarn_{key}"))
    every = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if every:
        if "mscale" in scaling:
            raise unsupported(
                keys,
                "gives two factors of its rotary embedding (rope.scaling.attn_factor and "
                "yarn_log_multiplier), of which mlx-lm knows one",
            )
        scaling["mscale"] = 1.0
        scaling["mscale_all_dim"] = short(every)
    return scaling


ARCHITECTURES = (
    Architecture("glm4", post_norm(), InMlx(_glm4_config, _tables(ATTENTION, FEED_FORWARD, _GLM4))),
    Architecture(
        "starcoder2",
        plain(),
        InMlx(
            _starcoder2_config,
            _tables(ATTENTION, FEED_FORWARD, {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
        ),
    ),
    Architecture("smollm3", plain(), InMlx(_smollm3_config, _smollm3_weights)),
    Architecture(
        "exaone4",
        post_norm(),
        InMlx(_exaone4_config, _tables(ATTENTION, FEED_FORWARD, _POST_NORMS)),
    ),
    Architecture(
        "olmo2",
        post_norm(),
        InMlx(_olmo2_config, _tables(ATTENTION, FEED_FORWARD, _POST_NORMS)),
        FromFolder(("olmo2",)),
    ),
    Architecture("nemotron", plain(), InMlx(_nemotron_config, _nemotron_weights)),
    Architecture(
        "ernie4_5", plain(), InMlx(_ernie_config("ernie4_5"), _tables(ATTENTION, FEED_FORWARD))
    ),
    Architecture(
        "ernie4_5-moe",
        plain(),
        InMlx(_ernie_moe_config, _ernie_moe_weights, unused=(_CORRECTION,)),
    ),
    Architecture(
        "seed_oss",
        plain(
            reads="post_attention_norm",
            note="post_attention_norm stands before the feed-forward network",
        ),
        InMlx(
            _seed_config,
            _tables(ATTENTION, FEED_FORWARD, {"post_attention_norm": "post_attention_layernorm"}),
        ),
    ),
    Architecture(
        "hunyuan-dense", plain(), InMlx(_hunyuan_config, _tables(ATTENTION, FEED_FORWARD, _HUNYUAN))
    ),
    Architecture("mistral3", plain(), InMlx(_mistral3_config, _smollm3_weights)),
)
