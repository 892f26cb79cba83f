"""Tiny files of Llama 4: every other layer with experts, the last without positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.gguf_recipes.llama import HEADS, WIDTH, usual_keys, usual_tensors
from tests.support.gguf_recipes.qwen import quiet
from tests.support.tiny_gguf import Recipe, Shapes

EXPERTS, INNER = 4, 256


def keys(experts: int = EXPERTS, inner: int = INNER, **more: Any) -> dict[str, Any]:
    """Metadata of a model of `tensors`."""
    return usual_keys(
        block_count=4,
        expert_count=experts,
        expert_used_count=1,
        expert_feed_forward_length=inner,
        interleave_moe_layer_step=2,
        **more,
    )


def tensors(experts: int = EXPERTS, inner: int = INNER) -> Shapes:
    """Layers with a feed-forward network by turns with layers of experts and a shared one."""
    dense = usual_tensors(layers=4)
    sparse = usual_tensors(layers=4, experts=experts, expert_width=inner)
    for layer in range(1, 4, 2):
        for name in [name for name in dense if name.startswith(f"blk.{layer}.ffn_")]:
            del dense[name]
        block = f"blk.{layer}."
        dense |= {name: shape for name, shape in sparse.items() if name.startswith(block)}
        for part, shape in {
            "gate": (inner, WIDTH),
            "up": (inner, WIDTH),
            "down": (WIDTH, inner),
        }.items():
            dense[f"{block}ffn_{part}_shexp.weight"] = shape
    return dense


def values(name: str, noise: np.ndarray) -> np.ndarray | None:
    """The table of Llama 4 Scout, whose two limits are one, so that nothing is blended."""
    if name != "rope_freqs.weight":
        return quiet(name, noise)
    waves = 2 * np.pi * 10000.0 ** (np.arange(len(noise)) / len(noise))
    return np.where(waves > 64, 8.0, 1.0).astype(np.float32)


_TABLE: Shapes = {"rope_freqs.weight": (WIDTH // HEADS // 2,)}

RECIPES: dict[str, Recipe] = {
    "llama4": Recipe("llama4", keys(), tensors() | _TABLE, values=values, seed=8),
}
