"""The low end of the residual writers' spectrum: the mathematics of `abl-mlx audit`, in NumPy.

A writer's energy along a unit direction v is vᵀGv with G = W Wᵀ, where W (d, n) is its weight
multiplied by its gain. An edit with strength α multiplies the energy along its direction by
(1 − α)² in every edited writer. Nothing else does this to one direction in all writers. So the
search looks for a direction with low energy in many writers, relative to each writer's own weakest
directions, and compares it with the next such directions of the same model.

First the dimensions of the stream are scaled: each is divided by the root of the energy that all
writers together have in it. Models have dimensions with much and with little energy, and a
direction with low energy only because of its dimensions is no evidence.

A writer's energy along v is then divided by vᵀDv, where D is the diagonal of G: the energy that it
would have if it wrote its dimensions independently of one another. So a single dimension always has
the energy 1, however little is written to it. Dimensions that a model hardly writes, that were
pruned, or that a norm's gain closes are therefore no evidence either way.

Finally the energies of one writer are divided by its *reference*: the median energy along the
directions that are weakest in all writers together. So 1 is the energy of a usual weak direction,
and 0 means that nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from abl_mlx.audit_weights.gram import bulk, lowest, threads

#: The number of directions, weakest in all writers together, from which references are computed.
_WEAKEST = 64

#: The numbers of further weakest directions, of each part of the model and of each layer.
_OF_SUM, _OF_LAYER = 8, 4

#: Energies below this share of the reference count as 0: naive rounding to 8 bits leaves less, a
#: fresh rounding to 4 bits about as much.
FLOOR = 0.02

#: The number of directions that a search finds; the later ones are for comparison.
_FOUND = 12

_STARTS = 3
_STEPS = 12

#: Share of a writer's typical energy that is added to numerator and denominator of an energy, so
#: that it is 1 where nothing is written at all.
_LEAST = 1e-5


# --- all writers -------------------------------------------------------------------------------


class Candidates:
    """Collects a small subspace that contains every direction that could have been removed.

    Gram matrices are added one after the other, layer by layer, and summed over the whole model,
    over its halves and over each role in a half (attention outputs, MLP outputs). The weakest
    directions of each sum, and of each layer, span the subspace. So memory holds no more than a
    dozen (d, d) matrices.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._sums: dict[tuple[str, int], np.ndarray] = {}
        self._counts: dict[tuple[str, int], int] = {}
        self._layer: tuple[int, np.ndarray] | None = None
        self._weak: list[np.ndarray] = []
        #: (d,), the factor of each dimension of the stream that `basis` used.
        self.units = np.empty(0)

    def add(self, role: str, layer: int, gram: np.ndarray) -> float:
        """Add one writer's Gram matrix (d, d); layers come in order, embeddings first.

        Returns:
            Its `bulk`; 0 for a writer with only zeros, which is ignored.
        """
        scale = bulk(gram)
        if not scale > 0:
            return 0.0
        gram = gram / gram.dtype.type(scale)
        key = (role, 0 if 2 * layer < self._layers else 1)
        if key in self._sums:
            self._sums[key] += gram
        else:
            self._sums[key] = gram.copy()
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._layer is not None and self._layer[0] == layer:
            gram += self._layer[1]
        else:
            self._end_layer()
        self._layer = (layer, gram)
        return scale

    def _end_layer(self) -> None:
        if self._layer is not None:
            gram = self._layer[1]
            units = per_dimension(gram)
            self._weak.append(units[:, None] * lowest(_scaled(gram, units), _OF_LAYER))
            self._layer = None

    def basis(self) -> tuple[np.ndarray, int]:
        """A map (d, m) from the subspace to the stream, and how many of its columns are references.

        In the scaled dimensions of the stream its columns are orthonormal. The directions from
        which references are computed come first.
        """
        self._end_layer()
        if not self._sums:
            raise ValueError("all writers are zero")
        total = sum(self._sums.values())
        assert isinstance(total, np.ndarray)
        units = self.units = per_dimension(total)
        d = len(total)
        first = lowest(_scaled(total, units), max(_WEAKEST, min(d, 96)))
        references = min(_WEAKEST, max(min(16, d // 2), d // 10), first.shape[1])
        parts = [first]
        keys = list(self._sums)
        roles = {role for role, _ in keys}
        groups = [[key] for key in keys]
        groups += [[key for key in keys if key[0] == role] for role in roles]
        groups += [[key for key in keys if key[1] == half] for half in (0, 1)]
        for group in sorted({tuple(group) for group in groups if 0 < len(group) < len(keys)}):
            # The sum of a single writer or layer was already used as a layer.
            if sum(self._counts[key] for key in group) > 1:
                some = sum(self._sums[key] for key in group)
                assert isinstance(some, np.ndarray)
                parts.append(lowest(_scaled(some, units), _OF_SUM))
        inverse = np.divide(1, units, where=units > 0, out=np.zeros_like(units))
        weak = inverse[:, None] * np.concatenate(self._weak, axis=1)
        columns = orthonormal(np.concatenate([*parts, weak], axis=1))
        return units[:, None] * columns, references


def per_dimension(gram: np.ndarray) -> np.ndarray:
    """1/√(energy) of each dimension, (d,), scaled to about 1; 0 where the energy is 0."""
    diagonal = np.diagonal(gram).astype(np.float64)
    typical = float(np.median(diagonal))
    alive = diagonal > 1e-7 * typical
    units = np.sqrt(np.divide(typical, diagonal, where=alive, out=np.zeros_like(diagonal)))
    return np.asarray(units)


def _scaled(gram: np.ndarray, units: np.ndarray) -> np.ndarray:
    narrow = units.astype(gram.dtype)
    return np.asarray(gram * narrow[:, None] * narrow[None, :])


def orthonormal(columns: np.ndarray) -> np.ndarray:
    """The columns orthonormalized one by one; linearly dependent columns are dropped."""
    kept = np.empty((len(columns), min(columns.shape)))
    count = 0
    for column in columns.T:
        block = kept[:, :count]
        rest = column - block @ (block.T @ column)
        rest -= block @ (block.T @ rest)
        length, whole = float(np.linalg.norm(rest)), float(np.linalg.norm(column))
        if length > 0.05 * whole and count < kept.shape[1]:
            kept[:, count] = rest / length
            count += 1
    return np.ascontiguousarray(kept[:, :count])


# --- the search --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A direction with low energy in many writers.

    Attributes:
        direction: unit vector in the coordinates of the subspace, (m,).
        score: the search's score, which is larger if more writers have less energy.
        energies: (N,), the energy of each writer in units of its reference.
    """

    direction: np.ndarray
    score: float
    energies: np.ndarray


@dataclass(frozen=True)
class Forms:
    """The quadratic forms of all writers' energies in a subspace of m dimensions.

    Attributes:
        held: (N, m, m), Bᵀ G B for each writer's Gram matrix G, where B (d, m) maps to the stream.
        alone: (N, m, m), Bᵀ D B, where D is the diagonal of G.
        units: (N,), the writers' references, by which energies are divided.
    """

    held: np.ndarray
    alone: np.ndarray
    units: np.ndarray

    def energies(self, v: np.ndarray) -> np.ndarray:
        """The energy of each writer along directions: (m,) -> (N,), or (m, k) -> (N, k)."""
        axis = 1 if v.ndim > 1 else -1
        held, alone = ((v * (form @ v)).sum(axis=axis) for form in (self.held, self.alone))
        units = self.units if v.ndim == 1 else self.units[:, None]
        return np.asarray(held / np.maximum(alone, 1e-30) / units)

    def without(self, v: np.ndarray) -> Forms:
        """The forms in the part of the subspace orthogonal to a unit vector: m − 1 dimensions.

        The coordinates are those of `mirrored` without the first.
        """
        w = _mirror(v)
        if w is None:
            return Forms(self.held[:, 1:, 1:].copy(), self.alone[:, 1:, 1:].copy(), self.units)

        def turned(forms: np.ndarray) -> np.ndarray:
            # (I − 2wwᵀ) F (I − 2wwᵀ) = F − waᵀ − awᵀ, with a = 2Fw − 2(wᵀFw)w.
            along = forms @ w
            along = 2 * along - 2 * (along @ w)[:, None] * w
            out = forms[:, 1:, 1:].copy()
            out -= along[:, 1:, None] * w[1:]
            out -= w[1:, None] * along[:, None, 1:]
            return out

        return Forms(turned(self.held), turned(self.alone), self.units)


def _mirror(v: np.ndarray) -> np.ndarray | None:
    """The unit vector w whose reflection I − 2wwᵀ swaps v and the first axis; None if v is that."""
    w = v.copy()
    w[0] -= 1
    length = float(np.linalg.norm(w))
    return None if length < 1e-12 else w / length


def mirrored(columns: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Vectors (m, k) reflected so that the unit vector ``v`` is mapped to the first axis."""
    w = _mirror(v)
    return columns if w is None else np.asarray(columns - 2 * np.outer(w, w @ columns))


def forms(
    small: Sequence[np.ndarray], diagonals: Sequence[np.ndarray], basis: np.ndarray, count: int
) -> Forms:
    """The writers' forms in the subspace of `Candidates.basis`.

    Args:
        small: basisᵀ G basis of each writer, (m, m).
        diagonals: the diagonal of each writer's G, (d,).
        basis: (d, m).
        count: how many of its columns are references; a writer's reference is its median energy
            along these.
    """
    flat = basis.T @ basis
    held, alone = [], []
    for gram, diagonal in zip(small, diagonals, strict=True):
        least = _LEAST * float(np.median(diagonal)) * flat
        scale = 1 / max(float(np.median(diagonal)), 1e-30)
        held.append(scale * ((gram + gram.T) / 2 + least))
        alone.append(scale * (basis.T @ (diagonal[:, None] * basis) + least))
    found = Forms(np.stack(held), np.stack(alone), np.ones(len(held)))
    each = np.diagonal(found.held, axis1=1, axis2=2) / np.diagonal(found.alone, axis1=1, axis2=2)
    units = np.maximum(np.median(each[:, :count], axis=1), 1e-9)
    return replace(found, units=units)


def typical(gram: np.ndarray) -> float:
    """The mean energy of one writer over all directions, without the few largest; see `bulk`."""
    units = per_dimension(gram)
    return bulk(_scaled(gram, units)) / max(float(np.median(np.diagonal(gram))), 1e-30)


def gains(energies: np.ndarray, reach: float) -> np.ndarray:
    """Each writer's contribution to a score: log(1 + reach / (e + FLOOR)), for energies e (…, N).

    It falls with e and is bounded on both sides, so that a single writer with energy 0 does not
    outweigh the others, and one with much energy subtracts nothing. It is convex in e, so that
    iteratively reweighted eigenvectors increase it.
    """
    return np.asarray(np.log1p(reach / (np.maximum(energies, 0) + FLOOR)))


def score(energies: np.ndarray, reach: float) -> float:
    """The mean gain without the largest one, because at least two writers must agree."""
    each = gains(energies, reach)
    if len(each) < 2:
        return float(each.mean())
    return float((each.sum() - each.max()) / (len(each) - 1))


def _climb(forms: Forms, v: np.ndarray, reach: float) -> Found:
    """A local maximum of the mean gain, from ``v`` on.

    In each step writer i gets as its weight wᵢ the slope with which its gain falls as its energy
    vᵀGᵢv / vᵀDᵢv grows; the next v minimizes vᵀ(Σ wᵢ Gᵢ)v / vᵀ(Σ wᵢ Dᵢ)v.
    """
    energies = forms.energies(v)
    best = gains(energies, reach).mean()
    for _ in range(_STEPS):
        floored = np.maximum(energies, 0) + FLOOR
        weights = (1 / floored - 1 / (floored + reach)) / forms.units
        weights /= np.einsum("i,nij,j->n", v, forms.alone, v, optimize=True)
        held, alone = (np.tensordot(weights, form, 1) for form in (forms.held, forms.alone))
        turned = _weakest(held, alone, v)
        tried = forms.energies(turned)
        value = gains(tried, reach).mean()
        if value <= best + 1e-4:
            break
        v, energies, best = turned, tried, value
    return Found(v, score(energies, reach), energies)


def _weakest(held: np.ndarray, alone: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Approximately the unit v that minimizes vᵀ held v / vᵀ alone v, by inverse iteration."""
    shifted = held + np.eye(len(held)) * (1e-9 * np.trace(held) / len(held))
    step = np.linalg.solve(shifted, alone)
    v = start
    for _ in range(8):
        v = step @ v
        v /= np.linalg.norm(v)
    return v


def search(forms: Forms, reach: float, count: int = _FOUND) -> list[Found]:
    """The best ``count`` orthogonal directions, one after the other, best first.

    Args:
        forms: the forms of all writers in the subspace.
        reach: energies up to about this count as low: 1 finds a direction with rather low energy
            in nearly all writers (a partial strength), 0.1 one with energy 0 in some writers (some
            layers).
        count: the number of directions.
    """
    with threads(forms.held.shape[1]):
        return _search(forms, reach, count)


def _search(forms: Forms, reach: float, count: int) -> list[Found]:
    m = forms.held.shape[1]
    mean = (forms.held / forms.units[:, None, None]).mean(axis=0)
    starts = [np.eye(m)[:, : min(m, 24)], np.linalg.eigh(mean)[1][:, :8]]
    starts += [np.linalg.eigh(one)[1][:, :2] for one in forms.held]
    tried = np.concatenate(starts, axis=1)
    found: list[Found] = []
    left, rest = forms, np.eye(m)  # the remaining subspace, and its basis in the whole one
    for _ in range(min(count, m - 2)):
        lengths = np.linalg.norm(tried, axis=0)
        inside = tried[:, lengths > 0.3] / lengths[lengths > 0.3]
        order = np.argsort(-gains(left.energies(inside), reach).mean(axis=0))[:_STARTS]
        ways = [_climb(left, inside[:, index], reach) for index in order]
        best = max(ways, key=lambda one: one.score)
        found.append(Found(rest @ best.direction, best.score, best.energies))
        left = left.without(best.direction)
        tried = mirrored(tried, best.direction)[1:]
        rest = mirrored(rest.T, best.direction)[1:].T
    return sorted(found, key=lambda one: -one.score)


@dataclass(frozen=True)
class Gap:
    """The gap between the scores of a search's first directions and the following ones.

    Attributes:
        rank: the number of directions before the gap.
        size: the difference of the scores on both sides of the gap.
        spread: the spread of the scores of the following directions, which are there by chance.
        found: the directions before the gap, best first.
        all: all directions.
    """

    rank: int
    size: float
    spread: float
    found: list[Found] = field(repr=False)
    all: list[Found] = field(repr=False)

    @property
    def ratio(self) -> float:
        """The size of the gap in units of the spread."""
        return self.size / max(self.spread, 1e-3)


def gap(found: Sequence[Found], most: int = 6) -> Gap:
    """The largest gap after one of the first ``most`` directions, the most of any edit."""
    scores = np.array([one.score for one in found])
    if len(scores) < 3:
        return Gap(0, 0.0, 1.0, [], list(found))
    steps = scores[:-1] - scores[1:]
    rank = int(np.argmax(steps[: min(most, len(steps) - 1)])) + 1
    behind = scores[rank : rank + 6]
    spread = float(behind[0] - behind[-1])
    return Gap(rank, float(steps[rank - 1]), spread, list(found[:rank]), list(found))


#: A direction with at least this |cos| to the mean over dimensions does not come from an edit.
_MEAN = 0.97


def structure(v: np.ndarray) -> str | None:
    """A reason other than an edit why little is written along a unit direction (d,), or None.

    Where weights were centred for LayerNorm, nothing is written along the mean over dimensions.
    """
    if abs(float(v.sum())) / np.sqrt(len(v)) >= _MEAN:
        return "the mean over dimensions is hardly written: weights centred for LayerNorm"
    return None


def spans(numbers: Sequence[int]) -> str:
    """Numbers as text, with runs shortened: 0, 1, 2, 5 -> "0-2, 5"."""

    def runs() -> Iterator[str]:
        start = previous = None
        for number in [*sorted(numbers), None]:
            if previous is not None and number == previous + 1:
                previous = number
                continue
            if start is not None:
                yield f"{start}" if start == previous else f"{start}-{previous}"
            start = previous = number

    return ", ".join(runs())
