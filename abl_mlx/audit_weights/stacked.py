"""Two removals of one direction each, one after the other, recovered from the writers' changes.

The first makes (I − α r rᵀ) W of a writer W, the second (I − β s sᵀ) of that. Whatever r and s are,
the change lies in their plane: with a basis U of the plane, A = UᵀW and B = UᵀW', it is
B = (I − β s sᵀ)(I − α r rᵀ) A. So r and s, two angles in the plane, are those with the least
‖B − (I − β s sᵀ)(I − α r rᵀ) A‖² over all writers, each with the best α and β of its own. Where
r and s are orthogonal and α and β are the same in every writer, this is one removal of a plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from abl_mlx.audit_weights import spectrum
from abl_mlx.audit_weights.pairs import Pair, both, plain

#: Least strength of a removal in a writer, and how many standard errors it is from none.
_STRENGTH, _SURE = 0.05, 6.0

#: The two explain a writer's change if, rounding apart, they leave at most these shares of its
#: squares in the plane, and of all its squares. Directions of single layers may nearly lie in a
#: plane.
_LEFT, _OUTSIDE = 0.02, 0.05

#: Angles that are tried, and how often the best are refined.
_ANGLES, _REFINED = 36, 24

#: Least sine of the two directions' angle, and how often strengths are found in turn.
_NEAREST, _ROUNDS = 0.2, 8

#: Strengths that differ by more are two; so are directions whose cosine is larger.
_APART, _OBLIQUE = 0.1, 0.1


@dataclass(frozen=True)
class Planes:
    """What the writers hold in a plane before and after, as sums over their columns.

    Attributes:
        turns: (N, 2, 2), maps coordinates of the stream's plane to those of a writer's output.
        aa, ba, bb: (N, 2, 2), A Aᵀ, B Aᵀ and B Bᵀ.
        whole: (N,), the squares of the whole change, without what rounding makes of it.
        noise: (N,), the squares of the change along a usual direction outside of the plane.
        lines: (N,), the writers' columns.
    """

    turns: np.ndarray
    aa: np.ndarray
    ba: np.ndarray
    bb: np.ndarray
    whole: np.ndarray
    noise: np.ndarray
    lines: np.ndarray


@dataclass(frozen=True)
class Stacked:
    """Two removals, one after the other.

    Attributes:
        directions: (2, d), in the order of the removals.
        strengths: (N, 2), of each writer; 0 where it lost nothing.
        errors: (N, 2), their standard errors.
        squares: (N,), the squares of each writer's change that they explain.
        cosine: |cos| of the two directions.
    """

    directions: np.ndarray
    strengths: np.ndarray
    errors: np.ndarray
    squares: np.ndarray
    cosine: float

    @property
    def two(self) -> bool:
        """Whether these are two removals, and not one of a plane."""
        differ = self._both & (np.abs(np.diff(self.strengths, axis=1)[:, 0]) > _APART)
        oblique = self._both.sum() if self.cosine > _OBLIQUE else 0
        return bool(max(self._one.sum(), differ.sum(), oblique) >= 2)

    @property
    def ordered(self) -> bool:
        """Whether a writer lost both, along directions that are not orthogonal."""
        return self.cosine > _OBLIQUE and bool(self._both.any())

    @property
    def mirrored(self) -> bool:
        """Whether two others, with the same strengths in the other order, make the same edit.

        That is so if every writer lost the same: a map of the plane is the product of two removals
        with given strengths in either order.
        """
        each = self.strengths[self._both]
        alike = self.ordered and not self._one.any() and bool((np.ptp(each, axis=0) < _APART).all())
        return alike and bool(abs(np.diff(each.mean(axis=0))[0]) > _APART)

    @property
    def _both(self) -> np.ndarray:
        """Which writers lost both, (N,)."""
        found: np.ndarray = (self.strengths != 0).all(axis=1)
        return found

    @property
    def _one(self) -> np.ndarray:
        """Which writers lost one of the two alone, (N,)."""
        found: np.ndarray = (self.strengths != 0).any(axis=1) & ~self._both
        return found


def planes(pairs: Sequence[Pair], basis: np.ndarray) -> Planes:
    """Read all writers once more, along a plane of the stream, (2, d)."""
    turns, sums, noise, whole = [], [], [], []
    for pair in pairs:
        gain = pair[0].gain
        flat = basis if gain is None else basis * gain
        plane, turn = np.linalg.qr(flat.astype(np.float64).T)
        random = np.random.default_rng(0).standard_normal((8, pair[1].width))
        random -= random @ plane @ plane.T
        random /= np.linalg.norm(random, axis=1, keepdims=True)
        rows = np.concatenate([plane.T, random]).astype(np.float32)
        aa, ba, bb = (np.zeros((2, 2)) for _ in range(3))
        along, squares = np.zeros(8), 0.0
        for before, after in both(plain(pair)):
            squares += float(np.square(after - before).sum(dtype=np.float64))
            a, b = (rows @ one for one in (before, after))
            along += ((a[2:] - b[2:]) ** 2).sum(axis=1)
            a, b = (one[:2].astype(np.float64) for one in (a, b))
            aa, ba, bb = aa + a @ a.T, ba + b @ a.T, bb + b @ b.T
        turns.append(turn)
        sums.append((aa, ba, bb))
        noise.append(float(np.median(along)))
        whole.append(squares - noise[-1] * pair[1].width)
    aa, ba, bb = (np.stack(one) for one in zip(*sums, strict=True))
    lines = np.array([new.lines for _, new in pairs], float)
    return Planes(np.stack(turns), aa, ba, bb, np.array(whole), np.array(noise), lines)


def possible(part: np.ndarray) -> bool:
    """Whether two writers lost a part of the second common direction, as after two removals.

    Args:
        part: (N, m), as of `found`.
    """
    return part.shape[1] > 1 and bool(part[:, 1].sum() > 1)


def found(pairs: Sequence[Pair], part: np.ndarray, common: np.ndarray) -> Stacked | None:
    """Two removals, one after the other; None where there is one, or none.

    Args:
        pairs: the writers, which are read once more if it may be so.
        part: (N, m), whether each writer lost a part of each common direction.
        common: (m, d), the directions that the changes have most in common, the commonest first.
    """
    if len(common) < 2 or not possible(part):
        return None
    two = fitted(planes(pairs, common[:2]), common[:2])
    return two if two is not None and two.two else None


def fitted(sums: Planes, basis: np.ndarray) -> Stacked | None:
    """The two removals that explain the writers' changes in a plane; None if none do.

    Args:
        sums: what the writers hold in the plane.
        basis: the plane, (2, d), orthonormal.
    """
    grid = np.pi * np.arange(_ANGLES) / _ANGLES
    best = min((_cost(sums, (one, two))[0], one, two) for one in grid for two in grid)
    step, angles = np.pi / _ANGLES, best[1:]
    for _ in range(_REFINED):
        near = [
            (angles[0] + i * step, angles[1] + j * step) for i in (-1, 0, 1) for j in (-1, 0, 1)
        ]
        better = min(near, key=lambda one: _cost(sums, one)[0])
        step, angles = (step / 2 if better == angles else step), better
    _, strengths, left = _cost(sums, angles)
    change = np.maximum(_trace(sums.aa - 2 * sums.ba + sums.bb), 1e-30)
    changed = change > 8 * sums.noise
    signal = np.maximum(left - 2 * sums.noise, 0)
    beside = sums.whole - (change - left)
    apart = (signal > _LEFT * change) | (beside > _OUTSIDE * sums.whole)
    if not changed.any() or apart[changed].any():
        return None
    vectors = _vectors(sums, angles)
    along = np.einsum("nei,nij,nej->ne", vectors, sums.aa, vectors)
    errors = np.sqrt(np.maximum(left, 1e-12 * change)[:, None] / np.maximum(along, 1e-30))
    errors = errors / np.sqrt(sums.lines)[:, None]
    sure = np.abs(strengths) >= np.maximum(_STRENGTH, _SURE * errors)
    strengths = np.where(sure & changed[:, None], strengths, 0.0)
    if ((strengths != 0).sum(axis=0) < 2).any():
        return None
    return Stacked(
        _unit(angles) @ basis,
        strengths,
        errors,
        np.maximum(change - left, 0),
        float(abs(np.cos(angles[0] - angles[1]))),
    )


def sentence(two: Stacked, layers: Sequence[int]) -> str:
    """What was removed, as a clause.

    Args:
        layers: of each writer; -1 for an embedding.
    """
    said = []
    for strengths in two.strengths.T:
        taken = strengths != 0
        some = sorted({layer for layer, one in zip(layers, taken, strict=True) if one} - {-1})
        low, high = float(strengths[taken].min()), float(strengths[taken].max())
        about = f"{low:.2f}" if high - low <= _APART else f"{low:.2f} to {high:.2f}"
        said.append(
            f"a direction from {int(taken.sum())} writers in layers "
            f"{spectrum.spans(some) or 'none'} at strength {about}"
        )
    order = ", then " if two.ordered else ", and, before it or after it, "
    line = f"two edits, one after the other: {order.join(said)}; |cos| of the two {two.cosine:.2f}"
    if two.mirrored:
        line += " (two others with these strengths in the other order would make the same edit)"
    return line


def _cost(sums: Planes, angles: Sequence[float]) -> tuple[float, np.ndarray, np.ndarray]:
    """How badly two directions explain all writers; the best strengths (N, 2); what is left (N,).

    The strengths are found in turn, each as a regression with the other one given.
    """
    alpha = np.zeros(len(sums.aa))
    beta = np.zeros(len(sums.aa))
    if abs(np.sin(angles[0] - angles[1])) < _NEAREST:
        return np.inf, np.zeros((len(alpha), 2)), alpha
    vectors = _vectors(sums, angles)
    first, second = (one[:, :, None] * one[:, None, :] for one in vectors.swapaxes(0, 1))
    ab = sums.ba.swapaxes(1, 2)
    for _ in range(_ROUNDS):
        rest = np.eye(2) - beta[:, None, None] * second
        along = _trace(rest @ first @ sums.aa @ first @ rest)
        alpha = _trace((sums.aa @ rest - ab) @ rest @ first) / np.maximum(along, 1e-30)
        done = np.eye(2) - alpha[:, None, None] * first
        before = done @ sums.aa @ done
        beta = _trace(second @ (before - sums.ba @ done)) / np.maximum(
            _trace(second @ before), 1e-30
        )
    made = (np.eye(2) - beta[:, None, None] * second) @ done
    left = _trace(sums.bb) - 2 * _trace(made @ ab) + _trace(made @ sums.aa @ made.swapaxes(1, 2))
    left = np.maximum(left, 0.0)
    change = _trace(sums.aa - sums.ba - ab + sums.bb)
    cost = float((left / (change + 8 * sums.noise + 1e-30)).sum())
    return cost, np.stack([alpha, beta], axis=1), left


def _vectors(sums: Planes, angles: Sequence[float]) -> np.ndarray:
    """The two directions in each writer's coordinates, (N, 2, 2), of unit length."""
    vectors = np.einsum("nij,ej->nei", sums.turns, _unit(angles))
    return vectors / np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-30)


def _unit(angles: Sequence[float]) -> np.ndarray:
    return np.array([[np.cos(one), np.sin(one)] for one in angles])


def _trace(forms: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.einsum("nii->n", forms)
    return found
