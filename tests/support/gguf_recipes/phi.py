"""Tiny phi3 files: Phi-3, Phi-3.5 and Phi-4."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.support.tiny_gguf import VOCAB, Recipe, Shapes

WIDTH, WIDE, LAYERS, HEADS, KV_HEADS = 256, 512, 2, 4, 2
HEAD = WIDTH // HEADS


def usual_keys(**more: Any) -> dict[str, Any]:
    """Metadata of a model of `usual_tensors`."""
    keys = {
        "block_count": LAYERS,
        "context_length": 4096,
        "rope.scaling.original_context_length": 4096,
        "embedding_length": WIDTH,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": 16,
        "rope.dimension_count": HEAD,
        "rope.freq_base": 10000.0,
    }
    return keys | {key.replace("__", "."): value for key, value in more.items()}


def usual_tensors(*, tied: bool = False, factors: int = 0) -> Shapes:
    """Of a phi3.

    Args:
        factors: how many values longrope's tables have; 0 for none.
    """
    shapes: Shapes = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, WIDTH)
    if factors:
        shapes["rope_factors_long.weight"] = (factors,)
        shapes["rope_factors_short.weight"] = (factors,)
    for layer in range(LAYERS):
        block: Shapes = {
            "attn_norm.weight": (WIDTH,),
            "attn_qkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD, WIDTH),
            "attn_output.weight": (WIDTH, WIDTH),
            "ffn_norm.weight": (WIDTH,),
            "ffn_up.weight": (2 * WIDE, WIDTH),
            "ffn_down.weight": (WIDTH, WIDE),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def _tables(name: str, noise: np.ndarray) -> np.ndarray | None:
    """Like Phi-3.5's: short factors stay near one, long ones grow."""
    if name.startswith("rope_factors_"):
        most = 40.0 if "long" in name else 1.5
        return np.geomspace(1.05, most, len(noise)).astype(np.float32)
    return None


def longrope(
    original: int, *, tied: bool = False, rotated: int = HEAD, tables: int | None = None
) -> Recipe:
    """Of a context of 1024 tokens, stretched from ``original``.

    Args:
        rotated: dimensions of each head.
        tables: how many values the tables have, if not as many as they should.
    """
    keys = usual_keys(
        context_length=1024,
        rope__scaling__original_context_length=original,
        rope__scaling__type="longrope",
        rope__scaling__attn_factor=math.sqrt(1 + math.log(1024 / original) / math.log(original)),
        rope__dimension_count=rotated,
        attention__sliding_window=0,
    )
    return Recipe(
        "phi3", keys, usual_tensors(tied=tied, factors=tables or rotated // 2), values=_tables
    )


RECIPES: dict[str, Recipe] = {
    # llama.cpp does not use the window either.
    "phi3": Recipe("phi3", usual_keys(), usual_tensors()),
    "phi3, linear": Recipe(
        "phi3",
        usual_keys(rope__scaling__type="linear", rope__scaling__factor=4.0),
        usual_tensors(),
        seed=2,
    ),
    # llama.cpp takes the long factors, as mlx-lm always does, in contexts longer than the original:
    # the test's has 512 tokens.
    "phi3, longrope": longrope(256),
    "phi3, longrope, partial rotary, tied": longrope(256, tied=True, rotated=48),
}
