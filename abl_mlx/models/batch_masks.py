"""Attention masks of batches, for architectures of mlx-lm that accept only masks of one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abl_mlx.models.hooks import around


@contextmanager
def batch_masks(model: nn.Module) -> Iterator[None]:
    """Context manager in which the model accepts the masks of mlx-lm's BatchGenerator.

    Gemma 2 groups its query heads, so its attention scores have the shape (B, kv heads, queries, T,
    S), with which a batch's mask (B, 1, T, S) does not broadcast (mlx-lm 0.32: "Shapes
    (64,1,17,17) and (64,4,2,17,17) cannot be broadcast").
    """
    from mlx_lm.models.gemma2 import Attention

    grouped = [
        module
        for _, module in model.named_modules()
        if isinstance(module, Attention) and module.repeats > 1
    ]
    with around([(module, _with_one_axis_more) for module in grouped]):
        yield


def _with_one_axis_more(call: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
    if isinstance(mask, mx.array) and mask.ndim == 4:
        mask = mask[:, None]
    return call(x, mask, cache)
