"""Captured states equal the model's own forward; batches and positions are right."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from abl_mlx.models import capture, shortcuts
from abl_mlx.models.batches import batches
from abl_mlx.models.chat_model import load
from convert.base.errors import UserError
from tests.support import tiny

PROMPTS = ["Hi", "How do I plan a garden?", "What is the name of the river near the old town?"]


class Identity(nn.Module):
    def __call__(self, x):
        return x


def states_by_truncation(chat, tokens):
    """The residual stream after each layer, without any hook: the model is cut after the layer,
    its final norm is taken away, and its inner model's output is read."""
    inner = chat.model.model
    layers, norm = inner.layers, inner.norm
    states = []
    try:
        inner.norm = Identity()
        for count in range(1, len(layers) + 1):
            inner.layers = layers[:count]
            states.append(inner(mx.array([tokens]), cache=[None] * len(layers))[0])
    finally:
        inner.layers, inner.norm = layers, norm
    return mx.stack(states)  # (L, T, d)


@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_states_equal_the_models_own_forward(arch, tiny_folder):
    chat = load(tiny_folder(arch))
    for tokens in (chat.encode(prompt) for prompt in PROMPTS):
        expected = states_by_truncation(chat, tokens)
        found = capture.full(chat, [tokens], [-4, -1])[0]  # (L, 2, d)
        for column, offset in ((0, -4), (1, -1)):
            np.testing.assert_array_equal(np.array(found[:, column]), np.array(expected[:, offset]))


@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_capturing_changes_no_logit_and_leaves_no_trace(arch, tiny_folder):
    chat = load(tiny_folder(arch))
    tokens = mx.array([chat.encode(PROMPTS[1])])
    classes = [type(layer) for layer in chat.layers]
    before = chat.model(tokens)
    with capture.Recorder(chat):
        during = chat.model(tokens)
    np.testing.assert_array_equal(np.array(during), np.array(before))
    assert [type(layer) for layer in chat.layers] == classes


@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_padded_batches_equal_single_runs(arch, tiny_folder):
    chat = load(tiny_folder(arch))
    sequences = [chat.encode(prompt) for prompt in PROMPTS]
    together = capture.full(chat, sequences, [-2, -1])
    alone = mx.concatenate([capture.full(chat, [s], [-2, -1]) for s in sequences])
    np.testing.assert_allclose(np.array(together), np.array(alone), rtol=1e-4, atol=1e-4)


def test_mean_is_the_mean_of_the_full_states(tiny_folder):
    chat = load(tiny_folder("llama"))
    sequences = [chat.encode(f"{prompt} {n}") for prompt in PROMPTS for n in range(5)]
    full = np.array(capture.full(chat, sequences, [-3, -1]), dtype=np.float64)
    mean = np.array(capture.mean(chat, sequences, [-3, -1]))
    assert mean.dtype == np.float32
    assert mean.shape == (3, 2, 64)
    np.testing.assert_allclose(mean, full.mean(axis=0), rtol=1e-5, atol=1e-5)


def test_full_states_come_in_the_order_of_the_prompts(tiny_folder, monkeypatch):
    chat = load(tiny_folder("llama"))
    monkeypatch.setattr(shortcuts, "TOKENS_PER_BATCH", 40)
    sequences = [chat.encode(prompt) for prompt in (PROMPTS[2], PROMPTS[0], PROMPTS[1])]
    together = np.array(capture.full(chat, sequences))
    for row, sequence in zip(together, sequences, strict=True):
        alone = np.array(capture.full(chat, [sequence]))[0]
        np.testing.assert_allclose(row, alone, rtol=1e-4, atol=1e-4)


def test_batches_hold_every_sequence_once_and_keep_to_the_limit():
    sequences = [[1] * length for length in (9, 2, 5, 7, 1, 30, 3)]
    seen = []
    for batch in batches(sequences, tokens=16):
        rows, width = batch.tokens.shape
        assert rows == 1 or rows * width <= 16
        assert width == max(batch.lengths.tolist())
        seen += batch.indices
    assert sorted(seen) == list(range(len(sequences)))


def test_sums_do_not_depend_on_the_output_head(tiny_folder):
    chat = load(tiny_folder("llama"))
    expected = capture.full(chat, [chat.encode("Hi")])

    class Broken(nn.Module):
        def __call__(self, x):
            return x * mx.array(float("nan"))

    chat.model.lm_head = Broken()
    np.testing.assert_array_equal(
        np.array(capture.full(chat, [chat.encode("Hi")])), np.array(expected)
    )


@pytest.mark.parametrize("offset", [0, 3, -1000])
def test_positions_outside_the_prompt_are_refused(offset, tiny_folder):
    chat = load(tiny_folder("llama"))
    with pytest.raises(UserError, match=str(offset)):
        capture.full(chat, [chat.encode("Hi")], [offset])


def test_the_template_tail_is_what_follows_the_instruction(tiny_folder):
    chat = load(tiny_folder("llama"))
    tail = chat.tokenizer.decode(chat.encode("Some words")[-chat.template_tail() :])
    rendered = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Some words"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered.endswith(tail)
    assert "words" not in tail
