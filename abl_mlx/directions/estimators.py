"""Estimating directions from residual states: the mathematics of each method, in float64 NumPy.

Shapes: N prompts of one set, width d of the residual stream, k directions. States are (N, d) for
one layer and token position, and may be memory-mapped. A direction is a unit vector (d,), a
subspace is given by orthonormal rows (k, d); each has the sign for which harmful prompts lie on its
positive side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

#: What a method finds in all states of one layer and position: (d,) or (k, d), and facts by name.
Facts = tuple[Array, dict[str, float]]

#: `winsorized` limits the magnitudes in a state to this quantile of that state's magnitudes.
WINSORIZED = 0.99

# The probe's penalty, for states whose root mean square distance from their mean is 1.
_PENALTY = 1e-2


# --- means -------------------------------------------------------------------------------------


def winsorized(states: Array, quantile: float = WINSORIZED) -> Array:
    """States (…, d) with every magnitude limited to a quantile of the state's own magnitudes.

    This limits massive activations: a few dimensions that in every state are hundreds of times
    larger than the others (Sun et al. 2024, arXiv 2402.17762), so that their random differences
    outweigh all others. Heretic's option ``winsorization_quantile`` does the same.
    """
    limit = np.quantile(np.abs(states), quantile, axis=-1, keepdims=True)
    return np.clip(states, -limit, limit)


def median(states: Array) -> Array:
    """The median of each dimension, (N, d) -> (d,), which outlying prompts do not change."""
    return np.median(np.asarray(states, np.float64), axis=0)


def unit(vectors: Array) -> Array:
    """Vectors (…, d) divided by their lengths; zero vectors stay zero."""
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)


def without(vectors: Array, others: Array) -> Array:
    """Vectors (…, d) minus their projection on the span of ``others``, (m, d) or (d,).

    With the harmless mean as ``others`` this is "projected abliteration": the component of the
    difference of means along the harmless mean reflects how strongly prompts are represented, not
    whether they are refused (grimjim 2025,
    https://huggingface.co/blog/grimjim/projected-abliteration).
    """
    others = np.atleast_2d(np.asarray(others, np.float64))
    basis = np.linalg.svd(others, full_matrices=False)
    inside = basis[2][basis[1] > 1e-9 * max(basis[1][0], 1e-30)]
    vectors = np.asarray(vectors, np.float64)
    return vectors - vectors @ inside.T @ inside


def orthonormal(rows: Array) -> tuple[Array, Array]:
    """Orthonormal rows with the span of rows (k, d), each on the side of the row it is made of.

    Returns:
        The rows (k, d), and the length (k,) of each given row that is orthogonal to those before.
    """
    q, r = np.linalg.qr(rows.T)
    lengths = np.diag(r)
    return (q * np.where(lengths < 0, -1.0, 1.0)).T, np.abs(lengths)


def difference(harmful: Array, harmless: Array) -> Array:
    """Harmful mean minus harmless mean, (d,) each (Arditi et al. 2024)."""
    return np.asarray(harmful, np.float64) - harmless


def projected(harmful: Array, harmless: Array) -> Array:
    """The difference of two means (d,) without its component along the harmless mean."""
    return without(harmful - harmless, harmless)


def medians(harmful: Array, harmless: Array, rank: int) -> Facts:
    """The unit difference of the sets' medians, from states (N, d) and (M, d)."""
    return unit(median(harmful) - median(harmless)), {}


# --- subspaces ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """Singular values and vectors of a matrix, largest first.

    Attributes:
        values: (m,) singular values.
        vectors: (m, d) right singular vectors.
    """

    values: Array
    vectors: Array

    @property
    def explained(self) -> Array:
        """(m,), the share of the matrix's summed squares along each vector."""
        squares = self.values**2
        return squares / max(float(squares.sum()), 1e-300)

    @property
    def effective_rank(self) -> float:
        """exp(entropy of the normalized singular values) (Roy & Vetterli 2007)."""
        shares = self.values / max(float(self.values.sum()), 1e-300)
        shares = shares[shares > 0]
        return float(np.exp(-(shares * np.log(shares)).sum()))


def spectrum(rows: Array) -> Spectrum:
    """Singular values and right singular vectors of (N, d), from the smaller Gram matrix."""
    rows = np.asarray(rows, np.float64)
    if rows.shape[0] > rows.shape[1]:
        values, vectors = np.linalg.eigh(rows.T @ rows)
        return Spectrum(np.sqrt(np.maximum(values[::-1], 0)), vectors.T[::-1])
    values, left = np.linalg.eigh(rows @ rows.T)
    values = np.sqrt(np.maximum(values[::-1], 0))
    # Singular values that are only rounding errors are left out: their vectors are arbitrary.
    kept = values > 1e-7 * max(float(values[0]), 1e-300)
    return Spectrum(values[kept], unit(left.T[::-1][kept] @ rows))


def subspace(rows: Array, rank: int, toward: Array | None = None) -> tuple[Array, Spectrum]:
    """The top singular vectors of (N, d), and the whole spectrum.

    For harmful states minus the harmless mean, this subspace holds the largest part that ``rank``
    directions can hold of what distinguishes harmful prompts (docs/architecture.md).

    Args:
        rows: (N, d).
        rank: the number of vectors; fewer are returned if the matrix has a lower rank.
        toward: (d,); each vector gets the sign for which its product with it is positive. None for
            the mean of the rows.
    """
    whole = spectrum(rows)
    top = whole.vectors[:rank]
    side = top @ (np.asarray(rows, np.float64).mean(axis=0) if toward is None else toward)
    return top * np.where(side < 0, -1.0, 1.0)[:, None], whole


def singular_vectors(harmful: Array, harmless: Array, rank: int) -> Facts:
    """The top singular vectors (k, d) of harmful states minus the harmless mean."""
    rows = np.asarray(harmful, np.float64) - harmless.mean(axis=0, dtype=np.float64)
    top, whole = subspace(rows, rank)
    return top, {"effective_rank": whole.effective_rank}


def paired_singular_vectors(harmful: Array, harmless: Array, rank: int) -> Facts:
    """The top singular vectors (k, d) of the differences of paired states, H_i − G_i.

    The sets are paired in their order, as far as the smaller one goes (Gülmez 2025, arXiv
    2512.18901).
    """
    count = min(len(harmful), len(harmless))
    top, whole = subspace(np.asarray(harmful[:count], np.float64) - harmless[:count], rank)
    return top, {"effective_rank": whole.effective_rank}


def explained(states: Array, center: Array, basis: Array) -> float:
    """The share of Σ‖h − center‖² that lies in the span of orthonormal (k, d) or (d,)."""
    apart = np.asarray(states, np.float64) - center
    along = apart @ np.atleast_2d(basis).T
    return float((along**2).sum() / max(float((apart**2).sum()), 1e-300))


def plane(harmful: Array, harmless: Array, direction: Array) -> tuple[Array, Array]:
    """Two sets of states projected on a plane, for plots: (N, d), (M, d) -> (N, 2), (M, 2).

    The first coordinate is the component along the direction, 0 being the middle between the means
    of the two sets. The second is the first principal component of all states' parts orthogonal to
    the direction. Both are in the units of the states.
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
    """Directions between two candidates, at ``share`` of the way from the first to the second.

    Single directions are averaged with these weights, as heretic does. Bases of subspaces are first
    rotated to match each other (orthogonal Procrustes), because a basis is arbitrary up to a
    rotation.

    Args:
        first, second: (k, d).
        share: from 0 to 1.

    Returns:
        Orthonormal rows (k, d).
    """
    if len(first) > 1:
        left, _, right = np.linalg.svd(first @ second.T)
        second = (left @ right) @ second
    mixed = (1 - share) * first + share * second
    return orthonormal(mixed)[0]


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

    Both sets have the same weight, whatever their sizes. For the fit, states are centred and
    divided by their root mean square length, so ``penalty`` has no units; the returned w and b are
    for the original states. The weight lies in the span of the states, so the problem is solved
    there, in at most N + M dimensions. The weight is the direction that best separates the sets:
    for Gaussian states of covariance Σ it is Σ⁻¹(μ₁ − μ₀), which differs from the difference of
    means unless Σ is a multiple of the identity.

    Args:
        harmful: (N, d).
        harmless: (M, d).
        penalty: weight of the penalty.
        rounds: the largest number of Newton steps.
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


def probe_weight(harmful: Array, harmless: Array, rank: int) -> Facts:
    """The unit weight (d,) of a fitted probe, and the projection at which it is undecided."""
    found = probe(harmful, harmless)
    length = float(np.linalg.norm(found.weight))
    return found.weight / length, {"threshold": -found.bias / length}


def accuracy(harmful: Array, harmless: Array) -> float:
    """The share of log-odds on the right side of 0; both sets have the same weight."""
    return float(((harmful > 0).mean() + (harmless <= 0).mean()) / 2)


# --- over-refusal ------------------------------------------------------------------------------


def over_refusal(harmful: Array, borderline: Array, harmless: Array) -> Array:
    """The over-refusal direction: borderline − harmless, orthogonal to harmful − borderline.

    With b = borderline − harmless and t = harmful − borderline it is b − (b·t / t·t) t. Removing it
    from the stream keeps the distance between harmful and borderline means exactly, and leaves of
    the difference between borderline and harmless means only its part along t.

    Args:
        harmful, borderline, harmless: mean states, (…, d).
    """
    apart = unit(harmful - borderline)
    other = np.asarray(borderline, np.float64) - harmless
    return other - (other * apart).sum(axis=-1, keepdims=True) * apart
