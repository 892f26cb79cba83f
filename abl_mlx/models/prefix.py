"""Runs the common first tokens of all prompts once, and reuses their cache in every batch.

A chat template begins every prompt with the same tokens, such as a system prompt. Their keys and
values are computed once, for a batch of one, and repeated for each batch; each batch then runs only
the tokens after them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx

from abl_mlx.models import heads, sweeps
from abl_mlx.models.cache_steps import small_steps
from abl_mlx.models.chat_model import ChatModel, common_prefix
from abl_mlx.models.hooks import around
from abl_mlx.models.stages import absent

#: Shorter prefixes (in tokens) are run with each prompt, because repeating a cache costs as much.
SHORTEST = 8


class Prefix:
    """The common first tokens of some sequences, already run.

    Attributes:
        length: their number; 0 where sequences share too few, or the cache cannot be shared.
    """

    def __init__(self, chat: ChatModel, tokens: Sequence[int], *, cached: bool = False):
        """Run the tokens.

        Args:
            chat: the model.
            tokens: the common first tokens, possibly none.
            cached: whether the model runs with a cache even if there are no such tokens.
        """
        from mlx_lm.models.cache import make_prompt_cache

        self.length = len(tokens)
        self._model = chat.model
        self._layers = chat.layers
        self._caches: list[Any] = []
        self._last: dict[int, int] = {}
        if tokens or cached:
            self._caches = make_prompt_cache(chat.model)
        if tokens:
            with heads.unseen(chat.model), small_steps(), self._noting():
                chat.model(mx.array([list(tokens)], mx.int32), cache=self._caches)
            mx.eval(list(sweeps.arrays_in(self._caches)))

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Context manager that notes the last layer that is given each cache, by their numbers.

        Nothing is noted for a model in memory, and where a layer runs more than once.
        """
        if sweeps.of(self._model) is None:
            yield
            return
        owners = {id(part): n for n, one in enumerate(self._caches) for part in _parts(one)}
        calls: list[int] = []

        def note(layer: int) -> Any:
            def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
                calls.append(layer)
                for given in [*args, *kwargs.values()]:
                    if id(given) in owners:
                        self._last[owners[id(given)]] = layer
                return call(*args, **kwargs)

            return wrapper

        with around([(module, note(layer)) for layer, module in enumerate(self._layers)]):
            yield
        if len(set(calls)) < len(calls):
            self._last.clear()

    def _dropping(self, caches: Sequence[Any]) -> AbstractContextManager[None]:
        """Context manager in which a layer's keys and values are dropped behind the last layer
        that is given them, so that a sweep keeps those of one layer."""

        def drop(layer: int) -> Any:
            def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
                output = call(*args, **kwargs)
                for number, last in self._last.items():
                    if last == layer:
                        for part in _parts(caches[number]):
                            _empty(part)
                return output

            return wrapper

        layers = sorted(set(self._last.values()))
        return around([(self._layers[layer], drop(layer)) for layer in layers])

    def rest(self, sequences: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """The tokens of each sequence after the prefix."""
        return [sequence[self.length :] for sequence in sequences]

    def __call__(self, tokens: mx.array) -> mx.array:
        """The model's logits (B, T, V) at the tokens after the prefix, for a batch of sequences.

        Args:
            tokens: (B, T), right-padded, without the prefix.
        """
        if not self._caches:
            return self._model(tokens)
        caches = [_repeated(cache, tokens.shape[0]) for cache in self._caches]
        with small_steps(), self._dropping(caches):
            return self._model(tokens, cache=caches)


def shared(
    chat: ChatModel, sequences: Sequence[Sequence[int]], *, keep: int = 1, cached: bool = False
) -> Prefix:
    """Run the common first tokens of sequences with the model and its present interventions.

    Args:
        chat: the model.
        sequences: encoded prompts.
        keep: the least number of tokens of each sequence that do not belong to the prefix.
        cached: as in `Prefix`.
    """
    common = list(common_prefix(sequences))
    common = common[: max(0, min(map(len, sequences)) - keep)]
    if len(common) < SHORTEST or len(sequences) < 4:
        common = []
    return Prefix(chat, common, cached=cached)


def _parts(cache: Any) -> list[Any]:
    """A cache, and the caches that it holds."""
    inner = vars(cache).get("caches", ()) if hasattr(cache, "__dict__") else ()
    return [cache, *(part for one in inner for part in _parts(one))]


def _empty(cache: Any) -> None:
    """Replace the arrays of a cache by ones of the same shape that take no memory."""
    for name, value in vars(cache).items():
        if isinstance(value, mx.array) and value.ndim > 1:
            setattr(cache, name, absent(value))
        elif isinstance(value, list):
            value[:] = [absent(one) if isinstance(one, mx.array) else one for one in value]


def _repeated(value: Any, count: int) -> Any:
    """A cache for a batch of ``count`` sequences, from that of a batch of one."""
    if isinstance(value, mx.array):
        return mx.repeat(value, count, axis=0) if value.ndim and value.shape[0] == 1 else value
    if isinstance(value, list | tuple):
        return type(value)([_repeated(part, count) for part in value])
    if not hasattr(value, "__dict__"):
        return value
    new = copy.copy(value)
    for name, part in vars(value).items():
        setattr(new, name, _repeated(part, count))
    return new
