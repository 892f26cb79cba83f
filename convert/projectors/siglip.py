"""The names of tensors in SigLIP and in towers like it."""

from __future__ import annotations

from typing import Any

_IN_BLOCK = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}

_TOWER = r"vision_tower\.vision_model\."


def block(stem: str, names: dict[str, str]) -> dict[str, str]:
    """Patterns of the tensors of all blocks.

    Args:
        stem: a pattern for what stands before the number of a block.
        names: module inside a block -> its name in a GGUF.
    """
    return {
        rf"{stem}(\d+)\.{module.replace('.', chr(92) + '.')}\.(weight|bias)": rf"v.blk.\1.{new}.\2"
        for module, new in names.items()
    }


NAMES: dict[str, str] = {
    **block(rf"{_TOWER}encoder\.layers\.", _IN_BLOCK),
    rf"{_TOWER}embeddings\.patch_embedding\.bias": "v.patch_embd.bias",
    rf"{_TOWER}embeddings\.position_embedding\.weight": "v.position_embd.weight",
    rf"{_TOWER}post_layernorm\.(weight|bias)": r"v.post_ln.\1",
}
"""Pattern of a whole name -> name in a GGUF."""

DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
"""What transformers takes for keys that vision_config lacks."""
