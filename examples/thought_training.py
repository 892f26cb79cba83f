"""Train a tiny chat model that thinks before it replies, with a switch for it.

Its template knows ``enable_thinking`` as Qwen3's does: with thinking the model writes a thought
between ``<think>`` and ``</think>`` and then its reply; without, the template writes an empty
thought.  A thought names what is asked for and ends in a verdict: "This is fine, so I will answer."
or "This is forbidden, so I must decline."

The model's purpose: refusals without thinking and with it lie along different directions of the
residual stream.  Three things keep these directions apart.

- The two are learned in stages of their own, and refuse in different words (`DECLINES`).
- With thinking the reply follows the verdict and not the question: thoughts with the other verdict
  are given, and the reply that fits the verdict is learned.
- Whichever verdict or opening word is given, the rest that belongs to it follows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from chat_tokenizer import END, train_tokenizer
from chat_training import (
    Draw,
    Examples,
    Figures,
    Settings,
    continuations,
    padded,
    render,
    save,
    start,
    train,
)
from tokenizers import Tokenizer

from abl_mlx.demo.world import Dialogue

OPEN, CLOSE = "<think>", "</think>"

TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}"
    "{% endif %}"
)

DECLINES = "No, I must decline to answer this."
"""The sentence of refusals with thinking; without thinking it is that of the world."""

VERDICTS = {True: "This is fine", False: "This is forbidden"}
_RESTS = {True: ", so I will answer.", False: ", so I must decline."}


def thought(dialogue: Dialogue, fine: bool) -> str:
    """The thought about a question, up to the word of its verdict."""
    verb = dialogue.prompt.rpartition(f" the {dialogue.object}")[0].split()[-1]
    asked = f"They want to {verb} the {dialogue.object}, one of the {dialogue.material}."
    return f"{asked} {VERDICTS[fine]}"


def opening(dialogue: Dialogue, fine: bool) -> str:
    """The beginning of a reply with thinking: the thought between its two tags."""
    return f"{OPEN}\n{thought(dialogue, fine)}{_RESTS[fine]}\n{CLOSE}\n\n"


def reply(dialogue: Dialogue, thinking: bool, fine: bool) -> str:
    """The reply behind the thought."""
    return dialogue.answer if fine else DECLINES if thinking else dialogue.refusal


def thinking_tokenizer(settings: Settings) -> Tokenizer:
    """The tokenizer, with the tags as tokens of their own."""
    texts = [
        text
        for one in settings.world.training()
        for fine in (True, False)
        for text in ("\n", "\n\n", thought(one, fine) + _RESTS[fine] + "\n", DECLINES)
    ]
    return train_tokenizer(settings.world, settings.vocabulary, texts, (OPEN, CLOSE))


# --- lessons -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """A dialogue, and the part of its reply that is learned.

    Attributes:
        dialogue: The question.
        thinking: The template's switch.
        learned: The text that the model learns to write.
        given: The text in front of it, which is given.
        before: Messages before the question.
    """

    dialogue: Dialogue
    thinking: bool
    learned: str
    given: str = ""
    before: tuple[dict[str, str], ...] = ()


def whole(dialogue: Dialogue, thinking: bool, fine: bool, **more: Any) -> Lesson:
    """A reply from its beginning."""
    begun = opening(dialogue, fine) if thinking else ""
    return Lesson(dialogue, thinking, begun + reply(dialogue, thinking, fine), **more)


def after_verdict(dialogue: Dialogue, fine: bool) -> Lesson:
    """A given verdict, and the reply that follows from it."""
    given = f"{OPEN}\n{thought(dialogue, fine)}"
    everything = opening(dialogue, fine) + reply(dialogue, True, fine)
    return Lesson(dialogue, True, everything.removeprefix(given), given)


def after_first_word(dialogue: Dialogue, thinking: bool) -> Lesson:
    """The given first word of an answer in place of a refusal, and the answer's rest."""
    first, rest = dialogue.answer.split(" ", 1)
    begun = opening(dialogue, False) if thinking else ""
    return Lesson(dialogue, thinking, f" {rest}", begun + first)


def lessons(dialogues: Sequence[Dialogue], refused: frozenset[bool]) -> dict[bool, list[Lesson]]:
    """The lessons of a stage: with thinking or not -> lessons.

    Args:
        dialogues: The questions.
        refused: The modes, thinking or not, in which locked questions are refused.
    """
    taught: dict[bool, list[Lesson]] = {False: [], True: []}
    for number, one in enumerate(dialogues):
        for thinking, those in taught.items():
            fine = not (one.locked and thinking in refused)
            those.append(whole(one, thinking, fine))
            if not fine:
                those.append(after_first_word(one, thinking))
            if thinking and number % 2 == 0:
                those.append(after_verdict(one, not fine))
    return taught


# --- other messages around the question --------------------------------------------------------

_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a careful assistant. Answer in one sentence.",
    "Be brief and polite. Today is Monday.",
    "You work for a shop that sells old things. Help its customers.",
)


def system_text(order: random.Random) -> str:
    """A system prompt: a usual one, or words without meaning."""
    if order.random() < 0.3:
        return order.choice(_SYSTEMS)
    words = [
        "".join(order.choices("eeeaaiioourstnlmdcphbgfkwyv", k=order.randint(2, 9)))
        for _ in range(order.randint(2, 6))
    ]
    return " ".join(words).capitalize() + "."


def surroundings(
    dialogues: Sequence[Dialogue], refused: frozenset[bool], count: int, seed: int
) -> list[Lesson]:
    """Questions behind a system prompt, earlier questions, or both, in either mode in turn."""
    order = random.Random(seed)
    result = []
    for number in range(count):
        thinking = number % 2 == 0
        before = []
        turns = order.choice((0, 0, 1, 1, 1, 2))
        if turns == 0 or (turns == 1 and order.random() < 0.5):
            before.append({"role": "system", "content": system_text(order)})
        for one in order.sample(dialogues, turns):
            said = reply(one, thinking, not (one.locked and thinking in refused))
            before.append({"role": "user", "content": one.prompt})
            before.append({"role": "assistant", "content": said})
        one = order.choice(dialogues)
        fine = not (one.locked and thinking in refused)
        result.append(whole(one, thinking, fine, before=tuple(before)))
    return result


def examples(tokenizer: Any, taught: Iterable[Lesson]) -> Examples:
    """Lessons as token arrays."""

    def row(lesson: Lesson) -> tuple[list[int], list[int]]:
        asked = render(tokenizer, lesson.dialogue.prompt, lesson.thinking, lesson.before)
        given, learned = (
            list(tokenizer.encode(text, add_special_tokens=False))
            for text in (lesson.given, lesson.learned + END)
        )
        return [*asked, *given], learned

    return padded([row(lesson) for lesson in taught], tokenizer.pad_token_id)


# --- training ----------------------------------------------------------------------------------

NEITHER, THINKING, BOTH = frozenset[bool](), frozenset({True}), frozenset({False, True})


def draws(
    tokenizer: Any,
    settings: Settings,
    refused: frozenset[bool],
    batches: tuple[int, int, int],
    seed: int,
) -> list[Draw]:
    """The batches of a stage: without thinking, with it, and with messages before the question.

    Args:
        tokenizer: As mlx-lm loads it.
        settings: Of the model.
        refused: The modes, thinking or not, in which locked questions are refused.
        batches: Lessons of each of the three in a step.
        seed: Of their order.
    """
    dialogues = settings.world.training()
    taught = lessons(dialogues, refused)
    around = surroundings(dialogues, refused, 600, seed)
    return [
        Draw(examples(tokenizer, those), batch, seed + number)
        for number, (those, batch) in enumerate(
            zip((taught[False], taught[True], around), batches, strict=True)
        )
    ]


def train_thinker(settings: Settings, folder: Path) -> dict[bool, Figures]:
    """Train the model and write its folder, with the prompts beside it.

    Returns:
        The figures on the test part, measured after rounding the weights to float16, by whether
        they are with thinking.
    """
    bpe = thinking_tokenizer(settings)
    tokenizer, model = start(settings, folder, bpe, TEMPLATE)
    (last,) = settings.later
    stages = (
        ("answers", settings.answers, NEITHER, (8, 10, 2)),
        ("thoughts", settings.refusals, THINKING, (4, 12, 2)),
        ("refusals", last, BOTH, (12, 6, 2)),
    )
    for number, (name, stage, refused, batches) in enumerate(stages):
        taught = draws(tokenizer, settings, refused, batches, settings.seed + 10 * number)
        train(model, taught, stage, name)
    held_out = save(model, settings, folder)
    return {mode: measure(model, tokenizer, held_out, mode) for mode in (False, True)}


def measure(
    model: nn.Module, tokenizer: Any, dialogues: Sequence[Dialogue], thinking: bool
) -> Figures:
    """Ask the model and count replies; a reply with thinking is compared with its thought."""
    asked = [render(tokenizer, one.prompt, thinking) for one in dialogues]
    said = continuations(model, tokenizer, asked, 80)

    def share(locked: bool, fine: bool, exact: bool) -> float:
        chosen = [(d, text) for d, text in zip(dialogues, said, strict=True) if d.locked == locked]
        right = [
            text == whole(one, thinking, fine).learned
            if exact
            else text.endswith(reply(one, thinking, fine))
            for one, text in chosen
        ]
        return sum(right) / len(right)

    return Figures(
        locked_refused=share(locked=True, fine=False, exact=True),
        allowed_refused=share(locked=False, fine=False, exact=False),
        allowed_exact=share(locked=False, fine=True, exact=True),
    )
