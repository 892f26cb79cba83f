"""The held-out prompts, which a model is asked before and after its edit."""

from __future__ import annotations

from abl_mlx.behaviour.evaluate import Behaviour, Chat, behaviour
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


def ask(answer: Chat, sets: PromptSets, borderline: PromptSet | None, max_tokens: int) -> Behaviour:
    """Ask a runtime the held-out prompts, and judge its replies.

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
