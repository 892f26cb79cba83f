"""Numba kernels of `rounding`: one line of weights at a time, in float32.

A line is what one constraint spans: a column of a writer's weight, or a row of an embedding. All
kernels release the interpreter lock, so that threads can share the lines.

Sums over a line are made in `LANES` parts side by side, which are added up at the end. So they are
the same on every CPU, and a compiler may still put the parts into one register.
"""

from __future__ import annotations

import numpy as np

from convert.base.compiled import compiled

F = np.float32

LANES = 32
"""Parts of a sum."""

# Evaluations of the residual in one search for a multiplier, besides those that bracket it.
_EVALUATIONS = 10
_BRACKETS = 6

# Levels above which they are searched by halving, and not compared one by one in vector registers.
_MANY = 32

# Scales below have no finite inverse.
_LEAST = F(1.2e-38)

# Share of its debt that a line like the others is asked for, times two.
_PAID = F(0.5)


@compiled()
def _inverse(scale):
    """1 / scale; 0 where that is no finite number, as of a scale of zero."""
    return F(1) / scale if abs(scale) >= _LEAST else F(0)


@compiled()
def _total(lanes):
    """The sum of the lanes' sums."""
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    return F(total)


@compiled()
def _prepare(x, u, w, s, inv, o, at, slope, weight, lanes):
    """What `_residual` needs of a line and a direction, and the part of it that stays.

    A weight's level is that nearest to at − μ slope, and adds weight · level to the residual. The
    three are longer than the line, up to a multiple of `LANES`, and zero there.

    Returns:
        Σ u (offset − w).
    """
    d = x.shape[0]
    lanes[:] = 0
    for i in range(d):
        at[i] = (x[i] - o[i]) * inv[i]
    for i in range(d):
        slope[i] = u[i] * inv[i]
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
    """Σ u (value − w) over the line, where every value is the one nearest to x − μ u."""
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
    """The index of the nearest level: how many midpoints between levels lie below a value."""
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
def _multipliers(w, s, inv, o, basis, levels, mids, low, high, uniform, codes, x, turns, tolerance,
                 scratch):  # fmt: skip
    """Step 1: codes Q(x − Σ μ_a u_a), each μ_a found in turn by a bracketed false position.

    x is w, or what `_owed` makes of it, and is changed. Each residual falls as its own multiplier
    grows, so this climbs the Lagrangian's dual one coordinate at a time. It is a staircase: the
    best step seen is kept.
    """
    k, d = basis.shape
    at, slope, weight, lanes = scratch
    mu = np.zeros(k, F)
    for _ in range(turns):
        for a in range(k):
            u = basis[a]
            if mu[a] != 0:
                for i in range(d):
                    x[i] += mu[a] * u[i]  # x is now without this direction's share
            kept = _prepare(x, u, w, s, inv, o, at, slope, weight, lanes)
            m0 = mu[a]
            f0 = _residual(at, slope, weight, m0, kept, levels, mids, low, high, uniform,
                           lanes)  # fmt: skip
            best, least = m0, abs(f0)
            if least > tolerance:
                # On average the values follow, so f falls by one as μ grows by one.
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
                        # Kept off the ends, so that the bracket shrinks at a steep step too.
                        left, width = min(m0, m1), abs(m1 - m0)
                        m = min(max(m, left + F(0.1) * width), left + F(0.9) * width)
                        f = _residual(at, slope, weight, m, kept, levels, mids, low, high, uniform,
                                      lanes)  # fmt: skip
                        if abs(f) < least:
                            best, least = m, abs(f)
                        if abs(f) <= tolerance:
                            break
                        # An end that stays counts half as much (the Illinois rule), so that a flat
                        # stretch on its side does not hold the search up.
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
                x[i] -= best * u[i]
    for i in range(d):
        at[i] = (x[i] - o[i]) * inv[i]
    _choose(at, mids, low, high, uniform, codes)


@compiled()
def _owed(w, debt, taken, mean, x):
    """x: the weights w minus the share of earlier lines' errors that this line compensates.

    Without it the cheapest codes for w + c u − μ u, where a line's weights lie on levels and the
    edit takes c u away, are the levels they lie on, but for a few weights with the largest u. The
    component along u would be gone, and c be found again along those few others: turned, not
    removed. So every weight's error times c is kept (``debt``, as in error diffusion), and later
    lines are rounded from where it shrinks.

    Args:
        debt: (k, d): Σ over earlier lines of c_a times the error of their weights.
        taken: (k,): c of this line.
        mean: Σ_a c_a², on average over the lines.
    """
    k, d = debt.shape
    square = mean
    for a in range(k):
        square += taken[a] * taken[a]
    for i in range(d):
        x[i] = w[i]
    if mean > 0:
        for a in range(k):
            share = _PAID * taken[a] / square
            for i in range(d):
                x[i] -= share * debt[a, i]


@compiled()
def _owe(w, s, o, levels, codes, taken, debt):
    """Add a line's errors to the sum that later lines compensate."""
    k, d = debt.shape
    for i in range(d):
        error = s[i] * levels[codes[i]] + o[i] - w[i]
        for a in range(k):
            debt[a, i] += taken[a] * error


@compiled()
def _finish(w, s, o, basis, levels, codes, residual, tolerance, steps, lanes):
    """Step 2: single steps of single codes that best cancel what is left of the residual.

    Of the steps that bring it within the tolerance, the one that adds least weight error is taken.
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
                    added = change * (change + F(2) * error)
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
    target, scales, offsets, group, basis, levels, mids, low, high, uniform, taken, mean, out, tile,
    first, last, turns, tolerance, steps,
):  # fmt: skip
    """Round the columns of tiles ``first`` to ``last``: the constraint is Σ_i u_i Ŵ_ij per j.

    ``tile`` columns lie within one group, so that they share every row's scale.
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
            _owed(w[j], debt, c, mean, x)
            _multipliers(
                w[j], s, inv, o, basis, levels, mids, low, high, uniform, codes[j], x, turns,
                tolerance, scratch,
            )  # fmt: skip
            _finish(w[j], s, o, basis, levels, codes[j], residual, tolerance, steps, lanes)
            if mean > 0:
                _owe(w[j], s, o, levels, codes[j], c, debt)
        for i in range(d):
            for j in range(width):
                out[i, start + j] = codes[j, i]


@compiled()
def rows(
    target, scales, offsets, group, basis, levels, mids, low, high, uniform, taken, mean, out,
    first, last, turns, tolerance, steps,
):  # fmt: skip
    """Round the rows ``first`` to ``last``: the constraint is Σ_j u_j Ŵ_ij per i."""
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
        _owed(target[i], debt, taken[i], mean, x)
        _multipliers(
            target[i], s, inv, o, basis, levels, mids, low, high, uniform, out[i], x, turns,
            tolerance, scratch,
        )  # fmt: skip
        _finish(target[i], s, o, basis, levels, out[i], residual, tolerance, steps, lanes)
        if mean > 0:
            _owe(target[i], s, o, levels, out[i], taken[i], debt)
