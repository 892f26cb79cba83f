"""Mistral Small 3 and Ministral 3, whose queries grow with their position."""

from __future__ import annotations

from typing import Any

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    plain,
)
from convert.architectures.families.llama import PLAIN, biases, llama_keys, permuted
from convert.architectures.hf_keys import (
    Config,
    real,
)
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    base_config,
    rope_scaling,
    short,
    unsupported,
    whole_rotary,
)


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


def _mistral3_keys(flat: Config) -> dict[str, Any]:
    found = llama_keys(flat)
    rope = flat.get("rope_parameters") or {}
    for key, name in (
        ("rope.scaling.yarn_log_multiplier", "mscale_all_dim"),
        ("attention.temperature_scale", "llama_4_scaling_beta"),
    ):
        if rope.get(name) is not None:
            found[key] = real(rope, name)
    return found


ARCHITECTURES = (
    Architecture(
        "mistral3",
        plain(),
        InMlx(_mistral3_config, PLAIN, permuted),
        (FromFolder(("mistral3", "ministral3"), _mistral3_keys, reads_betas=True),),
    ),
)
