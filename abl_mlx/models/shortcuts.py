"""Shorter forward passes of many prompts, as far as they do not change the logits.

There are three shortcuts: prompts run in one batch, padded on the right; their common first tokens
run once; and of the last layer's output only the needed positions are passed on. On some of
mlx-lm's architectures a shortcut gives wrong logits without any error: a layer that is run twice
has its output cut too early, or a sparse attention attends to the padding. So each model is
compared once with the plain pass of single prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from abl_mlx.models import sweeps
from abl_mlx.models.batches import TOKENS_PER_BATCH, Batch, batches
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import normalized
from abl_mlx.models.hooks import Around, around
from abl_mlx.models.plain import Plain, needs_cache, reach, sample, vocabulary
from abl_mlx.models.prefix import Prefix, shared
from abl_mlx.models.residuals import replaced, residual
from convert.base.errors import UserError

#: The number of logits that are computed at once: 16 MB of float32, of which several copies are in
#: memory at a time. Where the last layer's output is not cut, eight times as many.
LOGITS_PER_BATCH = 2**22


# (indices of sequences, their log-probabilities).
_Result = tuple[list[int], mx.array]

# (index of a sequence, its log-probabilities).
Found = list[tuple[int, mx.array]]

#: ``take(index, rows)`` is given the log-probabilities (K, V) float32 for a sequence.
Take = Callable[[int, mx.array], None]


@dataclass(frozen=True)
class Shortcuts:
    """Which shortcuts give a model's correct logits.

    Attributes:
        together: running prompts of one length in a batch.
        padded: running prompts of any lengths in a batch, padded on the right.
        prefix: running the common first tokens of all prompts once and repeating their cache.
        cut: passing on only those positions of the last layer's output whose logits are needed.
        cached: whether the model needs a cache (`plain.needs_cache`); this is no shortcut.
    """

    together: bool = True
    padded: bool = True
    prefix: bool = True
    cut: bool = True
    cached: bool = False

    def batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """The batches in which the sequences may be run."""
        most = TOKENS_PER_BATCH if self.together else 1
        return batches(sequences, most, padded=self.padded)

    def shared(self, chat: ChatModel, sequences: Sequence[Sequence[int]], keep: int) -> Prefix:
        """The common first tokens of all sequences, run once; none if ``prefix`` is false."""
        if not self.prefix:
            return Prefix(chat, [], cached=self.cached)
        return shared(chat, sequences, keep=keep, cached=self.cached)


def trusted(chat: ChatModel, sequences: Sequence[Sequence[int]]) -> Shortcuts:
    """The shortcuts that do not change this model's logits.

    They are found by a comparison, made once for each model, and again if prompts are far longer
    than those that were compared.

    Args:
        chat: the model.
        sequences: the prompts to be run, from which those of the comparison are made.

    Raises:
        UserError: when mlx-lm cannot run the model at all.
    """
    known: dict[int, Shortcuts] = vars(chat).setdefault("_shortcuts", {})
    length = reach(sequences)
    return sweeps.once(chat.model, known, length, lambda: _compared(chat, sample(sequences)))


def begun(
    chat: ChatModel, sequences: Sequence[Sequence[int]], begin: Callable[[Shortcuts], Prefix]
) -> tuple[Shortcuts, Prefix]:
    """The shortcuts for prompts, as of `trusted`, and their common first tokens.

    A streamed model runs these tokens in the sweep of the comparison, as most models allow it.

    Args:
        chat: the model.
        sequences: the prompts to be run.
        begin: runs their common first tokens, as of `Shortcuts.shared`.
    """
    if sweeps.of(chat.model) is None:
        how = trusted(chat, sequences)
        return how, begin(how)

    def hoping() -> Prefix | None:
        try:
            return begin(Shortcuts())
        except Exception:  # mlx-lm's code may raise anything for a pass that it does not support
            return None

    works: list[Callable[[], Any]] = [lambda: trusted(chat, sequences), hoping]
    how, prefix = sweeps.together(chat.model, *works)
    return how, prefix if prefix and how.prefix and not how.cached else begin(how)


def _compared(chat: ChatModel, tokens: list[int]) -> Shortcuts:
    if sweeps.of(chat.model) is None:
        return _compared_with(Plain(chat), chat, tokens)

    def without() -> Shortcuts | None:
        try:
            return _compared_with(Plain(chat, cached=False), chat, tokens)
        except UserError:
            return None

    # Most models need no cache, so this is asked in the sweep of a comparison without one.
    works: list[Callable[[], Any]] = [lambda: needs_cache(chat), without]
    cached, found = sweeps.together(chat.model, *works)
    if cached or found is None:
        return _compared_with(Plain(chat), chat, tokens)
    assert isinstance(found, Shortcuts)
    return found


def _compared_with(plain: Plain, chat: ChatModel, tokens: list[int]) -> Shortcuts:
    half = len(tokens) // 2
    every = Shortcuts(cached=plain.cached)
    none = Shortcuts(False, False, False, False, plain.cached)
    # An influence of padding shows most in short prompts, with few other tokens to attend to.
    long, short, shortest = tokens, [*tokens[:half], *tokens[-2:]], tokens[-2:]
    varied = [long, shortest, tokens[-4:]]

    def rows(how: Shortcuts, prompts: list[list[int]]) -> Found | None:
        try:
            begun = Prefix(chat, tokens[:half] if how.prefix else [], cached=how.cached)
            places = [[len(one) - 2, len(one) - 1] for one in prompts]
            return list(passes(chat, prompts, places, how, begun))
        except Exception:  # mlx-lm's code may raise anything for a pass that it does not support
            return None

    def same(found: Found | None, prompts: list[list[int]]) -> bool:
        return found is not None and all(plain.agrees(prompts[at], one) for at, one in found)

    def holds(how: Shortcuts, *prompts: list[int]) -> bool:
        return same(rows(how, list(prompts)), list(prompts))

    # A streamed model runs all of these side by side; one in memory each where it is asked for.
    works: list[Callable[[], Found | None]] = [
        partial(plain.prepare, [long, short, *varied[1:]], 2),
        partial(rows, every, [long, short]),
        partial(rows, replace(every, prefix=False), varied),
    ]
    usual = sweeps.each(chat.model, lambda work: work(), works)
    next(usual)
    if same(next(usual), [long, short]) and same(next(usual), varied):
        return every
    plain(shortest)  # raises an error with the reason if even this cannot run
    together = holds(replace(none, together=True), long, long[::-1], long[1:] + long[:1])
    padded = together and holds(replace(none, together=True, padded=True), *varied, short)
    prefix = replace(none, prefix=True, together=together)
    found = Shortcuts(
        together,
        padded,
        holds(prefix, long) and holds(prefix, short),
        holds(replace(none, cut=True), long),
        plain.cached,
    )
    # Two shortcuts may each be correct alone and wrong together.
    if holds(found, long, short) and holds(replace(found, prefix=False), *varied):
        return found
    return none


def passes(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    how: Shortcuts,
    prefix: Prefix,
    take: Take | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Yield (index, log-probabilities (K, V) float32) for each sequence, in no fixed order.

    Args:
        chat: the model.
        sequences: encoded prompts.
        positions: for each sequence, the positions of the tokens for which the distribution of the
            next token is wanted.
        how: the shortcuts to use.
        prefix: the common first tokens of the sequences, already run.
        take: called with the index and the log-probabilities, when they are computed; then what is
            yielded is empty.
    """
    widest = max(map(len, positions))
    streamed = sweeps.of(chat.model) is not None

    def results(batch: Batch) -> Iterator[_Result]:
        wanted = [list(positions[index]) for index in batch.indices]
        columns = mx.array([row + row[-1:] * (widest - len(row)) for row in wanted]) - prefix.length
        if not how.cut:
            logits = prefix(batch.tokens)
            yield batch.indices, normalized(mx.take_along_axis(logits, columns[:, :, None], axis=1))
        elif streamed:
            yield batch.indices, _cut(chat, prefix, batch.tokens, columns)
        else:
            states, outputs = last_states(chat, prefix, batch.tokens, columns)
            for some in _slices(chat, len(states), widest):
                yield batch.indices[some], behind(chat, states[some], outputs, cached=how.cached)

    def taken(chosen: list[int], output: mx.array) -> _Result:
        mx.eval(output)
        if take is None:
            return chosen, output
        for row, index in enumerate(chosen):
            take(index, output[row, : len(positions[index])])
        return chosen, mx.zeros((len(chosen), 0))

    def run(batch: Batch) -> Iterable[_Result]:
        done = (taken(*one) for one in results(batch))
        return list(done) if streamed else done

    batches = how.batches(prefix.rest(sequences))
    if streamed or not how.cut:  # the output head runs in the same pass
        batches = _smaller(chat, batches, widest if how.cut else None)
    for done in sweeps.each(chat.model, run, batches):
        for chosen, output in done:
            for row, index in enumerate(chosen):
                yield index, output[row, : len(positions[index])]


def _smaller(chat: ChatModel, given: Iterable[Batch], widest: int | None) -> Iterator[Batch]:
    """Batches of as many sequences as logits are computed for at once.

    Args:
        chat: the model.
        given: the batches.
        widest: at how many tokens of each sequence; None for all.
    """
    for batch in given:
        count, length = batch.tokens.shape
        for some in _slices(chat, count, widest or max(1, length // 8)):
            yield Batch(batch.indices[some], batch.tokens[some], batch.lengths[some])


def _slices(chat: ChatModel, count: int, each: int) -> Iterator[slice]:
    """As many sequences as logits are computed for at once, at ``each`` tokens of each."""
    rows = max(1, LOGITS_PER_BATCH // (vocabulary(chat) * each))
    return (slice(start, start + rows) for start in range(0, count, rows))


def _cut(chat: ChatModel, prefix: Prefix, tokens: mx.array, columns: mx.array) -> mx.array:
    """Log-probabilities (B, K, V), where the last layer passes on its output at the columns."""
    last = len(chat.layers) - 1

    def cut(call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        states = residual(output, last, chat.width)
        if states.shape[1] != tokens.shape[1]:
            return output  # the layer is run again, on states that are cut: no such positions
        return replaced(output, mx.take_along_axis(states, columns[:, :, None], axis=1))

    with around([(chat.layers[last], cut)]):
        return normalized(prefix(tokens))


class _Enough(Exception):
    """Ends a pass behind the last layer."""


def last_states(
    chat: ChatModel, prefix: Prefix, tokens: mx.array, columns: mx.array
) -> tuple[mx.array, dict[int, Any]]:
    """Run a model up to its last layer.

    Args:
        chat: the model.
        prefix: the first tokens, already run.
        tokens: (B, T), the tokens after them.
        columns: (B, K), positions among these.

    Returns:
        The states (B, K, d) after the last layer, and each layer's output for `behind`.
    """
    last = len(chat.layers) - 1
    outputs: dict[int, Any] = {}
    found: list[mx.array] = []

    def around_layer(layer: int) -> Around:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            states = residual(output, layer, chat.width)
            outputs[layer] = replaced(output, mx.zeros((1, 1, chat.width), states.dtype))
            if layer < last:
                return output
            found.append(mx.take_along_axis(states, columns[:, :, None], axis=1))
            raise _Enough

        return wrapper

    pairs = [(module, around_layer(layer)) for layer, module in enumerate(chat.layers)]
    with suppress(_Enough), around(pairs):
        prefix(tokens)
    mx.eval(found[0])
    return found[0], outputs


def behind(
    chat: ChatModel, states: mx.array, outputs: Mapping[int, Any], *, cached: bool
) -> mx.array:
    """Log-probabilities (B, K, V) from states (B, K, d) after the last layer; no layer runs.

    Args:
        chat: the model.
        states: what the last layer puts out.
        outputs: the output of each layer, with any states.
        cached: as of `Shortcuts`.
    """
    from mlx_lm.models.cache import make_prompt_cache

    def instead(layer: int) -> Around:
        output = outputs[layer]
        if layer == len(chat.layers) - 1:
            output = replaced(output, states)
        return lambda call, *args, **kwargs: output

    more = {"cache": make_prompt_cache(chat.model)} if cached else {}
    with around([(module, instead(layer)) for layer, module in enumerate(chat.layers)]):
        return normalized(chat.model(mx.zeros(states.shape[:2], mx.int32), **more))
