"""Next-token distributions at chosen positions, without computing the output head elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from abl_mlx import heads
from abl_mlx.capture import batches, residual
from abl_mlx.hooks import around
from abl_mlx.models import ChatModel, progress
from abl_mlx.prefix import Prefix, shared

# Logits made at once: 32 MB of float32, of which several copies live at a time.
_LOGITS_PER_BATCH = 2**23


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
    the wanted positions and the head computes no others.
    """
    widest = max(map(len, positions))
    width = max(1, _LOGITS_PER_BATCH // (vocabulary(chat) * widest))
    first = min(min(row) for row in positions)
    prefix = shared(chat, sequences, keep=min(map(len, sequences)) - first)
    with progress(len(sequences), label) as bar:
        for batch in batches(prefix.rest(sequences)):
            for start in range(0, len(batch.indices), width):
                chosen = batch.indices[start : start + width]
                rows = [list(positions[index]) for index in chosen]
                columns = mx.array([row + row[-1:] * (widest - len(row)) for row in rows])
                tokens = batch.tokens[start : start + width]
                output = _at(chat, prefix, tokens, columns - prefix.length)
                mx.eval(output)
                for row, index in enumerate(chosen):
                    yield index, output[row, : len(rows[row])]
                bar.update(len(chosen))


def _at(chat: ChatModel, prefix: Prefix, tokens: mx.array, columns: mx.array) -> mx.array:
    last = len(chat.layers) - 1

    def cut(call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        states = residual(output, last, chat.width)
        taken = mx.take_along_axis(states, columns[:, :, None], axis=1)
        return (taken, *output[1:]) if isinstance(output, tuple | list) else taken

    with around([(chat.layers[last], cut)]):
        raw = prefix(tokens).astype(mx.float32)
    return raw - mx.logsumexp(raw, axis=-1, keepdims=True)


def vocabulary(chat: ChatModel) -> int:
    """V, the width of the model's logits; the model is asked once."""
    known = vars(chat).get("_vocabulary")
    if known is None:
        with heads.unseen(chat.model):
            known = int(chat.model(mx.array([[0]])).shape[-1])
        object.__setattr__(chat, "_vocabulary", known)
    return int(known)


def first_reply_token(
    chat: ChatModel, sequences: Sequence[Sequence[int]], *, label: str = "logits"
) -> mx.array:
    """Log-probabilities of each reply's first token: (N, V) float32, in the order given."""
    rows: dict[int, mx.array] = dict(
        log_probabilities(chat, sequences, [[len(s) - 1] for s in sequences], label=label)
    )
    return mx.concatenate([rows[index] for index in range(len(sequences))], axis=0)
