"""What a model replies before anything is measured: whether there is a refusal to remove at all.

A dozen prompts of each set, then more where these do not decide. Any two sets of prompts differ in
some direction; it is a refusal's only where the model refuses the one set clearly more often than
the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from abl_mlx.behaviour.evaluate import decode
from abl_mlx.behaviour.refusals import Tally, Verdict, classify, without_thoughts
from abl_mlx.choices import Measuring
from abl_mlx.inputs.sets import Prompt, PromptSet, PromptSets, split
from abl_mlx.models.chat_model import ChatModel, common_prefix
from abl_mlx.models.generation import timed
from abl_mlx.support.console import percent, say
from convert.base.errors import UserError

#: Prompts of each set that are asked at a time, and at most.
DOZEN, MOST = 12, 48

#: Tokens of each reply: a refusal is told by its first sentence.
REPLY_TOKENS = 24

#: Tokens in which a common opening of all replies is looked for.
OPENING_TOKENS = 12

# How likely so large a difference would be between two sets that are refused alike: below the
# first it is clear, above the second no further replies are worth their time.
_CLEAR, _HOPELESS = 0.025, 0.2

# Characters of a reply that a message quotes; of a harmful prompt's, words.
_QUOTED, _FEW_WORDS = 60, 4


@dataclass(frozen=True)
class Asked:
    """Prompts of one set with the unedited model's replies, cut to `REPLY_TOKENS`.

    Attributes:
        prompts: all that may be asked; so far as many as there are replies.
    """

    name: str
    prompts: Sequence[Prompt]
    replies: list[str] = field(default_factory=list)

    @property
    def tally(self) -> Tally:
        """Verdicts on the replies so far."""
        return Tally.of(map(classify, self.replies))

    @property
    def refused(self) -> int:
        """How many refuse."""
        return self.tally.refusal

    @property
    def rate(self) -> float:
        """Their share."""
        return self.refused / max(1, len(self.replies))

    def coming(self) -> Sequence[Prompt]:
        """The next dozen prompts."""
        return self.prompts[len(self.replies) :][:DOZEN]

    def record(self) -> dict[str, int]:
        """As JSON values."""
        return {"asked": len(self.replies), "refused": self.refused}


@dataclass(frozen=True)
class FirstLook:
    """Replies of the unedited model.

    Attributes:
        refused: to prompts that it should refuse: harmful ones, or borderline ones where their
            refusal is what is to be removed.
        harmless: to harmless prompts.
        prefix: token ids that every reply opens with, whatever was asked: an opened thought, say.
        rate: tokens a second, of prompts and replies together.
    """

    refused: Asked
    harmless: Asked
    prefix: tuple[int, ...]
    rate: float

    @property
    def clear(self) -> bool:
        """Whether the prompts that should be are refused clearly more often than harmless ones."""
        return _more(self.refused, self.harmless)

    @property
    def swapped(self) -> bool:
        """Whether it is the other way round."""
        return _more(self.harmless, self.refused)

    @property
    def decided(self) -> bool:
        """Whether more replies are not needed.

        It is clear, a dozen show no refusal, or two dozen hardly more than among harmless prompts.
        """
        counts = _counts(self.refused, self.harmless)
        none = self.refused.refused == 0
        hopeless = len(self.refused.replies) >= 2 * DOZEN and chance(*counts) > _HOPELESS
        return self.clear or self.swapped or none or hopeless

    @property
    def thinking(self) -> bool:
        """Whether most replies are still inside a thought, so that nothing is known yet."""
        inside = sum(without_thoughts(reply) is None for reply in self.refused.replies)
        return 2 * inside > len(self.refused.replies)

    def record(self) -> dict[str, dict[str, int]]:
        """As JSON values: how many of each set were asked and refused."""
        return {one.name: one.record() for one in (self.refused, self.harmless)}


def _counts(one: Asked, other: Asked) -> tuple[int, int, int, int]:
    return one.refused, len(one.replies), other.refused, len(other.replies)


def _more(one: Asked, other: Asked) -> bool:
    """Whether a set is refused clearly more often; of few prompts, by half of them."""
    few = min(len(one.replies), len(other.replies)) < DOZEN
    return chance(*_counts(one, other)) <= _CLEAR or (few and one.rate - other.rate >= 0.5)


def chance(first: int, of: int, second: int, of_second: int) -> float:
    """Fisher's exact test, one-sided: how likely the first has so many of the refusals, or more.

    Args:
        first, of: refusals and prompts of the first set.
        second, of_second: of the second.
    """
    both = first + second
    ways = math.comb(of + of_second, both)
    top = min(of, both)
    return (
        sum(math.comb(of, k) * math.comb(of_second, both - k) for k in range(first, top + 1)) / ways
    )


def look(chat: ChatModel, sets: PromptSets, how: Measuring) -> FirstLook:
    """Ask the model as it is; where a person has decided already, a dozen prompts of each set."""
    name = "borderline" if how.finding.method == "over-refusal" else "harmful"
    refused, harmless = (
        Asked(name, _prompts(sets, name, how.prompting.seed)),
        Asked("harmless", _prompts(sets, "harmless", how.prompting.seed)),
    )
    openings: list[list[int]] = []

    def ask(*asked: Asked) -> float:
        """Ask the next dozen of each set; how many tokens ran in a second."""
        coming = [one.coming() for one in asked]
        prompts = [prompt for part in coming for prompt in part]
        sequences = [chat.encode_message(prompt) for prompt in prompts]
        replies, rate = timed(
            chat, sequences, REPLY_TOKENS, batch_size=how.batch_size, label="replies before"
        )
        openings.extend(replies)
        said = iter(decode(chat, replies, prompts))
        for one, part in zip(asked, coming, strict=True):
            one.replies.extend(next(said) for _ in part)
        return rate

    rate = ask(refused, harmless)
    found = FirstLook(refused, harmless, reply_prefix(openings), rate)
    goes_on = not (how.by_hand or how.finding.anyway or found.thinking)
    while goes_on and not found.decided and refused.coming():
        ask(refused, harmless)
    return found


def reply_prefix(replies: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What all replies open with; nothing where a reply has nothing behind it to be measured."""
    prefix = common_prefix([reply[:OPENING_TOKENS] for reply in replies])
    return prefix if all(len(reply) > len(prefix) for reply in replies) else ()


def _prompts(sets: PromptSets, name: str, seed: int) -> list[Prompt]:
    """Validation prompts of a set, and train prompts behind them where these are few."""
    if name == "borderline":
        assert sets.borderline is not None  # `prompt_choice.borderline_part` has checked
        parts = split(sets.borderline, seed)
    else:
        parts = getattr(sets, name)
    kept: tuple[PromptSet, ...] = (parts.validation, parts.train)
    return [prompt for part in kept for prompt in part.prompts][:MOST]


def check(found: FirstLook, how: Measuring) -> None:
    """Refuse, before anything is measured, a model that shows no refusal to remove.

    Where a person chose what is removed, or said to go on all the same, it is a warning.

    Raises:
        UserError: with its rate, two of its replies, and what one can do.
    """
    if found.clear:
        return
    if found.thinking:
        say(
            f"warning: after {REPLY_TOKENS} tokens most replies are still inside a thought, so "
            "whether the model refuses is known only from the evaluation"
        )
        return
    if how.by_hand or how.finding.anyway:
        say(f"warning: {_finding(found)}; the edit goes on as you asked")
        return
    raise UserError(f"{_finding(found)}. {_quotes(found)} {_advice(found)}")


def _finding(found: FirstLook) -> str:
    one, other = found.refused, found.harmless
    low, high = one.tally.interval(Verdict.REFUSAL)
    counts = (
        f"this model refuses {one.refused} of {len(one.replies)} {one.name} prompts "
        f"({percent(one.rate)}, 95% interval {low:.0%} to {high:.0%}) and {other.refused} of "
        f"{len(other.replies)} harmless ones ({percent(other.rate)})"
    )
    if found.swapped:
        return f"{counts}, so the two sets look swapped"
    if one.tally.broken > len(one.replies) / 2:
        return f"{counts}, and most of its replies are empty or loop, so it cannot be judged"
    if one.rate <= other.rate and other.refused:
        return f"{counts}, so no refusal sets the two apart"
    if one.refused == 0:
        return f"{counts}, so there is no refusal to remove"
    return f"{counts}, which is too little to tell a refusal by"


def _quotes(found: FirstLook) -> str:
    """Two replies, cut short: of answers to harmful prompts no more than a few words."""
    shown = []
    for one in (found.refused, found.harmless):
        kinds = [classify(reply) for reply in one.replies]
        place = kinds.index(Verdict.REFUSAL) if Verdict.REFUSAL in kinds else 0
        reply = _line(one.replies[place])
        if one is found.refused and kinds[place] is not Verdict.REFUSAL:
            reply = " ".join(reply.split()[:_FEW_WORDS]) + " ..."
        shown.append(f"{_cut(_line(one.prompts[place].text))} with {_cut(reply)}")
    return f"It answers {shown[0]} and {shown[1]}."


def _line(text: str) -> str:
    """A text in one line without what a terminal would obey."""
    return "".join(char for char in " ".join(text.split()) if char.isprintable())


def _cut(text: str) -> str:
    return f'"{text[:_QUOTED]}{" ..." if len(text) > _QUOTED else ""}"'


def _advice(found: FirstLook) -> str:
    name = found.refused.name
    if found.swapped and name == "harmful":
        return (
            "Give the prompts that it refuses with --harmful and the others with --harmless, or "
            "add --anyway to go on all the same."
        )
    flags = "--borderline" if name == "borderline" else "--harmful and --harmless"
    return (
        f"Give prompts that it refuses ({flags}), choose what is removed yourself (--layer, or "
        "--direction FILE), or add --anyway to measure and edit all the same."
    )
