"""Caches grow in small steps while we run a model, and as mlx-lm wants them otherwise."""

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from abl_mlx.models import prefix
from abl_mlx.models.cache_steps import STEP, small_steps
from abl_mlx.models.chat_model import load
from abl_mlx.models.hooks import around

TOKENS = mx.zeros((1, 2, 5, 8))


def room(cache) -> int:
    """The number of tokens for which a cache has memory after the first five."""
    cache.update_and_fetch(TOKENS, TOKENS)
    return cache.keys.shape[2]


def test_steps_are_small_in_the_block_only():
    usual = room(KVCache())
    with small_steps():
        with small_steps():
            assert room(KVCache()) == STEP
        assert room(BatchKVCache([0])) == STEP
    assert room(KVCache()) == usual > STEP


def test_a_shared_prefix_is_repeated_without_empty_room(tiny_folder):
    chat = load(tiny_folder("llama"))
    caches = []

    def kept(call, *args, cache=None, **kwargs):
        caches.append(cache)
        return call(*args, cache=cache, **kwargs)

    begun = prefix.Prefix(chat, list(range(5, 25)))
    with around([(chat.model, kept)]):
        begun(mx.array([[7, 8, 9]] * 4))
    assert [one.keys.shape[2] for one in caches[0]] == [STEP] * len(chat.layers)
