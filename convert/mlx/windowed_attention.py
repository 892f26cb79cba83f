"""Attention over a window, as a class of mlx-lm's: the class of `convert.mlx.gemma2_window`.

It is another module because mlx-lm takes seconds to import, which work on files alone does not
need.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.gemma2 import Attention


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
