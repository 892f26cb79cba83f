"""Edit-preserving rounding of weights that are stored by the group, as entries of a codebook.

As in `abl_mlx.edits.rounding`, a line's component along the directions is to be what the edit asks
for, at a small weight error. Here G neighbouring weights of a row are one choice. Along a row that
leaves the problem as it is. Down columns, each choice moves G lines at once, so the G columns that
groups share are rounded together: with a multiplier for each column, then by single groups whose
change best cancels what is left in all G columns. Scales stay.

The choices of a group are the entries near its present one (`NEAR` of them), and their signs. The
start is the tensor's own entries, or those that ggml's quantizer chose for the edited weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from abl_mlx.edits import projection
from convert.base.codebooks import EVEN, FREE, Codebook, CodebookGrid
from convert.base.grids import CHUNK, in_chunks

NEAR = 64
"""The number of entries that a group chooses from: its own and the nearest others."""

#: Tolerated error of a component, as a share of the tensor's root mean square component.
_AIM = 3e-4

# How often at most the entries to choose from are taken around the chosen ones; mostly it is twice.
_ROUNDS = 8

# Most single changes that finish a strip of columns or a row, for each direction.
_MOVES = 100

# The smallest number of lines for one thread, which keeps their errors from correlating with c.
_LINES = 512


@dataclass(frozen=True)
class Neighbours:
    """For each of K entries the M nearest, with signs: see `codebook_kernels.neighbours`.

    Attributes:
        codes, signs: (K, M).
        changes: float32, (K, G, M).
        norms: float32, (K, M): the squared lengths of the changes.
    """

    codes: np.ndarray
    signs: np.ndarray
    changes: np.ndarray
    norms: np.ndarray


@functools.cache
def neighbours(book: Codebook) -> Neighbours:
    """The nearest entries of each entry of a codebook."""
    from abl_mlx.edits import codebook_kernels as kernels

    count, group = book.entries.shape
    masks = np.arange(1 << group, dtype=np.uint8)
    bits = np.unpackbits(masks[:, None], axis=1).sum(axis=1)
    allowed = {EVEN: (bits == 0) | (bits == 2), FREE: bits <= 2}.get(book.signs, bits == 0)
    shape = (count, NEAR)
    codes, signs = np.zeros(shape, np.uint16), np.zeros(shape, np.uint8)
    changes = np.empty((count, group, NEAR), np.float32)
    kernels.neighbours(book.entries, masks[allowed], NEAR, codes, signs, changes)
    return Neighbours(codes, signs, changes, np.square(changes).sum(axis=1))


def preserve(
    grid: CodebookGrid,
    target: np.ndarray,
    basis: np.ndarray,
    axis: int,
    removed: float,
    taken: np.ndarray | None,
    weights: np.ndarray,
) -> CodebookGrid:
    """Choose entries so that the components of ``target`` along ``basis`` are preserved.

    Args:
        grid: the scales, and the entries to begin with.
        target, basis, axis, removed, taken: as for `abl_mlx.edits.rounding.preserve`.
        weights: (n,) float32: weights of the columns' squared errors, 1 on average.
    """
    from abl_mlx.edits import codebook_kernels as kernels

    k = len(basis)
    rows, width = target.shape
    group, lines = grid.book.group, width if axis == 0 else rows
    if taken is None:
        taken = np.zeros((lines, k), np.float32)
    heft = np.sqrt(weights) if axis == 0 else np.ones(lines, np.float32)
    mean = np.float32(projection.square(taken * np.sqrt(heft)[:, None]) / lines)
    near = neighbours(grid.book)
    codes, signs = np.array(grid.codes), np.array(grid.signs)
    shifts = np.zeros((0, 0), np.float32) if grid.shifts is None else grid.shifts
    constraints = group if axis == 0 else 1
    arguments = (
        np.array(target, dtype=np.float32, copy=None), codes, signs, grid.scales, shifts,
        np.array(basis, dtype=np.float32), weights,
        np.ascontiguousarray(taken, dtype=np.float32), heft, mean, grid.book.entries,
        near.codes, near.signs, near.changes, near.norms,
        np.float32(_AIM * removed * np.sqrt(constraints)), _ROUNDS, _MOVES * k,
    )  # fmt: skip
    if axis == 0:

        def work(part: slice) -> None:
            kernels.columns(*arguments, part.start, part.stop)

        in_chunks(work, width // group, min(rows * group, CHUNK * group // _LINES))
    else:

        def work(part: slice) -> None:
            kernels.rows(*arguments, part.start, part.stop)

        in_chunks(work, rows, min(width, CHUNK // _LINES))
    return grid.with_codes(codes, signs)
