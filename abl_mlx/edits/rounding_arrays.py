"""Edit-preserving rounding in MLX arrays, for a GPU: the codes that `rounding_kernels` chooses.

One line of every piece is rounded at a time, all pieces together, since a line needs the errors of
the lines before it. MLX evaluates line by line, so memory is bounded by the weights that are given.

On a CPU the codes are equal to those of the kernels. A GPU may round the last bits of sums in
another way, which may change single codes. So a GPU is used after a trial on which the codes were
equal; then the component is read from the chosen codes, and should too much of it be left, the
kernels choose again. A line of each piece of a slab has few weights for a GPU, and MLX starts 400
functions for it, so the trial also asks whether the kernels are faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.edits import projection, rounding
from abl_mlx.edits.level_arrays import Levels
from abl_mlx.edits.line_arrays import LANES, SHORT, Line, Steps
from abl_mlx.edits.rounding import Edited, Problem
from convert.base.grids import Grid

#: The share of the component that may be left; more of it is left to the kernels.
LIMIT = 1e-3

# Scales smaller than this have no finite inverse, as in `scale_kernels`.
_LEAST = np.float32(1.2e-38)

# Steps that finish a line are made in such numbers before it is asked whether more are needed.
_TOGETHER = 2

# Lines of each piece that are tried before a GPU rounds weights of one kind.
_TRIED = 8

# How many times faster compiled steps may be: MLX starts 2.7 times fewer functions.
_GAIN = 4

# (levels, axis, shape of the basis) -> whether a GPU rounds weights of that kind.
_verdicts: dict[tuple[Levels, int, tuple[int, ...]], bool] = {}


def on(grid: Grid, edited: Edited) -> Grid:
    """Edited weights rounded to a grid of one of MLX's own types: on a GPU, where that pays.

    The first weights of a kind are rounded by the kernels. A GPU rounds the others if it chooses
    the same codes for a few lines of these, in less time.
    """
    if not on_gpu():
        return edited.on(grid)
    kind = Levels.of(grid), edited.axis, edited.basis.shape
    if kind not in _verdicts:
        found = edited.on(grid)
        _verdicts[kind] = pays(grid, edited, found)
        return found
    if _verdicts[kind]:
        found = chosen(grid, edited)
        if _leak(found, edited) <= LIMIT:
            return found
    return edited.on(grid)


def on_gpu() -> bool:
    """Whether MLX computes on a GPU."""
    return bool(mx.default_device() == mx.Device(mx.gpu))


def pays(grid: Grid, edited: Edited, found: Grid) -> bool:
    """Whether MLX chooses the codes that the kernels have found, and faster than they do.

    On Metal it takes seconds to compile the steps, so they are tried without that first.
    """
    problem = Problem.of(grid, edited)
    lines, piece = len(problem.taken), problem.piece
    tried = min(_TRIED, piece, lines)
    first = np.arange(lines) % piece < tried
    wanted = (found.codes if edited.axis else found.codes.T)[first]
    kernels = _seconds(lambda: edited.on(grid)) * tried / min(piece, lines)
    for compiled, gain in (False, _GAIN), (True, 1):

        def some(compiled: bool = compiled) -> np.ndarray:
            return _codes(grid, problem, tried, compiled)[first]

        if not np.array_equal(some(), wanted) or _seconds(some) >= gain * kernels:
            return False
    return True


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _leak(found: Grid, edited: Edited) -> float:
    """How far a grid's components are from what they should be, as a share of what is removed."""
    axis, basis = edited.axis - 2, np.array(edited.basis, dtype=np.float32)
    wanted = projection.along(basis, edited.exact, axis)
    if isinstance(edited.exact, Grid) and edited.taken is not None:
        wanted = wanted - (edited.taken if edited.axis == 1 else edited.taken.T)
    left = projection.square(projection.along(basis, found, axis) - wanted)
    removed = edited.removed**2 * found.shape[1 - edited.axis]
    return math.sqrt(left / removed) if removed else 0.0


def chosen(grid: Grid, edited: Edited) -> Grid:
    """The grid with the codes that MLX chooses for edited weights."""
    problem = Problem.of(grid, edited)
    codes = _codes(grid, problem, len(problem.taken))
    return grid.with_codes(np.ascontiguousarray(codes.T if problem.axis == 0 else codes, np.uint8))


def _codes(grid: Grid, problem: Problem, most: int, compiled: bool = True) -> np.ndarray:
    """The codes of the first lines of each piece, at most so many of them: uint8 (lines, d)."""
    lines, d = len(problem.taken), problem.basis.shape[1]
    piece = min(problem.piece, lines)
    given = _Given.of(problem, Steps.of(Levels.of(grid), compiled))
    read = _reader(grid, problem, compiled)
    debt = [mx.zeros((-(-lines // piece), given.weights.shape[1]))] * len(problem.basis)
    codes = np.zeros((lines, d), np.uint8)
    for t in range(min(piece, most)):
        at = np.arange(t, lines, piece)  # the last piece may be shorter
        code, debt = _line(given, *read(mx.array(at)), [one[: len(at)] for one in debt])
        codes[at] = np.array(code.astype(mx.uint8))[:, :d]
    return codes


@dataclass(frozen=True)
class _Given:
    """What all lines of a problem have in common; see `rounding.Problem`.

    Attributes:
        steps: the functions that round a line.
        basis, shifts: lists of (1, D).
        weights: (1, D).
        mean, tolerance: scalars.
        turns, most: how often multipliers are found, and the most steps that finish a line.
    """

    steps: Steps
    basis: list[mx.array]
    shifts: list[mx.array]
    weights: mx.array
    mean: mx.array
    tolerance: mx.array
    turns: int
    most: int

    @staticmethod
    def of(problem: Problem, steps: Steps) -> _Given:
        """What the lines of a problem have in common."""
        mean, tolerance = (mx.array(float(one)) for one in (problem.mean, problem.tolerance))
        basis, shifts = (
            [_filled(mx.array(one[None])) for one in part]
            for part in (problem.basis, problem.shifts)
        )
        weights = _filled(mx.array(problem.weights[None]))
        return _Given(steps, basis, shifts, weights, mean, tolerance, problem.turns, problem.steps)


def _filled(values: mx.array) -> mx.array:
    """Lines (C, d) as (C, D)."""
    missing = -values.shape[1] % LANES
    return mx.pad(values, [(0, 0), (0, missing)]) if missing else values


def _reader(
    grid: Grid, problem: Problem, compiled: bool
) -> Callable[[mx.array], tuple[Line, mx.array, mx.array]]:
    """A function that gives some lines, their components (C, k), and their heft (C, 1)."""
    axis = problem.axis
    share, group = (grid.group, 1) if axis == 0 else (1, grid.group)

    def all_lines(values: np.ndarray) -> mx.array:
        return mx.array(values.T if axis == 0 else values)

    def scales_of(one: Grid) -> Callable[[mx.array], list[mx.array]]:
        scales, offsets = rounding.scales_of_lines(one, axis)
        assert scales is not None
        assert offsets is not None
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.where(np.abs(scales) >= _LEAST, np.float32(1) / scales, 0)
        parts = [mx.array(part) for part in (scales, offsets, inverse.astype(np.float32))]
        return lambda at: [
            _filled(mx.repeat(mx.take(part, at // share, axis=0), group, axis=1)) for part in parts
        ]

    new, taken, heft = scales_of(grid), mx.array(problem.taken), mx.array(problem.heft[:, None])
    basis = [_filled(mx.array(one[None])) for one in problem.basis]
    if problem.source is None:
        assert problem.exact is not None
        exact = all_lines(problem.exact)

        def weights(at: mx.array, removed: mx.array) -> mx.array:
            return _filled(mx.take(exact, at, axis=0))

    else:
        codes, old = all_lines(problem.source.codes), scales_of(problem.source)
        without = Steps.of(Levels.of(problem.source), compiled).without

        def weights(at: mx.array, removed: mx.array) -> mx.array:
            scales, offsets, _ = old(at)
            return without(_filled(mx.take(codes, at, axis=0)), scales, offsets, removed, basis)

    def read(at: mx.array) -> tuple[Line, mx.array, mx.array]:
        removed = mx.take(taken, at, axis=0)
        return Line(weights(at, removed), *new(at)), removed, mx.take(heft, at, axis=0)

    return read


def _line(
    given: _Given, line: Line, taken: mx.array, heft: mx.array, debt: list[mx.array]
) -> tuple[mx.array, list[mx.array]]:
    """The codes of a line of each piece, and the errors that are told to the next.

    Args:
        debt: the sums of earlier lines' errors times c.
    """
    steps, basis, tolerance = given.steps, given.basis, given.tolerance
    shared = taken, heft, given.mean
    z, e, slope, weight = steps.begin(line, given.shifts, basis, debt, *shared)
    mu = [mx.zeros_like(heft)] * len(basis)
    for turn in range(given.turns):
        for a in range(len(basis)):
            if turn > 0:
                z = z + mu[a] * slope[a]
            along = z, slope[a], weight[a]
            found, bracket, f, order, count = steps.bracket(*along, basis[a], e, mu[a], tolerance)
            many = int(count.max().item())
            if many:
                # Few widths, as each is compiled for itself.
                width = min(order.shape[1], max(SHORT, 1 << (many - 1).bit_length()))
                some = *along, order[:, :width], count
                found = steps.narrow(*some, found, bracket, f, tolerance)
            mu[a] = found[0]
            z = z - mu[a] * slope[a]
    state = steps.choose(z, line, basis)
    arrays = line.s, basis, weight, given.weights, tolerance
    if len(basis) == 1 and steps.first is not None:
        state = steps.first(state, *arrays)
    for step in range(given.most):
        if step % _TOGETHER == 0 and not mx.any(state.open).item():
            break
        state = steps.finish(state, *arrays)
    return state.codes, steps.owe(debt, state.e, *shared)
