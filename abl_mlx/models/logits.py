"""Next-token distributions at chosen positions, without computing the output head elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from abl_mlx.models import sweeps
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.plain import vocabulary
from abl_mlx.models.prefix import Prefix
from abl_mlx.models.shortcuts import LOGITS_PER_BATCH, Take, behind, last_states, passes, trusted
from abl_mlx.support import ranks
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.console import progress


def log_probabilities(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    *,
    label: str = "logits",
) -> Iterator[tuple[int, mx.array]]:
    """Yield (index, log-probabilities (K, V) float32) for each sequence, in no fixed order.

    Row k is the log-softmax, taken in float32, of the raw logits at token ``positions[index][k]``
    of the sequence: the model's distribution of the token that follows it. After the last layer a
    language model processes each position separately, so only the wanted positions of the last
    layer's output are passed on to the output head. Where a model is different
    (`shortcuts.trusted`), all positions are computed.

    Raises:
        UserError: when mlx-lm cannot run the model.
    """
    return _distributions(chat, sequences, positions, None, label)


def visit_probabilities(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    take: Take,
    *,
    label: str = "logits",
) -> None:
    """Call ``take`` with each result of `log_probabilities`, when its pass has computed it.

    In a sweep of a streamed model only one is then in memory at a time.
    """

    for _ in _distributions(chat, sequences, positions, take, label):
        pass


def _distributions(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    take: Take | None,
    label: str,
) -> Iterator[tuple[int, mx.array]]:
    how = trusted(chat, sequences)
    first = min(min(row) for row in positions)
    prefix = how.shared(chat, sequences, min(map(len, sequences)) - first)
    with progress(len(sequences), label) as bar:
        for index, rows in passes(chat, sequences, positions, how, prefix, take):
            yield index, rows
            bar.update()


def behind_last_layer(
    chat: ChatModel, sequences: Sequence[Sequence[int]], states: np.ndarray
) -> mx.array:
    """The result of `first_reply_token`, from the states after the last layer at the prompts' ends.

    Only the part of the model after the layers runs. Where the output does not depend on these
    states alone (`shortcuts.trusted`), the whole model runs.

    Args:
        chat: the model.
        sequences: encoded prompts.
        states: (N, d).
    """
    how = trusted(chat, sequences)
    if not (how.cut and how.together):
        return first_reply_token(chat, sequences)
    nothing = Prefix(chat, [], cached=how.cached)
    one, outputs = last_states(
        chat, nothing, mx.zeros((1, 1), mx.int32), mx.zeros((1, 1), mx.int32)
    )
    width = max(1, LOGITS_PER_BATCH // vocabulary(chat))

    def run(start: int) -> mx.array:
        given = mx.array(np.ascontiguousarray(states[start : start + width]))[:, None]
        row = behind(chat, given.astype(one.dtype), outputs, cached=how.cached)[:, 0]
        mx.eval(row)
        return row

    starts = range(0, len(states), width)
    return mx.concatenate(list(sweeps.each(chat.model, run, starts)), axis=0)


def first_reply_token(
    chat: ChatModel, sequences: Sequence[Sequence[int]], *, label: str = "logits"
) -> mx.array:
    """Log-probabilities of each reply's first token: (N, V) float32, in the order given."""
    parts = ranks.shares([len(one) for one in sequences])
    mine = [sequences[number] for number in parts[ranks.rank()]]
    rows: dict[int, mx.array] = {}
    if mine:
        rows = dict(log_probabilities(chat, mine, [[len(s) - 1] for s in mine], label=label))
    if ranks.size() == 1:
        return mx.concatenate([rows[index] for index in range(len(sequences))], axis=0)
    own = [numpy_of(rows[index][0]) for index in range(len(mine))]
    found = ranks.arrays(label, np.array(own, np.float32).reshape(len(mine), -1))
    return mx.array(np.stack(ranks.joined(parts, [list(one) for one in found])))
