"""Edit-preserving rounding: quantized codes whose components along the directions are the edit's.

The mathematics and measurements are in docs/architecture.md, "Edit-preserving rounding".

Ordinary rounding moves every weight to its nearest level. The edit of a refusal direction changes
each weight by far less than half a step, so most of the edit is rounded away. Here the codes of a
whole line (a column of a writer, a row of an embedding) are chosen together, so that the line's
component along the directions is the one that the edit asks for and the weight error is small.

The error is small but not minimal, for this reason. The weights of a quantized model lie on its
levels. The codes with the least error that remove a component c from a line keep nearly all weights
where they are, and move only the few with the largest share of the direction by whole steps. Over
many lines these moves are c times the same vector, so later layers could read along that vector
what they used to read along the direction: the component would be rotated, not removed. A demo
model at two bits still refused in this way at a leak of 0.0002. So the errors of a tensor are kept
from correlating with c over the lines; the weight error that this adds is smaller than the error of
the quantization itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from abl_mlx.edits import codebook_rounding, projection
from convert.base.codebooks import CodebookGrid
from convert.base.grids import CHUNK, Grid, in_chunks
from convert.base.near_scales import Less

#: Weights with a code each, or in groups that are entries of a codebook.
AnyGrid = TypeVar("AnyGrid", Grid, CodebookGrid)

#: Tolerated error of the component in each line, as a share of the tensor's root mean square
#: component.
AIM = 1e-4

#: A fresh grid gives up every code and scale of the source, so it is used only if it lowers the
#: error by this share of the error, or by this share of the weights' norm.
_WORTH_RELATIVE, _WORTH_ABSOLUTE = 0.025, 0.002

# The smallest weight of a column beside the mean; a smaller one would let a column take on
# large errors, which inputs unlike those of the importance matrix would meet.
_LEAST_WEIGHT = 0.05

# How many columns are turned to lines together: a line of the CPU's cache.
_SPAN = 64

# The smallest number of lines for one thread, which keeps their errors from correlating with c.
_LINES = 512

# Most single steps that finish a line, for each direction; usually one is enough.
_STEPS = 16


@dataclass(frozen=True)
class Edited:
    """Exact edited weights, and which of their components rounding preserves.

    Attributes:
        exact: (R, n) float32, the exact edited weights; or a grid, whose weights less ``taken``
            along ``basis`` they are.
        basis: (k, d) float32, orthonormal.
        axis: the axis of the residual stream: 0 for a writer (d = R), 1 for an embedding (d = n).
        removed: root mean square, over the lines, of the norm of the component that the edit
            removes; the tolerance is a share of it.
        taken: c, (lines, k) float32: the components that the edit removed from each line, with
            which the errors must not correlate. None where they are not known.
        importance: (n,) float32: weights of the columns' squared errors, such as the mean squares
            of the inputs. None for equal weights.
    """

    exact: np.ndarray | Grid
    basis: np.ndarray
    axis: int
    removed: float
    taken: np.ndarray | None = None
    importance: np.ndarray | None = None

    @cached_property
    def target(self) -> np.ndarray:
        """The exact edited weights, (R, n) float32."""
        if not isinstance(self.exact, Grid):
            return np.array(self.exact, dtype=np.float32, copy=None)
        assert self.taken is not None
        removed = self.taken if self.axis == 1 else self.taken.T
        return projection.without(self.basis, removed, self.exact.values(), self.axis - 2)

    def parts(self, group: int) -> tuple[np.ndarray | None, Grid | None]:
        """The edited weights and no grid, or no weights and the grid of which they can be made.

        Args:
            group: of the grid that they are rounded to.
        """
        if isinstance(self.exact, Grid) and self.exact.group == group:
            return None, self.exact
        return np.ascontiguousarray(self.target), None

    @property
    def less(self) -> Less | None:
        """The weights as those of a grid of whole numbers less a product, if they are told so."""
        if not isinstance(self.exact, Grid) or not self.exact.uniform or self.taken is None:
            return None
        left, right = (self.basis.T, self.taken.T) if self.axis == 0 else (self.taken, self.basis)
        return Less(self.exact, np.ascontiguousarray(left), np.ascontiguousarray(right))

    @property
    def taken_any(self) -> bool:
        """Whether the edit changes anything here."""
        return self.taken is None or bool(self.taken.any())

    def on(self, grid: AnyGrid) -> AnyGrid:
        """The edited weights rounded to a grid."""
        if isinstance(grid, CodebookGrid):
            wanted = (self.target, self.basis, self.axis, self.removed, self.taken)
            weights = tempered(self.importance, self.target.shape[1])
            return codebook_rounding.preserve(grid, *wanted, weights)
        return preserve(grid, self)


@dataclass(frozen=True)
class Problem:
    """The choice of the codes of lines of d weights, all of float32.

    Lines are columns of a writer or rows of an embedding. Those in a piece, one after the other,
    compensate the errors of earlier ones; pieces are independent.

    Attributes:
        axis: 0 where lines are columns, 1 where they are rows.
        exact: (R, n), the edited weights; None where they are those of ``source`` less what is
            taken.
        source: a grid, or None.
        basis: (k, d).
        shifts: (k, d): how a line moves for each direction at the least weighted error.
        weights: (d,), of the errors of a line.
        taken: (lines, k), the components that the edit removes.
        heft: (lines,), the weight of each line's errors beside those of other lines.
        mean: heft Σ_a c_a², averaged over all lines.
        turns: how often each direction's multiplier is found.
        tolerance: of a line's component.
        steps: the most single steps that finish a line.
    """

    axis: int
    exact: np.ndarray | None
    source: Grid | None
    basis: np.ndarray
    shifts: np.ndarray
    weights: np.ndarray
    taken: np.ndarray
    heft: np.ndarray
    mean: np.float32
    turns: int
    tolerance: np.float32
    steps: int

    @staticmethod
    def of(grid: Grid, edited: Edited) -> Problem:
        """The choice of a grid's codes for edited weights."""
        count, width = grid.shape
        basis = np.array(edited.basis, dtype=np.float32)
        k, axis = len(basis), edited.axis
        lines = width if axis == 0 else count
        taken = edited.taken
        if taken is None:
            taken = np.zeros((lines, k), dtype=np.float32)
        taken = np.ascontiguousarray(taken, dtype=np.float32)
        weights = tempered(edited.importance, width)
        along = np.ones(count, np.float32) if axis == 0 else weights
        # Within a column all errors have the same weight, which only matters beside other columns.
        # Its square root keeps errors from correlating with c under even inputs and under weighted
        # ones, at the least weighted error of both.
        heft = np.sqrt(weights) if axis == 0 else np.ones(lines, np.float32)
        mean = np.float32(projection.square(taken * np.sqrt(heft)[:, None]) / lines)
        return Problem(
            axis, *edited.parts(grid.group), basis, _shifts(basis, along), along, taken, heft, mean,
            1 if k == 1 else 4, np.float32(AIM * edited.removed), _STEPS * k,
        )  # fmt: skip

    @property
    def unit(self) -> int:
        """Lines are divided among threads by this number of them."""
        return _SPAN if self.axis == 0 else 1

    @property
    def load(self) -> int:
        """The weights that so many lines count for, which makes pieces of at least `_LINES`."""
        return self.unit * min(self.basis.shape[1], CHUNK // _LINES)

    @property
    def piece(self) -> int:
        """Lines in a piece of work, as `in_chunks` makes them."""
        return self.unit * max(1, CHUNK // self.load)


def preserve(grid: Grid, edited: Edited) -> Grid:
    """Round edited weights to a grid's levels so that their components are preserved.

    Args:
        grid: the scales, offsets and levels to choose from; its codes are ignored.
        edited: the exact edited weights, and what is preserved of them.

    Returns:
        The grid with the chosen codes.
    """
    from abl_mlx.edits import rounding_kernels as kernels
    from abl_mlx.edits import turning_kernels as turning

    count, width = grid.shape
    problem = Problem.of(grid, edited)
    exact, source, basis, axis = problem.exact, problem.source, problem.basis, problem.axis
    k = len(basis)
    # Columns are turned to lines, which share their scales with as many others as are in a group.
    share, group = (grid.group, 1) if axis == 0 else (1, grid.group)
    scales, old = scales_of_lines(grid, axis), scales_of_lines(source, axis)
    old_levels, low = _old_levels(source)
    fixed = (old_levels, low, share, group, basis, problem.shifts, problem.weights, *_levels(grid))
    search = (problem.turns, problem.tolerance, problem.steps)
    codes = np.empty((count, width), dtype=np.uint8)

    def choose(part: slice, target: np.ndarray | None, found: np.ndarray, scratch: Any) -> None:
        blocks = slice(part.start // share, -(-part.stop // share))
        each = (None if one is None else one[blocks] for one in (*scales, *old))
        kernels.lines(target, *each, *fixed, problem.taken[part], problem.heft[part], problem.mean,
                      found, *search, scratch)  # fmt: skip

    def columns(part: slice) -> None:
        scratch, old_words = _scratch(k, count), None if source is None else _words(source.codes)
        found, words = np.empty((_SPAN, count), np.uint8), np.empty((_SPAN // 8, count), np.uint64)
        target = None if exact is None else np.empty((_SPAN, count), np.float32)
        for start in range(part.start * _SPAN, min(width, part.stop * _SPAN), _SPAN):
            here = slice(start, min(width, start + _SPAN))
            size = here.stop - start
            if old_words is not None:
                turning.turn_codes(old_words, start, words[: size // 8], found)
            if target is not None:
                target = target[:size]
                turning.turn(exact, start, target)
            choose(here, target, found[:size], scratch)
            turning.turn_back(found, words[: size // 8], _words(codes), start)

    def rows(part: slice) -> None:
        if source is not None:
            codes[part] = source.codes[part]
        choose(part, None if exact is None else exact[part], codes[part], _scratch(k, width))

    in_chunks(columns if axis == 0 else rows, -(-len(problem.taken) // problem.unit), problem.load)
    return grid.with_codes(codes)


def _scratch(k: int, d: int) -> tuple[np.ndarray, ...]:
    """What `rounding_kernels.lines` writes to, for k directions and lines of d weights."""
    from abl_mlx.edits.level_kernels import LANES

    padded = -(-d // LANES) * LANES
    moves = np.zeros(padded, np.uint8)
    slope, weight = np.zeros((2, k, padded), np.float32)
    return (
        np.zeros((7, d), np.float32), np.zeros((k, d), np.float32), slope, weight,
        np.zeros(padded, np.float32), moves, moves.view(np.uint64), np.zeros(padded + 1, np.int64),
        np.zeros((3, padded), np.float32), np.zeros(LANES, np.float32), np.zeros(k, np.float32),
        np.zeros(k, np.float32), np.zeros((2, d), np.float32), np.zeros((2, d), np.float32),
    )  # fmt: skip


def _words(codes: np.ndarray) -> np.ndarray:
    """Codes, eight in each uint64."""
    return np.ascontiguousarray(codes).view(np.uint64)


def scales_of_lines(grid: Grid | None, axis: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The scales and offsets of a grid, where its lines are rows."""
    if grid is None:
        return None, None
    offsets = np.zeros_like(grid.scales) if grid.offsets is None else grid.offsets
    scales, offsets = (one.T if axis == 0 else one for one in (grid.scales, offsets))
    return np.ascontiguousarray(scales), np.ascontiguousarray(offsets)


def _old_levels(grid: Grid | None) -> tuple[np.ndarray | None, np.float32]:
    """The levels of a grid, or None where they are the whole numbers from the second result on."""
    if grid is None:
        return None, np.float32(0)
    levels = np.array(grid.levels, dtype=np.float32)
    return None if grid.uniform else levels, levels[0]


def _levels(grid: Grid) -> tuple[np.ndarray, np.ndarray | None, tuple[Any, ...] | None]:
    """The levels of a grid as `level_kernels` wants them: levels, mids and few."""
    from abl_mlx.edits.level_kernels import MIDPOINTS

    levels = np.array(grid.levels, dtype=np.float32)
    if grid.uniform:
        return levels, None, None
    mids, gaps = (levels[1:] + levels[:-1]) / 2, np.diff(levels)
    if len(mids) > MIDPOINTS:
        return levels, np.pad(mids, (0, 255 - len(mids)), constant_values=np.inf), None
    missing = MIDPOINTS - len(mids)
    padded = np.pad(mids, (0, missing), constant_values=np.inf), np.pad(gaps, (0, missing))
    ones = (np.float32(1),) * MIDPOINTS
    return levels, None, (tuple(padded[0]), tuple(padded[1]), ones, np.pad(gaps, 1))


def tempered(importance: np.ndarray | None, width: int) -> np.ndarray:
    """Weights of the columns with a mean of 1, none much below it: float32, (width,)."""
    if importance is None:
        return np.ones(width, np.float32)
    weights = np.asarray(importance, np.float64).reshape(width)
    mean = float(weights.mean())
    if mean <= 0:
        return np.ones(width, np.float32)
    return np.maximum(weights / mean, _LEAST_WEIGHT).astype(np.float32)


def _shifts(basis: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How a line moves for each direction u at the least weighted error: u / weights, scaled.

    Scaled so that the component along u moves by 1.
    """
    if np.all(weights == 1):
        return basis
    shifts = basis / weights
    return np.ascontiguousarray(shifts / np.sum(shifts * basis, axis=1, keepdims=True), np.float32)


def _on(grid: AnyGrid, edited: Edited) -> AnyGrid:
    return edited.on(grid)


@dataclass(frozen=True)
class Encoders:
    """Functions of a format that choose new scales for a tensor, and its codes.

    Attributes:
        fresh: makes a new grid of the same type for float32 rows.
        refit: chooses new scales for those blocks of a tensor's own grid that hold edited weights
            better with others.
        available: whether these functions can be called. A tensor's own grid needs neither.
        on: rounds edited weights to a grid.
    """

    fresh: Callable[[np.ndarray], Any]
    refit: Callable[[Any, Edited], Any]
    available: bool = True
    on: Callable[[Any, Edited], Any] = _on


def better_source(own: AnyGrid, edited: Edited, encoders: Encoders) -> str:
    """Which grid holds the edited weights with less error: ``own`` or ``fresh``.

    The tensor's own grid keeps its scales and most codes, so a fresh one must be clearly better.
    The edited weights are rounded to both, because on a coarse grid the rounding that preserves the
    edit may cost more than the quantization. Meant for a sample of whole lines.
    """
    if not encoders.available:
        return "own"
    kept = edited.on(encoders.refit(own, edited))
    new = edited.on(encoders.fresh(edited.target))
    present, other = _error(kept, edited), _error(new, edited)
    enough = min(_WORTH_RELATIVE * present, _WORTH_ABSOLUTE)
    return "fresh" if present - other > enough else "own"


def round_onto(own: AnyGrid, edited: Edited, encoders: Encoders, source: str) -> AnyGrid:
    """Round edited weights to the tensor's own grid or to a fresh one.

    Args:
        own: the tensor's own grid. Blocks whose range is too small get new scales if ``encoders``
            are available.
        edited: the edited weights.
        encoders: those of the tensor's format.
        source: ``own`` or ``fresh``, the result of `better_source`.
    """
    if source == "fresh":
        return encoders.on(encoders.fresh(edited.target), edited)
    return encoders.on(encoders.refit(own, edited) if encoders.available else own, edited)


def _error(grid: Grid | CodebookGrid, edited: Edited) -> float:
    """‖values − wanted‖ / ‖wanted‖, with weighted columns."""
    error, wanted = grid.values() - edited.target, edited.target
    if edited.importance is not None:
        root = np.sqrt(edited.importance, dtype=np.float32)
        error, wanted = error * root, wanted * root
    return math.sqrt(projection.square(error) / max(projection.square(wanted), 1e-30))
