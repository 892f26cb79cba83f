"""Small steps from the gentlest edit that a search has found, to one that is gentler still.

A model of the trials nearby says what edits would score (kernel regression, as in Gaussian
processes); its best edit in a trust region is looked for by evolution, which costs no pass through
the network, and is tried next. Everything follows from the trials before and a seed, so that a
search that goes on later takes the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from abl_mlx.search.screening import LEAST_KL, Trial
from abl_mlx.search.space import Parameters, Space

#: Trials around the parent that the model is made of.
NEAR = 60

#: Steps of the evolution, how many it keeps at each, and how many come from each of them.
GENERATIONS, KEPT, CHILDREN = 24, 8, 6

#: Refusal scores to end at, as shares of the parent's: the choice by replies is among them.
SHARES = (1.0, 0.5, 2.0, 0.25)

#: How far from all that is known a step may lead, per strength.
RADII = (0.05, 0.1, 0.2)

#: The refusal score below which less is not better.
LEAST_REFUSAL = 1e-4


def predicted(
    places: np.ndarray, values: np.ndarray, asked: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values expected at other places, by kernel ridge regression on top of a linear fit.

    Args:
        places: (n, f) where values are known.
        values: (n, m).
        asked: (a, f).

    Returns:
        The values and their standard deviations, (a, m) each.
    """
    middle = places.mean(axis=0)
    left, right = places - middle, asked - middle
    # A line through all of it, held back where few trials tell little.
    ridge = 1e-2 * np.eye(left.shape[1])
    mean = values.mean(axis=0)
    slope = np.linalg.solve(left.T @ left + ridge, left.T @ (values - mean))
    rest = values - mean - left @ slope
    between = _squares(left, left)
    scale = float(np.median(between[between > 0])) if (between > 0).any() else 1.0
    inner = np.exp(-between / scale) + 1e-3 * np.eye(len(left))
    outer = np.exp(-_squares(right, left) / scale)
    share = 1 - (outer * np.linalg.solve(inner, outer.T).T).sum(axis=1)
    doubt = np.sqrt(np.maximum(share, 0))[:, None] * rest.std(axis=0)
    return mean + right @ slope + outer @ np.linalg.solve(inner, rest), doubt


def logarithms(trials: Sequence[Trial]) -> np.ndarray:
    """Logarithms of KL and refusal score: (n, 2)."""
    return np.log([
        [max(one.screened.kl, LEAST_KL), max(one.screened.refusal, LEAST_REFUSAL)]
        for one in trials
    ])  # fmt: skip


def step(
    space: Space, trials: Sequence[Trial], parent: Trial, number: int, random: np.random.Generator
) -> dict[str, Any] | None:
    """The edit near the parent that is expected to be the gentlest at its refusal score or so.

    Args:
        trials: so far.
        parent: from where; one of them.
        number: how many steps there were, which says what share of the score is looked for and
            how far away.

    Returns:
        Its parameters; none where too little is known around the parent.
    """
    kind = space.kind(parent.parameters)
    known = [one for one in trials if space.kind(one.parameters) == kind]
    start = np.array(space.place(parent.parameters))
    places = np.array([space.place(one.parameters) for one in known])
    near = np.argsort(((places - start) ** 2).sum(axis=1), kind="stable")[:NEAR]
    if len(near) < 6:
        return None
    known, places = [known[place] for place in near], places[near]
    values = logarithms(known)
    share = SHARES[number % len(SHARES)]
    allowed = math.log(max(share * parent.screened.refusal, LEAST_REFUSAL))
    radius = RADII[number % len(RADII)] * math.sqrt(len(start))

    def merit(these: Sequence[Parameters]) -> np.ndarray:
        asked = np.array([space.place(one) for one in these])
        expected, doubt = predicted(places, values, asked)
        kl, refusal = (expected - 0.5 * doubt).T
        far = np.sqrt(_squares(asked, places).min(axis=1))
        # A step of nothing tells nothing.
        excess = np.maximum(far - radius, 0) + np.maximum(0.1 * radius - far, 0)
        return kl + 5 * np.maximum(refusal - allowed, 0) + 10 * excess

    ranges = space.ranges()
    alive = [dict(one.parameters) for one in known[:KEPT]]
    worth = merit(alive)
    for generation in range(GENERATIONS):
        scale = 0.15 * 0.85**generation
        made = [_child(one, ranges, scale, random) for one in alive for _ in range(CHILDREN)]
        alive, worth = alive + made, np.concatenate([worth, merit(made)])
        best = np.argsort(worth, kind="stable")[:KEPT]
        alive, worth = [alive[place] for place in best], worth[best]
    return alive[0]


def _child(
    parent: Parameters,
    ranges: dict[str, tuple[float, float]],
    scale: float,
    random: np.random.Generator,
) -> dict[str, Any]:
    """Parameters with about half of the numbers moved, inside their ranges."""
    moved = dict(parent)
    for name, (low, high) in ranges.items():
        if random.random() < 0.5:
            value = moved[name] + scale * (high - low) * random.normal()
            moved[name] = float(min(max(value, low), high))
    return moved


def _squares(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Squared distances: (a, f), (b, f) -> (a, b)."""
    return ((one[:, None] - other[None]) ** 2).sum(axis=-1)
