"""IBM's Granite: granite and granitemoe, llamas whose parts are multiplied by constants."""

from __future__ import annotations

import re
from typing import Any

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    edited,
    plain,
    refused,
)
from convert.architectures.families.llama import (
    PLAIN,
    biases,
    either_rotation,
    permuted,
    unpermuted,
)
from convert.architectures.hf_keys import Config, count, kv_heads, named, real
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
from convert.architectures.stored import Shape, Stored, halves
from convert.architectures.weights import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    Names,
    Piece,
    Weight,
    renamed,
)

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


_MOE = Names(
    {
        **ATTENTION,
        **FEED_FORWARD,
        "ffn_down_shexp": "shared_mlp.output_linear",
        **{
            name: "block_sparse_moe." + module.removeprefix("mlp.")
            for name, module in EXPERTS.items()
        },
        "ffn_gate_inp": "block_sparse_moe.router.layer",
    }
)


def _moe_weights(keys: Keys, names: Names) -> list[Weight]:
    weights = unpermuted(keys, renamed(keys, names, skip=[_SHARED]))
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
    return {
        "vocab_size": count(flat, "vocab_size"),
        "rope.dimension_count": count(flat, "hidden_size") // count(flat, "num_attention_heads"),
        "attention.key_length": None,
        "attention.value_length": None,
        **{ours: real(flat, name) for name, ours in _MULTIPLIERS.items() if flat.get(name)},
    }


def _moe_keys(flat: Config) -> dict[str, Any]:
    return _granite_keys(flat) | named(
        flat, {"shared_intermediate_size": "expert_shared_feed_forward_length"}
    )


def _hybrid_keys(flat: Config) -> dict[str, Any]:
    """What llama.cpp's converter says more about a hybrid, even if all of its layers attend."""
    found: dict[str, Any] = {
        "attention.head_count_kv": [kv_heads(flat)] * count(flat, "num_hidden_layers"),
        "rope.scaling.finetuned": True,
    }
    if flat.get("mamba_n_heads"):
        found |= named(
            flat,
            {
                "mamba_d_conv": "ssm.conv_kernel",
                "mamba_d_state": "ssm.state_size",
                "mamba_n_groups": "ssm.group_count",
                "mamba_n_heads": "ssm.time_step_rank",
            },
        )
        found["ssm.inner_size"] = count(flat, "mamba_expand") * count(flat, "hidden_size")
    return _moe_keys(flat) | found


def _dense(flat: Config) -> bool:
    """Whether a hybrid's config is that of a granite: attention in all layers, and no experts."""
    return _attends(flat) and not flat.get("num_local_experts")


def _attends(flat: Config) -> bool:
    return set(flat.get("layer_types") or ["mamba"]) == {"attention"}


def _with_shared(named: dict[str, Shape], others: dict[str, Shape]) -> dict[str, Shape]:
    """The tensors, with the halves of the shared expert's input as two."""
    for path, (rows, width) in others.items():
        layer = re.search(r"layers\.(\d+)\.shared_mlp\.input_linear\.weight$", path)
        if layer:
            for half in ("gate", "up"):
                named[f"blk.{layer[1]}.ffn_{half}_shexp.weight"] = (rows // 2, width)
    return named


_STORED_MOE = Stored(
    {
        r"block_sparse_moe\.input_linear\.": "block_sparse_moe.switch_mlp.gate_up_proj.",
        r"block_sparse_moe\.output_linear\.": "block_sparse_moe.switch_mlp.down_proj.",
    },
    {r"\.gate_up_proj\.weight$": halves},
)
_STORED_DENSE = Stored(
    {
        r"shared_mlp\.input_linear\.": "mlp.gate_up_proj.",
        r"shared_mlp\.output_linear\.": "mlp.down_proj.",
    },
    {r"\.gate_up_proj\.weight$": halves},
)


def _dense_keys(flat: Config) -> dict[str, Any]:
    """The keys of a granite in a hybrid's config, which llama.cpp's converter says more about."""
    return _hybrid_keys(flat) | {"feed_forward_length": count(flat, "shared_intermediate_size")}


ARCHITECTURES = (
    Architecture(
        "granite",
        plain(),
        InMlx(_granite_config, PLAIN, permuted),
        (
            *either_rotation(FromFolder(("granite",), _granite_keys)),
            FromFolder(("granitemoehybrid",), _dense_keys, _STORED_DENSE, when=_dense),
        ),
    ),
    Architecture(
        "granitemoe",
        plain(),
        InMlx(_moe_config, _MOE, _moe_weights),
        (
            FromFolder(
                ("granitemoe", "granitemoeshared"), _moe_keys, _STORED_MOE, tensors=_with_shared
            ),
            FromFolder(
                ("granitemoehybrid",),
                _hybrid_keys,
                _STORED_MOE,
                when=lambda flat: _attends(flat) and not _dense(flat),
                tensors=_with_shared,
            ),
        ),
    ),
    *edited("granite_swa", plain()),
    *edited("granitehybrid", plain("ssm_out")),
    *refused(
        "graniteswitch", "it switches adapters inside the model, which write to the stream too."
    ),
)
