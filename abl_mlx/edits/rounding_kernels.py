"""Numba kernels of `rounding`: one line of weights at a time, in float32.

A line is the set of weights that share a constraint: a column of a writer's weight, or a row of an
embedding. All kernels release the interpreter lock, so that threads can share the lines.

Sums over a line are computed as `LANES` partial sums, which are added at the end. So they are the
same on every CPU, while the compiler can still keep the partial sums in a vector register.
"""

from __future__ import annotations

import numpy as np

from convert.base.compiled import compiled

F = np.float32

LANES = 32
"""The number of partial sums."""

# Most evaluations of the residual in a search for a multiplier, besides those that bracket it.
_EVALUATIONS = 10
_BRACKETS = 6

# With more levels than this they are searched by bisection; fewer are compared one by one, with
# vector instructions.
_MANY = 32

# Scales smaller than this have no finite inverse.
_LEAST = F(1.2e-38)

# Twice the share of the accumulated errors that an average line compensates.
_PAID = F(0.5)


@compiled()
def _inverse(scale):
    """1 / scale; 0 where that is not finite, for instance for a scale of zero."""
    return F(1) / scale if abs(scale) >= _LEAST else F(0)


@compiled()
def _total(lanes):
    """The sum of the partial sums."""
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    return F(total)


@compiled()
def _prepare(x, u, v, w, s, inv, o, at, slope, weight, lanes):
    """Fill the arrays that `_residual` needs for a line and a direction.

    A weight's level is the one nearest to at − μ slope, where slope is v over the scale, and it
    adds weight · level to the residual.
    The arrays ``at``, ``slope`` and ``weight`` are padded with zeros to a multiple of `LANES`.

    Returns:
        Σ u (offset − w), the part of the residual that does not depend on μ.
    """
    d = x.shape[0]
    lanes[:] = 0
    for i in range(d):
        at[i] = (x[i] - o[i]) * inv[i]
    for i in range(d):
        slope[i] = v[i] * inv[i]
    for i in range(d):
        weight[i] = u[i] * s[i]
    whole = d // LANES * LANES
    for start in range(0, whole, LANES):
        us, os, ws = u[start : start + LANES], o[start : start + LANES], w[start : start + LANES]
        for lane in range(LANES):
            lanes[lane] += us[lane] * (os[lane] - ws[lane])
    for i in range(whole, d):
        lanes[i - whole] += u[i] * (o[i] - w[i])
    return _total(lanes)


@compiled()
def _residual(at, slope, weight, mu, kept, levels, mids, low, high, uniform, lanes):
    """Σ u (value − w) over the line, where each value is the grid's nearest to x − μ v."""
    lanes[:] = 0
    for start in range(0, at.shape[0], LANES):
        ats, slopes = at[start : start + LANES], slope[start : start + LANES]
        weights = weight[start : start + LANES]
        if uniform:
            for lane in range(LANES):
                q = np.floor(ats[lane] - mu * slopes[lane] + F(0.5))
                q = q if q >= low else low
                q = q if q <= high else high
                lanes[lane] += weights[lane] * q
            continue
        for lane in range(LANES):
            code = _code(ats[lane] - mu * slopes[lane], mids)
            lanes[lane] += weights[lane] * levels[code]
    return kept + _total(lanes)


@compiled()
def _code(z, mids):
    """The index of the level nearest to z: the number of midpoints between levels below z."""
    code = 0
    if mids.shape[0] <= _MANY:
        for m in range(mids.shape[0]):
            code += z > mids[m]
        return code
    step = 128
    while step:
        upper = code + step
        if upper <= mids.shape[0] and z > mids[upper - 1]:
            code = upper
        step >>= 1
    return code


@compiled()
def _choose(at, mids, low, high, uniform, codes):
    """The codes of the levels nearest to ``at``."""
    d = codes.shape[0]
    if uniform:
        for i in range(d):
            q = np.floor(at[i] + F(0.5))
            q = q if q >= low else low
            q = q if q <= high else high
            codes[i] = np.uint8(np.int32(q - low))
        return
    for i in range(d):
        codes[i] = np.uint8(_code(at[i], mids))


@compiled()
def _multipliers(w, s, inv, o, basis, shifts, levels, mids, low, high, uniform, codes, x, turns,
                 tolerance, scratch):  # fmt: skip
    """Step 1: codes Q(x − Σ μ_a v_a), where each μ_a is found in turn by bracketed false position.

    v_a is u_a, or u_a divided by the weights of the errors (``shifts``). x is w or the result of
    `_owed`; it is overwritten. Each residual falls as its own multiplier grows, so this is
    coordinate ascent on the Lagrangian dual. The residual is a step function of μ_a, so the best
    value seen is kept.
    """
    k, d = basis.shape
    at, slope, weight, lanes = scratch
    mu = np.zeros(k, F)
    for _ in range(turns):
        for a in range(k):
            u, v = basis[a], shifts[a]
            if mu[a] != 0:
                for i in range(d):
                    x[i] += mu[a] * v[i]  # takes this direction's shift out of x
            kept = _prepare(x, u, v, w, s, inv, o, at, slope, weight, lanes)
            m0 = mu[a]
            f0 = _residual(at, slope, weight, m0, kept, levels, mids, low, high, uniform,
                           lanes)  # fmt: skip
            best, least = m0, abs(f0)
            if least > tolerance:
                # On average the values follow x − μ v, so f falls by one as μ grows by one.
                step = f0 * F(1.5)
                m1 = m0 + step
                f1 = _residual(at, slope, weight, m1, kept, levels, mids, low, high, uniform,
                               lanes)  # fmt: skip
                for _ in range(_BRACKETS):
                    if f0 * f1 <= 0:
                        break
                    m0, f0 = m1, f1
                    step *= F(2)
                    m1 += step
                    f1 = _residual(at, slope, weight, m1, kept, levels, mids, low, high, uniform,
                                   lanes)  # fmt: skip
                if abs(f0) < least:
                    best, least = m0, abs(f0)
                if abs(f1) < least:
                    best, least = m1, abs(f1)
                if f0 * f1 < 0:
                    side = 0
                    for _ in range(_EVALUATIONS):
                        m = m0 + (m1 - m0) * f0 / (f0 - f1)
                        # The point is kept away from the ends, so that the bracket also shrinks at
                        # a steep step.
                        left, width = min(m0, m1), abs(m1 - m0)
                        m = min(max(m, left + F(0.1) * width), left + F(0.9) * width)
                        f = _residual(at, slope, weight, m, kept, levels, mids, low, high, uniform,
                                      lanes)  # fmt: skip
                        if abs(f) < least:
                            best, least = m, abs(f)
                        if abs(f) <= tolerance:
                            break
                        # The value at an end that stays is halved (the Illinois rule), so that a
                        # flat stretch on its side does not slow the search.
                        if f * f0 > 0:
                            m0, f0 = m, f
                            f1 *= F(0.5) if side == 1 else F(1)
                            side = 1
                        else:
                            m1, f1 = m, f
                            f0 *= F(0.5) if side == -1 else F(1)
                            side = -1
            mu[a] = best
            for i in range(d):
                x[i] -= best * v[i]
    for i in range(d):
        at[i] = (x[i] - o[i]) * inv[i]
    _choose(at, mids, low, high, uniform, codes)


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
    for i in range(d):
        x[i] = w[i]
    if mean > 0:
        for a in range(k):
            share = _PAID * taken[a] / square
            for i in range(d):
                x[i] -= share * debt[a, i]


@compiled()
def _owe(w, s, o, levels, codes, taken, heft, debt):
    """Add a line's weighted errors times c to ``debt``, the sum that later lines compensate."""
    k, d = debt.shape
    for i in range(d):
        error = heft * (s[i] * levels[codes[i]] + o[i] - w[i])
        for a in range(k):
            debt[a, i] += taken[a] * error


@compiled()
def _finish(w, s, o, basis, weights, levels, codes, residual, tolerance, steps, lanes):
    """Step 2: change single codes by one step each, so as to cancel the remaining residual.

    Of the steps that bring the residual within the tolerance, the one that adds the least
    weighted error is taken; if there are none, the one that leaves the smallest residual.
    """
    k, d = basis.shape
    top = levels.shape[0] - 1
    whole = d // LANES * LANES
    for a in range(k):
        u = basis[a]
        lanes[:] = 0
        for start in range(0, whole, LANES):
            for lane in range(LANES):
                i = start + lane
                lanes[lane] += u[i] * (s[i] * levels[codes[i]] + o[i] - w[i])
        for i in range(whole, d):
            lanes[i - whole] += u[i] * (s[i] * levels[codes[i]] + o[i] - w[i])
        residual[a] = _total(lanes)
    for _ in range(steps):
        left = F(0)
        for a in range(k):
            left += residual[a] * residual[a]
        if left <= tolerance * tolerance:
            return
        chosen, move, least, cost = -1, 0, left, F(np.inf)
        u, first = basis[0], residual[0]
        enough = False
        for i in range(d):
            code = np.int64(codes[i])
            for direction in (-1, 1):
                other = code + direction
                if other < 0 or other > top:
                    continue
                change = s[i] * (levels[other] - levels[code])
                part = first + u[i] * change
                after = part * part
                for a in range(1, k):
                    part = residual[a] + basis[a, i] * change
                    after += part * part
                if after <= tolerance * tolerance:
                    error = s[i] * levels[code] + o[i] - w[i]
                    added = weights[i] * (change * (change + F(2) * error))
                    if not enough or added < cost:
                        enough, cost = True, added
                        chosen, move = i, direction
                elif not enough and after < least:
                    least = after
                    chosen, move = i, direction
        if chosen < 0:
            return
        code = np.int64(codes[chosen])
        change = s[chosen] * (levels[code + move] - levels[code])
        for a in range(k):
            residual[a] += basis[a, chosen] * change
        codes[chosen] = np.uint8(code + move)


@compiled()
def columns(
    target, scales, offsets, group, basis, shifts, weights, levels, mids, low, high, uniform, taken,
    heft, mean, out, tile, first, last, turns, tolerance, steps,
):  # fmt: skip
    """Round the columns of tiles ``first`` to ``last``; column j has a constraint on Σ_i u_i Ŵ_ij.

    The columns of a tile lie within one group, so in each row they share a scale.
    """
    d, n = target.shape
    k = basis.shape[0]
    w = np.empty((tile, d), F)
    codes = np.empty((tile, d), np.uint8)
    s, inv, o, x = np.empty(d, F), np.empty(d, F), np.empty(d, F), np.empty(d, F)
    residual = np.empty(k, F)
    debt = np.zeros((k, d), F)
    length = (d + LANES - 1) // LANES * LANES
    lanes = np.zeros(LANES, F)
    scratch = (np.zeros(length, F), np.zeros(length, F), np.zeros(length, F), lanes)
    for t in range(first, last):
        start = t * tile
        width = min(n, start + tile) - start
        block = start // group
        for i in range(d):
            s[i] = scales[i, block]
            inv[i] = _inverse(s[i])
            o[i] = offsets[i, block]
            for j in range(width):
                w[j, i] = target[i, start + j]
        for j in range(width):
            c = taken[start + j]
            _owed(w[j], debt, c, heft[start + j], mean, x)
            _multipliers(
                w[j], s, inv, o, basis, shifts, levels, mids, low, high, uniform, codes[j], x,
                turns, tolerance, scratch,
            )  # fmt: skip
            _finish(
                w[j], s, o, basis, weights, levels, codes[j], residual, tolerance, steps, lanes
            )  # fmt: skip
            if mean > 0:
                _owe(w[j], s, o, levels, codes[j], c, heft[start + j], debt)
        for i in range(d):
            for j in range(width):
                out[i, start + j] = codes[j, i]


@compiled()
def rows(
    target, scales, offsets, group, basis, shifts, weights, levels, mids, low, high, uniform, taken,
    heft, mean, out, first, last, turns, tolerance, steps,
):  # fmt: skip
    """Round the rows ``first`` to ``last``; row i has a constraint on Σ_j u_j Ŵ_ij."""
    n = target.shape[1]
    k = basis.shape[0]
    s, inv, o, x = np.empty(n, F), np.empty(n, F), np.empty(n, F), np.empty(n, F)
    residual = np.empty(k, F)
    debt = np.zeros((k, n), F)
    length = (n + LANES - 1) // LANES * LANES
    lanes = np.zeros(LANES, F)
    scratch = (np.zeros(length, F), np.zeros(length, F), np.zeros(length, F), lanes)
    for i in range(first, last):
        for j in range(n):
            s[j] = scales[i, j // group]
            inv[j] = _inverse(s[j])
            o[j] = offsets[i, j // group]
        _owed(target[i], debt, taken[i], heft[i], mean, x)
        _multipliers(
            target[i], s, inv, o, basis, shifts, levels, mids, low, high, uniform, out[i], x, turns,
            tolerance, scratch,
        )  # fmt: skip
        _finish(
            target[i], s, o, basis, weights, levels, out[i], residual, tolerance, steps, lanes
        )  # fmt: skip
        if mean > 0:
            _owe(target[i], s, o, levels, out[i], taken[i], heft[i], debt)
