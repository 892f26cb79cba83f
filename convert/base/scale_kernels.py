"""Numba kernels of `near_scales`."""

from __future__ import annotations

import numpy as np

from convert.base.compiled import compiled

F = np.float32

# Scales smaller than this have no finite inverse.
_LEAST = F(1.2e-38)

# How many steps past its ends a weight must lie for a group to be encoded anew.
_FAR = F(1)

# Another scale must be better by this share, so that equal ones stay.
_BETTER = F(0.999)


@compiled(inner=True)
def nearest_whole(x, low, high):
    """The whole number nearest to x, between low and high."""
    q = np.floor(x + F(0.5))
    q = q if q > low else low
    return q if q < high else high


@compiled(inner=True)
def finite_inverse(scale):
    """1 / scale; 0 where that is not finite, for instance for a scale of zero."""
    return F(1) / scale if abs(scale) >= _LEAST else F(0)


@compiled(inline=True)
def _distance(x, low, high):
    """How far x is from the nearest whole number between low and high."""
    return abs(x - nearest_whole(x, low, high))


@compiled(inner=True)
def _costs(weights, heft, inverse, offset, low, high, cost):
    """The errors to be expected of groups of weights, in squared steps.

    A weight that lies between two levels, at the share f of a step from the nearer one, is rounded
    to either, and on average to itself: its squared error is then f (1 − f). Past the ends it is
    f².

    Args:
        weights, heft: (G, B), a group in each column: weights, and the weights of their errors;
            None for equal ones.
        inverse, offset: (B,): 1 / scale, and offset.
        cost: (B,), the result.
    """
    cost[:] = 0
    for j in range(weights.shape[0]):
        for b in range(cost.shape[0]):
            f = _distance((weights[j, b] - offset[b]) * inverse[b], low, high)
            rest = F(1) - f
            rest = rest if rest > f else f
            part = f * rest
            cost[b] += part if heft is None else heft[j, b] * part


@compiled(inline=True)
def _worst(weights, inverse, offset, low, high, worst):
    """The largest distance of a group's weights from a level, in steps."""
    worst[:] = 0
    for j in range(weights.shape[0]):
        for b in range(worst.shape[0]):
            f = _distance((weights[j, b] - offset[b]) * inverse[b], low, high)
            worst[b] = worst[b] if worst[b] > f else f


@compiled(inner=True)
def _place(base, step, moved, scale, inverse, offset):
    """Scales, their inverses and offsets after moves by these numbers of steps."""
    for b in range(scale.shape[0]):
        scale[b] = base[0, b] + moved[0, b] * step[0, b]
        inverse[b] = finite_inverse(scale[b])
        offset[b] = base[1, b] + moved[1, b] * step[1, b]


@compiled(inline=True)
def _try(
    moves, m, start, weights, heft, base, step, limits, low, high, best, chosen, tried, scratch
):
    """Move the scales and offsets of those groups that gain by these numbers of steps.

    Args:
        moves, m: row m holds the numbers of steps of scale and offset.
        start: (2, B): where these steps begin.
        best, chosen: (B,), (2, B), the results: the errors with the best moves, and these.
    """
    scale, inverse, offset, cost, gains = scratch
    more, further = F(moves[m, 0]), F(moves[m, 1])
    for b in range(cost.shape[0]):
        tried[0, b] = start[0, b] + more
        tried[1, b] = start[1, b] + further
    _place(base, step, tried, scale, inverse, offset)
    _costs(weights, heft, inverse, offset, low, high, cost)
    # Without branches, so that compilers look at several groups at a time.
    for b in range(cost.shape[0]):
        k, l = tried[0, b], tried[1, b]
        beyond = (limits[0, b] > k) | (k > limits[1, b]) | (limits[2, b] > l) | (l > limits[3, b])
        found = cost[b] * scale[b] * scale[b] * (_BETTER if abs(k) + abs(l) == F(0) else F(1))
        found = F(np.inf) if beyond else found
        least = best[b]
        best[b] = found if found < least else least
        gains[b] = F(1) if found < least else F(0)
    for which in range(2):
        for b in range(cost.shape[0]):
            chosen[which, b] = tried[which, b] if gains[b] > F(0) else chosen[which, b]


def scratch_of(n: int, group: int) -> tuple[np.ndarray, ...]:
    """What `near` writes to, for rows of n weights: its own arrays would take long to compile."""
    blocks = n // group
    return (
        np.empty(n, F), np.empty((group, blocks), F), *np.empty((2, 2, blocks), F),
        np.empty((4, blocks), F), np.empty(blocks, F), np.zeros((2, blocks), F),
        *np.empty((2, 2, blocks), F), *np.empty((5, blocks), F),
    )  # fmt: skip


@compiled(plain=True)
def near(codes, bases, steps, limits, group, levels, left, right, heft, moves, found, past, scratch,
         first, last):  # fmt: skip
    """Find better scales for the rows ``first`` to ``last`` of a grid whose weights change.

    Args:
        codes: (R, n); the levels are whole numbers in a row.
        bases: float32 (2, R, B): the scales and offsets of the groups of the rows.
        steps: float32 (2, R, B): how far apart scales and offsets lie that can be stored.
        limits: int16 (4, R, B): the least and most steps by which scale and offset may move.
        left, right: float32 (R, k), (k, n): left @ right is taken from the weights.
        heft: (group, B): weights of the columns' squared errors; None for equal ones.
        moves: int16 (M, 3): the numbers of steps of scale and offset that are tried, and whether
            they begin at the best so far.
        found: int16 (2, R, B), the result: by how many steps scale and offset move.
        past: bool (R, B), the result: whether a weight lies past the ends of its group.
        scratch: of `scratch_of`.
    """
    n = codes.shape[1]
    blocks, k = n // group, left.shape[1]
    row, weights, base, step, limit, best, own, chosen, tried, scale, inverse, offset = scratch[:12]
    cost, gains = scratch[12:]
    few = scale, inverse, offset, cost, gains
    low, high = levels[0], levels[-1]
    for i in range(first, last):
        for b in range(blocks):  # numba takes a second to assign a slice
            for which in range(2):
                base[which, b], step[which, b] = bases[which, i, b], steps[which, i, b]
            for which in range(4):
                limit[which, b] = limits[which, i, b]
        for b in range(blocks):
            unit, start = base[0, b], b * group
            for j in range(group):
                row[start + j] = unit * (F(codes[i, start + j]) + low) + base[1, b]
        for a in range(k):
            factor = left[i, a]
            for j in range(n):
                row[j] -= factor * right[a, j]
        for b in range(blocks):
            for j in range(group):
                weights[j, b] = row[b * group + j]
        best[:] = np.inf
        chosen[:] = 0
        for m in range(moves.shape[0]):
            start = chosen if moves[m, 2] else own
            _try(moves, m, start, weights, heft, base, step, limit, low, high, best, chosen, tried,
                 few)  # fmt: skip
        _place(base, step, chosen, scale, inverse, offset)
        _worst(weights, inverse, offset, low, high, cost)
        for b in range(blocks):
            found[0, i, b], found[1, i, b] = chosen[0, b], chosen[1, b]
            past[i, b] = cost[b] > _FAR
