"""The output head is computed where it is looked at, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from abl_mlx.behaviour import evaluate
from abl_mlx.models import capture, heads
from abl_mlx.models.chat_model import ChatModel, computes_on_cpu
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.prefix import Prefix
from convert.gguf.file import GgufSource
from convert.gguf_to_mlx import load
from convert.mlx import packed
from tests.support import tiny_gguf
from tests.support.gguf_recipes import RECIPES

PROMPTS = [[5, 77, 301, 12, 450, 88], [5, 77, 9, 260], [5, 77, 19, 260, 7, 333, 41]]

pytestmark = pytest.mark.skipif(not computes_on_cpu(), reason="laziness does this on a GPU")


class Tokens:
    """As much of a tokenizer as generation asks for."""

    eos_token_ids = (1,)


@pytest.fixture(scope="module", params=["qwen2", "gemma2"])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    """One with a head of its own, and one whose embedding is its head."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    tiny_gguf.write(path, RECIPES[request.param], Q.F16)
    with GgufSource(path) as source:
        found = load(source, widen=False)
    return ChatModel(path, found.model, Tokens(), found.config)


@pytest.fixture
def rows(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions for which logits were computed, call by call."""
    # Each model is compared with itself once (abl_mlx.models.shortcuts, abl_mlx.models.generation).
    first_reply_token(chat, PROMPTS)
    evaluate.generate(chat, PROMPTS, 1)
    seen: list[int] = []
    found = {id(module) for module in heads._heads(chat.model)}
    plain = packed.Packed._multiply

    def multiply(self: packed.Packed, x: np.ndarray, first: int, last: int) -> np.ndarray:
        if id(self) in found:
            seen.append(len(x))
        return plain(self, x, first, last)

    monkeypatch.setattr(packed.Packed, "_multiply", multiply)
    return seen


def test_measuring_computes_no_logits(chat: ChatModel, rows: list[int]) -> None:
    states = capture.full(chat, PROMPTS, [-2, -1])
    assert mx.isfinite(states).all()
    Prefix(chat, PROMPTS[0])
    assert rows == []


def test_a_first_token_takes_one_position_of_each_prompt(chat: ChatModel, rows: list[int]) -> None:
    found = first_reply_token(chat, PROMPTS)
    assert sum(rows) == len(PROMPTS)
    plain = chat.model(mx.array([PROMPTS[1]]))[:, -1]
    plain = plain - mx.logsumexp(plain, axis=-1, keepdims=True)
    assert mx.abs(found[1] - plain[0]).max() < 1e-4


def test_generation_takes_the_last_position_alone(chat: ChatModel, rows: list[int]) -> None:
    replies = evaluate.generate(chat, PROMPTS, 4)
    assert max(rows) <= len(PROMPTS)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        tokens = list(prompt)
        for token in reply:
            assert int(mx.argmax(chat.model(mx.array([tokens]))[0, -1]).item()) == token
            tokens.append(token)


def test_logits_of_the_last_position_are_the_whole_models(chat: ChatModel) -> None:
    tokens = mx.array([PROMPTS[0]] * 2)
    whole = chat.model(tokens)
    with heads.unseen(chat.model):
        unseen = chat.model(tokens)
        with heads.last_only(chat.model):
            pass
        assert mx.isnan(chat.model(tokens)).all()
    with heads.last_only(chat.model):
        last = chat.model(tokens)
    assert unseen.shape == whole.shape
    assert last.shape == (2, 1, whole.shape[-1])
    assert mx.array_equal(chat.model(tokens), whole)
    assert mx.abs(last[:, 0] - whole[:, -1]).max() < 1e-5


def test_products_of_any_size_go_through_numpys_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((4096, 32)).astype(np.float16)
    module = packed.PackedLinear(packed.Form(32), {"codes": mx.array(values)}, values.shape)

    def unpack(*_: object) -> None:
        raise AssertionError("multiplied by MLX")

    monkeypatch.setattr(packed.Packed, "rows", unpack)
    x = mx.random.normal((4, 1024, 32), key=mx.random.key(0))
    found = np.array(module(x))
    expected = np.array(x).reshape(-1, 32) @ values.astype(np.float32).T
    assert np.abs(found.reshape(expected.shape) - expected).max() < 1e-4


def test_a_padded_batch_looks_back_over_gemma_2s_window(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    recipe = RECIPES["gemma2"]
    keys = recipe.keys | {"attention.sliding_window": 6}
    tiny_gguf.write(path, replace(recipe, keys=keys), Q.F16)
    with GgufSource(path) as source:
        found = load(source, widen=False)
    chat = ChatModel(path, found.model, Tokens(), found.config)
    prompts = [list(range(5, 5 + length)) for length in (4, 9, 20)]
    for prompt, reply in zip(prompts, evaluate.generate(chat, prompts, 8), strict=True):
        tokens = list(prompt)
        for token in reply:
            logits = chat.model(mx.array([tokens]))[0, -1]
            assert logits.max() - logits[token] < 1e-4
            tokens.append(token)
