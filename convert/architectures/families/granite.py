"""IBM's Granite: granite and granitemoe, llamas whose parts are multiplied by constants."""

from __future__ import annotations

from typing import Any

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    edited,
    plain,
    refused,
)
from convert.architectures.families.llama import biases, unpermuted
from convert.architectures.hf_keys import Config, real
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    base_config,
    experts_used,
    rope_scaling,
    short,
    unscaled_rotary,
    unsupported,
    whole_rotary,
)
from convert.architectures.weights import ATTENTION, EXPERTS, FEED_FORWARD, Piece, Weight, renamed

_MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
"""Key of config.json -> GGUF key with the same meaning."""

_SHARED = r"\.ffn_(gate|up)_shexp\."


def _multipliers(keys: Keys) -> dict[str, Any]:
    """The four constants by which parts are multiplied; llama.cpp takes 0 for a missing one."""
    config = base_config(keys, "granite")

    def given(name: str, default: float) -> float:
        return short(keys.number(_MULTIPLIERS[name], 0.0)) or default

    return {
        "embedding_multiplier": given("embedding_multiplier", 1.0),
        "residual_multiplier": given("residual_multiplier", 1.0),
        "attention_multiplier": given("attention_multiplier", config["head_dim"] ** -0.5),
        "logits_scaling": short(keys.number(_MULTIPLIERS["logits_scaling"])),
    }


def _granite_config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    if not keys.get("rope.scaling.finetuned", True):
        raise unsupported(
            keys,
            "has no rotary embedding (granite.rope.scaling.finetuned is false), but mlx-lm's "
            "granite always has one",
        )
    return (
        base_config(keys, "granite")
        | _multipliers(keys)
        | biases(keys)
        | {"rope_scaling": rope_scaling(keys)}
    )


def _granite_weights(keys: Keys) -> list[Weight]:
    return unpermuted(keys, renamed(keys, {**ATTENTION, **FEED_FORWARD}))


def _shared(keys: Keys) -> bool:
    return "blk.0.ffn_down_shexp.weight" in keys.tensors


def _moe_config(keys: Keys) -> dict[str, Any]:
    """config.json for granitemoe; with a shared expert it is one for mlx-lm's granitemoehybrid.

    That class has a shared expert. With attention layers only, it is granitemoe with that expert.
    """
    whole_rotary(keys)
    config = (
        base_config(keys, "granitemoe")
        | _multipliers(keys)
        | {
            "attention_bias": biases(keys)["attention_bias"],
            "num_local_experts": keys.integer("expert_count"),
            "num_experts_per_tok": experts_used(keys),
        }
    )
    if not _shared(keys):
        return config | {"rope_scaling": rope_scaling(keys)}
    unscaled_rotary(keys)
    return config | {
        "model_type": "granitemoehybrid",
        "layer_types": ["attention"] * keys.layers,
        "shared_intermediate_size": keys.integer("expert_shared_feed_forward_length"),
    }


def _moe_weights(keys: Keys) -> list[Weight]:
    table = {**ATTENTION, **FEED_FORWARD, "ffn_down_shexp": "shared_mlp.output_linear"} | {
        name: "block_sparse_moe." + module.removeprefix("mlp.") for name, module in EXPERTS.items()
    }
    table["ffn_gate_inp"] = "block_sparse_moe.router.layer"
    weights = unpermuted(keys, renamed(keys, table, skip=[_SHARED]))
    if _shared(keys):
        weights += [
            Weight(
                f"model.layers.{layer}.shared_mlp.input_linear.weight",
                tuple(Piece(f"blk.{layer}.ffn_{half}_shexp.weight") for half in ("gate", "up")),
            )
            for layer in range(keys.layers)
        ]
    return weights


def _granite_keys(flat: Config) -> dict[str, Any]:
    return {ours: real(flat, name) for name, ours in _MULTIPLIERS.items()}


ARCHITECTURES = (
    Architecture(
        "granite",
        plain(),
        InMlx(_granite_config, _granite_weights),
        FromFolder(("granite",), _granite_keys, permutes=True),
    ),
    Architecture("granitemoe", plain(), InMlx(_moe_config, _moe_weights)),
    *edited("granite_swa", plain()),
    *edited("granitehybrid", plain("ssm_out")),
    *refused(
        "graniteswitch", "it switches adapters inside the model, which write to the stream too."
    ),
)
