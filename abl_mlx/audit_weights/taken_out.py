"""Recovers the edit that turned a base model into another: directions, strengths and kept norms.

A removal changes a writer W (d, n) by D = −α U(UᵀW), where a gain g behind the writer turns the
stream's direction r into u = g ⊙ r. The left singular vectors of D are candidates for u; one of
them was removed if what the writer lost along it is proportional to what it had. Strengths are
regressions over all columns, so that rounding to a few bits hardly moves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from abl_mlx.audit_weights.pairs import Pair, both, largest, plain
from abl_mlx.outputs.stream_weights import StreamWeight

#: How many left singular vectors of each writer's change are candidates, and how many directions
#: of chance they are compared with.
TOP, OTHERS = 12, 16

#: Least change of the component along a direction, and least cosine of what was lost and what was
#: there, for a writer that takes part; and the cosine that a removal has somewhere. Training also
#: changes weights along their own largest directions, and reaches 0.9.
_STRENGTH, _RESEMBLANCE, _ALIKE = 0.05, 0.4, 0.93

#: The share of a change's sum of squares that is nearly all of it.
_NEARLY = 0.98

#: A writer takes part if its change is at least so many standard errors from none.
_SURE = 6.0


@dataclass(frozen=True)
class Candidates:
    """The directions in which one writer's change is largest.

    Attributes:
        vectors: (m, d), in the stream, of unit length.
        weights: (m,), the share of the change's sum of squares that exceeds the least of them.
        change, size: sums of squares of the change and of the base's weights.
        rank_1: the share of the change's sum of squares along its first direction.
        rank: how many directions hold nearly all of the change's sum of squares; None if more than
            `TOP`.
    """

    vectors: np.ndarray
    weights: np.ndarray
    change: float
    size: float
    rank_1: float | None
    rank: int | None = None

    @staticmethod
    def none(width: int, size: float = 0.0) -> Candidates:
        """Those of a writer that is the same as in the base."""
        return Candidates(np.zeros((0, width)), np.zeros(0), 0.0, size, None)


def candidates(pair: Pair) -> Candidates:
    """The directions in which a writer's change is largest; none if nothing changed."""
    old, new = plain(pair)
    gram, size = np.zeros((new.width, new.width)), 0.0
    for before, after in both((old, new)):
        size += float(np.vdot(before, before))
        after = after - before
        gram += after @ after.T
    change = float(np.trace(gram))
    if change <= 0:
        return Candidates.none(new.width, size)
    values, vectors = largest(gram, min(TOP, new.width))
    low = np.flatnonzero(values.cumsum() >= _NEARLY * change)
    vectors = in_stream(vectors.T, pair[0].gain)
    return Candidates(
        vectors.astype(np.float32),
        np.maximum(values - values[-1], 0) / change,
        change,
        size,
        float(values[0]) / change,
        int(low[0]) + 1 if low.size else None,
    )


def rounding_of(kind: str) -> float:
    """About the largest relative error of weights that rounding to a type may leave."""
    bits = next((int(c) for c in kind.removeprefix("B").removeprefix("I") if c.isdigit()), 8)
    if kind in ("F32", "F64"):
        return 1e-5
    if kind in ("F16", "BF16"):
        return 0.003
    return 2.5 * 2.0 ** -min(bits, 8)


def in_stream(vectors: np.ndarray, gain: np.ndarray | None) -> np.ndarray:
    """Directions u = g ⊙ r of a writer's output as directions r of the stream, of unit length."""
    if gain is not None:
        g = gain.astype(np.float64)
        # Where the gain is next to nothing, r cannot be known.
        vectors = vectors * g / (g * g + 1e-4 * float(np.mean(g * g)))
    return _unit(vectors)


def in_output(directions: np.ndarray, gain: np.ndarray | None) -> np.ndarray:
    """Directions r of the stream as directions g ⊙ r of a writer's output, of unit length."""
    return _unit(directions if gain is None else directions * gain)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    found: np.ndarray = vectors / np.maximum(lengths, 1e-30)
    return found


def common(found: Sequence[Candidates], count: int) -> np.ndarray:
    """The directions that writers' changes have most in common, orthonormal (count, d)."""
    rows = [one.vectors * np.sqrt(one.weights)[:, None] for one in found if len(one.vectors)]
    stack = np.concatenate(rows) if rows else np.zeros((0, 0))
    if not stack.size:
        return np.zeros((0, 0))
    values, turn = np.linalg.eigh((stack @ stack.T).astype(np.float64))
    order = np.argsort(values)[::-1][:count]
    order = order[values[order] > 1e-12 * max(values[-1], 1e-300)]
    basis = (turn[:, order] / np.sqrt(values[order])).T @ stack
    return np.linalg.qr(basis.T)[0].T if len(basis) else basis


@dataclass(frozen=True)
class Lost:
    """What a writer lost along some directions, and along directions of chance.

    Attributes:
        strengths: α along each direction, less what rounding takes along any direction.
        resemblances: cosine of what was lost and what was there.
        errors: standard errors of the strengths.
        energies: sums of squares of the change along each direction, less those along a usual one.
        usual: what rounding takes along any direction, as a strength.
        noise: the sum of squares of the change along a usual direction.
    """

    strengths: np.ndarray
    resemblances: np.ndarray
    errors: np.ndarray
    energies: np.ndarray
    usual: float
    noise: float

    @staticmethod
    def nothing(count: int) -> Lost:
        """That of a writer that is the same as in the base, along so many directions."""
        none = np.zeros(count)
        return Lost(none, none, none, none, 0.0, 0.0)

    @property
    def part(self) -> np.ndarray:
        """Whether the change along a direction is the removal of a part of the component."""
        least = np.maximum(_STRENGTH, _SURE * self.errors)
        some: np.ndarray = np.abs(self.strengths) >= least
        return some & (np.abs(self.resemblances) >= _RESEMBLANCE)

    @property
    def alike(self) -> np.ndarray:
        """Whether it is so beyond what training does to a weight."""
        found: np.ndarray = self.part & (np.abs(self.resemblances) >= _ALIKE)
        return found


def lost(pair: Pair, directions: np.ndarray) -> Lost:
    """What a writer lost along directions (m, d) of the stream."""
    narrow = in_output(directions, pair[0].gain)
    random = np.random.default_rng(0).standard_normal((OTHERS, pair[1].width))
    span = np.linalg.qr(narrow.astype(np.float64).T)[0]
    narrow = np.concatenate([narrow, _unit(random - random @ span @ span.T)])
    narrow = np.ascontiguousarray(narrow, np.float32)
    count = _experts(pair[1])
    aa, ab, dd = (np.zeros((count, len(narrow))) for _ in range(3))
    for expert, before, after in _slabs(plain(pair)):
        a = (narrow @ before).astype(np.float64)
        b = (narrow @ after).astype(np.float64)
        aa[expert] += (a * a).sum(axis=1)
        ab[expert] += (a * b).sum(axis=1)
        dd[expert] += ((a - b) ** 2).sum(axis=1)
    m = len(directions)
    took = _took(1 - ab / np.maximum(aa, 1e-30))
    took[:, m:] = True
    aa, ab, dd = ((one * took).sum(axis=0) for one in (aa, ab, dd))
    aa = np.maximum(aa, 1e-30)
    share = 1 - ab / aa
    rest = np.maximum(dd - share * share * aa, 0)
    lines = pair[1].lines / count * took.sum(axis=0)
    errors = np.sqrt(rest / aa / lines)
    resemblances = (aa - ab) / np.sqrt(aa * np.maximum(dd, 1e-30))
    return Lost(
        share[:m] - np.median(share[m:]),
        resemblances[:m],
        np.hypot(errors[:m], np.std(share[m:]) / np.sqrt(OTHERS)),
        dd[:m] - np.median(dd[m:]),
        float(np.median(share[m:])),
        float(np.median(dd[m:])),
    )


def _experts(weight: StreamWeight) -> int:
    return weight.shape[0] if len(weight.shape) == 3 else 1


def _took(shares: np.ndarray) -> np.ndarray:
    """Which experts (axis 0) lost at least half of what the one did that lost most."""
    found: np.ndarray = np.abs(shares) >= 0.5 * np.abs(shares).max(axis=0, keepdims=True)
    return found


def _slabs(pair: Pair) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield the expert of each slab (0 without experts), and it before and after the edit."""
    d = pair[1].width if _experts(pair[1]) > 1 else 0
    for slab, (before, after) in zip(pair[1].slabs(), both(pair), strict=True):
        yield slab.rows.start // d if d else 0, before, after


# --- one writer and the directions that were removed ---------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How well the removal of directions explains a writer's change.

    Attributes:
        strengths: kept norms, one of `choices.NORMS` -> α over all directions together, if these
            norms were kept.
        error: the standard error of α.
        each: α along each direction.
        experts: α of each expert; one entry for a writer that has none.
        left: kept norms -> sum of squares of the change that a removal does not explain.
        columns, rows: the regression of lengths, for norms of columns and of rows that are kept.
    """

    strengths: dict[str, float]
    error: float
    each: np.ndarray
    experts: np.ndarray
    left: dict[str, float]
    columns: Slope
    rows: Slope


@dataclass(frozen=True)
class Slope:
    """A regression through deviations from the mean: slope, and its weight 1 / error².

    Attributes:
        value: 1 where norms are kept, 0 where they are not.
        weight: 0 where it cannot be told.
    """

    value: float
    weight: float

    @staticmethod
    def of(sxx: float, sxy: float, syy: float, count: int) -> Slope:
        """From sums over ``count`` pairs of deviations from their means."""
        if sxx <= 1e-24 or count < 8:
            return Slope(0.0, 0.0)
        value = sxy / sxx
        spread = max(syy - value * sxy, 1e-12 * syy, 1e-30) / count
        return Slope(value, sxx / spread)


def pooled(slopes: Sequence[Slope]) -> Slope:
    """The slopes of several writers as one."""
    weight = sum(one.weight for one in slopes)
    if weight <= 0:
        return Slope(0.0, 0.0)
    return Slope(sum(one.value * one.weight for one in slopes) / weight, weight)


class _Sums:
    """Sums over the slabs of a writer, for each expert apart."""

    def __init__(self, pair: Pair, directions: np.ndarray, strength: float) -> None:
        turned = in_output(directions, pair[0].gain).astype(np.float64)
        self.basis = np.linalg.qr(turned.T)[0].T
        self.strength = strength
        experts, (k, d) = _experts(pair[0]), self.basis.shape
        self.aa = np.zeros((experts, k, k))
        self.ab = np.zeros((experts, k))
        self.dd = np.zeros((experts, k))
        self.change = np.zeros(experts)
        self.rows = np.zeros((experts, 3, d))  # W·W, W'·W, W'·W'
        self.along = np.zeros((experts, 2, d, k))  # W·A, W'·A
        self.columns = np.zeros((experts, 6))  # n, Σx, Σy, Σxx, Σxy, Σyy
        self.scaled = np.zeros((experts, 3))  # Σ aa, Σ ab / s, Σ |W' − s X|²
        for expert, before, after in _slabs(plain(pair)):
            self._add(expert, before, after)

    def _add(self, expert: int, before: np.ndarray, after: np.ndarray) -> None:
        narrow = self.basis.astype(np.float32)
        a = (narrow @ before).astype(np.float64)
        b = (narrow @ after).astype(np.float64)
        self.aa[expert] += a @ a.T
        self.ab[expert] += (a * b).sum(axis=1)
        self.dd[expert] += ((a - b) ** 2).sum(axis=1)
        difference = after - before
        self.change[expert] += float(np.vdot(difference, difference))
        self.rows[expert, 0] += np.einsum("dc,dc->d", before, before)
        self.rows[expert, 1] += np.einsum("dc,dc->d", after, before)
        self.rows[expert, 2] += np.einsum("dc,dc->d", after, after)
        self.along[expert, 0] += before @ a.T
        self.along[expert, 1] += after @ a.T
        self._columns(expert, before, after, a, b)

    def _columns(
        self, expert: int, before: np.ndarray, after: np.ndarray, a: np.ndarray, b: np.ndarray
    ) -> None:
        """Lengths of columns: s that kept norms would make, and what was made of the rest of W."""
        ww = np.einsum("dc,dc->c", before, before).astype(np.float64)
        wv = np.einsum("dc,dc->c", before, after).astype(np.float64)
        vv = np.einsum("dc,dc->c", after, after).astype(np.float64)
        aa, ab, alpha = (a * a).sum(axis=0), (a * b).sum(axis=0), self.strength
        xx = ww - alpha * (2 - alpha) * aa  # of X = W − α UUᵀW
        good = ww - aa > 1e-3 * ww
        aa, ab, ww, wv, vv, xx = (one[good] for one in (aa, ab, ww, wv, vv, xx))
        s = np.sqrt(ww / np.maximum(xx, 1e-6 * ww))
        apart = (vv - 2 * s * (wv - alpha * ab) + s * s * xx).sum()
        self.scaled[expert] += (aa.sum(), (ab / s).sum(), apart)
        x, y = s - 1, (wv - ab) / (ww - aa) - 1
        self.columns[expert] += (len(x), x.sum(), y.sum(), x @ x, x @ y, y @ y)


def fit(pair: Pair, directions: np.ndarray, strength: float) -> Fit:
    """Fit the removal of directions to a writer's change, in one pass over its weights.

    Args:
        pair: the writer before and after the edit.
        directions: (k, d), in the stream.
        strength: about what α is, for the lengths that kept norms would have.
    """
    sums = _Sums(pair, directions, strength)
    own = np.einsum("ekk->ek", sums.aa)
    experts = 1 - sums.ab.sum(axis=1) / np.maximum(own.sum(axis=1), 1e-30)
    took = _took(experts)
    had, ab, dd = (float(one[took].sum()) for one in (own, sums.ab, sums.dd))
    had = max(had, 1e-30)
    share = 1 - ab / had
    rest = max(dd - share * share * had, 0.0)
    lines = pair[1].lines * took.mean()
    aa, scaled, apart = sums.scaled[took].sum(axis=0)
    untouched = float(sums.change[~took].sum())
    by_rows, rows, left = _rows(sums, took, share)
    return Fit(
        {"none": share, "columns": float(1 - scaled / max(aa, 1e-30)), "rows": by_rows},
        float(np.sqrt(rest / had / lines)),
        1 - sums.ab[took].sum(axis=0) / np.maximum(own[took].sum(axis=0), 1e-30),
        experts,
        {
            "none": max(float(sums.change.sum()) - share * share * had, 0.0),
            "columns": untouched + max(float(apart), 0.0),
            "rows": untouched + max(left, 0.0),
        },
        pooled([_slope(*one) for one in sums.columns[took]]),
        rows,
    )


def _slope(n: float, sx: float, sy: float, sxx: float, sxy: float, syy: float) -> Slope:
    m = max(n, 1.0)
    return Slope.of(sxx - sx * sx / m, sxy - sx * sy / m, syy - sy * sy / m, int(n))


def _rows(sums: _Sums, took: np.ndarray, share: float) -> tuple[float, Slope, float]:
    """α if norms of rows were kept, how lengths follow that, and what it leaves unexplained.

    Row i of W' is then t_i (W_i − α u_i A); for each α the best t_i are known.
    """
    u = sums.basis
    ww, wv, vv = sums.rows[took].swapaxes(0, 1)
    p, q = (np.einsum("kd,edk->ed", u, one) for one in sums.along[took].swapaxes(0, 1))
    z = np.einsum("kd,ekj,jd->ed", u, sums.aa[took], u)

    def squares(alpha: float) -> np.ndarray:
        return np.maximum(ww - 2 * alpha * p + alpha * alpha * z, 1e-6 * ww + 1e-30)

    def apart(alpha: float) -> float:
        return float((vv - (wv - alpha * q) ** 2 / squares(alpha)).sum())

    low, high = share - 1.0, share + 1.0
    golden = (5**0.5 - 1) / 2
    while high - low > 1e-5:
        one, other = high - golden * (high - low), low + golden * (high - low)
        if apart(one) < apart(other):
            high = other
        else:
            low = one
    alpha = (low + high) / 2
    xx = squares(alpha)
    t = np.sqrt(ww / xx)
    slopes = []
    for x, y in zip(t - 1, (wv - alpha * q) / xx - 1, strict=True):
        x, y = x - x.mean(), y - y.mean()
        slopes.append(Slope.of(float(x @ x), float(x @ y), float(y @ y), len(x)))
    left = (vv - 2 * t * (wv - alpha * q) + t * t * xx).sum()
    return alpha, pooled(slopes), float(left)
