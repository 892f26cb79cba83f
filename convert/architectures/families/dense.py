"""Dense relatives of llama: glm4, starcoder2, smollm3, exaone4, olmo2, nemotron and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    plain,
    post_norm,
)
from convert.architectures.families.llama import PLAIN, biases, llama_keys, permuted
from convert.architectures.hf_keys import (
    Config,
    count,
    head_dim,
    real,
    rope_kind,
    rope_theta,
    sliding_pattern,
)
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    base_config,
    rope_scaling,
    rotary_factor,
    short,
    sliding_layers,
    sliding_window,
    unscaled_rotary,
    unsupported,
    whole_rotary,
)
from convert.architectures.weights import (
    ATTENTION,
    FEED_FORWARD,
    LESS_ONE,
    Names,
    Weight,
    changed,
    renamed,
)
from convert.tokenizers.to_gguf import Form

_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _attention_bias(keys: Keys) -> dict[str, bool]:
    return {"attention_bias": "blk.0.attn_q.bias" in keys.tensors}


def _layer_norm_eps(keys: Keys) -> float:
    return short(keys.number("attention.layer_norm_epsilon"))


def with_names(*tables: Mapping[str, str]) -> Names:
    """The usual names, and those of further tables."""
    found = {**ATTENTION, **FEED_FORWARD}
    for table in tables:
        found |= table
    return Names(found)


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
    config = (
        base_config(keys, "glm4")
        | _attention_bias(keys)
        | {"partial_rotary_factor": rotary_factor(keys), "rope_traditional": not pictures}
    )
    if pictures:
        # mlx-lm does not need them, but the way back to a GGUF does.
        config["rope_scaling"] = {"type": "default", "mrope_section": sections[:3]}
    return config


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


def _nemotron_weights(keys: Keys, names: Names) -> list[Weight]:
    return changed(renamed(keys, names), r"norm\.weight$", LESS_ONE)


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
# From folders


def _glm4_keys(flat: Config) -> dict[str, Any]:
    share = flat.get("partial_rotary_factor")
    return {"rope.dimension_count": int(head_dim(flat) * (0.5 if share is None else float(share)))}


def _glm4_tokenizer(flat: Config) -> Form:
    end = "<|endoftext|>"
    return Form(roles={"bos": end, "unknown": end, "eot": "<|user|>"})


def _exaone4_keys(flat: Config) -> dict[str, Any]:
    found: dict[str, Any] = {"vocab_size": count(flat, "vocab_size")}
    if flat.get("sliding_window") is not None:
        found["attention.sliding_window"] = count(flat, "sliding_window")
        if flat.get("layer_types") or flat.get("sliding_window_pattern"):
            found["attention.sliding_window_pattern"] = sliding_pattern(flat)
    return found


def _olmo2_keys(flat: Config) -> dict[str, Any]:
    if flat.get("sliding_window") is None:
        return {}
    return {
        "attention.sliding_window": count(flat, "sliding_window"),
        "attention.sliding_window_pattern": sliding_pattern(flat, 4),
        "rope.freq_base_swa": rope_theta(flat),
    }


def _nemotron_keys(flat: Config) -> dict[str, Any]:
    eps = next(name for name in ("layer_norm_eps", "norm_epsilon", "norm_eps") if name in flat)
    width, heads = count(flat, "hidden_size"), count(flat, "num_attention_heads")
    share = flat.get("partial_rotary_factor")
    found = {
        "vocab_size": count(flat, "vocab_size"),
        "attention.layer_norm_epsilon": real(flat, eps),
        "rope.dimension_count": int((0.5 if share is None else float(share)) * width) // heads,
    }
    scaling = flat.get("rope_scaling") or {}
    if scaling.get("factor") is None:
        return found | {"rope.scaling.type": "none"}
    return found | {
        "rope.scaling.type": "linear",
        "rope.scaling.factor": real(scaling, "factor"),
    }


def _nemotron_tokenizer(flat: Config) -> Form:
    return Form(roles={"padding": 0, "unknown": 1})


_HUNYUAN_CONTEXT = 256 * 1024
"""Tokens of context that llama.cpp's converter takes for a HunYuan with a stretched embedding."""


def _hunyuan_keys(flat: Config) -> dict[str, Any]:
    scaling = flat.get("rope_scaling") or {}
    if rope_kind(scaling) not in ("dynamic", "xdrope"):
        return {}
    head, alpha = head_dim(flat), float(scaling.get("alpha") or 50)
    found: dict[str, Any] = {
        "rope.freq_base": rope_theta(flat) * alpha ** (head / (head - 2)),
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
    }
    if rope_kind(scaling) == "dynamic":
        found["rope.scaling.original_context_length"] = _HUNYUAN_CONTEXT
        found["context_length"] = _HUNYUAN_CONTEXT
    return found


def _hunyuan_tokenizer(flat: Config) -> Form:
    end = flat.get("eod_token_id")
    return Form(roles={"eos": end} if isinstance(end, int) else {}, first_end=True)


ARCHITECTURES = (
    Architecture(
        "glm4",
        post_norm(),
        InMlx(_glm4_config, with_names(_GLM4)),
        (FromFolder(("glm4",), _glm4_keys, tokenizer=_glm4_tokenizer),),
    ),
    Architecture(
        "starcoder2",
        plain(),
        InMlx(
            _starcoder2_config,
            with_names({"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
        ),
        (FromFolder(("starcoder2",), tied_by_default=True),),
    ),
    Architecture(
        "smollm3",
        plain(),
        InMlx(_smollm3_config, PLAIN, permuted),
        (FromFolder(("smollm3",), llama_keys, tied_by_default=True),),
    ),
    Architecture(
        "exaone4",
        post_norm(),
        InMlx(_exaone4_config, with_names(_POST_NORMS)),
        (FromFolder(("exaone4",), _exaone4_keys),),
    ),
    Architecture(
        "olmo2",
        post_norm(),
        InMlx(_olmo2_config, with_names(_POST_NORMS)),
        (FromFolder(("olmo2", "olmo3"), _olmo2_keys),),
    ),
    Architecture(
        "nemotron",
        plain(),
        InMlx(_nemotron_config, PLAIN, _nemotron_weights),
        (
            FromFolder(
                ("nemotron",),
                _nemotron_keys,
                scalings=("linear",),
                says_head=True,
                tokenizer=_nemotron_tokenizer,
            ),
        ),
    ),
    Architecture(
        "seed_oss",
        plain(
            reads="post_attention_norm",
            note="post_attention_norm stands before the feed-forward network",
        ),
        InMlx(
            _seed_config,
            with_names({"post_attention_norm": "post_attention_layernorm"}),
        ),
        (FromFolder(("seed_oss",)),),
    ),
    Architecture(
        "hunyuan-dense",
        plain(),
        InMlx(_hunyuan_config, with_names(_HUNYUAN)),
        (
            FromFolder(
                ("hunyuan_v1_dense",),
                _hunyuan_keys,
                scalings=("dynamic", "xdrope"),
                tokenizer=_hunyuan_tokenizer,
            ),
        ),
    ),
)
