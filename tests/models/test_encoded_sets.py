"""The prompts with which a direction is found are encoded once, and what is taken from them."""

from collections import Counter
from dataclasses import replace

import abl_mlx
from abl_mlx.choices import Measuring
from abl_mlx.commands import prompt_choice
from abl_mlx.commands.find import find_behind_openings
from abl_mlx.inputs.sets import Prompt, PromptSet
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import encode, opened
from abl_mlx.support.clock import Clock


def test_a_direction_is_found_with_each_prompt_encoded_once(monkeypatch):
    model = abl_mlx.load("demo")
    sets = abl_mlx.load_prompts(model=model)
    seen = Counter()
    whole = ChatModel.encode_message

    def counted(self, question):
        seen[question.text if isinstance(question, Prompt) else question] += 1
        return whole(self, question)

    monkeypatch.setattr(ChatModel, "encode_message", counted)
    find_behind_openings(model.chat, model.writers, sets, Measuring(), Clock())
    used = [
        text
        for both in (sets.harmful, sets.harmless)
        for part in (both.train, both.validation)
        for text in part.texts
    ]
    assert {seen[text] for text in used} == {1}
    assert not any(seen[text] for text in sets.harmful.test.texts)


def test_tokens_are_those_of_the_prompts_and_followed_by_the_opening():
    model = abl_mlx.load("demo")
    sets = abl_mlx.load_prompts(model=model)
    (plain,) = prompt_choice.encoded(model.chat, sets, Measuring()).values()
    assert plain.thinking is None
    assert plain.refused == "harmful"
    assert plain.validation["harmless"].prompts == sets.harmless.validation.prompts
    assert plain.train["harmful"].tokens == [
        model.encode(prompt) for prompt in sets.harmful.train.prompts
    ]
    model.chat.reply_prefixes[None] = (3, 4)
    (behind,) = opened(model.chat, {None: plain}).values()
    assert [one[-2:] for one in behind.train["harmful"].tokens] == [[3, 4]] * len(
        sets.harmful.train
    )
    assert behind.train["harmful"].tokens[0][:-2] == plain.train["harmful"].tokens[0]


def test_few_prompts_are_filled_up_and_parts_keep_prompts_with_their_tokens():
    model = abl_mlx.load("demo")
    sets = abl_mlx.load_prompts(model=model)
    (one,) = prompt_choice.encoded(model.chat, sets, Measuring()).values()
    few = len(sets.harmful.validation)
    filled = one.filled_up("harmful", few + 2)
    assert filled.prompts == sets.harmful.validation.prompts + sets.harmful.train.prompts[:2]
    assert one.filled_up("harmful", 1).prompts == sets.harmful.validation.prompts
    some = filled.only([n % 2 == 0 for n in range(len(filled))])
    assert some.tokens == encode(model.chat, some.prompts).tokens


def test_for_over_refusal_the_held_out_borderline_prompts_choose_nothing():
    model = abl_mlx.load("demo")
    sets = abl_mlx.load_prompts(model=model)
    borderline = PromptSet("x", tuple(Prompt(f"May I plant {n} trees?") for n in range(40)))
    how = Measuring.of(method="over-refusal", thinking="both")
    encoded = prompt_choice.encoded(model.chat, replace(sets, borderline=borderline), how)
    held_out = prompt_choice.borderline_part(
        replace(sets, borderline=borderline), how.prompting, how.finding, "test"
    )
    for mode, one in encoded.items():
        assert one.refused == "borderline"
        used = one.validation["borderline"].prompts + one.train["borderline"].prompts
        assert {prompt.thinking for prompt in used} == {mode}
        assert len(used) + len(held_out) == 40
        assert not {prompt.text for prompt in used} & set(held_out.texts)
