"""A shared prefix changes what is computed, never what comes out."""

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.edits.steering import Intervention, steering
from abl_mlx.models import capture, prefix
from abl_mlx.models.chat_model import load
from abl_mlx.models.logits import log_probabilities
from abl_mlx.models.shortcuts import trusted
from tests.models.test_writers import random_direction
from tests.support import tiny

RNG = np.random.default_rng(3)
COMMON = RNG.integers(5, 60, size=20).tolist()


def sequences(count=7):
    return [COMMON + RNG.integers(5, 60, size=RNG.integers(3, 9)).tolist() for _ in range(count)]


@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_the_same_with_and_without(arch, tiny_folder, monkeypatch):
    chat = load(tiny_folder(arch))
    prompts = sequences()
    places = [[len(one) - 2, len(one) - 1] for one in prompts]
    steer = Intervention("add", random_direction(chat.width), 0.5, layers=frozenset({0}))

    def everything():
        with steering(chat, steer):
            logits = dict(log_probabilities(chat, prompts, places))
            states = capture.full(chat, prompts, (-3, -1))
        return np.stack([np.array(logits[i]) for i in range(len(prompts))]), np.array(states)

    used = []
    run = prefix.Prefix.__call__

    def counted(self, tokens):
        used.append((self.length, tokens.shape[1]))
        return run(self, tokens)

    monkeypatch.setattr(prefix.Prefix, "__call__", counted)
    logits, states = everything()
    assert any(length == 20 and width < 10 for length, width in used)
    monkeypatch.setattr(prefix, "SHORTEST", 10**6)
    used.clear()
    plain_logits, plain_states = everything()
    assert used
    assert all(length == 0 and width > 20 for length, width in used)
    np.testing.assert_allclose(logits, plain_logits, atol=1e-3)
    np.testing.assert_allclose(states, plain_states, atol=1e-3 * np.abs(plain_states).max())


def test_a_model_whose_cache_differs_is_run_whole(tiny_folder):
    chat = load(tiny_folder("llama"))
    prompts = sequences()
    right = dict(log_probabilities(chat, prompts, [[len(one) - 1] for one in prompts]))
    attention = type(chat.layers[0].self_attn)
    chat = load(tiny_folder("llama"))

    class Forgetful(attention):
        def __call__(self, x, mask=None, cache=None):
            if cache is not None:
                cache.offset += 5  # keys are put in the wrong place
            return super().__call__(x, mask, cache)

    for layer in chat.layers:
        layer.self_attn.__class__ = Forgetful
    found = dict(log_probabilities(chat, prompts, [[len(one) - 1] for one in prompts]))
    for index, row in right.items():
        np.testing.assert_allclose(np.array(found[index]), np.array(row), atol=1e-4)
    assert not trusted(chat, prompts).prefix


@pytest.mark.parametrize("keep", [1, 4])
def test_so_many_tokens_are_left(keep, tiny_folder):
    chat = load(tiny_folder("llama"))
    found = prefix.shared(chat, [COMMON] * 4, keep=keep)
    assert found.length == len(COMMON) - keep
    assert found.rest([COMMON])[0] == COMMON[-keep:]
    logits = found(mx.array([COMMON[-keep:]]))
    whole = chat.model(mx.array([COMMON]))
    np.testing.assert_allclose(np.array(logits[0, -1]), np.array(whole[0, -1]), atol=1e-4)
