"""Which scales near a grid's own hold its weights better when something is taken from them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from convert.base.grids import Grid, in_chunks


@dataclass(frozen=True)
class Less:
    """The weights of a grid less a product of two matrices.

    Attributes:
        grid: the grid, (R, n).
        left, right: float32 (R, k), (k, n).
        past: the groups that have a weight past their ends, counted row after row, as `search`
            finds them.
    """

    grid: Grid
    left: np.ndarray
    right: np.ndarray
    past: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def blocks(self, which: np.ndarray, size: int) -> np.ndarray:
        """Some blocks of ``size`` weights, counted row after row: float32 (B, size)."""
        grid, n = self.grid, self.grid.shape[1]
        part = Grid(
            grid.codes.reshape(-1, size)[which],
            grid.levels,
            grid.scales.reshape(-1, size // grid.group)[which],
            None if grid.offsets is None else grid.offsets.reshape(-1, size // grid.group)[which],
            grid.group,
        )
        rows, columns = which // (n // size), which % (n // size) * size
        right = self.right[:, columns[:, None] + np.arange(size)]
        return part.values() - np.einsum("bk,kbs->bs", self.left[rows], right, dtype=np.float32)


def blocks_of(wanted: np.ndarray | Less, which: np.ndarray, size: int) -> np.ndarray:
    """Some blocks of weights (R, n), counted row after row: float32 (B, size)."""
    if isinstance(wanted, Less):
        return wanted.blocks(which, size)
    return np.ascontiguousarray(wanted, dtype=np.float32).reshape(-1, size)[which]


@dataclass(frozen=True)
class Choices:
    """The scales and offsets that are tried for each group of a grid of R rows.

    Attributes:
        steps: float32 (2, R, groups): how far apart scales, and offsets, lie that can be stored.
        limits: int16 (4, R, groups): the least and the most steps by which a scale may move, and
            by which an offset may.
        moves: int16 (M, 3): the numbers of steps of scale and offset that are tried, and whether
            they begin at the best so far.
    """

    steps: np.ndarray
    limits: np.ndarray
    moves: np.ndarray

    @staticmethod
    def none(grid: Grid) -> Choices:
        """No choice: all stay."""
        shape = grid.scales.shape
        limits = np.zeros((4, *shape), np.int16)
        return Choices(np.zeros((2, *shape), np.float32), limits, np.zeros((1, 3), np.int16))


def search(
    wanted: Less, choices: Choices, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the scales with which a grid holds its weights best after something is taken away.

    Args:
        wanted: the weights to hold, of a grid whose levels are whole numbers in a row.
        choices: the scales to choose from.
        importance: float32 (n,): weights of the columns' squared errors; None for equal ones.

    Returns:
        By how many steps scales and offsets move, int16 (2, R, groups); and the groups that have
        a weight past their ends still, by more than a step, counted row after row.
    """
    from convert.base import scale_kernels as kernels  # lazily: numba takes half a second

    grid = wanted.grid
    rows, n = grid.shape
    heft = None
    if importance is not None:
        columns = importance.astype(np.float32).reshape(-1, grid.group)
        heft = np.ascontiguousarray(columns.T)
    bases = np.zeros_like(choices.steps)
    bases[0] = grid.scales
    if grid.offsets is not None:
        bases[1] = grid.offsets
    found, past = np.zeros((2, *grid.scales.shape), np.int16), np.zeros(grid.scales.shape, np.bool_)
    arguments = (
        np.ascontiguousarray(grid.codes), bases, choices.steps, choices.limits, grid.group,
        np.array(grid.levels, np.float32), np.ascontiguousarray(wanted.left, np.float32),
        np.ascontiguousarray(wanted.right, np.float32),
        heft, choices.moves, found, past,
    )  # fmt: skip

    def some(part: slice) -> None:
        scratch = kernels.scratch_of(n, grid.group)
        kernels.near(*arguments, scratch, part.start, part.stop)

    in_chunks(some, rows, n)
    return found, np.flatnonzero(past)
