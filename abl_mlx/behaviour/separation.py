"""How well scores tell two groups apart: the AUC with its interval, and shuffled labels.

Nothing in this module imports MLX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating]


def auc(high: Scores, low: Scores) -> float:
    """The probability that one of the first group scores above one of the second.

    This is the area under the ROC curve. Equal scores count half.
    """
    ordered = np.sort(low)
    below = np.searchsorted(ordered, high, "left") + np.searchsorted(ordered, high, "right")
    return float(below.mean() / 2 / len(ordered))


def auc_interval(area: float, m: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The score interval of an AUC from groups of m and n; it is right at 0 and 1, too.

    The variance is Hanley and McNeil's (Radiology 143, 1982) with (m + n)/2 in place of m and n,
    taken at the limit itself: method 5 of Newcombe 2006, Statistics in Medicine 25:559-573.

    Args:
        z: normal quantile; 1.96 for 95%.
    """

    def off(limit: float) -> float:
        half = (m + n) / 2 - 1
        spread = 1 + half * (1 - limit) / (2 - limit) + half * limit / (1 + limit)
        return abs(area - limit) - z * math.sqrt(max(0.0, limit * (1 - limit) * spread / (m * n)))

    return _root(off, 0.0, area), _root(off, 1.0, area)


def _root(function: Callable[[float], float], outside: float, inside: float) -> float:
    """Where a function that is positive outside and not inside changes its sign."""
    if function(outside) <= 0:
        return outside
    for _ in range(60):
        middle = (outside + inside) / 2
        if function(middle) > 0:
            outside = middle
        else:
            inside = middle
    return inside


def shuffled_aucs(high: Scores, low: Scores, *, times: int = 1000, seed: int = 0) -> Scores:
    """AUCs of the same scores with shuffled labels: what chance gives."""
    chance = np.random.default_rng(seed)
    every = np.concatenate([high, low])
    rows = (chance.permutation(every) for _ in range(times))
    return np.array([auc(row[: len(high)], row[len(high) :]) for row in rows])


def right_of_the_median(high: Scores, low: Scores) -> int:
    """How many scores are on their group's side of the median of all.

    No label is used to place the median. It takes away what all scores have in common.
    """
    middle = np.median(np.concatenate([high, low]))
    return int((high > middle).sum() + (low <= middle).sum())


def mean_difference(high: Scores, low: Scores) -> tuple[float, tuple[float, float]]:
    """The difference of the groups' means, with its normal 95% interval (Welch's variance)."""
    difference = float(high.mean() - low.mean())
    if min(len(high), len(low)) < 2:
        return difference, (-math.inf, math.inf)
    half = 1.96 * math.sqrt(sum(float(one.var(ddof=1)) / len(one) for one in (high, low)))
    return difference, (difference - half, difference + half)


def growth(
    before: Sequence[Sequence[float | None]], after: Sequence[Sequence[float | None]]
) -> tuple[float, tuple[float, float]] | None:
    """How much the difference of two groups' means has grown, score by score, with its interval.

    Args:
        before, after: the scores of the first group and of the second; None for one that is not
            known, which is left out.

    Returns:
        None if the two are not of the same prompts, or nothing is left of a group.
    """
    changes = []
    for old, new in zip(before, after, strict=True):
        if len(old) != len(new):
            return None
        pairs = zip(old, new, strict=True)
        changes.append(np.array([b - a for a, b in pairs if a is not None and b is not None]))
    high, low = changes
    return mean_difference(high, low) if len(high) and len(low) else None
