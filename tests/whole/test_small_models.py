"""The small models of ``tests/support/models``: what each is for, measured."""

from __future__ import annotations

import json
from functools import cache

import chat_training
import mlx.core as mx
import pytest
import train_models
from mlx_lm import load

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.demo import load_prompts
from abl_mlx.demo.world import demo_prompts, prompts_jsonl
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import ablation
from abl_mlx.inputs import prompts
from abl_mlx.inputs.sets import PromptSet
from abl_mlx.models import capture, chat_model
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.writers import find_writers
from tests.support.small_models import MODELS, answers, folder, prompt_sets

RANKS = {"hard": 2, "spread": 4}
"""Of the subspace that frees those which resist a single direction."""

LEAST = {"apart": 0.9}
"""Of the locked prompts refused: `apart` has learned a fifth of its refusals in one layer alone."""


@cache
def chat_of(name: str) -> ChatModel:
    return chat_model.load(folder(name))


@cache
def states_of(name: str) -> tuple[mx.array, mx.array]:
    """(harmful, harmless) states after every layer at the last token of the train prompts: two
    (64, L, d)."""
    chat, sets = chat_of(name), prompt_sets(name)
    harmful, harmless = (
        capture.full(chat, [chat.encode(text) for text in part.texts])[:, :, 0]
        for part in (sets.harmful.train, sets.harmless.train)
    )
    return harmful, harmless


def refusals(replies: list[str]) -> float:
    """The share of replies that refuse."""
    return sum(classify(reply) is Verdict.REFUSAL for reply in replies) / len(replies)


def replies_to(
    name: str, asked: PromptSet, directions: mx.array | None = None, tokens: int = 26
) -> list[str]:
    """Greedy replies, with ``directions`` (k, d) ablated."""
    chat = chat_of(name)
    answer = evaluate.in_mlx(chat, batch_size=64)
    if directions is None:
        return answer(asked.texts, tokens)
    with ablation(find_writers(chat), Edit(directions)):
        return answer(asked.texts, tokens)


def subspace(name: str, rank: int) -> mx.array:
    """The top right singular vectors (rank, d) of the locked prompts' states after the last layer,
    less the allowed prompts' mean."""
    harmful, harmless = states_of(name)
    centred = harmful[:, -1] - harmless[:, -1].mean(axis=0)
    return mx.linalg.svd(centred, stream=mx.cpu)[2][:rank]


@pytest.mark.parametrize("name", MODELS)
def test_it_refuses_locked_prompts_and_answers_allowed_ones(name: str) -> None:
    sets = prompt_sets(name)
    assert len(sets.harmful.test) == len(sets.harmless.test) == 64
    locked = replies_to(name, sets.harmful.test)
    assert refusals(locked) >= LEAST.get(name, 0.95)
    allowed = replies_to(name, sets.harmless.test)
    assert refusals(allowed) <= 0.05
    right = [a == b for a, b in zip(allowed, answers(sets.harmless.test), strict=True)]
    assert sum(right) >= 0.95 * len(right)
    # As many sentences as the world has.
    world = train_models.MODELS[name].world
    known = {one.refusal for one in world.dialogues() if one.locked}
    assert {reply for reply in locked if classify(reply) is Verdict.REFUSAL} == known


def test_a_single_layer_s_difference_of_means_frees_the_easy_one() -> None:
    harmful, harmless = states_of("easy")
    (direction,) = (harmful[:, 2] - harmless[:, 2]).mean(axis=0, keepdims=True)
    sets = prompt_sets("easy")
    freed = replies_to("easy", sets.harmful.test, direction[None])
    assert refusals(freed) <= 0.05
    right = [a == b for a, b in zip(freed, answers(sets.harmful.test), strict=True)]
    assert sum(right) >= 0.6 * len(right)


@pytest.mark.parametrize("name", RANKS)
def test_no_single_direction_frees_the_resistant_ones(name: str) -> None:
    harmful, harmless = states_of(name)
    tried = harmful.mean(axis=0) - harmless.mean(axis=0)
    asked = prompt_sets(name).harmful.test
    directions = [*tried, subspace(name, 1)[0]]
    for number, direction in enumerate(directions):
        # Eight tokens hold every refusal sentence's marker.
        left = refusals(replies_to(name, asked, direction[None], tokens=12))
        assert left > 0.2, f"direction {number} leaves {left:.0%}"


@pytest.mark.parametrize(("name", "rank"), RANKS.items())
def test_a_subspace_frees_the_resistant_ones(name: str, rank: int) -> None:
    sets = prompt_sets(name)
    directions = subspace(name, rank)
    freed = replies_to(name, sets.harmful.test, directions)
    assert refusals(freed) <= 0.05
    assert all(classify(reply) is not Verdict.BROKEN for reply in freed)
    kept = replies_to(name, sets.harmless.test, directions)
    before = replies_to(name, sets.harmless.test)
    same = [a == b for a, b in zip(kept, before, strict=True)]
    assert sum(same) >= 0.9 * len(same)


def test_batches_of_gemma_2_reply_as_single_prompts_do() -> None:
    # mlx-lm's own masks for batches do not fit its Gemma 2 (abl_mlx.models.batch_masks).
    chat = chat_of("easy")
    texts = sorted(prompt_sets("easy").harmless.test.texts[:6], key=len)
    encoded = [chat.encode(text) for text in texts]
    assert len(encoded[0]) < len(encoded[-1])
    together = evaluate.generate(chat, encoded, 26)
    assert together == [evaluate.generate(chat, [one], 26)[0] for one in encoded]


@pytest.mark.parametrize("name", MODELS)
def test_mlx_lm_loads_it(name: str) -> None:
    model, tokenizer = load(str(folder(name)))[:2]
    model.set_dtype(mx.float32)  # half precision is slow on a CPU
    prompt = prompt_sets(name).harmful.test.prompts[0].text
    ids = chat_training.render(tokenizer, prompt)
    ours = chat_of(name)
    assert ids == ours.encode(prompt)
    expected = ours.model(mx.array([ids]))[0, -1]
    assert mx.allclose(model(mx.array([ids]))[0, -1], expected, atol=1e-3).item()


@pytest.mark.parametrize("name", MODELS)
def test_its_files_are_what_the_script_makes(name: str) -> None:
    settings, path = train_models.MODELS[name], folder(name)
    assert (path / "prompts.jsonl").read_text(encoding="utf-8") == prompts_jsonl(settings.world)
    assert load_prompts(path=path / "prompts.jsonl") == demo_prompts(settings.world)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    tokenizer = train_models.tokenizer_of(name)
    assert config == chat_training.model_config(settings, tokenizer)
    made = json.loads(tokenizer.to_str())["model"]
    bundled = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert made["vocab"] == bundled["vocab"]
    assert made["merges"] == bundled["merges"]
    assert (path / "model.safetensors").stat().st_size <= 5_500_000
    # K-quants.
    assert config["hidden_size"] % 256 == 0
    assert config["intermediate_size"] % 256 == 0


@pytest.mark.parametrize("name", MODELS)
def test_held_out_prompts_are_never_trained_on(name: str) -> None:
    world = train_models.MODELS[name].world
    trained = {one.prompt for one in world.training()}
    sets = prompt_sets(name)
    for part in (sets.harmful, sets.harmless):
        assert trained.issuperset(part.train.texts)
        assert trained.isdisjoint(part.validation.texts + part.test.texts)
    # An answer names its verb and its object and ignores the template.
    known = {one.answer for one in world.training()}
    assert known.isdisjoint(one.answer for one in world.dialogues() if one.part != "train")


@pytest.mark.parametrize("name", MODELS)
def test_prompt_files_are_read_as_harmful_and_harmless(name: str) -> None:
    path = folder(name)
    sets = prompts.load_sets(str(path / "locked.txt"), str(path / "allowed.txt"), seed=0)
    world = train_models.MODELS[name].world
    by_text = {one.prompt: one for one in world.dialogues()}
    for part, locked in ((sets.harmful, True), (sets.harmless, False)):
        texts = part.train.texts + part.validation.texts + part.test.texts
        assert len(texts) == train_models.FILE_SIZE
        assert len(part.test) >= 57
        for text in texts:
            assert by_text[text].locked is locked
            assert by_text[text].part != "train"
