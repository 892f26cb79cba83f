"""A race of edits: all are tried on a few prompts, the better ones on more, the best on all.

A trial costs one forward pass per prompt, and for most edits a few prompts suffice to show that
others are better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from abl_mlx.directions.trial import Effect, Trial
from abl_mlx.edits.edit import Edit
from abl_mlx.support.console import progress, say

T = TypeVar("T")

#: Harmful and harmless prompts that each heat goes up to, and how many edits are left after it.
HEATS = ((4, 2, 4), (10, 6, 2))


@dataclass
class Runner(Generic[T]):
    """An edit in a race.

    Attributes:
        of: what the edit is of.
        effect: on the prompts that were run so far.
    """

    of: T
    edit: Edit
    effect: Effect = field(default_factory=Effect)


def run(
    trial: Trial,
    runners: Sequence[Runner[T]],
    rank: Callable[[Effect], Any],
    possible: Callable[[Effect], bool],
    hopeful: Callable[[Effect], bool],
    good: Callable[[Runner[T]], bool],
    label: str,
) -> list[Runner[T]]:
    """The edits that ran all prompts, the best first; the effects of the others are kept as well.

    Of those that are left after the heats the first runs all prompts, and the others while none is
    good, if they are hopeful. Where none of them is possible, the next do, one by one: no edit that
    might be taken is given up for one that may not.

    Args:
        rank: what sorts edits by their effect on equally many prompts, the best first.
        possible: whether an edit may be taken at all.
        hopeful: whether what is known of an edit so far is as one wants it.
        good: whether it may be taken without a look at those behind it.
    """
    begun = trial.tokens
    with progress(len(runners), label, "edit") as bar:
        alive = list(runners)
        order: list[Runner[T]] = []
        for harmful, harmless, left in HEATS:
            if len(alive) <= left:
                continue
            for one in alive:
                one.effect = trial.of_edit(one.edit, one.effect, harmful, harmless)
            alive.sort(key=lambda one: rank(one.effect))
            # Those that are given up here come before all that were given up earlier.
            order[:0] = alive[left:]
            bar.update(len(alive) - left)
            alive = alive[:left]
        order[:0] = alive
        finished: list[Runner[T]] = []
        left = HEATS[-1][-1]
        while order:
            some = any(possible(one.effect) for one in finished)
            coming = order[0].effect
            if some and not (len(finished) < left and (not coming.scores or hopeful(coming))):
                break
            one = order.pop(0)
            one.effect = trial.of_edit(one.edit, one.effect)
            finished.append(one)
            bar.update()
            if good(one):
                break
    say(
        f"  {len(runners)} edits were tried, {len(finished)} of them on all prompts: "
        f"{trial.tokens - begun:,} forward tokens"
    )
    return sorted(finished, key=lambda one: rank(one.effect))
