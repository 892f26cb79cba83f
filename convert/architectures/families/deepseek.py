"""DeepSeek V2, V3 and what has their attention (deepseek2), by mlx-lm's three classes of it.

Keys and values come from one latent vector through a matrix each, k_b and v_b, per head. Newer
files hold them apart, with k_b transposed; older ones interleave them as kv_b. mlx-lm's deepseek_v3
wants them apart, and its deepseek_v2 and youtu_llm as kv_b.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    edited,
    plain,
)
from convert.architectures.hf_keys import Config, count, real
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import base_config, rope_scaling, short, unsupported
from convert.architectures.stored import Folder, Stored
from convert.architectures.weights import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    SWAPPED,
    Change,
    Names,
    Piece,
    Weight,
    halved_experts,
    renamed,
)
from convert.base.errors import UserError
from convert.tokenizers.to_gguf import Form

_BLOCK = {
    **{name: ATTENTION[name] for name in ("attn_norm", "attn_q", "attn_output")},
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    **FEED_FORWARD,
    **EXPERTS,
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}

_SOFTMAX, _SIGMOID = 1, 2
"""Meaning of the values of expert_gating_func."""

_APART = r"^blk\.\d+\.attn_(k|v)_b\.weight$"
_JOINED = r"^blk\.\d+\.attn_kv_b\.weight$"
_FUSED = r"^blk\.\d+\.ffn_gate_up_exps\.weight$"


@dataclass(frozen=True)
class _Heads:
    """Sizes of attention: heads, and per head the rotated, unrotated and value dimensions."""

    count: int
    rope: int
    nope: int
    value: int
    latent: int


def _heads(keys: Keys) -> _Heads:
    rope = int(keys.integer("rope.dimension_count"))
    mla = "attention.key_length_mla" in keys
    ending = "_mla" if mla else ""
    return _Heads(
        count=int(keys.integer("attention.head_count")),
        rope=rope,
        nope=int(keys.integer(f"attention.key_length{ending}")) - rope,
        value=int(keys.integer(f"attention.value_length{ending}")),
        latent=int(keys.integer("attention.kv_lora_rank")),
    )


def _model_type(keys: Keys) -> str:
    """The mlx-lm model class that computes this file as llama.cpp does."""
    experts = keys.integer("expert_count", 0)
    if not experts or keys.integer("leading_dense_block_count", 0) >= keys.layers:
        return "youtu_llm"
    gating = keys.integer("expert_gating_func", 0)
    if not gating:
        # Older files lack the key; llama.cpp recognises GLM 4.7 Flash by its size.
        glm = keys.layers in (47, 48) and keys.vocabulary == 154880
        gating = _SIGMOID if glm else _SOFTMAX
    if gating == _SIGMOID:
        return "deepseek_v3"
    if gating == _SOFTMAX:
        return "deepseek_v2"
    raise unsupported(
        keys,
        f"chooses experts by a function (expert_gating_func {gating}) that mlx-lm's DeepSeek "
        "classes do not have",
    )


def _config(keys: Keys) -> dict[str, Any]:
    model_type = _model_type(keys)
    heads = _heads(keys)
    if keys.number("attention.temperature_scale", 0.0):
        raise unsupported(
            keys,
            "scales its queries by their position (attention.temperature_scale), which mlx-lm's "
            "DeepSeek classes do not do",
        )
    config = base_config(keys, model_type)
    del config["head_dim"]
    config |= {
        # The file says 1, for the latent vector that all heads share.
        "num_key_value_heads": heads.count,
        "q_lora_rank": keys.integer("attention.q_lora_rank", None) if _has_q_a(keys) else None,
        "kv_lora_rank": heads.latent,
        "qk_rope_head_dim": heads.rope,
        "qk_nope_head_dim": heads.nope,
        "v_head_dim": heads.value,
        "rope_scaling": _scaling(keys, model_type),
        "attention_bias": False,
    }
    if model_type == "youtu_llm":
        return config
    if keys.tied:
        raise unsupported(
            keys,
            "has no output head of its own (output.weight), but mlx-lm's DeepSeek classes with "
            "experts do not tie it to the embedding",
        )
    if config["rms_norm_eps"] > 1e-5:
        raise unsupported(
            keys,
            f"adds {config['rms_norm_eps']} in all its norms, but mlx-lm adds 1e-06 in those of "
            "the latent vectors",
        )
    return config | _experts(keys, model_type)


def _has_q_a(keys: Keys) -> bool:
    return "blk.0.attn_q_a.weight" in keys.tensors


def _experts(keys: Keys, model_type: str) -> dict[str, Any]:
    groups = keys.integer("expert_group_count", 1) or 1
    normalized = bool(keys.get("expert_weights_norm", False))
    if model_type == "deepseek_v2" and (groups > 1 or normalized):
        what = (
            "chooses groups of experts by the sum of the two best scores"
            if groups > 1
            else "makes the weights of a token's experts add up to one"
        )
        raise unsupported(keys, f"{what} after a softmax, which mlx-lm's deepseek_v2 does not do")
    if model_type == "deepseek_v3" and keys.layers > 61:
        raise unsupported(
            keys, "has more than 61 layers, but mlx-lm's deepseek_v3 drops layer 61 when it loads"
        )
    found = {
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "n_routed_experts": keys.integer("expert_count"),
        "n_shared_experts": keys.integer("expert_shared_count", 0) or None,
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "routed_scaling_factor": short(keys.number("expert_weights_scale", 0.0)) or 1.0,
        "first_k_dense_replace": keys.integer("leading_dense_block_count", 0),
        "moe_layer_freq": 1,
    }
    if model_type == "deepseek_v2":
        return found | {"topk_method": "greedy"}
    return found | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": normalized,
        "n_group": groups,
        "topk_group": keys.integer("expert_group_used_count", groups),
    }


def _scaling(keys: Keys, model_type: str) -> dict[str, Any] | None:
    """The rope_scaling for yarn with equal magnitudes, where only the attention's scale changes.

    llama.cpp multiplies the scale by (1 + 0.1 m log(factor))², where m is ten times
    yarn_log_multiplier, and does not scale the rotated dimensions. In mlx-lm that is
    mscale_all_dim = mscale = m.
    """
    scaling = rope_scaling(keys)
    if scaling is None:
        # mlx-lm's deepseek_v2 needs a rope_scaling.
        unscaled = {"type": "yarn", "rope_type": "yarn", "factor": 1.0}
        return unscaled if model_type == "deepseek_v2" else None
    logarithm = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if scaling["type"] != "yarn" or not logarithm or "mscale" in scaling:
        raise unsupported(
            keys,
            f"stretches its rotary embedding by the method {scaling['type']!r} without "
            "yarn_log_multiplier alone, which llama.cpp follows with a scale of attention that "
            "mlx-lm's DeepSeek classes do not have",
        )
    if model_type == "youtu_llm":
        raise unsupported(
            keys,
            "stretches its rotary embedding and has no experts; mlx-lm's class for that does not "
            "scale attention with it",
        )
    # The file has a tenth of the publisher's number, rounded to float32.
    magnitude = round(10 * short(logarithm), 6)
    return scaling | {
        "mscale": magnitude,
        "mscale_all_dim": magnitude,
        "beta_fast": 32,
        "beta_slow": 1,
    }


# --------------------------------------------------------------------------------------------------
# Weights


def _weights(keys: Keys, names: Names) -> list[Weight]:
    found = renamed(keys, names, skip=(_APART, _JOINED, _FUSED))
    apart = _model_type(keys) == "deepseek_v3"
    for layer in range(keys.layers):
        module = f"model.layers.{layer}"
        if f"blk.{layer}.ffn_gate_up_exps.weight" in keys.tensors:
            found += halved_experts(
                keys, f"blk.{layer}.ffn_gate_up_exps.weight", f"{module}.mlp.switch_mlp"
            )
        joined = f"blk.{layer}.attn_kv_b.weight" in keys.tensors
        make = (_split if joined else _as_it_is) if apart else (_whole if joined else _joined)
        found += make(keys, layer, f"{module}.self_attn")
    return found


def _as_it_is(keys: Keys, layer: int, module: str) -> list[Weight]:
    """The Weights of k_b and v_b for mlx-lm's deepseek_v3, which has them in the same order."""
    return [
        Weight(f"{module}.embed_q.weight", (Piece(f"blk.{layer}.attn_k_b.weight"),)),
        Weight(f"{module}.unembed_out.weight", (Piece(f"blk.{layer}.attn_v_b.weight"),)),
    ]


def _whole(keys: Keys, layer: int, module: str) -> list[Weight]:
    """The Weight of kv_b for mlx-lm's deepseek_v2, which has it in the same order."""
    return [Weight(f"{module}.kv_b_proj.weight", (Piece(f"blk.{layer}.attn_kv_b.weight"),))]


def _split(keys: Keys, layer: int, module: str) -> list[Weight]:
    """kv_b as two Weights for deepseek_v3: each head's key rows, transposed, and its value rows."""
    name = f"blk.{layer}.attn_kv_b.weight"
    heads = _heads(keys)
    if keys.tensor(name).rows != heads.count * (heads.nope + heads.value):
        raise UserError(
            f"{keys.source.parts[0]}: {name} has {keys.tensor(name).rows} rows, which are not "
            f"those of {heads.count} heads: get the file again."
        )
    return _apart(heads, name, module)


def _apart(heads: _Heads, name: str, module: str) -> list[Weight]:
    """The Weights embed_q and unembed_out of ``module``, which lie in one tensor."""
    each = heads.nope + heads.value
    index = np.arange(heads.count * each).reshape(heads.count, each)
    return [
        Weight(
            f"{module}.embed_q.weight",
            (Piece(name, index[:, : heads.nope].reshape(-1)),),
            (heads.count, heads.nope, heads.latent),
            SWAPPED,
        ),
        Weight(
            f"{module}.unembed_out.weight",
            (Piece(name, index[:, heads.nope :].reshape(-1)),),
            (heads.count, heads.value, heads.latent),
        ),
    ]


def _joined(keys: Keys, layer: int, module: str) -> list[Weight]:
    """k_b and v_b as the single kv_b of deepseek_v2, by values because k_b is transposed."""
    key, value = f"blk.{layer}.attn_k_b.weight", f"blk.{layer}.attn_v_b.weight"
    return [
        Weight(f"{module}.kv_b_proj.weight", (Piece(value),), change=Change(_joining(keys, key)))
    ]


def _joining(keys: Keys, key: str) -> Callable[[np.ndarray], np.ndarray]:
    keys.tensor(key)

    def join(values: np.ndarray) -> np.ndarray:
        both = np.concatenate([keys.values(key).swapaxes(1, 2), values], axis=1)
        return both.reshape(-1, both.shape[-1])

    return join


# --------------------------------------------------------------------------------------------------
# From folders


_WRITTEN = Names({**_BLOCK, "attn_k_b": "self_attn.embed_q", "attn_v_b": "self_attn.unembed_out"})
"""k_b and v_b are written apart, whatever mlx-lm's class has."""


def _keys(flat: Config) -> dict[str, Any]:
    rope, latent = count(flat, "qk_rope_head_dim"), count(flat, "kv_lora_rank")
    value = count(flat, "v_head_dim")
    experts = flat.get("n_routed_experts") is not None
    dense = flat.get("first_k_dense_replace")
    if dense is None:
        dense = 0 if experts else count(flat, "num_hidden_layers")
    width = "moe_intermediate_size" if flat.get("moe_intermediate_size") else "intermediate_size"
    found: dict[str, Any] = {
        # All heads share the latent vector.
        "attention.head_count_kv": 1,
        "leading_dense_block_count": int(dense),
        "vocab_size": count(flat, "vocab_size"),
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": count(flat, "qk_nope_head_dim") + rope,
        "attention.value_length_mla": value,
        "expert_feed_forward_length": count(flat, width),
        "expert_shared_count": int(flat.get("n_shared_experts") or 0),
        "rope.dimension_count": rope,
    }
    if flat.get("q_lora_rank") is not None:
        found["attention.q_lora_rank"] = count(flat, "q_lora_rank")
    if flat.get("routed_scaling_factor") is not None:
        found["expert_weights_scale"] = real(flat, "routed_scaling_factor")
    if flat.get("norm_topk_prob"):
        found["expert_weights_norm"] = True
    magnitude = (flat.get("rope_scaling") or {}).get("mscale_all_dim")
    if magnitude is not None:
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * float(magnitude)
    return found


def _glm_tokenizer(flat: Config) -> Form:
    roles = {"bos": "[gMASK]", "eot": "<|user|>", "eom": "<|observation|>"}
    return Form(roles={**roles, "unknown": "<|endoftext|>"})


def _key_and_value(folder: Folder, path: str, source: str) -> list[Weight]:
    """kv_b as k_b and v_b: each head's key rows, transposed, and its value rows."""
    config = folder.config
    heads = _Heads(
        count(config, "num_attention_heads"),
        count(config, "qk_rope_head_dim"),
        count(config, "qk_nope_head_dim"),
        count(config, "v_head_dim"),
        count(config, "kv_lora_rank"),
    )
    return _apart(heads, source, path.removesuffix(".kv_b_proj.weight"))


_STORED = Stored(rules={r"\.kv_b_proj\.weight$": _key_and_value})


# Hyper-connections: several residual streams of the same width share the writers; they are read,
# mixed and written to with scalars computed from them. So a direction that no writer writes is in
# none of the streams.
HYPER = (
    "hc_attn_fn hc_attn_base hc_attn_scale hc_ffn_fn hc_ffn_base hc_ffn_scale output_hc_fn "
    "output_hc_base output_hc_scale"
)
STREAMS = "several streams, mixed by scalars (hyper-connections)"

ARCHITECTURES = (
    # attn_k_b is listed because attn_k_b and attn_v_b may become one parameter.
    Architecture(
        "deepseek2",
        plain(),
        InMlx(_config, Names(_BLOCK), _weights, unused=(r"^blk\.\d+\.attn_k_b\.weight$",)),
        (
            FromFolder(
                ("deepseek_v2", "deepseek_v3", "kimi_k2", "youtu_llm"),
                _keys,
                _STORED,
                names=_WRITTEN,
                arranged=renamed,
                drafting=False,
            ),
            FromFolder(
                ("glm4_moe_lite",),
                _keys,
                _STORED,
                names=_WRITTEN,
                arranged=renamed,
                drafting=True,
                tokenizer=_glm_tokenizer,
            ),
        ),
    ),
    *edited("deepseek deepseek2-ocr deepseek32", plain()),
    Architecture(
        "deepseek4",
        plain(
            "attn_output_b",
            reads=f"{HYPER} attn_output_a attn_kv attn_compressor_ape attn_compressor_gate "
            "attn_compressor_kv attn_compressor_norm indexer_compressor_ape "
            "indexer_compressor_gate indexer_compressor_kv indexer_compressor_norm "
            "ffn_gate_tid2eid",
            note=f"{STREAMS}; the attention writes through attn_output_b",
        ),
    ),
)
