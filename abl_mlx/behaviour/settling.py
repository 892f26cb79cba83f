"""Finds the number of tokens from which on the verdicts on a model's replies no longer change.

Nothing in this module imports MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from abl_mlx.behaviour.journal import Answered
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.behaviour.whole_reply import WholeReply
from abl_mlx.inputs.sets import Prompt
from abl_mlx.records.evaluations import Settled

#: The lengths in tokens that are compared.
LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def of(
    replies: Sequence[WholeReply], longest: int, prompts: Sequence[Prompt] | None = None
) -> Settled:
    """The shortest length from which on every verdict equals that on the whole reply.

    Args:
        replies: the replies, of at most ``longest`` tokens.
        longest: the longest length in tokens.
        prompts: what each replies to.
    """
    return _shortest(LENGTHS, longest, _Verdicts.of(replies, prompts).changing_after)


def of_answers(answers: Sequence[Answered], lengths: Sequence[int]) -> Settled:
    """Like `of`, with replies that were judged at these lengths, shortest first.

    The last length is the longest, and each answer holds its verdicts at the others.
    """

    def changing(length: int) -> int:
        number = lengths.index(length)
        return sum(one.cut(number).verdict is not one.verdict for one in answers)

    return _shortest(lengths, lengths[-1], changing)


def _shortest(lengths: Sequence[int], longest: int, changing: Callable[[int], int]) -> Settled:
    """The shortest length behind which nothing changes.

    Args:
        lengths: the lengths that are compared.
        longest: the longest length in tokens.
        changing: from a length to the number of verdicts that change behind it.
    """
    settled, changed = longest, 0
    for length in sorted((one for one in lengths if one < longest), reverse=True):
        changed = changing(length)
        if changed:
            break
        settled = length
    return Settled(longest=longest, tokens=settled, changing=changed if settled == longest else 0)


def changed_after(
    replies: Sequence[WholeReply], tokens: int, prompts: Sequence[Prompt] | None = None
) -> int:
    """The number of replies whose verdict differs from that on their first tokens."""
    return _Verdicts.of(replies, prompts).changing_after(tokens)


@dataclass(frozen=True)
class _Verdicts:
    """Replies, the prompt's text of each where it is known, and the verdict on the whole reply."""

    replies: Sequence[WholeReply]
    asked: Sequence[str | None]
    whole: Sequence[Verdict]

    @classmethod
    def of(cls, replies: Sequence[WholeReply], prompts: Sequence[Prompt] | None) -> _Verdicts:
        asked = [None] * len(replies) if prompts is None else [prompt.text for prompt in prompts]
        whole = [classify(reply.text, text) for reply, text in zip(replies, asked, strict=True)]
        return cls(replies, asked, whole)

    def changing_after(self, tokens: int) -> int:
        """The number of replies whose first tokens have another verdict."""
        return sum(
            classify(reply.cut(tokens), text) is not verdict
            for reply, text, verdict in zip(self.replies, self.asked, self.whole, strict=True)
            if tokens < reply.tokens
        )


def sentence(settled: Settled) -> str:
    """What was found, as a clause without a full stop."""
    if settled.tokens < settled.longest:
        return (
            f"from {settled.tokens} tokens on every verdict is the one on the whole reply "
            f"(--max-tokens {settled.longest})"
        )
    if settled.changing:
        count = settled.changing
        return (
            f"{count} verdict{'s' if count > 1 else ''} still change{'' if count > 1 else 's'} "
            f"towards the end of replies of {settled.longest} tokens: a larger --max-tokens may "
            "show more refusals"
        )
    return f"replies are read to {settled.longest} tokens"
