"""Gemma 4: a tower for pictures of any shape, whose matrices may clip what goes in and out.

Models that hear have a second tower in the same projector, which is not written.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from convert.base.errors import UserError
from convert.projectors.tower import Family, Part, Rule, Tower, of_types

_POOLED, _THETA = 3, 100.0
"""Patches of each side that are pooled, and the base of the rotary positions, in llama.cpp."""


def _keys(tower: Tower) -> dict[str, Any]:
    pooled = tower.vision["pooling_kernel_size"]
    if pooled != _POOLED:
        raise UserError(f"its tower pools {pooled} patches of each side, and llama.cpp {_POOLED}")
    rope = tower.vision.get("rope_parameters")
    theta = rope.get("rope_theta", _THETA) if isinstance(rope, dict) else _THETA
    if theta != _THETA:
        raise UserError(f"its tower's rope_theta is {theta}, and llama.cpp's {_THETA:g}")
    eps = tower.vision.get("layer_norm_eps")
    return {
        "clip.vision.attention.layer_norm_epsilon": 1e-6 if eps is None else float(eps),
        "clip.vision.image_size": 224,  # of no effect; llama.cpp wants the key
    }


def _patches(tower: Tower, name: str) -> list[Part]:
    """A kernel, which lies as a matrix: for each place of a patch its three colours."""
    rows, columns = tower.shapes[name]
    side = tower.count("patch_size")
    if columns != 3 * side * side:
        raise UserError(f"{name} has {columns} columns, which are no patch of {side}")

    def kernel(values: np.ndarray) -> np.ndarray:
        return np.moveaxis(values.reshape(rows, side, side, 3), -1, 1)

    return [Part("v.patch_embd.weight", kernel)]


def _limit(tower: Tower, name: str) -> list[Part]:
    """A limit of what a matrix takes or gives: one number."""
    *_, block, _, module, limit = name.split(".")
    new = f"v.blk.{block}.{_MATRICES[module]}.{limit}"
    return [Part(new, lambda values: values.reshape(1))]


def _hears(tower: Tower, name: str) -> list[Part]:
    raise UserError(
        "it hears as well, and the tower for sound (audio_tower), which belongs into the same "
        "projector, is not written yet"
    )


_MATRICES = {
    **{f"{one}_proj": f"attn_{one}" for one in "qkv"},
    "o_proj": "attn_out",
    **{f"{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")},
}

_NORMS = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ffn_post_norm",
}

_LAYER = r"vision_tower\.encoder\.layers\.(\d+)\."

_RULES: dict[str, Rule] = {
    r"vision_tower\.patch_embedder\.input_proj\.weight": _patches,
    rf"{_LAYER}(self_attn|mlp)\.\w+_proj\.(input|output)_(min|max)": _limit,
    r"(audio_tower|embed_audio)\..*": _hears,
}

FAMILIES = (
    Family(
        "gemma4v",
        of_types("gemma4"),
        _keys,
        {r"^model\.": ""},
        {
            **{
                rf"{_LAYER}(?:self_attn|mlp)\.{old}(?:\.linear)?\.weight": rf"v.blk.\1.{new}.weight"
                for old, new in _MATRICES.items()
            },
            **{
                rf"{_LAYER}{old.replace('.', chr(92) + '.')}\.weight": rf"v.blk.\1.{new}.weight"
                for old, new in _NORMS.items()
            },
            r"vision_tower\.patch_embedder\.position_embedding_table": "v.position_embd.weight",
            r"vision_tower\.std_(bias|scale)": r"v.std_\1",
            r"embed_vision\.embedding_projection\.weight": "mm.input_projection.weight",
        },
        _RULES,
        defaults={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 16,
            "num_attention_heads": 12,
            "patch_size": 16,
            "image_size": 224,
            "pooling_kernel_size": 3,
        },
        type_key="clip.vision.projector_type",
    ),
)
