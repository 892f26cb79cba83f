"""Baidu's ERNIE 4.5, dense and with experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    plain,
)
from convert.architectures.families.dense import with_names
from convert.architectures.families.llama import PLAIN
from convert.architectures.hf_keys import (
    Config,
    count,
)
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    base_config,
    experts_used,
    unscaled_rotary,
    unsupported,
    whole_rotary,
)
from convert.architectures.weights import (
    EXPERTS,
    Names,
    Weight,
    renamed,
)


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


def _ernie_moe_weights(keys: Keys, names: Names) -> list[Weight]:
    return renamed(keys, names, skip=[_CORRECTION])


def _ernie_moe_keys(flat: Config) -> dict[str, Any]:
    shared = int(flat.get("moe_num_shared_experts") or 0)
    found = {
        "expert_count": count(flat, "moe_num_experts"),
        "expert_used_count": count(flat, "moe_k"),
        "interleave_moe_layer_step": int(flat.get("moe_layer_interval") or 1),
        "leading_dense_block_count": int(flat.get("moe_layer_start_index") or 0),
        "expert_feed_forward_length": count(flat, "moe_intermediate_size"),
        "expert_shared_count": shared,
    }
    if shared:
        # llama.cpp's converter computes it otherwise, to the same number for published models.
        found["expert_shared_feed_forward_length"] = shared * count(flat, "moe_intermediate_size")
    return found


ARCHITECTURES = (
    Architecture(
        "ernie4_5",
        plain(),
        InMlx(_ernie_config("ernie4_5"), PLAIN),
        (FromFolder(("ernie4_5",), tied_by_default=True),),
    ),
    Architecture(
        "ernie4_5-moe",
        plain(),
        InMlx(
            _ernie_moe_config,
            with_names(EXPERTS, _SHARED_EXPERT),
            _ernie_moe_weights,
            unused=(_CORRECTION,),
        ),
        (
            FromFolder(
                ("ernie4_5_moe",),
                _ernie_moe_keys,
                names=with_names(
                    EXPERTS,
                    _SHARED_EXPERT,
                    {"exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias"},
                ),
                arranged=renamed,
                drafting=False,
                tied_by_default=True,
            ),
        ),
    ),
)
