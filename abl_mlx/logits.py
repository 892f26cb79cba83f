"""Next-token distributions at chosen positions, without computing the output head elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from abl_mlx.models import ChatModel, progress
from abl_mlx.shortcuts import passes, trusted


def log_probabilities(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    *,
    label: str = "logits",
) -> Iterator[tuple[int, mx.array]]:
    """Yield (index, log-probabilities (K, V) float32) for each sequence, in no fixed order.

    Row k is the log-softmax, taken in float32, of the raw logits at token ``positions[index][k]``
    of the sequence: the model's distribution of the token that follows it. After the last layer
    a language model works on each position by itself, so the last layer's output is cut down to
    the wanted positions and the head computes no others; where a model is different
    (`shortcuts.trusted`), the whole is computed.

    Raises:
        UserError: when mlx-lm cannot run the model.
    """
    how = trusted(chat, sequences)
    first = min(min(row) for row in positions)
    prefix = how.shared(chat, sequences, min(map(len, sequences)) - first)
    with progress(len(sequences), label) as bar:
        for index, rows in passes(chat, sequences, positions, how, prefix):
            yield index, rows
            bar.update()


def first_reply_token(
    chat: ChatModel, sequences: Sequence[Sequence[int]], *, label: str = "logits"
) -> mx.array:
    """Log-probabilities of each reply's first token: (N, V) float32, in the order given."""
    rows: dict[int, mx.array] = dict(
        log_probabilities(chat, sequences, [[len(s) - 1] for s in sequences], label=label)
    )
    return mx.concatenate([rows[index] for index in range(len(sequences))], axis=0)
