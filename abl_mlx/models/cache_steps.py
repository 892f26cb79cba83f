"""Lets the caches of keys and values grow in small steps.

mlx-lm's caches grow by 256 tokens at a time. For a batch of short prompts that is several times
what they need: with 32 prompts of 60 tokens, 200 MB instead of 50 in a model with half a billion
weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: The number of tokens by which a cache grows.
STEP = 32


# Kinds of caches with their own steps, and one element for each block that is entered.
_entered: list[tuple[Any, int]] = []
_inside: list[None] = []


@contextmanager
def small_steps() -> Iterator[None]:
    """Context manager in which all caches grow by `STEP` tokens."""
    from mlx_lm.models import cache

    kinds: list[Any] = [
        kind for kind in vars(cache).values() if isinstance(kind, type) and "step" in vars(kind)
    ]
    if not _entered:
        _entered.extend((kind, kind.step) for kind in kinds)
        for kind in kinds:
            kind.step = STEP
    _inside.append(None)
    try:
        yield
    finally:
        # Passes that run side by side leave in any order; the last one sets the steps back.
        _inside.pop()
        if not _inside:
            while _entered:
                kind, step = _entered.pop()
                kind.step = step
