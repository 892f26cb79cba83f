"""Tiny LFM2 files."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.gguf_recipes.llama import KV_HEADS, WIDTH, usual_keys, usual_tensors
from tests.support.gguf_recipes.qwen import quiet
from tests.support.tiny_gguf import Recipe, Shapes

EXPERTS = 4


def keys(attends: list[bool], **more: Any) -> dict[str, Any]:
    """Metadata of `tensors`."""
    return usual_keys(
        block_count=len(attends),
        attention__head_count_kv=[KV_HEADS if one else 0 for one in attends],
        shortconv__l_cache=3,
        rope__freq_base=1e6,
        rope__dimension_count=None,
        **more,
    )


def tensors(attends: list[bool], dense: int) -> Shapes:
    """Attention or a short convolution in each layer, and experts from a layer on.

    Args:
        dense: layers without experts.
    """
    shapes = usual_tensors(tied=True, layers=len(attends), qk_norm=True)
    shapes["token_embd_norm.weight"] = shapes.pop("output_norm.weight")
    for layer, attending in enumerate(attends):
        block = f"blk.{layer}."
        if not attending:
            for name in ("q", "k", "v", "output", "q_norm", "k_norm"):
                del shapes[f"{block}attn_{name}.weight"]
            shapes |= {
                f"{block}shortconv.conv.weight": (WIDTH, 3),
                f"{block}shortconv.in_proj.weight": (3 * WIDTH, WIDTH),
                f"{block}shortconv.out_proj.weight": (WIDTH, WIDTH),
            }
        if layer >= dense:
            for name in ("gate", "up", "down"):
                del shapes[f"{block}ffn_{name}.weight"]
            shapes |= {
                f"{block}ffn_gate_inp.weight": (EXPERTS, WIDTH),
                f"{block}exp_probs_b.bias": (EXPERTS,),
                f"{block}ffn_gate_exps.weight": (EXPERTS, 256, WIDTH),
                f"{block}ffn_up_exps.weight": (EXPERTS, 256, WIDTH),
                f"{block}ffn_down_exps.weight": (EXPERTS, WIDTH, 256),
            }
    return shapes


def values(name: str, noise: np.ndarray) -> np.ndarray | None:
    """Kernels that look back."""
    if name.endswith("shortconv.conv.weight"):
        return np.float32(0.5) * noise
    return quiet(name, noise)


SOME = [False, True, False, True]

RECIPES: dict[str, Recipe] = {
    "lfm2": Recipe("lfm2", keys(SOME), tensors(SOME, len(SOME)), values, seed=1),
    "lfm2moe": Recipe(
        "lfm2moe",
        keys(
            SOME,
            expert_count=EXPERTS,
            expert_used_count=2,
            expert_feed_forward_length=256,
            expert_gating_func=2,
            leading_dense_block_count=1,
        ),
        tensors(SOME, 1),
        values,
        seed=9,
    ),
}
