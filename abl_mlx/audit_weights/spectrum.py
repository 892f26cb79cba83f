"""The low end of the residual writers' spectrum: the mathematics of `abl-mlx audit`. NumPy alone.

A writer's energy along a unit direction v is vᵀGv, with G = W Wᵀ of its weight W (d, n) as the
stream sees it. An edit with strength α multiplies the energy along its direction by (1 − α)² in
every writer it touches, and nothing else does that to one direction everywhere at once. So what is
looked for is the direction that is low in many writers together, each measured against what its own
weakest directions hold; and what it is held against is the next such directions of the same model,
found by the same search.

Dimensions of the stream are first brought to one scale (each divided by what all writers together
hold in it): models have loud and quiet ones, and a direction that is quiet because its dimensions
are is no finding.

The energy of one writer along v is measured against vᵀDv, with D the diagonal of its G: what it
would hold along v if it wrote its dimensions independently of one another. So a single dimension
always has the energy 1, however little is written to it: dimensions that a model hardly writes,
that were pruned, or that the gain of a norm closes are no evidence either way.

Energies of one writer are then told in units of its *reference*: the median energy along the
directions that are weakest in all writers together. 1 is what a weak direction has, 0 is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

#: Below this width eigenvectors come from LAPACK; above it, from a few inverse iterations.
_SMALL = 768

#: Directions that are weakest in all writers together, of which references are made.
_WEAKEST = 64

#: Weakest directions of every part of the model that are tried beside those.
_OF_SUM, _OF_LAYER = 8, 4

#: Energies below this share of the reference are as good as none: naive rounding to 8 bits leaves
#: less, a fresh rounding to 4 bits about as much.
FLOOR = 0.02

#: What is found after the first directions, to hold them against.
_FOUND = 12

_STARTS = 3
_STEPS = 12

#: Share of a writer's typical dimension that is added to both sides of an energy, so that where it
#: holds nothing at all the energy is 1.
_LEAST = 1e-5


def threads(width: int) -> AbstractContextManager[object]:
    """One BLAS thread for small matrices, which only get slower when several share them."""
    return threadpool_limits(1, user_api="blas") if width <= _SMALL else nullcontext()


# --- one writer --------------------------------------------------------------------------------


def bulk(gram: np.ndarray) -> float:
    """The mean energy (mean eigenvalue) of a Gram matrix (d, d) without its few largest.

    The largest eigenvalue of an embedding may hold half of its trace.
    """
    d = len(gram)
    k = min(16, d // 4)
    trace = float(np.trace(gram, dtype=np.float64))
    if k == 0 or trace <= 0:
        return max(trace / d, 0.0)
    block = np.random.default_rng(0).standard_normal((d, k)).astype(gram.dtype)
    for _ in range(3):
        block = gram @ block
        block /= np.linalg.norm(block, axis=0)
    block = np.linalg.qr(block.astype(np.float64))[0].astype(gram.dtype)
    top = float(np.trace(block.T @ (gram @ block), dtype=np.float64))
    return max((trace - top) / (d - k), 1e-7 * trace / d)


def lowest(gram: np.ndarray, count: int) -> np.ndarray:
    """About the ``count`` weakest directions of a Gram matrix (d, d): orthonormal (d, count).

    Dimensions that hold nothing at all (pruned, or never used) are left out: no edit makes those.
    For wide matrices they come from inverse iteration (one O(d³) inverse): a direction that stands
    apart is exact, the others lie near the lower end.
    """
    diagonal = np.diagonal(gram)
    alive = np.flatnonzero(diagonal > 1e-7 * np.median(diagonal))
    count = min(count, len(alive))
    whole = len(alive) == len(gram)
    part = gram if whole else gram[np.ix_(alive, alive)]
    if len(part) <= _SMALL:
        found = np.linalg.eigh(part.astype(np.float64))[1][:, :count]
    else:
        found = _inverse_iteration(part, count)
    if whole:
        return found
    out = np.zeros((len(gram), count))
    out[alive] = found
    return out


def _inverse_iteration(gram: np.ndarray, count: int) -> np.ndarray:
    shifted = gram.astype(np.float64)
    shifted[np.diag_indices_from(shifted)] += 1e-5 * float(np.median(np.diagonal(gram)))
    inverse = np.linalg.inv(shifted)
    del shifted
    block = np.random.default_rng(0).standard_normal((len(gram), count + 8))
    for _ in range(6):
        block = np.linalg.qr(inverse @ block)[0]
    turn = np.linalg.eigh(block.T @ (gram @ block))[1]
    return block @ turn[:, :count]


# --- all writers -------------------------------------------------------------------------------


class Candidates:
    """A small subspace in which every direction that could have been edited lies.

    Gram matrices are added one after the other, layer by layer, and summed over the whole model,
    over its halves and over each role in them (attention outputs, MLP outputs); each sum, and each
    layer, gives its weakest directions. So no more than a dozen (d, d) matrices are held.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._sums: dict[tuple[str, int], np.ndarray] = {}
        self._counts: dict[tuple[str, int], int] = {}
        self._layer: tuple[int, np.ndarray] | None = None
        self._weak: list[np.ndarray] = []
        #: (d,), what `basis` has multiplied each dimension of the stream by.
        self.units = np.empty(0)

    def add(self, role: str, layer: int, gram: np.ndarray) -> float:
        """Add one writer's Gram matrix (d, d); layers come in order, embeddings first.

        Returns:
            Its `bulk`; 0 for a writer that holds nothing, which is not taken in.
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
        """A map (d, m) from the subspace into the stream, and how many columns are references.

        With the stream's dimensions brought to one scale its columns are orthonormal; those that
        are references come first.
        """
        self._end_layer()
        if not self._sums:
            raise ValueError("no writer holds anything")
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
            # A single writer, or layer, is among the layers already.
            if sum(self._counts[key] for key in group) > 1:
                some = sum(self._sums[key] for key in group)
                assert isinstance(some, np.ndarray)
                parts.append(lowest(_scaled(some, units), _OF_SUM))
        inverse = np.divide(1, units, where=units > 0, out=np.zeros_like(units))
        weak = inverse[:, None] * np.concatenate(self._weak, axis=1)
        columns = _orthonormal(np.concatenate([*parts, weak], axis=1))
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


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """Columns made orthonormal one by one; columns that depend on earlier ones are dropped."""
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
    """A direction that is low in many writers at once.

    Attributes:
        direction: unit, in the coordinates of the subspace (m,).
        score: of the search; grows as more writers hold less along it.
        energies: (N,) per writer, in units of its reference.
    """

    direction: np.ndarray
    score: float
    energies: np.ndarray


@dataclass(frozen=True)
class Forms:
    """What all writers hold in a subspace of m dimensions, and what they are measured against.

    Attributes:
        held: (N, m, m), Bᵀ G B of each writer's Gram matrix G; B (d, m) maps into the stream.
        alone: (N, m, m), Bᵀ D B with the diagonal D of G.
        units: (N,), what an energy is divided by: the writers' references.
    """

    held: np.ndarray
    alone: np.ndarray
    units: np.ndarray

    def energies(self, v: np.ndarray) -> np.ndarray:
        """Of each writer along directions: (m,) -> (N,), or (m, k) -> (N, k)."""
        axis = 1 if v.ndim > 1 else -1
        held, alone = ((v * (form @ v)).sum(axis=axis) for form in (self.held, self.alone))
        units = self.units if v.ndim == 1 else self.units[:, None]
        return np.asarray(held / np.maximum(alone, 1e-30) / units)

    def without(self, v: np.ndarray) -> Forms:
        """The same in what a unit direction leaves of the subspace: m − 1 dimensions.

        The coordinates are those of `mirrored`, without the first.
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
    """The unit w whose reflection I − 2wwᵀ swaps v and the first axis; None if they agree."""
    w = v.copy()
    w[0] -= 1
    length = float(np.linalg.norm(w))
    return None if length < 1e-12 else w / length


def mirrored(columns: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Vectors (m, k) reflected so that the unit ``v`` comes to lie on the first axis."""
    w = _mirror(v)
    return columns if w is None else np.asarray(columns - 2 * np.outer(w, w @ columns))


def forms(
    small: Sequence[np.ndarray], diagonals: Sequence[np.ndarray], basis: np.ndarray, count: int
) -> Forms:
    """The writers' forms in the subspace that `Candidates.basis` gave.

    Args:
        small: (m, m) each, basisᵀ G basis.
        diagonals: (d,) each, the diagonal of G.
        basis: (d, m).
        count: how many of its columns are references: a writer's is its median energy along them.
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
    """The mean energy of one writer over all directions, without its few largest: see `bulk`."""
    units = per_dimension(gram)
    return bulk(_scaled(gram, units)) / max(float(np.median(np.diagonal(gram))), 1e-30)


def gains(energies: np.ndarray, reach: float) -> np.ndarray:
    """Each writer's contribution to a score: log(1 + reach / (e + FLOOR)), for energies e (…, N).

    It falls with e, is bounded on both sides (one writer without anything does not outweigh the
    others, and one that is full takes nothing away), and -gain is concave in e, so that
    reweighted eigenvectors climb it.
    """
    return np.asarray(np.log1p(reach / (np.maximum(energies, 0) + FLOOR)))


def _score(energies: np.ndarray, reach: float) -> float:
    """Mean gain without the largest one, because a single writer is no agreement."""
    each = gains(energies, reach)
    if len(each) < 2:
        return float(each.mean())
    return float((each.sum() - each.max()) / (len(each) - 1))


def _climb(forms: Forms, v: np.ndarray, reach: float) -> Found:
    """A local maximum of the mean gain: each step the weakest direction of a weighted sum.

    Along v the gain of writer i falls as its energy vᵀGᵢv / vᵀDᵢv grows, with a slope that weighs
    it; the next v makes Σ wᵢ Gᵢ smallest against Σ wᵢ Dᵢ.
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
    return Found(v, _score(energies, reach), energies)


def _weakest(held: np.ndarray, alone: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Nearly the unit v of the least vᵀ held v / vᵀ alone v: inverse iterations from ``start``."""
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
        forms: of all writers in the subspace.
        reach: energies up to about this count as low: 1 for a direction that is somewhat low
            nearly everywhere (a partial strength), 0.1 for one that is empty in some writers (some
            layers).
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
    left, rest = forms, np.eye(m)  # what is left, and its coordinates in the whole subspace
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
    """The distance between the scores of a search's first directions and the next ones.

    Attributes:
        rank: how many stand apart.
        size: difference of the scores on both sides of the gap.
        spread: how far apart the next ones are among themselves: what chance gives this model.
        found: the directions that stand apart, best first.
        all: those and the next ones.
    """

    rank: int
    size: float
    spread: float
    found: list[Found] = field(repr=False)
    all: list[Found] = field(repr=False)

    @property
    def ratio(self) -> float:
        """Size in units of the spread."""
        return self.size / max(self.spread, 1e-3)


def gap(found: Sequence[Found], most: int = 6) -> Gap:
    """The largest gap among the first directions, with the ``most`` that an edit may have."""
    scores = np.array([one.score for one in found])
    if len(scores) < 3:
        return Gap(0, 0.0, 1.0, [], list(found))
    steps = scores[:-1] - scores[1:]
    rank = int(np.argmax(steps[: min(most, len(steps) - 1)])) + 1
    behind = scores[rank : rank + 6]
    spread = float(behind[0] - behind[-1])
    return Gap(rank, float(steps[rank - 1]), spread, list(found[:rank]), list(found))


#: |cos| with the mean over dimensions from which on a direction is no edit's.
_MEAN = 0.97


def structure(v: np.ndarray) -> str | None:
    """Why a unit direction (d,) is no edit, though little may be written along it.

    Nothing is written along the mean over dimensions where weights were centred for LayerNorm.
    """
    if abs(float(v.sum())) / np.sqrt(len(v)) >= _MEAN:
        return "the mean over dimensions is hardly written: weights centred for LayerNorm"
    return None


def spans(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""

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
