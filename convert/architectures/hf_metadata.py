"""The metadata of the GGUF that a folder becomes, and tensors that are made from config.json.

The keys are those that llama.cpp's converter writes, from the same keys of config.json; what
differs between architectures is in their entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.architectures.config_keys import SHARED
from convert.architectures.folder_config import architecture, text_config
from convert.architectures.hf_keys import (
    Config,
    count,
    count_or_none,
    head_dim,
    kv_heads,
    original_context,
    real,
    rope_kind,
    rope_theta,
    rotary_dim,
)
from convert.architectures.table import Written
from convert.base.errors import UserError

_COUNTS = {
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
}
"""GGUF key -> the names it has in config.json, the first of which is taken."""

_NORMS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
}

_GATING = {"softmax": 1, "sigmoid": 2}
"""scoring_func of config.json -> expert_gating_func."""


def hyperparameters(config: Config, drafting: int = 0) -> dict[str, Any]:
    """The architecture's GGUF metadata: full key -> value.

    Values are int (for uint32), float (for float32), str, or a list of bool or int.

    Args:
        config: the parsed config.json.
        drafting: the number of blocks for multi-token prediction behind the model's layers.

    Raises:
        UserError: naming a key of config.json that is missing or that a GGUF cannot represent.
    """
    arch = architecture(config)
    flat = text_config(config)
    values = _usual(flat, arch)
    values.update(arch.folder.keys(flat))
    if drafting:
        values[SHARED["num_hidden_layers"]] += drafting
        values["nextn_predict_layers"] = drafting
        if isinstance(recurrent := values.get("attention.recurrent_layers"), list):
            values["attention.recurrent_layers"] = recurrent + [False] * drafting
    return {f"{arch.gguf}.{key}": value for key, value in values.items() if value is not None}


def _usual(flat: Config, arch: Written) -> dict[str, Any]:
    """The keys of nearly every architecture."""
    values: dict[str, Any] = {
        SHARED["num_hidden_layers"]: count(flat, "num_hidden_layers"),
        SHARED["max_position_embeddings"]: count(flat, "max_position_embeddings"),
        SHARED["hidden_size"]: count(flat, "hidden_size"),
        SHARED["num_attention_heads"]: count(flat, "num_attention_heads"),
        SHARED["num_key_value_heads"]: kv_heads(flat),
        SHARED["rope_theta"]: rope_theta(flat),
    }
    if flat.get("intermediate_size") is not None:
        values[SHARED["intermediate_size"]] = count(flat, "intermediate_size")
    for key, names in (*_COUNTS.items(), *_NORMS.items()):
        name = next((name for name in names if flat.get(name) is not None), None)
        if name is not None:
            values[key] = (count_or_none if key in _COUNTS else real)(flat, name)
    if flat.get("scoring_func") in _GATING:
        values["expert_gating_func"] = _GATING[flat["scoring_func"]]
    if flat.get("head_dim") is not None or arch.folder.says_head:
        values[SHARED["head_dim"]] = head_dim(flat)
        values["attention.value_length"] = head_dim(flat)
    if flat.get("rope_local_base_freq") is not None:
        values["rope.freq_base_swa"] = real(flat, "rope_local_base_freq")
    scaling = flat.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("mrope_section"):
        sections = [int(one) for one in scaling["mrope_section"]]
        values["rope.dimension_sections"] = (sections + [0] * 4)[:4]
    return values | _rope_scaling(flat, arch)


def _rope_scaling(flat: Config, arch: Written) -> dict[str, Any]:
    scaling = flat.get("rope_scaling")
    kind = rope_kind(scaling)
    if not isinstance(scaling, Mapping) or kind in ("default", "llama3", "mrope"):
        return {}
    if kind in arch.folder.scalings:
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": real(scaling, "factor")}
    if kind == "yarn":
        return _yarn(scaling, arch)
    if kind in ("longrope", "su") and arch.folder.longrope:
        context = max(2, original_context(flat))
        ratio = count(flat, "max_position_embeddings") / context
        factor = math.sqrt(1 + math.log(ratio) / math.log(context)) if ratio > 1 else 1.0
        return {"rope.scaling.attn_factor": factor}
    raise UserError(
        f'config.json asks for rope_scaling of type "{kind}", which llama.cpp has no counterpart '
        f"for in {arch.gguf}: remove rope_scaling to keep the trained context length."
    )


def _yarn(scaling: Config, arch: Written) -> dict[str, Any]:
    values: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": real(scaling, "factor"),
        "rope.scaling.original_context_length": int(
            scaling.get("original_max_position_embeddings") or 4096
        ),
    }
    attention = scaling.get("attention_factor", scaling.get("attn_factor"))
    if attention is not None:
        values["rope.scaling.yarn_attn_factor"] = float(attention)
    if scaling.get("mscale") is not None and scaling.get("mscale_all_dim") is None:
        # mlx-lm multiplies by 1 + mscale * grown, llama.cpp by the factor times 1 + grown.
        grown = 0.1 * math.log(real(scaling, "factor"))
        values["rope.scaling.attn_factor"] = (1 + real(scaling, "mscale") * grown) / (1 + grown)
    for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if scaling.get(key) is None:
            continue
        values[f"rope.scaling.yarn_{key}"] = real(scaling, key)
        # llama.cpp reads these keys for few architectures only.
        if not arch.folder.reads_betas and scaling[key] != default:
            raise UserError(
                f"config.json's rope_scaling sets {key} to {scaling[key]}, but llama.cpp "
                f"always takes {default} for {arch.gguf}: remove rope_scaling to keep the "
                f"trained context length."
            )
    return values


def extra_tensors(config: Config) -> dict[str, np.ndarray]:
    """Tensors that are made from config.json: rotary factors, float32 (rotary dimensions / 2,).

    llama3 scaling becomes ``rope_freqs.weight``, the divisor of each frequency. Phi-3's longrope
    becomes ``rope_factors_long.weight`` and ``rope_factors_short.weight``.
    """
    flat = text_config(config)
    made = architecture(config).folder.made
    if made is not None:
        return made(flat)
    scaling = flat.get("rope_scaling")
    kind = rope_kind(scaling)
    if not isinstance(scaling, Mapping):
        return {}
    half = rotary_dim(flat) // 2
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(scaling, flat, half)}
    if kind in ("longrope", "su"):
        factors = {}
        for length in ("long", "short"):
            values = np.asarray(scaling.get(f"{length}_factor"), dtype=np.float32)
            if values.shape != (half,):
                raise UserError(
                    f"config.json's rope_scaling.{length}_factor should be {half} numbers, has "
                    f"shape {values.shape}: download config.json again."
                )
            factors[f"rope_factors_{length}.weight"] = values
        return factors
    return {}


def _llama3_factors(scaling: Config, flat: Config, half: int) -> np.ndarray:
    base = rope_theta(flat)
    factor = real(scaling, "factor")
    low = float(scaling.get("low_freq_factor") or 1.0)
    high = float(scaling.get("high_freq_factor") or 4.0)
    context = float(scaling.get("original_max_position_embeddings") or 8192)
    if low > high:
        raise UserError(
            f"config.json's rope_scaling has low_freq_factor {low:g}, which is above its "
            f"high_freq_factor {high:g}: fetch config.json again."
        )
    wavelength = 2 * np.pi * base ** (np.arange(half, dtype=np.float64) / half)
    if low == high:
        return np.where(wavelength > context / low, factor, 1.0).astype(np.float32)
    # Short waves keep their length, long ones are stretched by the whole factor, others in between.
    share = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - share) / factor + share)).astype(np.float32)
