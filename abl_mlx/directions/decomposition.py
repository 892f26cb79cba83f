"""What a refusal direction is made of: angles with known directions, categories, layers, topics.

All of it is float64 NumPy. Shapes: d the width of the stream, K categories, N_c prompts in one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from abl_mlx.directions import estimators

Array = np.ndarray

#: Category -> states (N_c, d).
ByCategory = Mapping[str, Array]

#: The smallest number of prompts of a category that is looked at.
FEWEST = 2

#: How often categories are shuffled for the share that chance gives.
SHUFFLES = 30


def cosine(direction: Array, basis: Array) -> float:
    """The cosine of a unit vector (d,) with another vector (d,), or with a subspace (k, d).

    With a subspace it is the length of the projection, which has no sign.
    """
    rows = np.atleast_2d(np.asarray(basis, np.float64))
    if len(rows) == 1:
        return float(np.asarray(direction, np.float64) @ estimators.unit(rows[0]))
    return math.sqrt(inside(direction, rows))


def chance(width: int) -> float:
    """The standard deviation of the cosine of two random directions in d dimensions: 1/√d."""
    return 1 / math.sqrt(width)


def matrix(rows: Array) -> Array:
    """The cosines of all pairs of vectors, (m, d) -> (m, m)."""
    units = estimators.unit(rows)
    return np.asarray(units @ units.T)


def inside(direction: Array, rows: Array) -> float:
    """The share of a unit vector's squared length in the span of rows, ‖P r‖², 0 to 1."""
    direction = np.asarray(direction, np.float64)
    along = direction - estimators.without(direction, rows)
    return float(along @ along)


# --- categories --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cone:
    """The directions of the harmful categories: D_c = mean of the category − harmless mean.

    Attributes:
        names: the K categories.
        differences: (K, d), D_c.
        counts: N_c.
        noise: for each category the share of |D_c|² that the spread of its prompts and of the
            harmless ones explains: (tr S_c / N_c + tr S_G / M) / |D_c|².
        spreads, harmless_spread: tr S_c / N_c, and tr S_G / M.
    """

    names: tuple[str, ...]
    differences: Array
    counts: tuple[int, ...]
    noise: tuple[float, ...]
    spreads: tuple[float, ...]
    harmless_spread: float

    @property
    def cosines(self) -> Array:
        """(K, K)."""
        return matrix(self.differences)

    @property
    def effective_rank(self) -> float:
        """exp(entropy of the normalized singular values) of the unit directions, 1 to K."""
        values = np.linalg.svd(estimators.unit(self.differences), compute_uv=False)
        return estimators.Spectrum(values, np.empty((0, 0))).effective_rank

    @property
    def common(self) -> float:
        """The share of the categories' differences that they have in common, 0 to 1.

        With D̄ the mean of D_c, the mean of |D_c|² is |D̄|² plus the mean of |D_c − D̄|². The first
        is common to all categories, the second is their own. Both hold noise of the sampled
        prompts, which is taken off: with n_c = tr S_c / N_c and g = tr S_G / M, the first holds
        Σ n_c / K² + g and the second (1 − 1/K) Σ n_c / K.
        """
        count = len(self.names)
        own_noise = np.array(self.spreads)
        mean = self.differences.mean(axis=0)
        apart = ((self.differences - mean) ** 2).sum(axis=1).mean()
        shared = float(mean @ mean) - own_noise.sum() / count**2 - self.harmless_spread
        own = float(apart) - (1 - 1 / count) * own_noise.mean()
        shared, own = max(shared, 0.0), max(own, 0.0)
        return shared / max(shared + own, 1e-300)


def cone(harmful: ByCategory, harmless: Array) -> Cone | None:
    """The directions of the categories of harmful prompts; None with fewer than two categories.

    Args:
        harmful: states by category; those with fewer than `FEWEST` prompts are left out.
        harmless: (M, d), states of all harmless prompts.
    """
    names = tuple(name for name, states in harmful.items() if len(states) >= FEWEST)
    if len(names) < 2:
        return None
    center = np.asarray(harmless, np.float64).mean(axis=0)
    differences = (
        np.stack([np.asarray(harmful[n], np.float64).mean(axis=0) for n in names]) - center
    )
    own = tuple(_noise(harmful[name]) for name in names)
    other = _noise(harmless)
    lengths = (differences**2).sum(axis=1)
    noise = tuple(
        float((mine + other) / max(length, 1e-300))
        for mine, length in zip(own, lengths, strict=True)
    )
    counts = tuple(len(harmful[name]) for name in names)
    return Cone(names, differences, counts, noise, own, other)


def _noise(states: Array) -> float:
    """tr S / N, the expected squared length of the error of a mean."""
    if len(states) < 2:
        return 0.0
    return float(np.asarray(states, np.float64).var(axis=0, ddof=1).sum() / len(states))


# --- topics ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topics:
    """How much of a direction lies among the topics of harmless prompts.

    Attributes:
        share: ‖P r‖², P being the projection on the span of the categories' means less the mean of
            these means.
        dimensions: of that span.
        chance: the mean share with shuffled categories. States fill few of their d dimensions, and
            means of few prompts are noisy, so it is far more than dimensions / d.
    """

    share: float
    dimensions: int
    chance: float


def topics(direction: Array, harmless: ByCategory) -> Topics | None:
    """The share of a direction in the span of harmless topics; None with fewer than two."""
    kept = {name: states for name, states in harmless.items() if len(states) >= FEWEST}
    if len(kept) < 2:
        return None
    every = np.concatenate([np.asarray(states, np.float64) for states in kept.values()])
    of = np.repeat(np.arange(len(kept)), [len(states) for states in kept.values()])
    rows = _centred_means(every, of)
    dimensions = int(np.linalg.matrix_rank(rows))
    if not dimensions:
        return None
    random = np.random.default_rng(0)
    shuffled = [
        inside(direction, _centred_means(every, random.permutation(of))) for _ in range(SHUFFLES)
    ]
    return Topics(inside(direction, rows), dimensions, float(np.mean(shuffled)))


def _centred_means(states: Array, of: Array) -> Array:
    """The mean of each group of states less the mean of these means, (N, d), (N,) -> (K, d)."""
    rows = np.stack([states[of == group].mean(axis=0) for group in range(of.max() + 1)])
    centred: Array = rows - rows.mean(axis=0)
    return centred


def matched(harmful: ByCategory, harmless: ByCategory) -> tuple[Array, list[str]] | None:
    """The direction between prompts of the same topic, for categories that both sets have.

    It is the mean over these categories of (mean of the harmful prompts − mean of the harmless
    ones), in which what a topic adds to both cancels: the least-squares coefficient of the set in a
    regression on set and category, each category with the same weight.

    Returns:
        The vector (d,) and the categories; None with fewer than two of them.
    """
    first, second = _means(harmful), _means(harmless)
    shared = [name for name in first if name in second]
    if len(shared) < 2:
        return None
    return np.mean([first[name] - second[name] for name in shared], axis=0), shared


def contrast(high: Array, low: Array) -> Array:
    """The mean difference of paired states, (N, d), (N, d) -> (d,)."""
    return np.asarray((np.asarray(high, np.float64) - np.asarray(low, np.float64)).mean(axis=0))


def lead(basis: Array, difference: Array) -> Array:
    """The unit vector (d,) of a subspace (k, d) along which the means differ; of a row, itself."""
    rows = np.atleast_2d(np.asarray(basis, np.float64))
    if len(rows) == 1:
        return estimators.unit(rows[0])
    along = np.asarray(difference, np.float64) - estimators.without(difference, rows)
    return estimators.unit(along)


def by_category(states: Array, categories: Sequence[str]) -> dict[str, Array]:
    """States (N, d) by the categories of their prompts; those without one are left out."""
    names = list(dict.fromkeys(name for name in categories if name))
    of = np.array(categories)
    return {name: states[of == name] for name in names}


def _means(states: ByCategory) -> dict[str, Array]:
    return {
        name: np.asarray(rows, np.float64).mean(axis=0)
        for name, rows in states.items()
        if len(rows) >= FEWEST
    }
