"""Runs the tokens with which all prompts of a set begin once, and reuses them in every batch.

A chat template opens every prompt with the same tokens, a system prompt among them. Their keys and
values are computed once, for a batch of one, and repeated for each batch; only what follows runs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from abl_mlx.models import heads
from abl_mlx.models.chat_model import ChatModel, common_prefix

#: Prefixes of fewer tokens are run with each prompt: repeating a cache costs as much.
SHORTEST = 8


class Prefix:
    """The first ``length`` tokens of some sequences, already run.

    Attributes:
        length: how many there are; 0 where nothing is shared, or the model's cache cannot be.
    """

    def __init__(self, chat: ChatModel, tokens: Sequence[int], *, cached: bool = False):
        """Run the tokens.

        Args:
            cached: whether the model runs with a cache even where there are none.
        """
        self.length = len(tokens)
        self._model = chat.model
        self._caches: list[Any] = []
        if tokens or cached:
            self._caches = make_prompt_cache(chat.model)
        if tokens:
            with heads.unseen(chat.model):
                chat.model(mx.array([list(tokens)], mx.int32), cache=self._caches)
            mx.eval([_arrays(cache) for cache in self._caches])

    def rest(self, sequences: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """What follows the prefix in each sequence."""
        return [sequence[self.length :] for sequence in sequences]

    def __call__(self, tokens: mx.array) -> mx.array:
        """The model's logits (B, T, V) for what follows the prefix in a batch of sequences.

        Args:
            tokens: (B, T), right-padded, without the prefix.
        """
        if not self._caches:
            return self._model(tokens)
        caches = [_repeated(cache, tokens.shape[0]) for cache in self._caches]
        return self._model(tokens, cache=caches)


def shared(
    chat: ChatModel, sequences: Sequence[Sequence[int]], *, keep: int = 1, cached: bool = False
) -> Prefix:
    """Run what all sequences begin with, as the model is now, interventions included.

    Args:
        keep: the least number of tokens that stay outside the prefix in each sequence.
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
    """A cache for a batch of ``count``, from that of a batch of one."""
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
