"""What all prompts of a set begin with, run once and reused by every batch of them.

A chat template opens every prompt with the same tokens, a system prompt among them. Their keys and
values are computed once, for a batch of one, and repeated for each batch; only what follows runs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from abl_mlx import heads
from abl_mlx.arrays import number
from abl_mlx.models import ChatModel, common_prefix
from convert.errors import UserError

#: Prefixes of fewer tokens are run with each prompt: repeating a cache costs as much.
SHORTEST = 8

# Probabilities with and without the prefix's cache may differ by rounding, not by more.
_SAME = 2e-3


class Prefix:
    """The first ``length`` tokens of some sequences, already run.

    Attributes:
        length: how many there are; 0 where nothing is shared, or the model's cache cannot be.
    """

    def __init__(self, chat: ChatModel, tokens: Sequence[int]):
        self.length = len(tokens)
        self._model = chat.model
        self._caches: list[Any] = []
        if tokens:
            self._caches = make_prompt_cache(chat.model)
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
        if not self.length:
            return self._model(tokens)
        caches = [_repeated(cache, tokens.shape[0]) for cache in self._caches]
        return self._model(tokens, cache=caches)


def shared(chat: ChatModel, sequences: Sequence[Sequence[int]], *, keep: int = 1) -> Prefix:
    """Run what all sequences begin with, as the model is now, interventions included.

    Args:
        keep: so many tokens at least are left of each sequence.
    """
    common = list(common_prefix(sequences))
    common = common[: max(0, min(map(len, sequences)) - keep)]
    if len(common) < SHORTEST or len(sequences) < 4 or not _trusted(chat, sequences, common):
        return Prefix(chat, [])
    return Prefix(chat, common)


def _trusted(chat: ChatModel, sequences: Sequence[Sequence[int]], common: Sequence[int]) -> bool:
    """Whether a cache gives this model the same probabilities; asked once for each model."""
    known = vars(chat).get("_caches_prefixes")
    if known is None:
        try:
            known = _differs_by(chat, min(sequences, key=len), common) < _SAME
        except UserError:
            raise
        except Exception:  # whatever mlx-lm's own caches raise for a batch they were not made for
            known = False
        object.__setattr__(chat, "_caches_prefixes", known)
    return bool(known)


def _differs_by(chat: ChatModel, sequence: Sequence[int], common: Sequence[int]) -> float:
    prefix = Prefix(chat, common)
    with heads.last_only(chat.model):
        whole = chat.model(mx.array([list(sequence)] * 2, mx.int32))
        parts = prefix(mx.array([list(sequence[len(common) :])] * 2, mx.int32))
    last = [mx.softmax(one[:, -1].astype(mx.float32), axis=-1) for one in (whole, parts)]
    return number(mx.abs(last[0] - last[1]).max())


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
