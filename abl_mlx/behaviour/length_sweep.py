"""`--length-sweep`: how verdicts depend on the number of tokens of a reply that are read.

Every prompt is asked once, at the longest length, and the reply is judged at each length
(`whole_reply`). A length suffices for a model if at least `SHARE` of the replies that are refusals
at the longest length are refusals at this length, and if the cut leaves at most 1 − `SHARE` of all
replies inside a thought that they finish later.

Nothing in this module imports MLX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from abl_mlx.behaviour.journal import Answered, Beginnings
from abl_mlx.behaviour.refusals import Oddity, Verdict, classify, declines_later
from abl_mlx.behaviour.whole_reply import SPREAD, TOKENS, WORDS, WholeReply
from abl_mlx.records.measurements import LengthSweep, MarkerTokens, SweptSet

#: The share of the refusals at the longest length that a sufficient length shows.
SHARE = 0.95


def judged(
    reply: WholeReply,
    lengths: Sequence[int],
    judge: Callable[[str], Answered],
    prompt: str | None = None,
) -> Answered:
    """The verdict on a whole reply, with those on its beginnings.

    Args:
        lengths: the lengths in tokens, shortest first; the last is the one that was asked for.
        judge: gives the verdict on a text.
        prompt: the prompt of the reply.
    """
    whole = judge(reply.text)
    known = {reply.text: whole}
    cuts = []
    for length in lengths:
        if length < min(reply.tokens, lengths[-1]):
            text = reply.cut(length)
            if text not in known:
                known[text] = judge(text)
            cuts.append(replace(known[text], reply=None))
    begins = Beginnings(
        reply.tokens,
        reply.unit,
        tuple(cuts),
        _marker(reply, lengths, prompt),
        declines_later(reply.text, prompt),
    )
    return replace(whole, begins=begins)


def _marker(reply: WholeReply, lengths: Sequence[int], prompt: str | None) -> int | None:
    """The number of tokens from which on a reply is a refusal; None if the whole reply is none."""

    def refuses(tokens: int) -> bool:
        return classify(reply.cut(tokens), prompt) is Verdict.REFUSAL

    if not refuses(reply.tokens):
        return None
    # Single tokens are looked at only between the last length without a refusal and the next one.
    ends = [*(length for length in lengths if length < reply.tokens), reply.tokens]
    start = next((at for at, end in reversed(list(enumerate(ends))) if not refuses(end)), -1)
    first = ends[start + 1]
    while first > 1 and first - 1 > (ends[start] if start >= 0 else 0) and refuses(first - 1):
        first -= 1
    return first


def record(sets: Mapping[str, Sequence[Answered]], lengths: Sequence[int]) -> LengthSweep:
    """The figures of one model.

    Args:
        sets: prompt set -> answers to its prompts.
        lengths: the lengths in tokens, shortest first.
    """
    every = [one for answers in sets.values() for one in answers]
    units = {one.begins.unit for one in every if one.begins is not None}
    refused = any(_count(every, number, Verdict.REFUSAL) for number in range(len(lengths)))
    return LengthSweep(
        lengths=list(lengths),
        cut_by=next((unit for unit in (WORDS, SPREAD) if unit in units), TOKENS),
        share=SHARE,
        suffices=lengths[_enough(every, len(lengths))] if refused else None,
        sets={name: _swept(answers, len(lengths)) for name, answers in sets.items()},
    )


def judged_at(models: Sequence[Sequence[Answered]], lengths: Sequence[int]) -> int:
    """The index of the length at which models that are compared are judged.

    It is the shortest length that suffices for all of them, or the longest if none of them refuses
    anything.

    Args:
        models: the answers of each model.
    """
    last = len(lengths) - 1
    if not any(_count(answers, last, Verdict.REFUSAL) for answers in models):
        return last
    return max(_enough(answers, len(lengths)) for answers in models)


def _enough(answers: Sequence[Answered], lengths: int) -> int:
    """The index of the shortest length that suffices."""
    last = lengths - 1
    final = [one.cut(last).verdict is Verdict.REFUSAL for one in answers]
    open_ones = _unfinished(answers, last)
    for number in range(lengths):
        seen = sum(
            there and one.cut(number).verdict is Verdict.REFUSAL
            for there, one in zip(final, answers, strict=True)
        )
        still_open = _unfinished(answers, number) - open_ones
        if seen >= SHARE * sum(final) and still_open <= (1 - SHARE) * len(answers):
            return number
    return last


def _swept(answers: Sequence[Answered], lengths: int) -> SweptSet:
    numbers = range(lengths)
    told = [[one.cut(number).verdict for number in numbers] for one in answers]
    late = [row[0] is Verdict.ANSWER and row[-1] is Verdict.REFUSAL for row in told]
    turned = [Verdict.REFUSAL in row and row[-1] is Verdict.ANSWER for row in told]
    found = [one.begins for one in answers if one.begins is not None]
    return SweptSet(
        n=len(answers),
        refused=[_count(answers, number, Verdict.REFUSAL) for number in numbers],
        broken=[_count(answers, number, Verdict.BROKEN) for number in numbers],
        unfinished=[_unfinished(answers, number) for number in numbers],
        late=sum(late),
        turned=sum(turned),
        declining=sum(one.declines for one in found),
        markers=_places([one.marker for one in found if one.marker is not None]),
    )


def _count(answers: Sequence[Answered], number: int, verdict: Verdict) -> int:
    return sum(one.cut(number).verdict is verdict for one in answers)


def _unfinished(answers: Sequence[Answered], number: int) -> int:
    return sum(one.cut(number).oddity is Oddity.UNFINISHED for one in answers)


def _places(markers: Sequence[int]) -> MarkerTokens | None:
    if not markers:
        return None
    ordered = sorted(markers)

    def least(share: float) -> int:
        """The number of tokens that shows this share of the refusals."""
        return ordered[math.ceil(share * len(ordered)) - 1]

    return MarkerTokens(n=len(ordered), median=least(0.5), p95=least(SHARE), last=ordered[-1])
