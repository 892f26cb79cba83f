"""The steps by which a line of weights is rounded, in MLX arrays: see `rounding_arrays`.

They are those of `rounding_kernels.lines`, with each multiplication and addition in the same order.
Where a kernel would leave a loop, lines that are done wait here for the others.

Metal has no float64, in which the kernels add up their partial sums: here they are added exactly,
as integers. On a CPU MLX adds float32 in the kernels' order, on Metal perhaps in another, which may
change the last bits of sums.

Arrays of a line's weights are (C, D), for C lines that are rounded together, with zeros behind the
d weights up to a multiple of `LANES`. Numbers of lines are (C, 1). A list has an array for each
direction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from abl_mlx.edits.level_arrays import Levels, power

LANES = 32
"""The number of partial sums, as in `level_kernels`."""

SHORT = 128
"""Up to this number weights are summed one by one, as in `rounding_kernels`."""

# As there: evaluations that narrow a bracket and those that find it, and twice the share of errors
# that a line compensates.
_EVALUATIONS, _BRACKETS, _PAID = 10, 6, 0.5


class Line(NamedTuple):
    """A line of each piece: edited weights, scales, offsets and the inverses of scales."""

    w: mx.array
    s: mx.array
    o: mx.array
    inverse: mx.array


class State(NamedTuple):
    """A rounded line.

    Attributes:
        codes: int32.
        e: the errors.
        residual: list of (C, 1).
        open: bool (C, 1): whether another step may help.
    """

    codes: mx.array
    e: mx.array
    residual: list[mx.array]
    open: mx.array


@dataclass(frozen=True)
class Steps:
    """The steps for one kind of levels; ``first`` is None where the kernels do not have it."""

    without: Callable[..., mx.array]
    begin: Callable[..., Any]
    bracket: Callable[..., Any]
    narrow: Callable[..., Any]
    choose: Callable[..., State]
    finish: Callable[..., State]
    first: Callable[..., State] | None
    owe: Callable[..., list[mx.array]]

    @staticmethod
    @functools.cache
    def of(levels: Levels, compiled: bool = True) -> Steps:
        """The steps, which are kept, as MLX compiles them or not."""

        def made(function: Callable[..., Any], *first: Any) -> Any:
            step = functools.partial(function, *first)
            return mx.compile(step) if compiled else step

        return Steps(
            made(_without, levels), made(_begin), made(_bracket, levels), made(_narrow, levels),
            made(_choose, levels), made(_finish, levels, False),
            made(_finish, levels, True) if levels.few else None, made(_owe),
        )  # fmt: skip


def _total(terms: mx.array) -> mx.array:
    """Sums over the last axis, of length D, which is kept with length 1.

    The partial sums are multiplied by a power of two and added as integers, which is exact for all
    but those that are 2 ** 33 times smaller than the largest.
    """
    lanes = terms.reshape(*terms.shape[:-1], -1, LANES).sum(axis=-2)
    top = mx.abs(lanes).max(axis=-1, keepdims=True).view(mx.int32) >> 23
    shift = mx.clip(183 - top, -126, 126)
    whole = (lanes * power(shift)).astype(mx.int64).sum(axis=-1, keepdims=True)
    return whole.astype(mx.float32) * power(-shift)


def _without(
    levels: Levels, codes: mx.array, scales: mx.array, offsets: mx.array, taken: mx.array,
    basis: list[mx.array],
) -> mx.array:  # fmt: skip
    """The weights of codes less the components that are taken."""
    w = scales * levels.at(codes) + offsets
    for a, u in enumerate(basis):
        w = w - u * taken[:, a : a + 1]
    return w


def _begin(
    line: Line, shifts: list[mx.array], basis: list[mx.array], debt: list[mx.array],
    taken: mx.array, heft: mx.array, mean: mx.array,
) -> tuple[mx.array, mx.array, list[mx.array], list[mx.array]]:  # fmt: skip
    """z, the errors of offsets alone, and for each direction its slope and its levels' weights."""
    square, x = mean, line.w
    for a in range(len(basis)):
        square = square + heft * (taken[:, a : a + 1] * taken[:, a : a + 1])
    for a in range(len(basis)):
        part = mx.where(mean > 0, _PAID * taken[:, a : a + 1] / square, 0.0)
        x = x - part * debt[a]
    slope, weight = [v * line.inverse for v in shifts], [u * line.s for u in basis]
    return (x - line.o) * line.inverse, line.o - line.w, slope, weight


def _bracket(
    levels: Levels, z: mx.array, slope: mx.array, weight: mx.array, u: mx.array, e: mx.array,
    mu: mx.array, tolerance: mx.array,
) -> tuple[Any, ...]:  # fmt: skip
    """Bracket the multiplier at which the residual is 0.

    All points that may be needed are known after the first, so they are looked at together.

    Returns:
        The best multiplier and the size of its residual; the ends of the bracket; the residuals
        there; the indices of the weights whose levels differ between the ends; their number, which
        is 0 where no bracket needs to be narrowed.
    """
    kept = _total(u * e)
    first = kept + _total(weight * levels.nearest(z - mu * slope))
    points, step = [mu], first * 1.5
    for _ in range(_BRACKETS + 1):
        points.append(points[-1] + step)
        step = step * 2.0
    m = mx.concatenate(points, axis=1)
    x = z[:, None] - m[:, 1:, None] * slope[:, None]
    later = kept + _total(weight[:, None] * levels.nearest(x))[..., 0]
    f = mx.concatenate([first, later], axis=1)
    turned = (f[:, :-1] * f[:, 1:] <= 0).astype(mx.int32)
    last = mx.ones_like(turned[:, :1])
    at = mx.argmax(mx.concatenate([turned[:, :-1], last], axis=1), axis=1, keepdims=True)
    (m0, f0), (m1, f1) = (
        (mx.take_along_axis(m, one, axis=1), mx.take_along_axis(f, one, axis=1))
        for one in (at, at + 1)
    )
    best, least = mu, mx.abs(first)
    far = least > tolerance
    for point, value in (m0, f0), (m1, f1):
        better = far & (mx.abs(value) < least)
        best, least = mx.where(better, point, best), mx.where(better, mx.abs(value), least)
    wanted = far & (f0 * f1 < 0) & (least > tolerance)
    moves = wanted & (levels.nearest(z - m0 * slope) != levels.nearest(z - m1 * slope))
    width = z.shape[1]
    rank = mx.cumsum(moves.astype(mx.int32), axis=1)
    slot = mx.where(moves, rank - 1, width)
    index = mx.broadcast_to(mx.arange(width, dtype=mx.int32), slot.shape)
    empty = mx.zeros((len(z), width + 1), mx.int32)
    order = mx.put_along_axis(empty, slot, index, axis=1)[:, :width]
    return (best, least), (m0, m1), (f0, f1), order, rank[:, -1:]


def _narrow(
    levels: Levels, z: mx.array, slope: mx.array, weight: mx.array, order: mx.array,
    count: mx.array, found: tuple[mx.array, mx.array], bracket: tuple[mx.array, mx.array],
    f: tuple[mx.array, mx.array], tolerance: mx.array,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """Search within the bracket by false position, over those weights that can change."""
    here = mx.arange(order.shape[1]) < count
    z, slope, weight = (mx.take_along_axis(one, order, axis=1) for one in (z, slope, weight))
    weight = mx.where(here, weight, 0.0)

    def evaluate(m: mx.array) -> mx.array:
        terms = weight * levels.nearest(z - m * slope)
        short = mx.cumsum(terms[:, :SHORT], axis=1)[:, -1:]
        return mx.where(count <= SHORT, short, _total(terms)) if here.shape[1] > SHORT else short

    (best, least), (m0, m1), (f0, f1) = found, bracket, f
    rest = f1 - evaluate(m1)
    side = mx.zeros_like(count)
    waiting = count > 0
    for _ in range(_EVALUATIONS):
        m = m0 + (m1 - m0) * f0 / (f0 - f1)
        low, width = mx.minimum(m0, m1), mx.abs(m1 - m0)
        left, right = low + 0.1 * width, low + 0.9 * width
        m = mx.where(m < left, left, m)
        m = mx.where(m > right, right, m)
        value = rest + evaluate(m)
        better = waiting & (mx.abs(value) < least)
        best, least = mx.where(better, m, best), mx.where(better, mx.abs(value), least)
        waiting = waiting & (mx.abs(value) > tolerance)
        same = value * f0 > 0
        far, near = mx.where(side == 1, 0.5, 1.0) * f1, mx.where(side == -1, 0.5, 1.0) * f0
        m0, m1 = mx.where(same, m, m0), mx.where(same, m1, m)
        f0, f1 = mx.where(same, value, near), mx.where(same, far, value)
        side = mx.where(same, 1, -1)
    return best, least


def _choose(levels: Levels, z: mx.array, line: Line, basis: list[mx.array]) -> State:
    """The codes of the levels nearest to z."""
    e = line.s * levels.nearest(z) + line.o - line.w
    residual = [_total(u * e) for u in basis]
    return State(levels.codes(z), e, residual, mx.ones(residual[0].shape, mx.bool_))


def _finish(
    levels: Levels, first: bool, state: State, s: mx.array, basis: list[mx.array],
    weight: list[mx.array], weights: mx.array, tolerance: mx.array,
) -> State:  # fmt: skip
    """Change one code by one step, so as to cancel the remaining residual.

    Args:
        first: whether only those weights may change of which one step leaves nothing.
    """
    codes, e, residual, waiting = state
    within = tolerance * tolerance
    left = functools.reduce(mx.add, [one * one for one in residual])
    waiting = waiting & (left > within)
    present = levels.at(codes)
    changes = [s * (levels.at(mx.clip(codes + way, 0, levels.last)) - present) for way in (-1, 1)]
    after = [
        functools.reduce(
            mx.add, [_squared(r + u * change) for r, u in zip(residual, basis, strict=True)]
        )
        for change in changes
    ]
    enough = [one <= within for one in after]
    if first:
        if levels.whole:
            marked = mx.abs(mx.abs(weight[0]) - mx.abs(residual[0])) <= tolerance
        else:
            parts = [mx.abs(residual[0] + basis[0] * change) <= tolerance for change in changes]
            marked = parts[0] | parts[1]
        after = [mx.where(marked, one, math.inf) for one in after]
        enough = [one & marked for one in enough]
    any_enough = mx.any(enough[0] | enough[1], axis=1, keepdims=True)
    costs = []
    for change, square, good in zip(changes, after, enough, strict=True):
        added = weights * (change * (change + 2.0 * e))
        costs.append(mx.where(any_enough, mx.where(good, added, math.inf), square))
    up = costs[1] < costs[0]
    cost, change = mx.where(up, costs[1], costs[0]), mx.where(up, changes[1], changes[0])
    which = mx.argmin(cost, axis=1, keepdims=True)
    least = mx.take_along_axis(cost, which, axis=1)
    moving = waiting & (any_enough | (least < left))
    here = moving & (mx.arange(cost.shape[1]) == which)
    codes = mx.where(here, codes + mx.where(up, 1, -1), codes)
    e = mx.where(here, e + change, e)
    step = mx.take_along_axis(change, which, axis=1)
    residual = [
        mx.where(moving, one + mx.take(u[0], which) * step, one)
        for one, u in zip(residual, basis, strict=True)
    ]
    return State(codes, e, residual, mx.ones_like(waiting) if first else moving)


def _squared(x: mx.array) -> mx.array:
    return x * x


def _owe(
    debt: list[mx.array], e: mx.array, taken: mx.array, heft: mx.array, mean: mx.array
) -> list[mx.array]:
    """The errors that later lines compensate, with those of this line."""
    parts = [mx.where(mean > 0, heft * taken[:, a : a + 1], 0.0) for a in range(len(debt))]
    return [one + part * e for one, part in zip(debt, parts, strict=True)]
