"""KL(base ‖ model) over the base model's own replies, both in MLX, from whole distributions.

Several ranks share the prompts out. Each keeps the base model's distributions for its own prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from abl_mlx.inputs.sets import Question
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import kl_divergence
from abl_mlx.models.generation import generate
from abl_mlx.models.logits import visit_probabilities
from abl_mlx.models.plain import vocabulary
from abl_mlx.records.evaluations import Divergence
from abl_mlx.support import ranks
from abl_mlx.support.arrays import numbers
from convert.base import scratch

if TYPE_CHECKING:
    from abl_mlx.behaviour.target import Group

#: The largest number of harmless prompts; each takes K·V float32 numbers on disk.
PROMPTS = 32


@dataclass(frozen=True)
class Baseline:
    """The base model's distributions over the opening of its own replies, kept on disk.

    Attributes:
        sequences: each an encoded prompt with the first tokens of the base model's greedy reply.
        positions: for each sequence, the positions of the tokens for which the next is predicted.
        mine: the numbers of the sequences whose distributions this rank keeps.
        rows: log-probabilities (V,) for all positions of these, one after the other.
    """

    sequences: list[list[int]]
    positions: list[list[int]]
    mine: list[int]
    rows: scratch.RowsFile

    @property
    def starts(self) -> dict[int, int]:
        """For each sequence of ``mine`` the number of its first row."""
        counts = [len(self.positions[number]) for number in self.mine]
        return dict(zip(self.mine, accumulate(counts, initial=0), strict=False))

    def of(self, numbers: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Some sequences, and their positions."""
        return [self.sequences[n] for n in numbers], [self.positions[n] for n in numbers]


@contextmanager
def baseline(
    chat: ChatModel, prompts: Sequence[Question], *, tokens: int = 32, batch_size: int = 32
) -> Iterator[Baseline]:
    """Context manager with the base model's distributions of its first reply tokens.

    Args:
        chat: the base model.
        prompts: at most `PROMPTS` harmless prompts; each takes tokens × V × 4 bytes of disk.
        tokens: the number of reply tokens.
        batch_size: how many replies are generated at the same time.
    """
    encoded = [chat.encode(prompt) for prompt in prompts]
    replies = generate(chat, encoded, tokens, batch_size=batch_size, label="KL: base replies")
    sequences, positions = [], []
    for prompt, reply in zip(encoded, replies, strict=True):
        sequences.append([*prompt, *reply[: tokens - 1]])
        positions.append(list(range(len(prompt) - 1, len(sequences[-1]))))
    mine = ranks.shares([len(one) for one in sequences])[ranks.rank()]
    count = sum(len(positions[number]) for number in mine)
    with scratch.scratch() as folder:
        stored = scratch.RowsFile(folder / "base.f32", count, vocabulary(chat))
        base = Baseline(sequences, positions, mine, stored)
        starts = base.starts

        def keep(at: int, rows: mx.array) -> None:
            stored.write(starts[mine[at]], np.array(rows.astype(mx.float32)))

        if mine:
            visit_probabilities(chat, *base.of(mine), keep, label="KL: base")
        # The model may be released inside the block, so no reference to it is kept here.
        del chat
        yield base


def kl(
    chat: ChatModel,
    base: Baseline,
    groups: Sequence[Group] | None = None,
) -> Divergence:
    """Mean KL(base ‖ this model) in nats over harmless prompts.

    Args:
        chat: this model.
        base: the base model's distributions.
        groups: numbers of prompts, and what the model runs inside of on these; None for all prompts
            with the model as it is.

    Returns:
        The mean at the first reply token, and the mean over the first 32 tokens of the base model's
        greedy replies.
    """
    found: list[list[float]] = []
    starts = base.starts
    for numbers_of, context in groups or [([*range(len(base.sequences))], nullcontext)]:
        mine = [number for number in numbers_of if number in starts]

        def compare(at: int, rows: mx.array, mine: Sequence[int] = mine) -> None:
            before = mx.array(base.rows.read(starts[mine[at]], len(rows)))
            found.append(numbers(kl_divergence(before, rows)))

        with context():
            if mine:
                visit_probabilities(chat, *base.of(mine), compare, label="KL: edited")
    told = [values for part in ranks.gathered("KL", found) for values in part]
    first, every = [values[0] for values in told], [value for values in told for value in values]
    return Divergence(k1=float(np.mean(first)), k32=float(np.mean(every)))
