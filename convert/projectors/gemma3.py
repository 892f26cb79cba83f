"""Gemma 3: SigLIP, pooled, with one matrix into the language model."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from convert.projectors.siglip import DEFAULTS, NAMES
from convert.projectors.tower import Family, Part, Rule, Tower, kernel, of_types

_Q = GGMLQuantizationType


def _keys(tower: Tower) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "clip.vision.attention.layer_norm_epsilon": tower.real("layer_norm_eps"),
        "clip.use_gelu": True,
    }
    tokens = tower.processor.get("image_seq_length")
    side = int((256 if tokens is None else int(tokens)) ** 0.5)
    scale = tower.count("image_size") // tower.count("patch_size") // max(side, 1)
    if scale > 0 and scale != _POOLED:
        keys["clip.vision.projector.scale_factor"] = scale
    return keys


_POOLED = 4
"""How many patches of each side llama.cpp pools into one where the file does not say."""


def _patches(tower: Tower, name: str) -> list[Part]:
    colours = tower.count("num_channels")
    return [Part("v.patch_embd.weight", kernel(tower, name, colours, 2))]


def _plus_one(tower: Tower, name: str) -> list[Part]:
    """The norm's weight is stored less one, and llama.cpp multiplies by the whole."""
    return [Part("mm.soft_emb_norm.weight", lambda values: values + np.float32(1))]


_RULES: dict[str, Rule] = {
    r"vision_tower\.vision_model\.embeddings\.patch_embedding\.weight": _patches,
    r"multi_modal_projector\.mm_soft_emb_norm\.weight": _plus_one,
}

FAMILIES = (
    Family(
        "gemma3",
        of_types("gemma3"),
        _keys,
        {r"^model\.(?=vision_tower\.|multi_modal_projector\.)": ""},
        {
            **NAMES,
            r"multi_modal_projector\.mm_input_projection_weight": "mm.input_projection.weight",
        },
        _RULES,
        unused=r"vision_tower\.vision_model\.head\..*",
        # llama.cpp multiplies by this matrix transposed, which it does in F16.
        types={
            r"mm\.input_projection\.weight": _Q.F16,
            r"v\.(patch|position)_embd\..*": _Q.F32,
        },
        defaults=DEFAULTS,
    ),
)
