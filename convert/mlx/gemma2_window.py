"""Gemma 2's sliding-window attention, which mlx-lm's gemma2 does not have.

In every other layer a token attends to the last ``window`` tokens only. llama.cpp and Transformers
do this; without it, the replies to prompts longer than the window differ.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

#: The window in tokens when config.json gives none: Transformers' default.
WINDOW = 4096


def give_window(model: nn.Module, config: dict[str, Any]) -> None:
    """Give a Gemma 2 model of mlx-lm the window of its config.json; leave other models alone."""
    if config.get("model_type") != "gemma2":
        return
    from convert.mlx.windowed_attention import WindowedAttention  # lazily: it brings mlx-lm

    window = config.get("sliding_window", WINDOW)
    kinds = config.get("layer_types")
    for index, layer in enumerate(model.layers):
        slides = kinds[index] == "sliding_attention" if kinds else index % 2 == 0
        if window and slides:
            layer.self_attn.__class__ = WindowedAttention
            layer.self_attn.window = int(window)
