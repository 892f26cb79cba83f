"""Prompts side by side in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

#: Tokens in one batch, padding included. Bounds the activations held at once, not the result.
TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Batch:
    """Prompts of like length, right-padded.

    Attributes:
        indices: which prompts of the input these are.
        tokens: (B, T) int32.
        lengths: (B,) real tokens in each row.
    """

    indices: list[int]
    tokens: mx.array
    lengths: mx.array


def batches(
    sequences: Sequence[Sequence[int]], tokens: int = TOKENS_PER_BATCH, *, padded: bool = True
) -> Iterator[Batch]:
    """Batches of at most ``tokens`` tokens (or one sequence), sorted by length to pad little.

    Padding stands on the right: a causal model's states at a real position do not see it, so no
    mask is needed (DESIGN section 7).

    Args:
        padded: whether sequences of different lengths may stand in one batch.
    """
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    start = 0
    while start < len(order):
        stop = start + 1
        while (
            stop < len(order)
            and len(sequences[order[stop]]) * (stop + 1 - start) <= tokens
            and (padded or len(sequences[order[stop]]) == len(sequences[order[start]]))
        ):
            stop += 1
        chosen = order[start:stop]
        longest = len(sequences[chosen[-1]])
        rows = [
            list(sequences[index]) + [0] * (longest - len(sequences[index])) for index in chosen
        ]
        yield Batch(
            chosen, mx.array(rows, mx.int32), mx.array([len(sequences[index]) for index in chosen])
        )
        start = stop
