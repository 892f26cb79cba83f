"""Runs the common first tokens of all prompts once, and reuses their cache in every batch.

A chat template begins every prompt with the same tokens, such as a system prompt. Their keys and
values are computed once, for a batch of one, and repeated for each batch; each batch then runs only
the tokens after them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from abl_mlx.models import heads
from abl_mlx.models.cache_steps import small_steps
from abl_mlx.models.chat_model import ChatModel, common_prefix

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
        self.length = len(tokens)
        self._model = chat.model
        self._caches: list[Any] = []
        if tokens or cached:
            self._caches = make_prompt_cache(chat.model)
        if tokens:
            with heads.unseen(chat.model), small_steps():
                chat.model(mx.array([list(tokens)], mx.int32), cache=self._caches)
            mx.eval([_arrays(cache) for cache in self._caches])

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
        with small_steps():
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


def _arrays(value: Any) -> list[mx.array]:
    if isinstance(value, mx.array):
        return [value]
    if isinstance(value, list | tuple):
        return [array for part in value for array in _arrays(part)]
    return [array for part in vars(value).values() for array in _arrays(part)] if hasattr(
        value, "__dict__"
    ) else []  # fmt: skip


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
