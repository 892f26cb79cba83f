"""The end of a search: trials on the front generate replies, and one trial is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from abl_mlx.behaviour.refusals import wilson
from abl_mlx.records.evaluations import Kept
from abl_mlx.search.pareto import front, hypervolume
from abl_mlx.search.screening import Trial
from abl_mlx.search.space import DEFAULT, Space
from abl_mlx.support.console import percent, progress

#: The largest number of trials that generate replies.
MOST_ASKED = 12

#: The bisection ends where no KL is left that is below this share of the best one.
GENTLER = 0.95

#: The normal quantile of 80%.
FOUR_IN_FIVE = 0.8416


@dataclass(frozen=True)
class Asked:
    """A trial on the front, with the verdicts on its replies.

    Attributes:
        refused, broken: shares of the replies to harmful prompts.
        meets: whether their sum meets the target, and enough refusals stay of those that are to.
        ends: whether their sum meets the target.
        kept: set -> what is left of the refusals that are to stay.
        figures: name of each scorer -> its figure.
        risen: the names of the scorers whose figure is higher than it may be.
    """

    trial: Trial
    refused: float
    broken: float
    meets: bool
    ends: bool = False
    kept: Mapping[str, Kept] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    risen: tuple[str, ...] = ()

    @property
    def lost(self) -> float:
        """The largest share of a set's refusals that are to stay and do not."""
        shares = [one.share for one in self.kept.values() if one.share is not None]
        return 1 - min(shares, default=1)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.trial.record(), "refusal_rate": self.refused, "broken_rate": self.broken}


def meets(share: float, prompts: int, target: float) -> bool:
    """Whether a share of refused and broken replies meets the target for other prompts as well.

    It does if it is 0, or if its one-sided Wilson bound at 80% confidence is at most ``target``.
    """
    count = round(share * prompts)
    return count == 0 or wilson(count, prompts, FOUR_IN_FIVE)[1] <= target


def _any(share: float) -> bool:
    return True


def ask_survivors(
    trials: Sequence[Trial],
    ask: Callable[[Trial], Asked],
    enough: Callable[[float], bool] = _any,
    most: int = MOST_ASKED,
) -> list[Asked]:
    """Let at most ``most`` trials generate replies, so as to find the best one and see the front.

    The best one is the trial with the lowest KL that meets the target. Half of the trials are
    spread over the front. The others bisect towards it, between the highest KL that fails below the
    lowest one that passes, and that. A trial that failed is better than no other there: trials that
    were behind it by first tokens count again.

    Args:
        trials: the trials that ran all prompts.
        ask: generates replies for a trial and judges them.
        enough: whether a share of replies opening with a refusal is small enough.
        most: the largest number of trials to ask.

    Returns:
        What was asked, by rising KL.
    """
    trials = sorted(trials, key=lambda one: one.screened.kl)
    # First tokens that call none good enough mislead: then replies alone decide.
    told = any(enough(one.screened.refused) for one in trials)
    found: dict[int, Asked] = {}
    with progress(most, "replies of the front", "edit") as bar:
        for place in spread(trials, max(1, most // 2)):
            found[place] = ask(trials[place])
            bar.update()
        while len(found) < most and (left := _between(trials, found, enough if told else _any)):
            place = left[len(left) // 2]
            found[place] = ask(trials[place])
            bar.update()
    return [found[place] for place in sorted(found)]


def spread(trials: Sequence[Trial], most: int) -> list[int]:
    """The places of trials that cover the front, at most ``most``, by rising KL.

    One after the other the trial is taken that adds the most to the area over refused shares and
    the logarithm of the KL (Zitzler and Thiele 1998), until none adds any.
    """
    points = [one.shares for one in trials]
    taken: list[int] = []
    area = -1.0
    while len(taken) < most:
        areas = [hypervolume([points[one] for one in (*taken, place)])
                 for place in range(len(points))]  # fmt: skip
        if not areas or max(areas) <= area + 1e-9:
            break
        area = max(areas)
        taken.append(areas.index(area))
    return sorted(taken)


def _between(
    trials: Sequence[Trial], found: Mapping[int, Asked], enough: Callable[[float], bool]
) -> list[int]:
    """The places of the trials that may be the best one: a front by KL and refusal score.

    Args:
        trials: all trials, by rising KL.
        found: what was asked, by place.
        enough: as of `ask_survivors`.
    """
    top = min((place for place, one in found.items() if one.meets), default=len(trials))
    most = GENTLER * trials[top].screened.kl if top < len(trials) else math.inf
    bottom = max((place for place in found if place < top), default=-1)
    inside = [
        place
        for place in range(bottom + 1, top)
        if enough(trials[place].screened.refused) and trials[place].screened.kl <= most
    ]
    points = [(trials[place].screened.kl, trials[place].screened.refusal) for place in inside]
    return [inside[number] for number in front(points)]


def choose(asked: Sequence[Asked]) -> Asked:
    """The trial with the lowest KL that meets the target.

    If none does, it is of those that end refusals the one that loses the fewest that are to stay,
    and then raises the fewest figures of scorers. If none ends refusals, it is the one with the
    fewest refused and broken replies.
    """
    passing = [one for one in asked if one.meets]
    if passing:
        return min(passing, key=lambda one: one.trial.screened.kl)
    if ending := [one for one in asked if one.ends]:
        return min(ending, key=lambda one: (one.lost, len(one.risen), one.trial.screened.kl))
    return min(asked, key=lambda one: (one.refused + one.broken, one.trial.screened.kl))


def unmet(chosen: Asked, target: str) -> str:
    """Why a trial was chosen that does not meet the target, which is a flag with its value."""
    if chosen.risen:
        return (
            f"no edit of the front meets {target} and raises no figure of --scorer by more than "
            f"--max-rise: the one that is taken raises {', '.join(chosen.risen)}"
        )
    if chosen.ends:
        return (
            "no edit of the front ends refusals and leaves those that are to stay: the one that "
            "loses fewest is taken; more trials may find a better one"
        )
    nearest = "refuses least" if target.startswith("--target-refusals") else "comes nearest"
    return (
        f"no edit of the front meets {target}: the one that {nearest} is taken; more trials may "
        "find a better one"
    )


def table(
    asked: Sequence[Asked], chosen: Asked, space: Space, search_for: str | None = None
) -> str:
    """A table of the trials that generated replies, a line for each, by rising KL.

    Args:
        search_for: the scorer whose figure is the score, if there is one.
    """
    scored = ("score", "refused", "broken") if search_for is None else ("figure", "of before", "")
    names = list(asked[0].figures)
    parts = ("directions", "attention", "MLP", "embedding")
    rows: list[tuple[str, ...]] = [("", "KL", *scored, *names, *parts)]
    for one in asked:
        given, screened = one.trial.parameters, one.trial.screened
        recipe = space.recipe(given)
        name = str(given["method"])
        if name != DEFAULT and not name.startswith("layers-rank"):
            name += ", per layer" if given["per_layer"] else f" {given['index']:.1f}"
        rows.append(
            (
                "→" if one is chosen else "",
                f"{screened.kl:.6f}",
                f"{screened.refusal:.3f}",
                percent(one.refused),
                percent(one.broken) if search_for is None else "",
                *(f"{one.figures[scorer]:.3f}" for scorer in names),
                name,
                *(_strengths(recipe["profile"][part]) for part in ("attention", "mlp")),
                "yes" if recipe["embedding"] else "no",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _strengths(values: Sequence[float]) -> str:
    """Strengths by layer, in so few numbers as fit a table."""
    if len(set(values)) == 1:
        return f"{values[0]:.2f}"
    if len(values) <= 6:
        return " ".join(f"{value:.2f}".removeprefix("0") if value else "0" for value in values)
    peak = int(np.argmax(values))
    return f"{min(values):.2f} to {values[peak]:.2f} at {peak}"
