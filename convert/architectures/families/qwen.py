"""Qwen's mixtures of experts: qwen2moe and qwen3moe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    edited,
    plain,
    refused,
)
from convert.architectures.config_keys import EXPERTS as EXPERT_KEYS
from convert.architectures.families.reasons import SPEECH
from convert.architectures.hf_keys import Config, named
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    base_config,
    unscaled_rotary,
    whole_rotary,
)
from convert.architectures.stored import Stored, halves
from convert.architectures.weights import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    Names,
    Weight,
    renamed,
)
from convert.base.errors import UserError

SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


def expert_config(keys: Keys) -> dict[str, Any]:
    count, used = (
        keys.integer(EXPERT_KEYS[name]) for name in ("num_experts", "num_experts_per_tok")
    )
    if not 1 <= used <= count:
        raise UserError(
            f"{keys.source.parts[0]} asks for {used} of {count} experts: get the file again."
        )
    dense = keys.integer("feed_forward_length", 0)
    return {
        "num_experts": count,
        "num_experts_per_tok": used,
        "intermediate_size": dense,
        "moe_intermediate_size": keys.integer(EXPERT_KEYS["moe_intermediate_size"], 0)
        or dense // used,
        "shared_expert_intermediate_size": (
            keys.integer("expert_shared_feed_forward_length", 0) or dense
        ),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def shared_gates(keys: Keys, weights: list[Weight]) -> list[Weight]:
    """The shared expert's gate: a vector in GGUF, a matrix of one row in mlx-lm."""
    return [
        replace(weight, shape=(1, *keys.tensor(weight.pieces[0].tensor).shape[-1:]))
        if weight.path.endswith("shared_expert_gate.weight")
        else weight
        for weight in weights
    ]


def moe_config(model_type: str, *, normalized: bool) -> Callable[[Keys], dict[str, Any]]:
    def config(keys: Keys) -> dict[str, Any]:
        unscaled_rotary(keys)
        whole_rotary(keys)
        return base_config(keys, model_type) | expert_config(keys) | {"norm_topk_prob": normalized}

    return config


def _qwen2moe_config(keys: Keys) -> dict[str, Any]:
    if keys.tied:
        raise UserError(
            f"{keys.source.parts[0]} has no output.weight, which every {keys.architecture} file "
            "needs: get the file again."
        )
    return moe_config("qwen2_moe", normalized=False)(keys)


MOE = Names({**ATTENTION, **EXPERTS, **SHARED_EXPERT, "ffn_norm": FEED_FORWARD["ffn_norm"]})


def moe_weights(keys: Keys, names: Names) -> list[Weight]:
    return shared_gates(keys, renamed(keys, names))


# --------------------------------------------------------------------------------------------------
# From folders

EXPERT_COUNTS = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}


def _qwen2moe_keys(flat: Config) -> dict[str, Any]:
    return named(flat, EXPERT_COUNTS)


def qwen3moe_keys(flat: Config) -> dict[str, Any]:
    if not flat.get("norm_topk_prob", False):
        raise UserError(
            "config.json sets norm_topk_prob to false, but llama.cpp always normalizes "
            "Qwen3-MoE's expert weights: this model cannot be written as GGUF."
        )
    return named(flat, EXPERT_COUNTS)


STORED_EXPERTS = Stored(
    {r"\.mlp\.experts\.(gate_up|down)_proj(\.weight)?$": r".mlp.switch_mlp.\1_proj.weight"},
    {r"\.switch_mlp\.gate_up_proj\.weight$": halves},
)


ARCHITECTURES = (
    Architecture(
        "qwen2moe",
        plain(),
        InMlx(_qwen2moe_config, MOE, moe_weights),
        (FromFolder(("qwen2_moe",), _qwen2moe_keys, STORED_EXPERTS),),
    ),
    Architecture(
        "qwen3moe",
        plain(),
        InMlx(moe_config("qwen3_moe", normalized=True), MOE, moe_weights),
        (FromFolder(("qwen3_moe",), qwen3moe_keys, STORED_EXPERTS),),
    ),
    *edited("qwen", plain()),
    *refused("rwkv6qwen2", "its recurrent blocks have not been proved in llama.cpp."),
    *refused(
        "qwen4exp",
        "its streams are mixed by learned maps (hyper-connections) and written to by per-layer "
        "n-gram embeddings.",
    ),
    *refused("qwen3tts", SPEECH),
)
