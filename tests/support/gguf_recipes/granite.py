"""Tiny granite and granitemoe files."""

from __future__ import annotations

from typing import Any

from tests.support.gguf_recipes.llama import (
    LAYERS,
    WIDTH,
    small_biases,
    usual_keys,
    usual_tensors,
    with_biases,
)
from tests.support.tiny_gguf import Recipe, Shapes


def _keys(**more: Any) -> dict[str, Any]:
    multipliers = {
        "embedding_scale": 1.7,
        "residual_scale": 0.7,
        "attention.scale": 0.11,
        "logit_scale": 1.3,
    }
    return usual_keys(**{**multipliers, **more})


def _shared() -> Shapes:
    shapes: Shapes = {}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.ffn_gate_shexp.weight": (512, WIDTH),
            f"blk.{layer}.ffn_up_shexp.weight": (512, WIDTH),
            f"blk.{layer}.ffn_down_shexp.weight": (WIDTH, 512),
        }
    return shapes


_MOE = {"expert_count": 4, "expert_used_count": 2, "feed_forward_length": 256}

RECIPES: dict[str, Recipe] = {
    "granite": Recipe("granite", _keys(), usual_tensors(tied=True)),
    "granite, biases": Recipe(
        "granite",
        _keys(),
        with_biases(usual_tensors(), "attn_[qkv]|attn_output|ffn_(gate|up|down)"),
        values=small_biases,
    ),
    "granite, some constants left out": Recipe(
        "granite",
        _keys(embedding_scale=None, residual_scale=None, attention__scale=None),
        usual_tensors(),
    ),
    "granitemoe": Recipe("granitemoe", _keys(**_MOE), usual_tensors(tied=True, experts=4), seed=1),
    "granitemoe, shared expert": Recipe(
        "granitemoe",
        _keys(**_MOE, expert_shared_feed_forward_length=512),
        usual_tensors(experts=4) | _shared(),
        seed=1,
    ),
}
