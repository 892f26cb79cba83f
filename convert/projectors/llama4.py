"""Llama 4: a tower with a class token, whose patches are shuffled into a smaller grid.

The norm before a block's feed-forward network is ``ln2`` in llama.cpp's graph and in the files that
are in use. The converter of llama-cpp-python 0.3.36 names it ``attn_post_norm``, a tensor that the
graph applies to the attention's output.
"""

from __future__ import annotations

from typing import Any

from convert.base.errors import UserError
from convert.projectors.siglip import block
from convert.projectors.tower import Family, Tower, of_types


def _keys(tower: Tower) -> dict[str, Any]:
    ratio, act = tower.real("pixel_shuffle_ratio"), tower.vision["hidden_act"]
    if act != "gelu":
        raise UserError(f'its tower\'s hidden_act is "{act}", and llama.cpp knows gelu')
    return {
        "clip.vision.attention.layer_norm_epsilon": tower.real("norm_eps"),
        "clip.vision.projector.scale_factor": int(1 / ratio) if ratio else 0,
        "clip.use_gelu": True,
    }


_IN_BLOCK = {
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}

FAMILIES = (
    Family(
        "llama4",
        of_types("llama4"),
        _keys,
        {r"^model\.(?=vision_model\.|multi_modal_projector\.)": ""},
        {
            **block(r"vision_model\.model\.layers\.", _IN_BLOCK),
            r"vision_model\.class_embedding": "v.class_embd",
            r"vision_model\.positional_embedding_vlm(\.weight)?": "v.position_embd.weight",
            r"vision_model\.patch_embedding\.linear\.weight": "v.patch_embd.weight",
            r"vision_model\.layernorm_pre\.(weight|bias)": r"v.pre_ln.\1",
            r"vision_model\.layernorm_post\.(weight|bias)": r"v.post_ln.\1",
            r"vision_model\.vision_adapter\.mlp\.fc([12])\.weight": r"mm.model.mlp.\1.weight",
            r"multi_modal_projector\.linear_1\.weight": "mm.model.fc.weight",
        },
        defaults={
            "hidden_size": 768,
            "intermediate_size": 5632,
            "num_hidden_layers": 34,
            "num_attention_heads": 16,
            "image_size": 448,
            "patch_size": 14,
            "hidden_act": "gelu",
            "norm_eps": 1e-5,
            "pixel_shuffle_ratio": 0.5,
        },
    ),
)
