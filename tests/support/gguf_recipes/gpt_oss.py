"""Tiny gpt-oss files."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.gguf_recipes.llama import HEADS, KV_HEADS, WIDTH, usual_keys
from tests.support.gguf_recipes.qwen import quiet
from tests.support.tiny_gguf import VOCAB, Recipe, Shapes, usual_values

EXPERTS, EXPERT_WIDTH, LAYERS, HEAD = 4, 256, 4, 64


def keys(**more: Any) -> dict[str, Any]:
    """Metadata of `tensors`, with a window that is shorter than the test's texts."""
    return usual_keys(
        block_count=LAYERS,
        feed_forward_length=EXPERT_WIDTH,
        expert_feed_forward_length=EXPERT_WIDTH,
        expert_count=EXPERTS,
        expert_used_count=2,
        attention__key_length=HEAD,
        attention__value_length=HEAD,
        attention__sliding_window=8,
        rope__freq_base=150000.0,
        rope__dimension_count=None,
        **more,
    )


def tensors() -> Shapes:
    """Attention with sinks and biases; experts and a router with biases."""
    shapes: Shapes = {
        "token_embd.weight": (VOCAB, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (VOCAB, WIDTH),
    }
    for layer in range(LAYERS):
        block = {
            "attn_norm.weight": (WIDTH,),
            "attn_q.weight": (HEADS * HEAD, WIDTH),
            "attn_q.bias": (HEADS * HEAD,),
            "attn_k.weight": (KV_HEADS * HEAD, WIDTH),
            "attn_k.bias": (KV_HEADS * HEAD,),
            "attn_v.weight": (KV_HEADS * HEAD, WIDTH),
            "attn_v.bias": (KV_HEADS * HEAD,),
            "attn_output.weight": (WIDTH, HEADS * HEAD),
            "attn_output.bias": (WIDTH,),
            "attn_sinks.weight": (HEADS,),
            "post_attention_norm.weight": (WIDTH,),
            "ffn_gate_inp.weight": (EXPERTS, WIDTH),
            "ffn_gate_inp.bias": (EXPERTS,),
            "ffn_gate_exps.weight": (EXPERTS, EXPERT_WIDTH, WIDTH),
            "ffn_gate_exps.bias": (EXPERTS, EXPERT_WIDTH),
            "ffn_up_exps.weight": (EXPERTS, EXPERT_WIDTH, WIDTH),
            "ffn_up_exps.bias": (EXPERTS, EXPERT_WIDTH),
            "ffn_down_exps.weight": (EXPERTS, WIDTH, EXPERT_WIDTH),
            "ffn_down_exps.bias": (EXPERTS, WIDTH),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def values(name: str, noise: np.ndarray) -> np.ndarray | None:
    """Biases that leave something of the inputs, sinks that take part of the attention."""
    if name.endswith((".attn_output.bias", "ffn_down_exps.bias")):
        return np.float32(0.02) * noise
    if name.endswith("_exps.bias"):
        # Some are cut off at 7. Experts are much alike, as in `usual_values`.
        return np.float32(2.5) * (noise.mean(axis=0) * np.sqrt(len(noise)) + 0.05 * noise)
    if name.endswith("attn_sinks.weight"):
        return 1 + noise
    if name.endswith("ffn_down_exps.weight"):
        # What gates are multiplied by is about 1, and not about 0.
        return np.float32(0.1) * usual_values(name, noise)
    return quiet(name, noise)


STRETCHED = {
    "rope__scaling__type": "yarn",
    "rope__scaling__factor": 32.0,
    "rope__scaling__original_context_length": 64,
    "rope__scaling__yarn_beta_fast": 32.0,
    "rope__scaling__yarn_beta_slow": 1.0,
}
"""As in every real file, but for the context length."""

RECIPES: dict[str, Recipe] = {
    "gpt-oss": Recipe("gpt-oss", keys(**STRETCHED), tensors(), values),
    "gpt-oss, first layer full": Recipe(
        "gpt-oss",
        keys(attention__sliding_window_pattern=[False, True, True, False]),
        tensors(),
        values,
    ),
}
