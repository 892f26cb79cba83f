"""Gemma 2's sliding window, which mlx-lm's gemma2 does not have.

Every other layer looks back over so many tokens only. llama.cpp and Transformers do so; without it
a prompt longer than the window is answered otherwise.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gemma2 import Attention

#: The window of a config.json that names none, as Transformers has it.
WINDOW = 4096


class WindowedAttention(Attention):
    """Attention over the last ``window`` tokens, the query's own among them."""

    window: int

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """As mlx-lm's, with a mask (T, S), (B, 1, T, S) or (B, 1, 1, T, S), or none."""
        length = x.shape[1]
        seen = mask.shape[-1] if mask is not None else length + (cache.offset if cache else 0)
        if seen > self.window:
            # Places in the cache, which lie as far apart as the tokens, whatever stands before.
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
    """Have a model of mlx-lm look back as far as its config.json says; others stay as they are."""
    if config.get("model_type") != "gemma2":
        return
    window = config.get("sliding_window", WINDOW)
    kinds = config.get("layer_types")
    for index, layer in enumerate(model.layers):
        slides = kinds[index] == "sliding_attention" if kinds else index % 2 == 0
        if window and slides:
            layer.self_attn.__class__ = WindowedAttention
            layer.self_attn.window = int(window)
