"""Edit-preserving rounding: quantized codes that keep the component that an edit asks for.

The mathematics and its figures are in docs/architecture.md, "Edit-preserving rounding".

Ordinary rounding moves every weight to its nearest level, and the edit of a refusal direction, far
smaller than half a step in each weight, is mostly rounded away. Here the codes of a whole line (a
column of a writer, a row of an embedding) are chosen together: of all codes for which the line's
component along the directions is what the edit wants, those with little weight error.

Little, not least. The weights of a quantized model lie on its levels, and the cheapest codes that
take a component c out of a line leave nearly all of them where they are: they move the few weights
whose share of the direction is largest by whole steps. Over many lines these moves are c times one
and the same vector, so that what was read along the direction can be read along that vector: the
component is turned, not removed. A demo at two bits went on refusing so at a leak of 0.0002. So the
errors of a tensor are kept from correlating with c from line to line, at a price in weight error
that stays below what the quantization itself has cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from abl_mlx.edits import projection
from convert.base.grids import CHUNK, Grid, in_chunks

#: Leak aimed at in each line, as a share of the tensor's root mean square component.
AIM = 1e-4

#: A fresh grid gives up every code and scale of the source, so it must lower the error by this
#: share of itself, or by this share of the weights' norm.
_WORTH_RELATIVE, _WORTH_ABSOLUTE = 0.025, 0.002

# Columns rounded together; divides the group size of every format.
_TILE = 16

# Lines that one thread rounds in turn, at least: their errors are kept apart from c together.
_LINES = 512

# Single steps that finish a line, for each direction. Mostly one will do.
_STEPS = 16


def preserve(
    grid: Grid,
    target: np.ndarray,
    basis: np.ndarray,
    axis: int,
    removed: float,
    taken: np.ndarray | None = None,
) -> Grid:
    """Round ``target`` onto a grid's levels so that its components along ``basis`` survive.

    Args:
        grid: scales, offsets and levels to choose from; its codes are not looked at.
        target: (R, n) float32, the exact edited weights.
        basis: (k, d) float32, orthonormal.
        axis: 0 when the stream runs down the rows (a writer, d = R), 1 when it runs along them
            (an embedding, d = n).
        removed: root mean square, over the lines, of the norm of the component that the edit
            takes away; sets the tolerance.
        taken: (lines, k) float32, c: the components that the edit took away from each line, with
            which the errors must not correlate. None where they are not known.

    Returns:
        The grid with the chosen codes.
    """
    from abl_mlx.edits import rounding_kernels as kernels

    count, width = target.shape
    basis = np.array(basis, dtype=np.float32)
    levels = np.array(grid.levels, dtype=np.float32)
    offsets = np.zeros_like(grid.scales) if grid.offsets is None else grid.offsets
    uniform = bool(np.all(np.diff(levels) == 1) and levels[0] == np.floor(levels[0]))
    k = len(basis)
    codes = np.empty((count, width), dtype=np.uint8)
    lines = width if axis == 0 else count
    if taken is None:
        taken = np.zeros((lines, k), dtype=np.float32)
    taken = np.ascontiguousarray(taken, dtype=np.float32)
    mean = np.float32(projection.square(taken) / lines)
    grid_arguments = (
        np.array(target, dtype=np.float32, copy=None), grid.scales, offsets, grid.group, basis,
        levels, (levels[1:] + levels[:-1]) / 2, levels[0], levels[-1], uniform, taken, mean, codes,
    )  # fmt: skip
    turns = 1 if k == 1 else 4
    search = (turns, np.float32(AIM * removed), _STEPS * k)
    if axis == 0:

        def work(part: slice) -> None:
            kernels.columns(*grid_arguments, _TILE, part.start, part.stop, *search)

        in_chunks(work, -(-width // _TILE), min(_TILE * count, CHUNK * _TILE // _LINES))
    else:

        def work(part: slice) -> None:
            kernels.rows(*grid_arguments, part.start, part.stop, *search)

        in_chunks(work, count, min(width, CHUNK // _LINES))
    return grid.with_codes(codes)


@dataclass(frozen=True)
class Encoders:
    """Encoders of a format for grids other than a tensor's own.

    Attributes:
        fresh: encodes float32 rows anew in the same type.
        refit: re-encodes the blocks of a grid that values have left.
        available: whether the two can be called; a tensor's own grid needs neither.
    """

    fresh: Callable[[np.ndarray], Grid]
    refit: Callable[[Grid, np.ndarray], Grid]
    available: bool = True


@dataclass(frozen=True)
class Edited:
    """Exact edited weights, and the components to keep; the arguments of `preserve`."""

    target: np.ndarray
    basis: np.ndarray
    axis: int
    removed: float
    taken: np.ndarray | None = None

    def on(self, grid: Grid) -> Grid:
        """Rounded onto a grid."""
        return preserve(grid, self.target, self.basis, self.axis, self.removed, self.taken)


def better_source(own: Grid, edited: Edited, encoders: Encoders) -> str:
    """``own`` or ``fresh``: which grid holds the edited weights with less error.

    The own grid keeps tuned scales and most codes, so a fresh one has to be clearly better. Both
    are tried, rounding included: where the edit must be forced against a coarse grid, the forcing
    costs more than the quantization. Meant for a sample of whole lines.
    """
    if not encoders.available:
        return "own"
    kept = edited.on(encoders.refit(own, edited.target))
    new = edited.on(encoders.fresh(edited.target))
    present, other = _error(kept, edited.target), _error(new, edited.target)
    enough = min(_WORTH_RELATIVE * present, _WORTH_ABSOLUTE)
    return "fresh" if present - other > enough else "own"


def round_onto(own: Grid, edited: Edited, encoders: Encoders, source: str) -> Grid:
    """Round onto the tensor's own grid, with new scales where values have left it, or onto a fresh
    one.

    Args:
        source: ``own`` or ``fresh``, as `better_source` says.
    """
    if source == "fresh":
        return edited.on(encoders.fresh(edited.target))
    return edited.on(encoders.refit(own, edited.target) if encoders.available else own)


def _error(grid: Grid, wanted: np.ndarray) -> float:
    """‖values − wanted‖ / ‖wanted‖."""
    error = projection.square(grid.values() - wanted)
    return math.sqrt(error / max(projection.square(wanted), 1e-30))
