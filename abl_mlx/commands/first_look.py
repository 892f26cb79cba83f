"""Asks the model before anything is measured, to see whether there is a refusal to remove.

A dozen prompts of each set are asked, and more if these do not decide. Any two sets of prompts
differ in some direction. It is a refusal direction only if the model refuses one set clearly more
often than the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from abl_mlx.behaviour.evaluate import decode
from abl_mlx.behaviour.refusals import Tally, Verdict, classify, without_thoughts
from abl_mlx.choices import Measuring
from abl_mlx.directions.selection import Told, told
from abl_mlx.models.chat_model import ChatModel, common_prefix
from abl_mlx.models.encoded_sets import ByMode, EncodedSet, EncodedSets
from abl_mlx.models.generation import timed
from abl_mlx.models.logits import first_reply_token
from abl_mlx.support.arrays import numbers
from abl_mlx.support.console import percent, say
from convert.base.errors import UserError

#: The number of prompts of each set that are asked at a time, and the largest number.
DOZEN, MOST = 12, 48

#: The number of tokens in each reply, enough for a refusal's first sentence. Where no refusal is
#: seen in them, the same prompts are asked for replies of `Measuring.max_tokens`.
REPLY_TOKENS = 24

#: The number of tokens of each reply that are searched for a common opening.
OPENING_TOKENS = 12

# p-values of the difference between the sets: below the first it is clear, above the second further
# replies are not worth their time.
_CLEAR, _HOPELESS = 0.025, 0.2

# The number of characters of a reply that a message quotes; of words, for an answer to a harmful
# prompt.
_QUOTED, _FEW_WORDS = 60, 4


@dataclass(frozen=True)
class Asked:
    """Prompts of one set with the unedited model's replies.

    Attributes:
        encoded: the prompts that may be asked. The first ones were asked, one for each reply.
    """

    name: str
    encoded: EncodedSet
    replies: list[str] = field(default_factory=list)

    @property
    def tally(self) -> Tally:
        """Verdicts on the replies so far."""
        return Tally.of(self.verdicts)

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts on the replies so far."""
        texts = [prompt.text for prompt in self.encoded.prompts]
        return list(map(classify, self.replies, texts))

    @property
    def refused(self) -> int:
        """The number of refusals."""
        return self.tally.refusal

    @property
    def rate(self) -> float:
        """The share of refusals."""
        return self.refused / max(1, len(self.replies))

    def coming(self) -> EncodedSet:
        """The next dozen prompts."""
        return self.encoded[len(self.replies) :][:DOZEN]

    def record(self) -> dict[str, int]:
        """As JSON values."""
        return {"asked": len(self.replies), "refused": self.refused}


@dataclass(frozen=True)
class FirstLook:
    """Replies of the unedited model.

    Attributes:
        refused: replies to prompts whose refusal is to be removed: harmful ones, or borderline ones
            for over-refusal.
        harmless: replies to harmless prompts.
        prefix: token ids of the common opening of all replies, such as an opened thought.
        rate: the speed in tokens (of prompts and replies) per second.
        told: what the replies tell of the tokens that open refusals, behind ``prefix``.
    """

    refused: Asked
    harmless: Asked
    prefix: tuple[int, ...]
    rate: float
    told: Told | None = None

    @property
    def clear(self) -> bool:
        """Whether the prompts in ``refused`` are refused clearly more often than harmless ones."""
        return _more(self.refused, self.harmless)

    @property
    def swapped(self) -> bool:
        """Whether harmless prompts are refused clearly more often."""
        return _more(self.harmless, self.refused)

    @property
    def decided(self) -> bool:
        """Whether no more replies are needed.

        That is so if the difference is clear, if a dozen replies show no refusal, or if two dozen
        show hardly more than among harmless prompts.
        """
        counts = _counts(self.refused, self.harmless)
        none = self.refused.refused == 0
        hopeless = len(self.refused.replies) >= 2 * DOZEN and chance(*counts) > _HOPELESS
        return self.clear or self.swapped or none or hopeless

    @property
    def thinking(self) -> bool:
        """Whether most replies are still inside a thought, so that they show nothing."""
        inside = sum(without_thoughts(reply) is None for reply in self.refused.replies)
        return 2 * inside > len(self.refused.replies)

    def record(self) -> dict[str, dict[str, int]]:
        """As JSON values: how many of each set were asked and refused."""
        return {one.name: one.record() for one in (self.refused, self.harmless)}


def _counts(one: Asked, other: Asked) -> tuple[int, int, int, int]:
    return one.refused, len(one.replies), other.refused, len(other.replies)


def _more(one: Asked, other: Asked) -> bool:
    """Whether one set is refused clearly more often; with few prompts, in half of them more."""
    few = min(len(one.replies), len(other.replies)) < DOZEN
    return chance(*_counts(one, other)) <= _CLEAR or (few and one.rate - other.rate >= 0.5)


def chance(first: int, of: int, second: int, of_second: int) -> float:
    """The p-value of Fisher's exact test, one-sided.

    It is the probability that the first set has at least so many of all refusals by chance.

    Args:
        first, of: refusals and prompts of the first set.
        second, of_second: refusals and prompts of the second set.
    """
    both = first + second
    ways = math.comb(of + of_second, both)
    top = min(of, both)
    return (
        sum(math.comb(of, k) * math.comb(of_second, both - k) for k in range(first, top + 1)) / ways
    )


def look(chat: ChatModel, sets: EncodedSets, how: Measuring) -> FirstLook:
    """Ask the model as it is; where a person has decided already, a dozen prompts of each set.

    Validation prompts are asked first, and train prompts where these are few.
    """
    refused, harmless = (
        Asked(name, (sets.validation[name] + sets.train[name])[:MOST])
        for name in (sets.refused, "harmless")
    )
    openings: list[list[int]] = []
    verdicts: list[Verdict] = []

    def ask(*parts: EncodedSet, longest: int = REPLY_TOKENS) -> float:
        """Ask prompts of the two sets; returns the speed in tokens per second."""
        prompts = [prompt for part in parts for prompt in part.prompts]
        sequences = [tokens for part in parts for tokens in part.tokens]
        if sets.thinking is not None:
            longest += how.prompting.thought_tokens
        replies, rate = timed(
            chat, sequences, longest, batch_size=how.batch_size, label="replies before"
        )
        openings.extend(replies)
        texts = decode(chat, replies, prompts)
        verdicts.extend(map(classify, texts))
        said = iter(texts)
        for one, part in zip((refused, harmless), parts, strict=True):
            one.replies.extend(next(said) for _ in part.prompts)
        return rate

    rate = ask(refused.coming(), harmless.coming())
    found = FirstLook(refused, harmless, reply_prefix(openings), rate)
    goes_on = not (how.by_hand or how.finding.anyway or found.thinking)
    while goes_on and not found.decided and len(refused.coming()):
        ask(refused.coming(), harmless.coming())
    if goes_on and not (found.clear or found.swapped) and how.max_tokens > REPLY_TOKENS:
        # Some models say a lot before they decline.
        again = [one.encoded[: len(one.replies)] for one in (refused, harmless)]
        for one in (refused, harmless):
            one.replies.clear()
        openings.clear()
        verdicts.clear()
        ask(*again, longest=how.max_tokens)
    return replace(found, told=_told(openings, verdicts, len(found.prefix)))


def _told(replies: Sequence[Sequence[int]], verdicts: Sequence[Verdict], behind: int) -> Told:
    """What replies tell of the tokens that open refusals, behind a common opening."""

    def first(kind: Verdict) -> list[int]:
        both = zip(replies, verdicts, strict=True)
        return [reply[behind] for reply, one in both if one is kind and len(reply) > behind]

    return told(first(Verdict.REFUSAL), first(Verdict.ANSWER))


def reply_prefix(replies: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The common opening of all replies; empty if a reply ends with it, or there is none."""
    prefix = common_prefix([reply[:OPENING_TOKENS] for reply in replies])
    return prefix if all(len(reply) > len(prefix) for reply in replies) else ()


def in_every_mode(chat: ChatModel, prompts: ByMode, how: Measuring) -> FirstLook:
    """Ask the unedited model in every mode of thinking; sets ``chat.reply_prefixes``.

    Raises:
        UserError: when its replies show no refusal to remove.
    """
    looks = []
    for mode, asked in prompts.items():
        looks.append(look(chat, asked, how))
        chat.reply_prefixes[mode] = looks[-1].prefix
    # A refusal in one mode is enough to go on: replies in all modes are judged later.
    seen = next((one for one in looks if one.clear), looks[0])
    check(seen, how)
    return seen


def open_prompts(chat: ChatModel, prompts: ByMode) -> None:
    """Set ``chat.reply_prefixes`` of a streamed model, without asking it for replies."""
    for mode, asked in prompts.items():
        chat.reply_prefixes[mode] = _opening(chat, asked)


def _opening(chat: ChatModel, sets: EncodedSets) -> tuple[int, ...]:
    """The common opening of the replies of a streamed model, a sweep for each of its tokens."""
    parts = (sets.validation[name] + sets.train[name] for name in (sets.refused, "harmless"))
    asked = [tokens for part in parts for tokens in part[:DOZEN].tokens]
    found: tuple[int, ...] = ()
    while len(found) < OPENING_TOKENS:
        rows = first_reply_token(chat, [[*one, *found] for one in asked], label="reply openings")
        said = {int(token) for token in numbers(rows.argmax(axis=-1))}
        if said & set(chat.tokenizer.eos_token_ids):
            return ()
        if len(said) > 1:
            break
        found += tuple(said)
    return found


def check(found: FirstLook, how: Measuring) -> None:
    """Refuse, before anything is measured, a model that shows no refusal to remove.

    If the user chose the direction or gave ``--anyway``, this is only a warning; a search for
    another behaviour than refusal needs no refusals.

    Raises:
        UserError: with the refusal rates, two replies, and advice.
    """
    if found.clear:
        return
    if found.thinking:
        say(
            f"warning: after {REPLY_TOKENS} tokens most replies are still inside a thought, so "
            "whether the model refuses is known only from the evaluation"
        )
        return
    if how.scoring.search_for is not None:
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
    """A sentence with two shortened replies; of answers to harmful prompts, a few words only."""
    shown = []
    for one in (found.refused, found.harmless):
        kinds = one.verdicts
        place = kinds.index(Verdict.REFUSAL) if Verdict.REFUSAL in kinds else 0
        reply = _line(one.replies[place])
        if one is found.refused and kinds[place] is not Verdict.REFUSAL:
            reply = " ".join(reply.split()[:_FEW_WORDS]) + " ..."
        shown.append(f"{_cut(_line(one.encoded.prompts[place].text))} with {_cut(reply)}")
    return f"It answers {shown[0]} and {shown[1]}."


def _line(text: str) -> str:
    """A text in one line, with escape sequences made visible."""
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
