"""The held-out prompts, which a model is asked before and after its edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from abl_mlx.behaviour import settling
from abl_mlx.behaviour.evaluate import Behaviour, Wholes, behaviour_of
from abl_mlx.behaviour.whole_reply import WholeReply
from abl_mlx.choices import Prompting
from abl_mlx.inputs import thinking
from abl_mlx.inputs.sets import Prompt, PromptSet, PromptSets, Question
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.records.evaluations import Settled
from abl_mlx.support.console import in_order, say

#: The number of held-out prompts of each set on which the component is measured.
COMPONENT_PROMPTS = 32


def component_sample(chat: ChatModel, sets: PromptSets) -> list[list[int]]:
    """Encoded held-out prompts on which the component is measured."""
    return [
        chat.encode(prompt)
        for part in (sets.harmful.test, sets.harmless.test)
        for prompt in part.take(COMPONENT_PROMPTS).prompts
    ]


class Runtime(Protocol):
    """A runtime that replies to prompts."""

    def opened(
        self, prompts: Sequence[Question], max_tokens: int
    ) -> AbstractContextManager[Wholes]:
        """Context manager with a function that replies to these prompts, in one call or several."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts, and how they are asked.

    Before an edit all replies are generated at their full length, which shows how many tokens the
    verdicts need. After the edit only replies to the sets that the edit aims at are generated at
    full length. Replies to the other sets are cut at the number of tokens that was needed before,
    unless verdicts on the first sets change behind it.

    Attributes:
        sets: name -> prompts: ``harmful``, ``harmless`` and further sets.
        aims: names of the sets that the edit aims at.
        max_tokens: the longest reply in tokens, without its thought.
        prompting: the options of prompts.
    """

    sets: Mapping[str, PromptSet]
    aims: frozenset[str]
    max_tokens: int
    prompting: Prompting

    def __len__(self) -> int:
        """The number of prompts."""
        return sum(map(len, self.sets.values()))

    def before(self, runtime: Runtime) -> tuple[Behaviour, Settled | None]:
        """The unedited model's behaviour in every mode of thinking, and what length verdicts need.

        With thinking on no length is given, because an edit may make thoughts longer.
        """
        modes = thinking.modes(self.prompting.thinking)
        with runtime.opened(self._every(modes), self._longest(modes)) as ask:
            wholes = {mode: self._ask(ask, self._in(mode), self._longest([mode])) for mode in modes}
        texts = {mode: [one.text for one in mine] for mode, mine in wholes.items()}
        settled = None
        if modes == (None,):
            settled = settling.of(wholes[None], self.max_tokens, _prompts(self._in(None)))
        return self._behaviour(texts), settled

    def after(self, runtime: Runtime, settled: Settled | None) -> tuple[Behaviour, int | None]:
        """An edited model's behaviour, and the length at which replies to the other sets were cut.

        Args:
            runtime: runs the model.
            settled: the length from `before`.
        """
        if settled is None:
            return self.before(runtime)[0], None
        aims = {name: part for name, part in self.sets.items() if name in self.aims}
        others = {name: part for name, part in self.sets.items() if name not in self.aims}
        with runtime.opened(self._every([None]), self.max_tokens) as ask:
            told = self._by_set(aims, self._ask(ask, aims, self.max_tokens))
            length = settled.tokens
            wholes = [one for part in told.values() for one in part]
            late = settling.changed_after(wholes, length, _prompts(aims))
            if late:
                say(
                    f"  {late} of these verdicts would be others at {length} tokens: all replies "
                    f"are read to {self.max_tokens}"
                )
                length = self.max_tokens
            told |= self._by_set(others, self._ask(ask, others, length))
        texts = [one.text for name in self.sets for one in told[name]]
        return behaviour_of(self.sets, texts), length

    def _behaviour(self, texts: Mapping[str | None, Sequence[str]]) -> Behaviour:
        """The behaviour in the first mode of thinking, which holds that in the other modes."""
        first, *others = (behaviour_of(self._in(mode), mine) for mode, mine in texts.items())
        _, *names = map(thinking.name, texts)
        return replace(first, modes=dict(zip(names, others, strict=True)))

    def _ask(self, ask: Wholes, sets: Mapping[str, PromptSet], max_tokens: int) -> list[WholeReply]:
        """Replies to all prompts of these sets, in order."""
        prompts = _prompts(sets)
        return in_order(ask(prompts, max_tokens), len(prompts), "replies") if prompts else []

    @staticmethod
    def _by_set(
        sets: Mapping[str, PromptSet], replies: Sequence[WholeReply]
    ) -> dict[str, list[WholeReply]]:
        rest = iter(replies)
        return {name: [next(rest) for _ in part.prompts] for name, part in sets.items()}

    def _in(self, mode: str | None) -> dict[str, PromptSet]:
        return {name: part.asked(thinking=mode) for name, part in self.sets.items()}

    def _every(self, modes: Sequence[str | None]) -> list[Prompt]:
        parts = [part for mode in modes for part in self._in(mode).values()]
        return [prompt for part in parts for prompt in part.prompts]

    def _longest(self, modes: Sequence[str | None]) -> int:
        return max(longest(self.max_tokens, mode, self.prompting) for mode in modes)


def longest(max_tokens: int, mode: str | None, prompting: Prompting) -> int:
    """The longest reply in tokens, its thought included.

    Args:
        max_tokens: the longest reply behind the thought, in tokens.
        mode: the mode of thinking.
        prompting: the options of prompts.
    """
    return max_tokens if mode is None else max_tokens + prompting.thought_tokens


def _prompts(sets: Mapping[str, PromptSet]) -> list[Prompt]:
    """All prompts of these sets, in order."""
    return [prompt for part in sets.values() for prompt in part.prompts]
