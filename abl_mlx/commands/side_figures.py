"""What `run` measures of a model beside refusals: recognition, and the figures of scorers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from abl_mlx.behaviour import recognition
from abl_mlx.behaviour.scorers import measured
from abl_mlx.behaviour.scorers.scorer import Scorer
from abl_mlx.commands.held_out import Runtime
from abl_mlx.inputs.sets import PromptSets, Question
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.records.measurements import Recognition, Scored


def check(sets: PromptSets, asked: bool) -> None:
    """Refuse prompts of which recognition, if it is asked for, cannot be measured."""
    if asked:
        recognition.matched(sets.harmful.test, sets.harmless.test)


def recognition_of(chat: ChatModel, sets: PromptSets, asked: bool) -> Recognition | None:
    """Whether a model knows what is harmful; None if the user did not ask for it."""
    return recognition.of_chat(chat, sets.harmful.test, sets.harmless.test) if asked else None


def scored(runtime: Runtime, scorers: Sequence[Scorer]) -> dict[str, Scored] | None:
    """Name of each scorer -> the figure of a model's replies; None without scorers."""
    if not scorers:
        return None
    every = [prompt for one in scorers for prompt in one.prompts]
    with runtime.opened(every, max(one.max_tokens for one in scorers)) as wholes:

        def ask(prompts: Sequence[Question], max_tokens: int) -> Iterator[tuple[int, str]]:
            for number, whole in wholes(prompts, max_tokens):
                yield number, whole.text

        return measured.record(ask, scorers)
