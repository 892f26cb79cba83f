"""How a model thinks before it replies: how long, whether it comes to an end, whether it loops.

Refusal words inside a thought are no refusal: verdicts read what stands behind it
(`abl_mlx.behaviour.refusals`). Lengths are in words, which every runtime tells alike.

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
        words: how many it has; 0 where the reply opens with none.
        closed: whether it comes to its end.
        loops: whether its end says the same over and over.
    """

    words: int
    closed: bool
    loops: bool

    @classmethod
    def of(cls, reply: str) -> Thought:
        """Look at a reply in full, its thought marked by tags."""
        thought, body = parted(reply)
        return cls(len(thought.split()), body is not None, without_loop(thought) != thought)


def figures(thoughts: Iterable[Thought]) -> Thoughts | None:
    """The figures of many replies; None where none opens with a thought."""
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
    """How many times as long thoughts are as they were; None where it cannot be told.

    Only thoughts that came to their end have a length, so a model whose thoughts no longer end is
    told by ``unclosed``.
    """
    if before is None or after is None:
        return None
    return times_as_long(before.words, after.words)


def times_as_long(before: float | None, after: float | None) -> float | None:
    """The ratio of two mean lengths in words; None if one is not known, or there was none before.

    Args:
        before, after: mean lengths of thoughts that come to their end.
    """
    return after / before if before and after is not None else None
