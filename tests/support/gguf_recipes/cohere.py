"""Tiny command-r and cohere2 files."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.support.gguf_recipes.llama import (
    HEADS,
    KV_HEADS,
    THIN,
    WIDTH,
    thin,
    usual_keys,
    usual_tensors,
)
from tests.support.tiny_gguf import Recipe, Shapes


def _keys(**more: Any) -> dict[str, Any]:
    usual = {
        "attention.layer_norm_rms_epsilon": None,
        "attention.layer_norm_epsilon": 1e-5,
        "logit_scale": 0.7,
        "rope.scaling.type": "none",
    }
    return usual_keys(**{**usual, **more})


def _tensors(**more: Any) -> Shapes:
    shapes = usual_tensors(tied=True, **more)
    return {name: shape for name, shape in shapes.items() if not re.search("ffn_norm", name)}


_MANY = 64
"""llama.cpp expects norms of queries and keys from so many layers on."""


def _norms(name: str, noise: np.ndarray) -> np.ndarray | None:
    """One gain for each head and dimension, about one."""
    return 1 + np.float32(0.2) * noise if "_norm." in name else None


RECIPES: dict[str, Recipe] = {
    "command-r": Recipe("command-r", _keys(), _tensors()),
    "command-r, norms of queries and keys": Recipe(
        "command-r",
        _keys(**THIN, block_count=_MANY),
        thin(_tensors(layers=_MANY))
        | {
            f"blk.{layer}.attn_{which}_norm.weight": (heads, WIDTH // 4 // HEADS)
            for layer in range(_MANY)
            for which, heads in (("q", HEADS), ("k", KV_HEADS))
        },
        values=_norms,
        seed=6,
    ),
    "cohere2": Recipe(
        "cohere2",
        _keys(block_count=5, attention__sliding_window=16),
        _tensors(layers=5),
    ),
    "cohere2, another pattern": Recipe(
        "cohere2",
        _keys(
            block_count=4,
            attention__sliding_window=9,
            attention__sliding_window_pattern=[True, False, True, False],
        ),
        _tensors(layers=4),
    ),
}
