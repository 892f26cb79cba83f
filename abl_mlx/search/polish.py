"""Small steps from a good edit that a search has found to one with a lower KL.

A regression model of nearby trials predicts the scores of edits (kernel regression, as in Gaussian
processes). An evolutionary search in a trust region finds the edit with the best prediction,
without running the network, and that edit is tried next. Everything depends only on earlier trials
and a seed, so a continued search takes the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from abl_mlx.search.screening import LEAST_KL, Trial
from abl_mlx.search.space import Parameters, Space

#: The number of trials around the parent to which the regression model is fitted.
NEAR = 60

#: Generations of the evolutionary search, how many edits survive each, and their children.
GENERATIONS, KEPT, CHILDREN = 24, 8, 6

#: Radii of the trust region: how far a step may lead from all trials, per strength.
RADII = (0.05, 0.1, 0.2)

#: Refusal scores below this count as equal.
LEAST_REFUSAL = 1e-4


def predicted(
    places: np.ndarray, values: np.ndarray, asked: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predict values at other places, by a linear fit and kernel ridge regression of its residuals.

    Args:
        places: (n, f), the places of known values.
        values: (n, m), the known values.
        asked: (a, f), the places of the predictions.

    Returns:
        The predicted values and their standard deviations, (a, m) each.
    """
    middle = places.mean(axis=0)
    left, right = places - middle, asked - middle
    # A linear fit, regularized because there may be few trials.
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
    """The logarithms of KL and refusal score of each trial, (n, 2)."""
    return np.log([
        [max(one.screened.kl, LEAST_KL), max(one.screened.refusal, LEAST_REFUSAL)]
        for one in trials
    ])  # fmt: skip


def step(
    space: Space,
    trials: Sequence[Trial],
    parent: Trial,
    aim: float,
    number: int,
    random: np.random.Generator,
) -> dict[str, Any] | None:
    """The edit near a trial with the lowest predicted KL at about some refusal score.

    Args:
        space: the parameters of edits.
        trials: the trials so far.
        parent: the trial to start from.
        aim: the largest refusal score that the edit may have.
        number: how many such steps there were, which selects the radius.
        random: the random generator.

    Returns:
        The edit's parameters; None if there are too few trials around the parent.
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
    allowed = math.log(max(aim, LEAST_REFUSAL))
    radius = RADII[number % len(RADII)] * math.sqrt(len(start))

    def merit(these: Sequence[Parameters]) -> np.ndarray:
        asked = np.array([space.place(one) for one in these])
        expected, doubt = predicted(places, values, asked)
        kl, refusal = (expected - 0.5 * doubt).T
        far = np.sqrt(_squares(asked, places).min(axis=1))
        # Steps that are too small show nothing new, so they are penalized like too large ones.
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
    """The parameters with about half of the numbers changed at random, within their ranges."""
    moved = dict(parent)
    for name, (low, high) in ranges.items():
        if random.random() < 0.5:
            value = moved[name] + scale * (high - low) * random.normal()
            moved[name] = float(min(max(value, low), high))
    return moved


def _squares(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Squared distances: (a, f), (b, f) -> (a, b)."""
    return ((one[:, None] - other[None]) ** 2).sum(axis=-1)
