"""Qwen 2 VL, 2.5 VL, 3 VL and 3.5: towers with rotary positions, and patches merged by fours.

A kernel spans two pictures of a film; llama.cpp takes the two halves apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from convert.base.errors import UserError
from convert.projectors.siglip import block
from convert.projectors.tower import Change, Family, Part, Rule, Tower, kernel, of_types

_PREFIXES = {r"^(model\.visual|vision_tower|visual)\.": "visual."}

_FRAMES = 2
"""The pictures that a kernel spans."""


def _patches(tower: Tower, name: str) -> list[Part]:
    change = kernel(tower, name, tower.count("in_channels"), 3)
    frames = change(np.broadcast_to(np.float32(0), tower.shapes[name])).shape[2]
    if frames != _FRAMES:
        raise UserError(f"{name} spans {frames} pictures where llama.cpp knows {_FRAMES}")

    def frame(index: int) -> Change:
        return lambda values: change(values)[:, :, index]

    return [
        Part("v.patch_embd.weight", frame(0)),
        Part("v.patch_embd.weight.1", frame(1)),
    ]


def _thirds(tower: Tower, name: str) -> list[Part]:
    """Queries, keys and values, which lie in one matrix."""
    found = re.search(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", name)
    assert found
    rows = tower.shapes[name][0]
    if rows % 3:
        raise UserError(f"{name} has {rows} rows, which are not three times as many")

    def third(index: int) -> Change:
        return lambda values: values[index * (rows // 3) : (index + 1) * (rows // 3)]

    names = enumerate(("attn_q", "attn_k", "attn_v"))
    return [Part(f"v.blk.{found[1]}.{new}.{found[2]}", third(at)) for at, new in names]


_RULES: dict[str, Rule] = {r"visual\.patch_embed\.proj\.weight": _patches}

# --------------------------------------------------------------------------------------------------
# Qwen 2


def _qwen2_keys(tower: Tower) -> dict[str, Any]:
    return {"clip.vision.attention.layer_norm_epsilon": 1e-6}


def _qwen2_sizes(vision: Mapping[str, Any]) -> dict[str, Any]:
    """Its hidden_size is the language model's, which the converter takes for another."""
    return {"hidden_size": vision["embed_dim"], "intermediate_size": vision["hidden_size"]}


_QWEN2 = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}

# --------------------------------------------------------------------------------------------------
# Qwen 2.5


def _qwen25_keys(tower: Tower) -> dict[str, Any]:
    layers = tower.layers("fullatt_block_indexes")
    if not layers:
        raise UserError("vision_config in config.json has no fullatt_block_indexes")
    every = layers[0] + 1
    if any(after - before != every for before, after in pairwise(layers)):
        raise UserError(
            f"its blocks with whole attention are {layers}, and llama.cpp knows every n-th only"
        )
    return {
        "clip.use_silu": True,
        "clip.vision.n_wa_pattern": every,
        # Not the language model's: transformers has this number in its code.
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
    }


_QWEN25 = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# --------------------------------------------------------------------------------------------------
# Qwen 3


def _qwen3_keys(tower: Tower) -> dict[str, Any]:
    text = tower.config.get("text_config")
    eps = text.get("rms_norm_eps", 1e-6) if isinstance(text, dict) else 1e-6
    deep = tower.layers("deepstack_visual_indexes")
    return {
        "clip.use_gelu": True,
        "clip.vision.spatial_merge_size": tower.count("spatial_merge_size"),
        "clip.vision.attention.layer_norm_epsilon": float(eps),
        # The layers whose outputs go into the language model's first layers as well.
        "clip.vision.is_deepstack_layers": [one in deep for one in range(tower.count("depth"))],
    }


def _size(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The side of the largest picture with a learned position for each patch."""
    positions, patch = vision["num_position_embeddings"], vision["patch_size"]
    if vision.get("image_size") is not None:
        return {}
    if not (type(positions) is int and type(patch) is int and positions > 0):
        return {}
    return {"image_size": int(positions**0.5 * patch)}


def _deepstack(tower: Tower, name: str) -> list[Part]:
    found = re.search(r"\.(\d+)\.(?:linear_)?(norm|fc1|fc2)\.(weight|bias)$", name)
    deep = tower.layers("deepstack_visual_indexes")
    if found is None or int(found[1]) >= len(deep):
        raise UserError(f"{name} has no layer among deepstack_visual_indexes")
    return [Part(f"v.deepstack.{deep[int(found[1])]}.{found[2]}.{found[3]}")]


_MERGER = {
    r"visual\.merger\.ln_q\.(weight|bias)": r"v.post_ln.\1",
    r"visual\.merger\.mlp\.(\d)\.(weight|bias)": r"mm.\1.\2",
}

FAMILIES = (
    Family(
        "qwen2vl_merger",
        of_types("qwen2_vl"),
        _qwen2_keys,
        _PREFIXES,
        {**block(r"visual\.blocks\.", _QWEN2), **_MERGER},
        {**_RULES, r"visual\.blocks\.\d+\.attn\.qkv\.(weight|bias)": _thirds},
        defaults={
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": 3584,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 14,
            "image_size": 560,
        },
        derived=_qwen2_sizes,
    ),
    Family(
        "qwen2.5vl_merger",
        of_types("qwen2_5_vl"),
        _qwen25_keys,
        _PREFIXES,
        {**block(r"visual\.blocks\.", _QWEN25), **_MERGER},
        {**_RULES, r"visual\.blocks\.\d+\.attn\.qkv\.(weight|bias)": _thirds},
        defaults={
            "depth": 32,
            "hidden_size": 3584,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 14,
            "image_size": 560,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    ),
    Family(
        "qwen3vl_merger",
        of_types("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        _qwen3_keys,
        _PREFIXES,
        {
            **block(
                r"visual\.blocks\.",
                {
                    "norm1": "ln1",
                    "norm2": "ln2",
                    "attn.qkv": "attn_qkv",
                    "attn.proj": "attn_out",
                    "mlp.linear_fc1": "ffn_up",
                    "mlp.linear_fc2": "ffn_down",
                },
            ),
            r"visual\.pos_embed\.weight": "v.position_embd.weight",
            r"visual\.patch_embed\.proj\.bias": "v.patch_embd.bias",
            r"visual\.merger\.norm\.(weight|bias)": r"v.post_ln.\1",
            r"visual\.merger\.linear_fc1\.(weight|bias)": r"mm.0.\1",
            r"visual\.merger\.linear_fc2\.(weight|bias)": r"mm.2.\1",
        },
        {**_RULES, r"visual\.deepstack_merger_list\..*": _deepstack},
        defaults={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "num_position_embeddings": 2304,
        },
        derived=_size,
    ),
)
