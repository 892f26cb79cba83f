"""The held-out prompts, which a model is asked before and after its edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from abl_mlx.behaviour.evaluate import Behaviour, Chat, behaviour
from abl_mlx.choices import Prompting
from abl_mlx.inputs import thinking
from abl_mlx.inputs.sets import PromptSet, PromptSets
from abl_mlx.models.chat_model import ChatModel

#: The number of held-out prompts of each set on which the component is measured.
COMPONENT_PROMPTS = 32


def component_sample(chat: ChatModel, sets: PromptSets) -> list[list[int]]:
    """Encoded held-out prompts on which the component is measured."""
    return [
        chat.encode(prompt)
        for part in (sets.harmful.test, sets.harmless.test)
        for prompt in part.take(COMPONENT_PROMPTS).prompts
    ]


def ask(
    answer: Chat,
    sets: PromptSets,
    further: Mapping[str, PromptSet],
    max_tokens: int,
    prompting: Prompting,
) -> Behaviour:
    """What a runtime does on the held-out prompts, in every mode of thinking that is asked for.

    Args:
        further: what is asked beside them: `prompt_choice.further_asked`.
        max_tokens: longest reply, without its thought.
    """
    modes = thinking.modes(prompting.thinking)
    first, *others = [
        behaviour(
            answer,
            sets.harmful.test.asked(thinking=mode),
            sets.harmless.test.asked(thinking=mode),
            max_tokens=longest(max_tokens, mode, prompting),
            further={name: part.asked(thinking=mode) for name, part in further.items()},
        )
        for mode in modes
    ]
    named = zip(map(thinking.name, modes[1:]), others, strict=True)
    return replace(first, modes=dict(named))


def longest(max_tokens: int, mode: str | None, prompting: Prompting) -> int:
    """Tokens of the longest reply, its thought included.

    Args:
        max_tokens: of the reply behind the thought.
        mode: of thinking.
    """
    return max_tokens if mode is None else max_tokens + prompting.thought_tokens
