"""Forward passes of many prompts, shortened in every way that changes nothing on the model at hand.

Prompts stand side by side, padded on the right; what all begin with is run once; the last layer's
output is cut down to the positions that are asked for. On some of mlx-lm's architectures one or the
other gives other logits, without a word: a layer that is run twice is cut too early, a sparse
attention sees the padding. So each model is compared once with the plain pass of single prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from abl_mlx.models.batches import TOKENS_PER_BATCH, Batch, batches
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import normalized
from abl_mlx.models.hooks import around
from abl_mlx.models.plain import Plain, reach, sample, vocabulary
from abl_mlx.models.prefix import Prefix, shared
from abl_mlx.models.residuals import residual

#: Logits made at once: 32 MB of float32, of which several copies live at a time; where the last
#: layer's output is not cut, eight times as many.
LOGITS_PER_BATCH = 2**23


@dataclass(frozen=True)
class Shortcuts:
    """Which ways to shorten forward passes give a model's own logits.

    Attributes:
        together: prompts of one length side by side.
        padded: prompts of any lengths side by side, padded on the right.
        prefix: what all prompts begin with run once, and its cache repeated.
        cut: the last layer's output cut to the positions whose logits are asked for.
        cached: no shortcut, but what this model needs to be itself: `plain.needs_cache`.
    """

    together: bool = True
    padded: bool = True
    prefix: bool = True
    cut: bool = True
    cached: bool = False

    def batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Batches that may be run at once."""
        most = TOKENS_PER_BATCH if self.together else 1
        return batches(sequences, most, padded=self.padded)

    def shared(self, chat: ChatModel, sequences: Sequence[Sequence[int]], keep: int) -> Prefix:
        """What all sequences begin with, run once; nothing where that is not to be trusted."""
        if not self.prefix:
            return Prefix(chat, [], cached=self.cached)
        return shared(chat, sequences, keep=keep, cached=self.cached)


def trusted(chat: ChatModel, sequences: Sequence[Sequence[int]]) -> Shortcuts:
    """The shortcuts that change nothing, by a comparison that is made once for each model.

    Made again where prompts are far longer than those that were compared.

    Args:
        sequences: what is to be run; the prompts of the comparison are made from it.

    Raises:
        UserError: when mlx-lm cannot run the model at all.
    """
    known: dict[int, Shortcuts] = vars(chat).setdefault("_shortcuts", {})
    length = reach(sequences)
    if length not in known:
        known[length] = _compared(chat, sample(sequences))
    return known[length]


def _compared(chat: ChatModel, tokens: list[int]) -> Shortcuts:
    plain, half = Plain(chat), len(tokens) // 2
    every = Shortcuts(cached=plain.cached)
    none = Shortcuts(False, False, False, False, plain.cached)
    # Padding that is read shows most where there is little else to look at.
    long, short, shortest = tokens, [*tokens[:half], *tokens[-2:]], tokens[-2:]

    def same(how: Shortcuts, *prompts: list[int]) -> bool:
        begun = Prefix(chat, tokens[:half] if how.prefix else [], cached=how.cached)
        places = [[len(one) - 2, len(one) - 1] for one in prompts]
        found = passes(chat, prompts, places, how, begun)
        return all(plain.agrees(prompts[index], rows) for index, rows in found)

    def holds(how: Shortcuts, *prompts: list[int]) -> bool:
        return _works(lambda: same(how, *prompts))

    if holds(every, long, short) and holds(
        replace(every, prefix=False), long, shortest, tokens[-4:]
    ):
        return every
    plain(shortest)  # where even that cannot be run, that is said
    together = holds(replace(none, together=True), long, long[::-1], long[1:] + long[:1])
    padded = together and holds(
        replace(none, together=True, padded=True), long, shortest, tokens[-4:], short
    )
    prefix = replace(none, prefix=True, together=together)
    found = Shortcuts(
        together,
        padded,
        holds(prefix, long) and holds(prefix, short),
        holds(replace(none, cut=True), long),
        plain.cached,
    )
    # Each alone may be right, and two together not.
    if holds(found, long, short) and holds(
        replace(found, prefix=False), long, shortest, tokens[-4:]
    ):
        return found
    return none


def _works(attempt: Callable[[], bool]) -> bool:
    """What an attempt finds; False where a shortcut is one that the architecture does not take."""
    try:
        return attempt()
    except Exception:  # whatever mlx-lm's code raises for what it was not made for
        return False


def passes(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    how: Shortcuts,
    prefix: Prefix,
) -> Iterator[tuple[int, mx.array]]:
    """Yield (index, log-probabilities (K, V) float32) for each sequence, in no fixed order.

    Args:
        positions: for each sequence the tokens whose successors' distributions are asked for.
        prefix: what all sequences begin with, already run.
    """
    widest = max(map(len, positions))
    for batch in how.batches(prefix.rest(sequences)):
        start, count = 0, len(batch.indices)
        while start < count:
            rows = _rows(chat, how, widest, batch.tokens.shape[1])
            chosen = batch.indices[start : start + rows]
            wanted = [list(positions[index]) for index in chosen]
            columns = mx.array([row + row[-1:] * (widest - len(row)) for row in wanted])
            tokens = batch.tokens[start : start + rows]
            output = _at(chat, how, prefix, tokens, columns - prefix.length)
            mx.eval(output)
            for row, index in enumerate(chosen):
                yield index, output[row, : len(wanted[row])]
            start += rows


def _rows(chat: ChatModel, how: Shortcuts, widest: int, length: int) -> int:
    """How many rows of a batch have their logits made at once."""
    each = vocabulary(chat) * (widest if how.cut else max(1, length // 8))
    return max(1, LOGITS_PER_BATCH // each)


def _at(
    chat: ChatModel, how: Shortcuts, prefix: Prefix, tokens: mx.array, columns: mx.array
) -> mx.array:
    if not how.cut:
        return normalized(mx.take_along_axis(prefix(tokens), columns[:, :, None], axis=1))
    last = len(chat.layers) - 1

    def cut(call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        states = residual(output, last, chat.width)
        taken = mx.take_along_axis(states, columns[:, :, None], axis=1)
        return (taken, *output[1:]) if isinstance(output, tuple | list) else taken

    with around([(chat.layers[last], cut)]):
        return normalized(prefix(tokens))
