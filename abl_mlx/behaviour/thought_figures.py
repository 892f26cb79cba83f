"""Figures of the thoughts before replies: their length, whether they end, and whether they loop.

Refusal words inside a thought are no refusal: verdicts are on the text behind the thought
(`abl_mlx.behaviour.refusals`). Lengths are in words, which are counted alike for every runtime.

Nothing in this module imports MLX.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from abl_mlx.behaviour.loops import without_loop
from abl_mlx.models.thoughts import parted
from abl_mlx.records.measurements import Thoughts


@dataclass(frozen=True)
class Thought:
    """The thought of one reply.

    Attributes:
        words: its number of words; 0 if the reply opens with no thought.
        closed: whether it ends before the reply does.
        loops: whether it ends in repetitions.
    """

    words: int
    closed: bool
    loops: bool

    @classmethod
    def of(cls, reply: str) -> Thought:
        """The thought of a whole reply, in which tags mark it."""
        thought, body = parted(reply)
        return cls(len(thought.split()), body is not None, without_loop(thought) != thought)


def figures(thoughts: Iterable[Thought]) -> Thoughts | None:
    """The figures of many replies; None if no reply opens with a thought."""
    found = [one for one in thoughts if one.words]
    if not found:
        return None
    closed = [one.words for one in found if one.closed]
    return Thoughts(
        n=len(found),
        words=fmean(closed) if closed else None,
        unclosed=len(found) - len(closed),
        looping=sum(one.loops for one in found),
    )


def growth(before: Thoughts | None, after: Thoughts | None) -> float | None:
    """The mean length of thoughts after an edit, divided by that before; None if not known.

    Only thoughts that end have a length. Of a model whose thoughts no longer end, ``unclosed``
    is the figure that shows it.
    """
    if before is None or after is None:
        return None
    return times_as_long(before.words, after.words)


def times_as_long(before: float | None, after: float | None) -> float | None:
    """The ratio of two mean lengths; None if one is not known, or the first is 0.

    Args:
        before, after: mean lengths in words of thoughts that end.
    """
    return after / before if before and after is not None else None
