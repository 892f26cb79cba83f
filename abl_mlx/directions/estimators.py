"""From residual states to directions: the mathematics of every method, in float64 NumPy.

Shapes: N prompts of one set, d dimensions of the residual stream, k directions. States are (N, d)
of one layer and token, and may be memory-mapped. Directions come as unit vectors (d,), subspaces as
orthonormal rows (k, d), each row turned so that harmful prompts lie on its positive side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

#: Magnitudes in a state above this quantile of its own are cut down to it by `winsorized`.
WINSORIZED = 0.99

# The penalty of the probe, on states whose root mean square distance from their mean is 1.
_PENALTY = 1e-2


# --- means -------------------------------------------------------------------------------------


def winsorized(states: Array, quantile: float = WINSORIZED) -> Array:
    """States (…, d) with every magnitude cut down to a quantile of the state's own magnitudes.

    Tames massive activations: a few dimensions hundreds of times larger than the rest in every
    state (Sun et al. 2024, arXiv 2402.17762), whose chance differences outweigh all others.
    Heretic's option ``winsorization_quantile`` does the same.
    """
    limit = np.quantile(np.abs(states), quantile, axis=-1, keepdims=True)
    return np.clip(states, -limit, limit)


def median(states: Array) -> Array:
    """The median of each dimension: (N, d) -> (d,). Prompts that are far out do not move it."""
    return np.median(np.asarray(states, np.float64), axis=0)


def unit(vectors: Array) -> Array:
    """Vectors (…, d) divided by their lengths; zero vectors stay zero."""
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)


def without(vectors: Array, others: Array) -> Array:
    """Vectors (…, d) less their part in the span of ``others``, (m, d) or (d,).

    With the harmless mean for ``others`` this is "projected abliteration": what the difference of
    means has along the harmless mean says how strongly prompts are represented, not that they are
    refused (grimjim 2025, https://huggingface.co/blog/grimjim/projected-abliteration).
    """
    others = np.atleast_2d(np.asarray(others, np.float64))
    basis = np.linalg.svd(others, full_matrices=False)
    inside = basis[2][basis[1] > 1e-9 * max(basis[1][0], 1e-30)]
    vectors = np.asarray(vectors, np.float64)
    return vectors - vectors @ inside.T @ inside


# --- subspaces ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """Singular vectors of some rows, strongest first.

    Attributes:
        values: (m,) singular values.
        vectors: (m, d) right singular vectors.
    """

    values: Array
    vectors: Array

    @property
    def explained(self) -> Array:
        """(m,) the share of the rows' summed squares along each vector."""
        squares = self.values**2
        return squares / max(float(squares.sum()), 1e-300)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the normalized singular values (Roy & Vetterli 2007)."""
        shares = self.values / max(float(self.values.sum()), 1e-300)
        shares = shares[shares > 0]
        return float(np.exp(-(shares * np.log(shares)).sum()))


def spectrum(rows: Array) -> Spectrum:
    """Singular values and right singular vectors of (N, d), through the smaller Gram matrix."""
    rows = np.asarray(rows, np.float64)
    if rows.shape[0] > rows.shape[1]:
        values, vectors = np.linalg.eigh(rows.T @ rows)
        return Spectrum(np.sqrt(np.maximum(values[::-1], 0)), vectors.T[::-1])
    values, left = np.linalg.eigh(rows @ rows.T)
    values = np.sqrt(np.maximum(values[::-1], 0))
    # Vectors of values that are nothing but rounding have no direction, and are left out.
    kept = values > 1e-7 * max(float(values[0]), 1e-300)
    return Spectrum(values[kept], unit(left.T[::-1][kept] @ rows))


def subspace(rows: Array, rank: int, toward: Array | None = None) -> tuple[Array, Spectrum]:
    """The top singular vectors of (N, d), and the whole spectrum.

    Of harmful states less the harmless mean this is a subspace that holds as much as ``rank``
    directions can of what sets harmful prompts apart (docs/architecture.md).

    Args:
        rank: how many; fewer come back where the rows have no more.
        toward: (d,) turns each vector to its side; the rows' mean without it.
    """
    whole = spectrum(rows)
    top = whole.vectors[:rank]
    side = top @ (np.asarray(rows, np.float64).mean(axis=0) if toward is None else toward)
    return top * np.where(side < 0, -1.0, 1.0)[:, None], whole


def explained(states: Array, center: Array, basis: Array) -> float:
    """The share of Σ‖h − center‖² that lies in the span of orthonormal (k, d) or (d,)."""
    apart = np.asarray(states, np.float64) - center
    along = apart @ np.atleast_2d(basis).T
    return float((along**2).sum() / max(float((apart**2).sum()), 1e-300))


def plane(harmful: Array, harmless: Array, direction: Array) -> tuple[Array, Array]:
    """Two sets of states in a plane, to be drawn: (N, d), (M, d) -> (N, 2), (M, 2).

    Across is the component along the direction, from 0 at the middle between the sets' means. Up
    is what else differs most among all states, in their own units: the first principal component
    of what is orthogonal to the direction.
    """
    along = unit(direction)
    sets = [np.asarray(one, np.float64) for one in (harmful, harmless)]
    middle = (sets[0].mean(axis=0) + sets[1].mean(axis=0)) / 2
    rest = np.concatenate([without(one - one.mean(axis=0), along) for one in sets])
    found = spectrum(rest).vectors[:1]
    up = found[0] if len(found) else np.zeros_like(along)
    first, second = (np.stack([(one - middle) @ along, (one - middle) @ up], 1) for one in sets)
    return first, second


def interpolated(first: Array, second: Array, share: float) -> Array:
    """Directions (k, d) between two sets of them: ``share`` of the way to the second.

    Single directions are mixed as they are, as heretic does. Bases of subspaces are first turned
    onto one another (orthogonal Procrustes), as they are known up to a rotation only.

    Returns:
        orthonormal (k, d).
    """
    if len(first) > 1:
        left, _, right = np.linalg.svd(first @ second.T)
        second = (left @ right) @ second
    mixed = (1 - share) * first + share * second
    q, r = np.linalg.qr(mixed.T)
    return (q * np.where(np.diag(r) < 0, -1.0, 1.0)).T


# --- the probe ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """Logistic regression: P(harmful | h) = 1 / (1 + exp(−(w·h + b))).

    Attributes:
        weight: (d,) w.
        bias: b.
    """

    weight: Array
    bias: float

    def scores(self, states: Array) -> Array:
        """Log-odds that the prompts behind states (N, d) are harmful: (N,)."""
        return np.asarray(states, np.float64) @ self.weight + self.bias


def probe(
    harmful: Array, harmless: Array, *, penalty: float = _PENALTY, rounds: int = 100
) -> Probe:
    """Fit a linear probe by Newton's method on the mean log-loss plus ``penalty`` ‖w‖² / 2.

    Both sets weigh the same, whatever their sizes. States are centred and divided by their root
    mean square length first, which is what the penalty is in units of; w and b are of the states
    as they are. The weight lies in the span of the states, so the problem is solved there, in at
    most N + M dimensions. It is the direction that tells the sets apart best, Σ⁻¹(μ₁ − μ₀) for
    Gaussian states of covariance Σ, and differs from the difference of means where noise does.
    """
    states = np.concatenate([np.asarray(harmful, np.float64), np.asarray(harmless, np.float64)])
    labels = np.repeat([1.0, 0.0], [len(harmful), len(harmless)])
    weights = np.repeat([0.5 / len(harmful), 0.5 / len(harmless)], [len(harmful), len(harmless)])
    center = states.mean(axis=0)
    states -= center
    scale = max(float(np.sqrt((states**2).sum(axis=1).mean())), 1e-30)
    basis = spectrum(states).vectors
    inside = np.concatenate([states @ basis.T / scale, np.ones((len(states), 1))], axis=1)
    ridge = np.full(inside.shape[1], penalty)
    ridge[-1] = 0.0
    found = np.zeros(inside.shape[1])

    def loss(at: Array) -> float:
        odds = inside @ at
        return float(
            (weights * (np.logaddexp(0, odds) - labels * odds)).sum() + (ridge * at**2).sum() / 2
        )

    for _ in range(rounds):
        shares = 0.5 * (1 + np.tanh(inside @ found / 2))
        gradient = inside.T @ (weights * (shares - labels)) + ridge * found
        if np.abs(gradient).max() < 1e-12:
            break
        curvature = inside.T @ (inside * (weights * shares * (1 - shares))[:, None])
        step = np.linalg.solve(curvature + np.diag(ridge + 1e-12), gradient)
        size, before = 1.0, loss(found)
        while loss(found - size * step) > before and size > 1e-6:
            size /= 2
        found = found - size * step
    weight = found[:-1] @ basis / scale
    return Probe(weight, float(found[-1] - weight @ center))


def accuracy(harmful: Array, harmless: Array) -> float:
    """The share of log-odds on the right side of 0, both sets weighing the same."""
    return float(((harmful > 0).mean() + (harmless <= 0).mean()) / 2)


def auc(harmful: Array, harmless: Array) -> float:
    """The chance that a harmful prompt scores above a harmless one; ties count half."""
    ordered = np.sort(harmless)
    below = np.searchsorted(ordered, harmful, "left") + np.searchsorted(ordered, harmful, "right")
    return float(below.mean() / 2 / len(ordered))


# --- over-refusal ------------------------------------------------------------------------------


def over_refusal(harmful: Array, borderline: Array, harmless: Array) -> Array:
    """Borderline minus harmless, made orthogonal to harmful minus borderline: means (…, d).

    With b = borderline − harmless and t = harmful − borderline it is b − (b·t / t·t) t. Taken out
    of the stream, it leaves harmful and borderline prompts exactly as far apart as they were, and
    of what sets borderline prompts apart from harmless ones no more than their part along t.
    """
    apart = unit(harmful - borderline)
    other = np.asarray(borderline, np.float64) - harmless
    return other - (other * apart).sum(axis=-1, keepdims=True) * apart
