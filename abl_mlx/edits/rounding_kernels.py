"""Numba kernels of `rounding`: one line of weights at a time, in float32.

A line is the set of weights that share a constraint: a column of a writer's weight, or a row of an
embedding. All kernels release the interpreter lock, so that threads can share the lines.

Most weights never come near the edge between two levels. So a line is passed over once for each end
of the bracket in which its multiplier lies, and the search within the bracket passes over those
weights alone whose level differs between the two ends: a twentieth of them at four bits.
"""

from __future__ import annotations

import numpy as np

from abl_mlx.edits.level_kernels import (
    LANES,
    UNIFORM,
    F,
    between,
    choose,
    exact_line,
    level_sum,
    marked,
    short_sum,
)
from abl_mlx.edits.projection_kernels import dot
from abl_mlx.edits.turning_kernels import turn, turn_back, turn_codes
from convert.base.compiled import compiled
from convert.base.scale_kernels import finite_inverse

SPAN = 64
"""How many columns are turned to lines together: a line of the CPU's cache."""

# Most evaluations of the residual in a search for a multiplier, besides those that bracket it.
_EVALUATIONS = 10
_BRACKETS = 6

# Up to this number weights are summed one by one.
_SHORT = 128

# Twice the share of the accumulated errors that an average line compensates.
_PAID = F(0.5)


@compiled()
def _search(z, slope, weight, kept, mu, kind, levels, mids, few, tolerance, scratch):
    """Step 1 for one direction: the multiplier nearest to a residual of 0, from ``mu`` on.

    The residual is kept + Σ weight · level, where a weight's level is the one nearest to
    z − μ slope. It falls as μ grows, in steps; so it is bracketed, then searched by false position,
    and the best value seen is kept. (The function is long because splitting it would hand a dozen
    numbers back and forth.)
    """
    moves, active, parts, lanes = scratch
    m0, f0 = mu, kept + level_sum(z, slope, weight, mu, kind, levels, mids, few, lanes)
    best, least = m0, abs(f0)
    if least <= tolerance:
        return best
    # On average the values follow the line, so f falls by one as μ grows by one.
    step = f0 * F(1.5)
    m1 = m0 + step
    f1 = kept + level_sum(z, slope, weight, m1, kind, levels, mids, few, lanes)
    for _ in range(_BRACKETS):
        if f0 * f1 <= 0:
            break
        m0, f0 = m1, f1
        step *= F(2)
        m1 += step
        f1 = kept + level_sum(z, slope, weight, m1, kind, levels, mids, few, lanes)
    if abs(f0) < least:
        best, least = m0, abs(f0)
    if abs(f1) < least:
        best, least = m1, abs(f1)
    between(z, slope, m0, m1, kind, levels, mids, few, moves)
    count = marked(moves, active)
    if f0 * f1 >= 0 or least <= tolerance:
        return best
    # From here on only the weights that can change are looked at.
    padded = (count + LANES - 1) // LANES * LANES
    zs, slopes, weights = parts[0, :padded], parts[1, :padded], parts[2, :padded]
    for j in range(count):
        i = active[j]
        zs[j], slopes[j], weights[j] = z[i], slope[i], weight[i]
    for j in range(count, padded):
        zs[j], slopes[j], weights[j] = 0, 0, 0
    short = count <= _SHORT
    if short:
        rest = f1 - short_sum(zs, slopes, weights, count, m1, kind, levels, mids)
    else:
        rest = f1 - level_sum(zs, slopes, weights, m1, kind, levels, mids, few, lanes)
    side = 0
    for _ in range(_EVALUATIONS):
        m = m0 + (m1 - m0) * f0 / (f0 - f1)
        # The point is kept away from the ends, so that the bracket also shrinks at a steep step.
        left, width = min(m0, m1), abs(m1 - m0)
        m = min(max(m, left + F(0.1) * width), left + F(0.9) * width)
        if short:
            f = rest + short_sum(zs, slopes, weights, count, m, kind, levels, mids)
        else:
            f = rest + level_sum(zs, slopes, weights, m, kind, levels, mids, few, lanes)
        if abs(f) < least:
            best, least = m, abs(f)
        if abs(f) <= tolerance:
            break
        # The value at an end that stays is halved (the Illinois rule), so that a flat stretch on
        # its side does not slow the search.
        if f * f0 > 0:
            m0, f0 = m, f
            f1 *= F(0.5) if side == 1 else F(1)
            side = 1
        else:
            m1, f1 = m, f
            f0 *= F(0.5) if side == -1 else F(1)
            side = -1
    return best


@compiled()
def _line(w, s, inv, o, basis, weights, kind, levels, mids, few, codes, e, z, turns,
          tolerance, steps, slopes, scratch):  # fmt: skip
    """Choose the codes of a line, and its errors ``e``, which enters as the point to round from.

    Step 1: codes Q(x − Σ μ_a v_a), where each μ_a is found in turn. v_a is u_a, or u_a divided by
    the weights of the errors (``shifts``). Each residual falls as its own multiplier grows, so this
    is coordinate ascent on the Lagrangian dual.
    """
    k, d = basis.shape
    moves, active, _, lanes = scratch
    mu, residual = np.zeros(k, F), np.zeros(k, F)
    for i in range(d):
        z[i] = (e[i] - o[i]) * inv[i]
        e[i] = o[i] - w[i]
    for time in range(turns):
        for a in range(k):
            slope, weight = slopes[0, a], slopes[1, a]
            kept = dot(basis[a], e, lanes)
            if time > 0:
                for i in range(d):
                    z[i] += mu[a] * slope[i]  # takes this direction's shift out of z
            mu[a] = _search(z, slope, weight, kept, mu[a], kind, levels, mids, few,
                                   tolerance, scratch)  # fmt: skip
            for i in range(d):
                z[i] -= mu[a] * slope[i]
    choose(z, w, s, o, kind, levels, mids, few, codes, e)
    for a in range(k):
        residual[a] = dot(basis[a], e, lanes)
    # A step that leaves nothing is as large as the residual, which few are.
    if k == 1 and kind == UNIFORM:
        size, weight = abs(residual[0]), slopes[1, 0]
        for i in range(weight.shape[0]):
            moves[i] = abs(abs(weight[i]) - size) <= tolerance
        count = marked(moves, active)
        if _finish(e, s, basis, weights, levels, codes, residual, tolerance, 1, active[:count]):
            return
    for i in range(d):
        active[i] = i
    _finish(e, s, basis, weights, levels, codes, residual, tolerance, steps, active[:d])


@compiled()
def _slopes(s, inv, basis, shifts, slopes):
    """Fill the slope of each weight's place between levels in μ, and its weight in the residual."""
    for a in range(basis.shape[0]):
        u, v, slope, weight = basis[a], shifts[a], slopes[0, a], slopes[1, a]
        for i in range(s.shape[0]):
            slope[i] = v[i] * inv[i]
            weight[i] = u[i] * s[i]


@compiled()
def _finish(e, s, basis, weights, levels, codes, residual, tolerance, steps, which):
    """Step 2: change single codes by one step each, so as to cancel the remaining residual.

    Of the steps that bring the residual within the tolerance, the one that adds the least
    weighted error is taken; if there are none, the one that leaves the smallest residual.

    Args:
        which: indices of the weights that may change.

    Returns:
        Whether the residual is within the tolerance.
    """
    k = basis.shape[0]
    top = levels.shape[0] - 1
    within = tolerance * tolerance
    for step in range(steps + 1):
        left = F(0)
        for a in range(k):
            left += residual[a] * residual[a]
        if left <= within or step == steps:
            return left <= within
        chosen, move, least, cost = -1, 0, left, F(np.inf)
        u, first = basis[0], residual[0]
        enough = False
        for i in which:
            code = np.int64(codes[i])
            for direction in (-1, 1):
                other = code + direction
                if other < 0 or other > top:
                    continue
                change = s[i] * (levels[other] - levels[code])
                part = first + u[i] * change
                after = part * part
                if after > least and after > within:
                    continue
                for a in range(1, k):
                    part = residual[a] + basis[a, i] * change
                    after += part * part
                if after <= within:
                    added = weights[i] * (change * (change + F(2) * e[i]))
                    if not enough or added < cost:
                        enough, cost = True, added
                        chosen, move = i, direction
                elif not enough and after < least:
                    least = after
                    chosen, move = i, direction
        if chosen < 0:
            return False
        code = np.int64(codes[chosen])
        change = s[chosen] * (levels[code + move] - levels[code])
        for a in range(k):
            residual[a] += basis[a, chosen] * change
        codes[chosen] = np.uint8(code + move)
        e[chosen] += change
    return False


@compiled()
def _owed(w, debt, taken, heft, mean, x):
    """Write to x the weights w minus the share of earlier lines' errors that this line compensates.

    Why: if a line's weights lie on levels and the edit removes c u, then the codes with the least
    error are nearly all the old ones; only a few weights, those with the largest u, move. The
    component along u would be gone, but c could be read along those few weights: it would be
    rotated, not removed. So the sum of every weight's error times c is kept (``debt``, as in error
    diffusion), and later lines are rounded from a point that reduces it.

    Args:
        w: the exact weights of the line, (d,).
        debt: (k, d), the sum over earlier lines of c_a times the errors of their weights.
        taken: (k,), c of this line.
        heft: the weight of this line's errors beside those of other lines.
        mean: heft Σ_a c_a², averaged over the lines.
        x: (d,), the result.
    """
    k, d = debt.shape
    square = mean
    for a in range(k):
        square += heft * (taken[a] * taken[a])
    share = _PAID * taken[0] / square if mean > 0 else F(0)
    due = debt[0]
    for i in range(d):
        x[i] = w[i] - share * due[i]
    if mean > 0:
        for a in range(1, k):
            share = _PAID * taken[a] / square
            due = debt[a]
            for i in range(d):
                x[i] -= share * due[i]


@compiled()
def _owe(e, taken, heft, debt):
    """Add a line's weighted errors times c to ``debt``, the sum that later lines compensate."""
    for a in range(debt.shape[0]):
        share, due = heft * taken[a], debt[a]
        for i in range(e.shape[0]):
            due[i] += share * e[i]


@compiled()
def _scratch(k, d, lanes):
    length = (d + lanes - 1) // lanes * lanes
    slopes = np.zeros((2, k, length), F)
    scratch = (
        np.zeros(length, np.uint8), np.zeros(length + 1, np.int64), np.zeros((3, length), F),
        np.zeros(lanes, F),
    )  # fmt: skip
    return np.zeros(length, F), slopes, scratch


@compiled()
def columns(
    target, source, scales, offsets, group, basis, shifts, weights, kind, levels, mids, few, taken,
    heft, mean, out, tile, lanes, first, last, turns, tolerance, steps,
):  # fmt: skip
    """Round some columns of a writer; column j has a constraint on Σ_i u_i Ŵ_ij.

    Args:
        target: (d, n), the exact edited weights; empty where they are those of ``source``, less
            the components ``taken``.
        source: codes, scales, offsets, kind and levels of a grid with the same groups. Codes are
            eight in each uint64, as in ``out``.
        scales, offsets: (d, n // group), those of the new grid.
        tile: how many columns lie within one group for sure: in a row, they share a scale.
        first, last: of spans of `SPAN` columns.
    """
    d, n = basis.shape[1], 8 * out.shape[1]
    w, span = np.empty((tile, d), F), SPAN
    codes, words = np.empty((span, d), np.uint8), np.empty((span // 8, d), np.uint64)
    s, inv, o, e = np.empty(d, F), np.empty(d, F), np.empty(d, F), np.empty(d, F)
    old_s, old_o = np.empty(d, F), np.empty(d, F)
    debt = np.zeros((basis.shape[0], d), F)
    z, slopes, scratch = _scratch(basis.shape[0], d, lanes)
    from_codes = target.shape[0] == 0
    for start in range(first * span, min(n, last * span), tile):
        here = start % span
        if here == 0:
            eights = min(span, n - start) // 8
            if from_codes:
                turn_codes(source[0], start, words[:eights], codes)
        block = start // group
        for i in range(d):
            s[i] = scales[i, block]
            o[i] = offsets[i, block]
        for i in range(d):
            inv[i] = finite_inverse(s[i])
        _slopes(s, inv, basis, shifts, slopes)
        if from_codes:
            for i in range(d):
                old_s[i] = source[1][i, block]
                old_o[i] = source[2][i, block]
            for j in range(tile):
                exact_line(codes[here + j], old_s, old_o, source[3], source[4], basis,
                           taken[start + j], w[j])  # fmt: skip
        else:
            turn(target, start, w)
        for j in range(tile):
            c, line = taken[start + j], codes[here + j]
            _owed(w[j], debt, c, heft[start + j], mean, e)
            _line(w[j], s, inv, o, basis, weights, kind, levels, mids, few, line, e, z,
                  turns, tolerance, steps, slopes, scratch)  # fmt: skip
            if mean > 0:
                _owe(e, c, heft[start + j], debt)
        if here + tile == 8 * eights:
            turn_back(codes, words[:eights], out, start - here)


@compiled()
def _spread(values, group, row):
    """Give every weight of a row the number of its group."""
    for block in range(values.shape[0]):
        row[block * group : block * group + group] = values[block]


@compiled()
def rows(
    target, source, scales, offsets, group, basis, shifts, weights, kind, levels, mids, few, taken,
    heft, mean, out, tile, lanes, first, last, turns, tolerance, steps,
):  # fmt: skip
    """Round the rows ``first`` to ``last``; row i has a constraint on Σ_j u_j Ŵ_ij.

    The arguments are those of `columns`, but all codes are one in each uint8.
    """
    n = basis.shape[1]
    s, inv, o, e = np.empty(n, F), np.empty(n, F), np.empty(n, F), np.empty(n, F)
    w = np.empty(n, F)
    debt = np.zeros((basis.shape[0], n), F)
    z, slopes, scratch = _scratch(basis.shape[0], n, lanes)
    for i in range(first, last):
        if target.shape[0]:
            w[:] = target[i]
        else:
            _spread(source[1][i], group, s)
            _spread(source[2][i], group, o)
            exact_line(source[0][i], s, o, source[3], source[4], basis, taken[i], w)
        _spread(scales[i], group, s)
        _spread(offsets[i], group, o)
        for j in range(n):
            inv[j] = finite_inverse(s[j])
        _slopes(s, inv, basis, shifts, slopes)
        _owed(w, debt, taken[i], heft[i], mean, e)
        _line(w, s, inv, o, basis, weights, kind, levels, mids, few, out[i], e, z,
              turns, tolerance, steps, slopes, scratch)  # fmt: skip
        if mean > 0:
            _owe(e, taken[i], heft[i], debt)
