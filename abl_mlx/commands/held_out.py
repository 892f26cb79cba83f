"""The held-out prompts, which a model is asked before and after its edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from abl_mlx.behaviour import settling
from abl_mlx.behaviour.evaluate import Behaviour, Question, Wholes, behaviour_of
from abl_mlx.behaviour.whole_reply import WholeReply
from abl_mlx.choices import Prompting
from abl_mlx.inputs import thinking
from abl_mlx.inputs.sets import Prompt, PromptSet, PromptSets
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.records.evaluations import Settled
from abl_mlx.support.console import progress, say

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
    """What runs a model."""

    def opened(
        self, prompts: Sequence[Question], max_tokens: int
    ) -> AbstractContextManager[Wholes]:
        """Context manager with what replies to these prompts, one call or several."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts, and how they are asked.

    Before an edit every reply is asked for at its longest, which tells how much of it the verdict
    takes. After the edit replies to the sets that it does not aim at are asked for no longer than
    that: so long as the other sets, whose replies are always read whole, show nothing that stands
    behind it.

    Attributes:
        sets: ``harmful``, ``harmless`` and further ones, by name.
        aims: names of the sets that an edit is about, whose replies are always read whole.
        max_tokens: longest reply, without its thought.
    """

    sets: Mapping[str, PromptSet]
    aims: frozenset[str]
    max_tokens: int
    prompting: Prompting

    def __len__(self) -> int:
        """The number of prompts."""
        return sum(map(len, self.sets.values()))

    def before(self, runtime: Runtime) -> tuple[Behaviour, Settled | None]:
        """What the unedited model does in every mode of thinking, and where verdicts settle.

        With thinking on nothing settles: an edit may make thoughts longer.
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
        """What an edited model does, and how far the sets were read that it does not aim at.

        Args:
            settled: as `before` told.
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
        """The behaviour in the first mode of thinking, with that in the others."""
        first, *others = (behaviour_of(self._in(mode), mine) for mode, mine in texts.items())
        _, *names = map(thinking.name, texts)
        return replace(first, modes=dict(zip(names, others, strict=True)))

    def _ask(self, ask: Wholes, sets: Mapping[str, PromptSet], max_tokens: int) -> list[WholeReply]:
        """Replies to all prompts of these sets, in order."""
        prompts = _prompts(sets)
        found: dict[int, WholeReply] = {}
        with progress(len(prompts), "replies") as bar:
            for number, reply in ask(prompts, max_tokens) if prompts else ():
                found[number] = reply
                bar.update()
        return [found[number] for number in range(len(prompts))]

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
    """Tokens of the longest reply, its thought included.

    Args:
        max_tokens: of the reply behind the thought.
        mode: of thinking.
    """
    return max_tokens if mode is None else max_tokens + prompting.thought_tokens


def _prompts(sets: Mapping[str, PromptSet]) -> list[Prompt]:
    """All prompts of these sets, in order."""
    return [prompt for part in sets.values() for prompt in part.prompts]
