"""Gemma 2's sliding-window attention, which mlx-lm's gemma2 does not have.

In every other layer a token attends to the last ``window`` tokens only. llama.cpp and Transformers
do this; without it, the replies to prompts longer than the window differ.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gemma2 import Attention

#: The window in tokens when config.json gives none: Transformers' default.
WINDOW = 4096


class WindowedAttention(Attention):
    """Attention over the last ``window`` tokens, the query's own token included."""

    window: int

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """As mlx-lm's Attention; mask (T, S), (B, 1, T, S), (B, 1, 1, T, S), or None."""
        length = x.shape[1]
        seen = mask.shape[-1] if mask is not None else length + (cache.offset if cache else 0)
        if seen > self.window:
            # Positions in the cache; their differences are those of the tokens' positions.
            places = mx.arange(seen)
            near = places[seen - length :, None] - places[None] < self.window
            if mask is None:
                mask = near
            elif mask.dtype == mx.bool_:
                mask = mask & near
            else:
                mask = mx.where(near, mask, mx.array(mx.finfo(mask.dtype).min, mask.dtype))
        output: mx.array = super().__call__(x, mask, cache)
        return output


def give_window(model: nn.Module, config: dict[str, Any]) -> None:
    """Give a Gemma 2 model of mlx-lm the window of its config.json; leave other models alone."""
    if config.get("model_type") != "gemma2":
        return
    window = config.get("sliding_window", WINDOW)
    kinds = config.get("layer_types")
    for index, layer in enumerate(model.layers):
        slides = kinds[index] == "sliding_attention" if kinds else index % 2 == 0
        if window and slides:
            layer.self_attn.__class__ = WindowedAttention
            layer.self_attn.window = int(window)
