"""Which known tool makes edits like one that was learned.

Tools differ in the writers that they edit, the strengths of the layers and the norms that they
keep, as their papers and pages say:

- Arditi et al. 2024 (arXiv 2406.11717, section 4.1), scripts after it, and `abl-mlx run` without
  flags remove one direction from every writer and the embedding, at strength 1.
- Heretic (its page on PyPI) edits attention outputs and MLP outputs, each at strengths that fall
  linearly from a peak to a smallest one at some distance, beyond which layers are left alone.
- `abl-mlx run --search` has the same shape (`search.space.kernel`), but layers beyond that distance
  keep the smallest strength, and the embedding may be edited.

A match is no proof: whoever sets the strengths by hand can make any of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: With fewer edited layers than this a line with two ends fits by chance.
_LEAST = 6

#: Strengths follow a shape if they are so close to it (root of the mean square).
_CLOSE = 0.02

#: Strengths that differ by less are the same.
_SAME = 0.04

#: How often the best peak and distance are refined.
_REFINED = 12


@dataclass(frozen=True)
class Peak:
    """Strengths that fall linearly from a peak.

    Attributes:
        layer: of the peak; it may lie between two layers.
        distance: in layers, from the peak to where the strength is smallest.
        strongest, weakest: the strengths at the peak and at that distance.
        error: root of the mean square of what the strengths differ by.
    """

    layer: float
    distance: float
    strongest: float
    weakest: float
    error: float


def peak(strengths: Sequence[float], *, floor: bool) -> Peak | None:
    """The peak that the strengths of one component follow; None if they follow none.

    Args:
        strengths: of each layer; 0 where it was not edited.
        floor: whether layers beyond the distance keep the smallest strength; else they are not
            edited.
    """
    wanted = np.array(strengths, float)
    edited = wanted[wanted != 0]
    if len(edited) < _LEAST or np.ptp(edited) <= _SAME:
        return None
    layers = len(wanted)
    at, distance = np.meshgrid(np.arange(0, layers - 0.5, 0.5), np.arange(1, layers + 0.5, 0.5))
    best, step = _best(wanted, at.ravel(), distance.ravel(), floor), 0.25
    around = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)])
    for _ in range(_REFINED):
        near = (best.layer, best.distance) + step * around
        found = _best(wanted, near[:, 0], np.maximum(near[:, 1], 0.5), floor)
        best, step = (found, step) if found.error < best.error else (best, step / 2)
    return best if best.error <= _CLOSE and best.strongest > best.weakest >= -_CLOSE else None


def _best(wanted: np.ndarray, at: np.ndarray, distance: np.ndarray, floor: bool) -> Peak:
    """Of several peaks and distances (m,), those whose best strengths are least off."""
    away = np.abs(np.arange(len(wanted)) - at[:, None]) / distance[:, None]
    share = np.minimum(away, 1.0)
    inside = np.ones_like(away) if floor else (away <= 1).astype(float)
    basis = np.stack([(1 - share) * inside, share * inside], axis=2)  # (m, L, 2)
    square = basis.swapaxes(1, 2) @ basis + 1e-9 * np.eye(2)
    ends = np.linalg.solve(square, (basis.swapaxes(1, 2) @ wanted)[:, :, None])
    made = (basis @ ends)[:, :, 0]
    # A strength that is too small to be seen counts as none.
    made = np.where((wanted == 0) & (np.abs(made) < 0.08), 0.0, made)
    errors = np.sqrt(np.mean((made - wanted) ** 2, axis=1))
    n = int(errors.argmin())
    strongest, weakest = ends[n, :, 0]
    return Peak(
        float(at[n]), float(distance[n]), float(strongest), float(weakest), float(errors[n])
    )


def sentence(
    *,
    strength: float,
    profile: Mapping[str, Sequence[float]] | None,
    embedding: bool,
    norm: str | None,
    per_layer: bool,
) -> str | None:
    """Which known tool makes edits like this one, as a clause; None if none does.

    Args:
        strength, profile, embedding, norm: as in `learning.Learned`.
        per_layer: whether each layer lost a direction of its own.
    """
    if norm == "rows":
        return "norms of rows are kept by norm-preserving scripts, and by `abl-mlx --norm rows`"
    if norm == "columns":
        return "norms of columns are kept by `abl-mlx --norm columns`, and by no other tool we know"
    if norm is None or strength <= 0:
        return None
    if profile is None:
        if embedding and strength == 1 and not per_layer:
            return (
                "every writer and the embedding at strength 1: as in Arditi et al. 2024, by "
                "scripts after it, and by abl-mlx without flags"
            )
        return None
    each = {part: [strength * one for one in of] for part, of in profile.items()}
    flat = {round(one, 3) for of in each.values() for one in of}
    if flat == {1.0} and not embedding and not per_layer:
        return (
            "every writer but the embedding at strength 1: by scripts that leave embeddings out, "
            "and by `abl-mlx --no-embedding`"
        )
    for floor, who in ((False, "Heretic"), (True, "`abl-mlx run --search`")):
        found = {part: peak(of, floor=floor) for part, of in each.items()}
        if all(found.values()) and not (embedding and not floor):
            said = "; ".join(
                f"{part} {one.strongest:.2f} at layer {one.layer:.1f}, falling to "
                f"{one.weakest:.2f} within {one.distance:.1f} layers"
                for part, one in found.items()
                if one is not None
            )
            return f"strengths that fall linearly from a peak, as {who} chooses them: {said}"
    return None
