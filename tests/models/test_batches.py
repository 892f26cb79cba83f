"""Replies in a batch are those of single prompts, and logits those of a plain pass: everywhere."""

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.models import capture, generation, shortcuts
from abl_mlx.models.chat_model import load
from abl_mlx.models.generation import Way, generate, way
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.plain import Plain, needs_cache
from abl_mlx.models.shortcuts import Shortcuts, trusted
from convert.base.errors import UserError
from tests.support import batches, places, zoo
from tools import mlx_batches

TABLE = (places.DOCS / "mlx-batches.md").read_text(encoding="utf-8").splitlines()
NAMES = [*zoo.architectures(), *zoo.VARIANTS]
CANNOT_RUN = {"bitnet", "muse_spark", "olmo"}  # Metal kernels; adds a mask that is a word


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_replies_and_measures_as_alone(name):
    one = batches.outcome(name)
    assert mlx_batches.row(name) in TABLE
    assert (one.way is None) == (name in CANNOT_RUN)
    if one.way is None:
        assert one.reason.startswith("mlx-lm cannot run this")
        return
    assert one.same == one.alone == len(batches.PROMPTS)
    assert one.apart < 5e-3


def test_the_documented_table_names_every_architecture():
    names = [line.split(" | ")[0].removeprefix("| ") for line in TABLE if line.startswith("| ")]
    assert names == ["Architecture", *sorted(NAMES, key=str.lower)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "gemma2", "gemma3_text", "phi3"])
def test_ordinary_models_keep_every_shortcut(name):
    one = batches.outcome(name)
    assert one.way is Way.BATCH
    assert one.left_out == ()


def prompts_of(chat, count=6):
    return [chat.encode("u:" + "river bread " * n + "oven?") for n in range(count)]


def test_a_model_is_compared_once(monkeypatch):
    chat, calls = zoo.chat("mamba"), []
    monkeypatch.setattr(
        generation, "_agrees", lambda *a, real=generation._agrees: calls.append(a) or real(*a)
    )
    monkeypatch.setattr(
        shortcuts, "_compared", lambda *a, real=shortcuts._compared: calls.append(a) or real(*a)
    )
    prompts = prompts_of(chat)
    for _ in range(2):
        generate(chat, prompts, 2)
        first_reply_token(chat, prompts)
        capture.full(chat, prompts)
    assert len(calls) == 3  # batches fail, equal lengths do not; and the forward passes
    assert way(chat, prompts, 32) is Way.EQUAL
    # What holds for short prompts need not hold for long ones.
    long = [list(range(1, 90)) * 3 for _ in range(2)]
    assert way(chat, long, 32) is Way.EQUAL
    assert len(calls) == 5


def test_replies_of_one_length_never_stand_beside_another(monkeypatch):
    """Where padding is read, more prompts of a length than the batch size wait for their turn."""
    chat = zoo.chat("jamba")
    prompts = [chat.encode(f"u:{'bread ' * (n % 2)}{n}?") for n in range(9)]
    lengths = []
    batch = generation._batch

    def seen(chat, sequences, *rest):
        lengths.append([len(one) for one in sequences])
        yield from batch(chat, sequences, *rest)

    monkeypatch.setitem(generation._STEPS, Way.BATCH, batch)
    monkeypatch.setattr(generation, "_batch", seen)
    vars(chat)["_ways"] = {(Way.BATCH, 64): False, (Way.EQUAL, 64): True}
    replies = generate(chat, prompts, 3, batch_size=3)
    assert all(len(set(row)) == 1 and len(row) <= 3 for row in lengths)
    assert sorted(map(len, lengths)) == [1, 2, 3, 3]
    assert replies == [generate(chat, [one], 3, batch_size=1)[0] for one in prompts]


def test_a_slower_way_is_said_once(capsys):
    chat = zoo.chat("llama4")
    for _ in range(2):
        generate(chat, prompts_of(chat), 2)
    said = capsys.readouterr().err
    assert said.count("llama4 is asked one by one") == 1
    generate(zoo.chat("llama"), prompts_of(chat), 2)
    assert "is asked" not in capsys.readouterr().err


def test_the_end_token_ends_a_reply_in_every_way(monkeypatch):
    chat = zoo.chat("llama")
    prompts = prompts_of(chat, 4)
    whole = generate(chat, prompts, 6)
    end = whole[0][3]
    monkeypatch.setattr(zoo.Letters, "eos_token_ids", (end,))
    cut = [one[: one.index(end)] if end in one else one for one in whole]
    assert len(cut[0]) <= 3
    for one in Way:
        vars(chat)["_ways"] = {(each, 64): each is one for each in Way}
        assert way(chat, prompts, 32) is one
        assert generate(chat, prompts, 6) == cut


def test_a_cut_made_too_early_is_noticed():
    """Its layers are run twice, and after the first round nothing is final."""
    chat = zoo.chat("nanbeige, no norm between")
    prompts = prompts_of(chat)
    assert trusted(chat, prompts) == Shortcuts(cut=False)
    (_, rows), *_ = shortcuts.passes(
        chat, prompts[:1], [[len(prompts[0]) - 1]], Shortcuts(), shortcuts.Prefix(chat, [])
    )
    right = Plain(chat)(prompts[0])
    assert np.abs(np.array(rows - right)).max() > 0.5  # what the cut would give
    found = first_reply_token(chat, prompts)
    np.testing.assert_allclose(np.array(found[:1]), np.array(right), atol=1e-3)


def test_a_model_that_is_itself_only_with_a_cache_has_one():
    chat = zoo.chat("gemma3n")
    assert needs_cache(chat)
    assert not needs_cache(zoo.chat("gemma4_text"))
    prompts = prompts_of(chat)
    assert trusted(chat, prompts).cached
    free = mx.softmax(chat.model(mx.array(prompts[-1:]))[:, -1], axis=-1)
    found = mx.exp(first_reply_token(chat, prompts)[-1:])
    assert mx.abs(free - found).max().item() > 1e-2


@pytest.mark.parametrize("what", ["padding", "neighbours"])
def test_states_and_logits_stay_right_where_rows_are_not_apart(what, tiny_folder):
    """A model that reads its padding, or the other prompts of its batch, without a word."""
    chat = load(tiny_folder("llama"))
    texts = ["Hi", "How do I plan a garden?", "Why is the sky blue?", "Why?"]
    prompts = [chat.encode(text) for text in texts]
    alone = [np.array(capture.full(chat, [one])[0]) for one in prompts]
    right = [np.array(Plain(chat)(one)[0]) for one in prompts]
    chat = load(tiny_folder("llama"))
    layer = type(chat.layers[0])

    class Leaky(layer):
        def __call__(self, x, mask=None, cache=None):
            if what == "padding" and x.shape[0] > 1:
                x = x + 0.1 * (x - x[:, -1:])
            elif x.shape[0] > 1:
                x = 0.9 * x + 0.1 * x[::-1]
            return super().__call__(x, mask, cache)

    for one in chat.layers:
        one.__class__ = Leaky
    states = np.array(capture.full(chat, prompts))
    for found, expected in zip(states, alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    for found, expected in zip(first_reply_token(chat, prompts), right, strict=True):
        np.testing.assert_allclose(np.array(found), expected, atol=1e-3)
    together, padded = trusted(chat, prompts).together, trusted(chat, prompts).padded
    assert not padded
    assert not together
    assert way(chat, prompts, 32) is Way.SINGLE


def test_what_cannot_be_run_is_refused_in_one_sentence():
    with pytest.raises(UserError, match="mlx-lm cannot run this olmo model: "):
        generate(zoo.chat("olmo"), [[5, 6, 7]], 2)
