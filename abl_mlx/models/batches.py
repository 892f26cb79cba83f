"""Batches: several prompts in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

#: Tokens in one batch, padding included. Bounds the activations held at once, not the result.
TOKENS_PER_BATCH = 1024

#: The cost of a forward pass besides its tokens (a CPU unpacks all weights for it), in tokens.
PASS = 64


@dataclass(frozen=True)
class Batch:
    """Prompts of similar length, padded on the right.

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

    Padding is on the right: in a causal model no real position attends to it, so no mask is needed
    (docs/architecture.md, "MLX and Metal").

    Args:
        sequences: encoded prompts.
        tokens: the largest number of tokens in a batch, padding included.
        padded: whether a batch may hold sequences of different lengths.
    """
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    start = 0
    for stop in _ends([len(sequences[index]) for index in order], tokens, padded):
        chosen = order[start:stop]
        some = [sequences[index] for index in chosen]
        yield Batch(chosen, right_padded(some), mx.array([len(one) for one in some]))
        start = stop


def right_padded(sequences: Sequence[Sequence[int]]) -> mx.array:
    """Sequences of tokens as one array, (B, T) int32, the shorter ones padded with 0."""
    longest = max(map(len, sequences))
    return mx.array([[*one, *[0] * (longest - len(one))] for one in sequences], mx.int32)


def _ends(lengths: Sequence[int], tokens: int, padded: bool) -> list[int]:
    """The end index of each batch, chosen so that the total cost is lowest.

    Args:
        lengths: of the sequences, shortest first.
        tokens, padded: as for `batches`.
    """
    costs, starts = [0], [0]
    for stop in range(1, len(lengths) + 1):
        longest = lengths[stop - 1]
        best, at = costs[stop - 1] + longest, stop - 1
        for start in range(stop - 2, -1, -1):
            count = stop - start
            if longest * count > tokens or not (padded or lengths[start] == longest):
                break
            cost = costs[start] + longest * count
            if cost <= best:
                best, at = cost, start
        costs.append(best + PASS)
        starts.append(at)
    ends, stop = [], len(lengths)
    while stop:
        ends.append(stop)
        stop = starts[stop]
    return ends[::-1]
