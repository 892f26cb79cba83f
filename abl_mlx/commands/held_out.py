"""The held-out prompts: what is asked of a model before and after, and what is read in them."""

from __future__ import annotations

from abl_mlx.behaviour.evaluate import Behaviour, Chat, behaviour
from abl_mlx.inputs.sets import PromptSet, PromptSets
from abl_mlx.models.chat_model import ChatModel

#: Held-out prompts of each set in which the component is looked for.
COMPONENT_PROMPTS = 32


def component_sample(chat: ChatModel, sets: PromptSets) -> list[list[int]]:
    """Encoded held-out prompts in which the component is looked for."""
    return [
        chat.encode(prompt)
        for part in (sets.harmful.test, sets.harmless.test)
        for prompt in part.take(COMPONENT_PROMPTS).prompts
    ]


def ask(answer: Chat, sets: PromptSets, borderline: PromptSet | None, max_tokens: int) -> Behaviour:
    """What a runtime does on the held-out prompts.

    Args:
        borderline: what is asked beside them, if anything: `prompt_choice.borderline_asked`.
        max_tokens: longest reply.
    """
    return behaviour(
        answer,
        sets.harmful.test,
        sets.harmless.test,
        max_tokens=max_tokens,
        borderline=borderline,
    )
