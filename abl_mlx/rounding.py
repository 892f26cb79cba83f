"""Edit-preserving rounding: codes that keep an edit's component where it was put (DESIGN 6).

Ordinary rounding moves every weight to its nearest level, and the edit of a refusal direction, far
smaller than half a step in each weight, is mostly rounded away. Here the codes of a whole line (a
column of a writer, a row of an embedding) are chosen together: of all codes for which the line's
component along the directions is what the edit wants, those with the least weight error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.grids import Grid, in_chunks

#: Leak aimed at in each line, as a share of the tensor's root mean square component.
AIM = 1e-4

#: Rows on which a tensor's own grid and a fresh one are compared.
_SAMPLE = 64

#: A fresh grid must lower the error by this much: it gives up every code and scale of the source.
_WORTH = 0.95

# Columns rounded together; divides the group size of every format.
_TILE = 16

Encoder = Callable[[np.ndarray], Grid]


def preserve(grid: Grid, target: np.ndarray, basis: np.ndarray, axis: int, removed: float) -> Grid:
    """Round ``target`` onto a grid's levels so that its components along ``basis`` survive.

    Args:
        grid: scales, offsets and levels to choose from; its codes are not looked at.
        target: (R, n) float32, the exact edited weights.
        basis: (k, d) float32, orthonormal.
        axis: 0 when the stream runs down the rows (a writer, d = R), 1 when it runs along them
            (an embedding, d = n).
        removed: root mean square, over the lines, of the norm of the component that the edit
            takes away; sets the tolerance.

    Returns:
        The grid with the chosen codes.
    """
    from abl_mlx import rounding_kernels as kernels

    count, width = target.shape
    basis = np.array(basis, dtype=np.float32)
    levels = np.array(grid.levels, dtype=np.float32)
    offsets = np.zeros_like(grid.scales) if grid.offsets is None else grid.offsets
    uniform = bool(np.all(np.diff(levels) == 1) and levels[0] == np.floor(levels[0]))
    k = len(basis)
    codes = np.empty((count, width), dtype=np.uint8)
    grid_arguments = (
        np.array(target, dtype=np.float32, copy=None), grid.scales, offsets, grid.group, basis,
        levels, (levels[1:] + levels[:-1]) / 2, levels[0], levels[-1], uniform, codes,
    )  # fmt: skip
    turns = 1 if k == 1 else 4
    search = (turns, np.float32(AIM * removed), 3 * k)
    if axis == 0:

        def work(part: slice) -> None:
            kernels.columns(*grid_arguments, _TILE, part.start, part.stop, *search)

        in_chunks(work, -(-width // _TILE), _TILE * count)
    else:

        def work(part: slice) -> None:
            kernels.rows(*grid_arguments, part.start, part.stop, *search)

        in_chunks(work, count, width)
    return grid.with_codes(codes)


@dataclass(frozen=True)
class Choice:
    """A rounded tensor.

    Attributes:
        grid: with the chosen codes.
        source: ``own``, ``refit`` (own, with new scales where values left the grid) or ``fresh``.
    """

    grid: Grid
    source: str


def choose(
    own: Grid,
    target: np.ndarray,
    basis: np.ndarray,
    axis: int,
    removed: float,
    *,
    fresh: Encoder,
    refit: Callable[[Grid, np.ndarray], Grid],
    source: str = "auto",
) -> Choice:
    """Round onto the tensor's own grid, or onto a fresh one where that is clearly better.

    The own grid keeps tuned scales and most codes; a fresh one fits weights that an edit has moved
    far. Which is better is seen on a sample of rows, before the rounding, which costs the more.

    Args:
        own: the grid of the tensor as stored.
        fresh: encodes float32 rows anew in the same type.
        refit: re-encodes the blocks of a grid that values have left.
        source: ``auto``, ``own`` or ``fresh``.
    """
    if source == "auto":
        source = "fresh" if _fresh_is_better(own, target, fresh) else "own"
    if source == "fresh":
        return Choice(preserve(fresh(target), target, basis, axis, removed), "fresh")
    base = refit(own, target)
    name = "own" if base is own else "refit"
    return Choice(preserve(base, target, basis, axis, removed), name)


def _fresh_is_better(own: Grid, target: np.ndarray, fresh: Encoder) -> bool:
    rows = np.unique(np.linspace(0, len(target) - 1, _SAMPLE).astype(int))
    part = take_rows(own, rows)
    wanted = np.array(target[rows], dtype=np.float32)
    kept = part.with_codes(part.nearest(wanted))
    return _error(fresh(wanted), wanted) < _WORTH**2 * _error(kept, wanted)


def _error(grid: Grid, wanted: np.ndarray) -> float:
    difference = grid.values() - wanted
    return float(np.vdot(difference, difference))


def take_rows(grid: Grid, rows: Any) -> Grid:
    """Some rows of a grid, to round with; it cannot be encoded."""
    return Grid(
        np.array(grid.codes[rows], dtype=np.uint8),
        grid.levels,
        grid.scales[rows],
        None if grid.offsets is None else grid.offsets[rows],
        grid.group,
    )
