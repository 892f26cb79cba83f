"""The prompts with which a direction is found, with their token ids: encoded once, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from abl_mlx.inputs.sets import Prompt
from abl_mlx.models.chat_model import ChatModel


@dataclass(frozen=True)
class EncodedSet:
    """Prompts of one set, each with its token ids.

    Attributes:
        prompts: the prompts, in the order of the set.
        tokens: the token ids of each, in the chat template.
    """

    prompts: tuple[Prompt, ...]
    tokens: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, part: slice) -> EncodedSet:
        return EncodedSet(self.prompts[part], self.tokens[part])

    def __add__(self, other: EncodedSet) -> EncodedSet:
        return EncodedSet(self.prompts + other.prompts, self.tokens + other.tokens)

    def only(self, wanted: Sequence[bool]) -> EncodedSet:
        """The prompts for which ``wanted`` is true."""
        places = [n for n, one in enumerate(wanted) if one]
        return EncodedSet(tuple(self.prompts[n] for n in places), [self.tokens[n] for n in places])

    def opened(self, opening: Sequence[int]) -> EncodedSet:
        """The same prompts, each followed by the tokens with which every reply begins."""
        return replace(self, tokens=[[*one, *opening] for one in self.tokens])


def encode(chat: ChatModel, prompts: Sequence[Prompt]) -> EncodedSet:
    """Prompts with their token ids, up to where the reply begins.

    Raises:
        UserError: when the chat template does not render a prompt, or the model cannot hold it.
    """
    return EncodedSet(tuple(prompts), [chat.encode_message(one) for one in prompts])


@dataclass(frozen=True)
class EncodedSets:
    """The prompts with which a direction is measured and chosen, in one mode of thinking.

    Attributes:
        thinking: the mode, as of `Prompt`.
        refused: the name of the set whose refusals are to be removed: ``harmful``, or
            ``borderline`` for over-refusal.
        train: set -> prompts with which directions are measured. The sets are ``harmful`` and
            ``harmless``; ``borderline`` for over-refusal; ``kept`` and ``off_topic``, whose
            refusals are to stay; and ``on_topic``, the prompts of ``off_topic`` without the system
            message that puts them off topic.
        validation: set -> prompts on which a direction is chosen; the same sets but ``on_topic``.
        tail: how many tokens follow the instruction, which are the same in every prompt.
        sha256: their hashes, as of `inputs.sets.prompt_hashes`.
    """

    thinking: str | None
    refused: str
    train: Mapping[str, EncodedSet]
    validation: Mapping[str, EncodedSet]
    tail: int
    sha256: Mapping[str, str]

    def opened(self, opening: Sequence[int]) -> EncodedSets:
        """The same prompts, each followed by the tokens with which every reply begins."""
        train, validation = (
            {name: one.opened(opening) for name, one in part.items()}
            for part in (self.train, self.validation)
        )
        return replace(self, train=train, validation=validation, tail=self.tail + len(opening))

    @property
    def staying(self) -> dict[str, EncodedSet]:
        """Name -> validation prompts whose refusals are to stay, of the sets that there are."""
        names = ("kept", "off_topic")
        return {name: self.validation[name] for name in names if name in self.validation}

    def filled_up(self, name: str, enough: int) -> EncodedSet:
        """The validation prompts of a set, and train prompts behind them where these are few.

        Args:
            enough: how many there are together, if there are so many.
        """
        few = self.validation[name]
        return (few + self.train[name])[: max(enough, len(few))]


#: Mode of thinking, as of `Prompt` -> the prompts in it.
ByMode = Mapping[str | None, EncodedSets]


def opened(chat: ChatModel, prompts: ByMode) -> ByMode:
    """The prompts, each followed by what replies open with, ``chat.reply_prefixes``."""
    return {mode: one.opened(chat.reply_prefixes.get(mode, ())) for mode, one in prompts.items()}
