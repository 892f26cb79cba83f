"""A race of edits: all are tried on a few prompts, the better ones on more, the best on all.

A trial costs one forward pass per prompt, and a few prompts are enough to show that most edits are
worse than others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from abl_mlx.directions.trial import Effect, Trial
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.support.console import progress, say

T = TypeVar("T")

#: For each heat: how many harmful and harmless prompts have been run by its end, and how many edits
#: go on after it.
HEATS = ((4, 2, 4), (10, 6, 2))


@dataclass
class Runner(Generic[T]):
    """An edit in a race.

    Attributes:
        of: the candidate or variant that the edit belongs to.
        effect: the edit's effect on the prompts that were run so far.
    """

    of: T
    edit: WeightEdit
    effect: Effect = field(default_factory=Effect)


def run(
    trial: Trial,
    runners: Sequence[Runner[T]],
    rank: Callable[[Effect], Any],
    possible: Callable[[Effect], bool],
    hopeful: Callable[[Effect], bool],
    good: Callable[[Runner[T]], bool],
    label: str,
    early: Callable[[Sequence[Runner[T]]], Runner[T] | None] = lambda order: None,
    worth: Callable[[Effect], bool] = lambda effect: True,
) -> list[Runner[T]]:
    """Run a race and return the edits that ran all prompts, the best first.

    The effects of the others stay in ``runners``. Of the edits that are left after the heats, the
    first runs all prompts; the others do so, if they are hopeful, until one is good. If none of
    these is possible, the edits that were dropped run all prompts one by one, the better ones
    first, until one is possible.

    Args:
        trial: tries edits.
        runners: the edits.
        rank: a sort key for effects that were measured on equally many prompts, the best first.
        possible: whether an edit with this effect may be chosen.
        hopeful: whether an edit with this effect so far might be good.
        good: whether an edit may be chosen without trying those that rank behind it.
        label: what is raced, for the line of progress.
        early: may take an edit, run on all prompts, after the heats; it is given all edits, the
            best first. Then no other edit runs all prompts.
        worth: whether an edit with this effect so far may run all prompts; one that ranks behind an
            edit that may not does not either. Where none has to be found, this saves passes.
    """
    begun = trial.tokens
    with progress(len(runners), label, "edit") as bar:
        alive = list(runners)
        order: list[Runner[T]] = []
        for harmful, harmless, left in HEATS:
            if len(alive) <= left:
                continue
            asked = [one.edit for one in alive], [one.effect for one in alive]
            effects = trial.of_edits(*asked, harmful, harmless)
            for one, effect in zip(alive, effects, strict=True):
                one.effect = effect
            alive.sort(key=lambda one: rank(one.effect))
            # Edits that are dropped now rank before all that were dropped in earlier heats.
            order[:0] = alive[left:]
            bar.update(len(alive) - left)
            alive = alive[:left]
        order[:0] = alive
        taken = early(order)
        finished = [] if taken is None else [taken]
        order = order if taken is None else []
        left = HEATS[-1][-1]
        while order:
            some = any(possible(one.effect) for one in finished)
            coming = order[0].effect
            if some and not (len(finished) < left and (not coming.scores or hopeful(coming))):
                break
            if coming.scores and not worth(coming):
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
