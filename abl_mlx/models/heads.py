"""Skips the output head where its logits are not used.

On a CPU, NumPy's BLAS multiplies matrices immediately (`convert.mlx.packed`), so MLX's lazy
evaluation cannot skip a vocabulary-wide product whose result is unused. Over a batch of prompts
that product would take gigabytes. Only modules of `convert.mlx.packed` are changed here: MLX skips
its own products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abl_mlx.models.hooks import Around, around, around_method
from convert.mlx.packed import PackedEmbedding, PackedLinear


@contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """Context manager in which logits are not computed: they keep their shape and are all NaN."""

    def nothing(call: Any, states: mx.array, *, width: int) -> mx.array:
        return mx.broadcast_to(mx.array(mx.nan), (*states.shape[:-1], width))

    with _around_heads(model, nothing):
        yield


@contextmanager
def last_only(model: nn.Module) -> Iterator[None]:
    """Context manager in which logits are those of the last position: (B, 1, V), not (B, T, V)."""

    def last(call: Any, states: mx.array, *, width: int) -> Any:
        return call(states[:, -1:] if states.ndim == 3 else states)

    with _around_heads(model, last):
        yield


@contextmanager
def _around_heads(model: nn.Module, wrapper: Any) -> Iterator[None]:
    def of(width: int) -> Around:
        return lambda call, states: wrapper(call, states, width=width)

    with ExitStack() as stack:
        for module in _heads(model):
            width = module.shape[0]
            if isinstance(module, PackedEmbedding):
                stack.enter_context(around_method(module, "as_linear", of(width)))
            else:
                stack.enter_context(around([(module, of(width))]))
        yield


def _heads(model: nn.Module) -> list[PackedEmbedding | PackedLinear]:
    """Modules that may be output heads: embeddings, and matrices as wide as these are long.

    Modules inside layers are never heads.
    """
    within = {id(part) for layer in model.layers for _, part in layer.named_modules()}
    outside = [module for _, module in model.named_modules() if id(module) not in within]
    embeddings = [module for module in outside if isinstance(module, PackedEmbedding)]
    widths = {module.shape[0] for module in embeddings}
    linear = [
        module
        for module in outside
        if isinstance(module, PackedLinear) and module.shape[0] in widths
    ]
    return [*embeddings, *linear]
