"""Numba kernels of `rounding`: one line of weights at a time, in float32.

A line is what one constraint spans: a column of a writer's weight, or a row of an embedding. All
kernels release the interpreter lock, so that threads can share the lines.
"""

from __future__ import annotations

import numpy as np
from numba import njit

F = np.float32

# Evaluations of the residual in one search for a multiplier, besides those that bracket it.
_EVALUATIONS = 10
_BRACKETS = 6

# Levels above which they are searched by halving, and not compared one by one in vector registers.
_MANY = 32

# Share of its debt that a line like the others is asked for, times two.
_PAID = F(0.5)


@njit(nogil=True, fastmath=True, cache=True)
def _rounded(x, u, mu, w, s, inv, o, levels, mids, low, high, uniform, codes):
    """Codes of the values nearest to x − μ u, and Σ u (value − w) over the line."""
    total = F(0)
    if uniform:
        for i in range(x.shape[0]):
            q = min(max(np.floor((x[i] - mu * u[i] - o[i]) * inv[i] + F(0.5)), low), high)
            codes[i] = np.uint8(q - low)
            total += u[i] * (s[i] * q + o[i] - w[i])
    elif mids.shape[0] > _MANY:
        for i in range(x.shape[0]):
            z = (x[i] - mu * u[i] - o[i]) * inv[i]
            code, step = 0, 128
            while step:
                upper = code + step
                if upper <= mids.shape[0] and z > mids[upper - 1]:
                    code = upper
                step >>= 1
            codes[i] = np.uint8(code)
            total += u[i] * (s[i] * levels[code] + o[i] - w[i])
    else:
        for i in range(x.shape[0]):
            z = (x[i] - mu * u[i] - o[i]) * inv[i]
            code = 0
            for m in range(mids.shape[0]):
                code += z > mids[m]
            codes[i] = np.uint8(code)
            total += u[i] * (s[i] * levels[code] + o[i] - w[i])
    return total


@njit(nogil=True, fastmath=True, cache=True)
def _multipliers(w, s, inv, o, basis, levels, mids, low, high, uniform, codes, x, turns, tolerance):
    """Step 1: codes Q(x − Σ μ_a u_a), each μ_a found in turn by a bracketed false position.

    x is w, or what `_owed` makes of it, and is changed. Each residual falls as its own multiplier
    grows, so this climbs the Lagrangian's dual one coordinate at a time. It is a staircase: the
    best step seen is kept.
    """
    k, d = basis.shape
    mu = np.zeros(k, F)
    for _ in range(turns):
        for a in range(k):
            u = basis[a]
            for i in range(d):
                x[i] += mu[a] * u[i]  # x is now without this direction's share
            m0 = mu[a]
            f0 = _rounded(x, u, m0, w, s, inv, o, levels, mids, low, high, uniform, codes)
            best, least = m0, abs(f0)
            if least > tolerance:
                # On average the values follow, so f falls by one as μ grows by one.
                step = f0 * F(1.5)
                m1 = m0 + step
                f1 = _rounded(x, u, m1, w, s, inv, o, levels, mids, low, high, uniform, codes)
                for _ in range(_BRACKETS):
                    if f0 * f1 <= 0:
                        break
                    m0, f0 = m1, f1
                    step *= F(2)
                    m1 += step
                    f1 = _rounded(x, u, m1, w, s, inv, o, levels, mids, low, high, uniform, codes)
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
                        f = _rounded(x, u, m, w, s, inv, o, levels, mids, low, high, uniform, codes)
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
    zero = F(0)
    _rounded(x, basis[0], zero, w, s, inv, o, levels, mids, low, high, uniform, codes)


@njit(nogil=True, fastmath=True, cache=True)
def _owed(w, debt, taken, mean, x):
    """x: w less the share of the debt that this line is asked to pay back.

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


@njit(nogil=True, fastmath=True, cache=True)
def _owe(w, s, o, levels, codes, taken, debt):
    """Add a line's errors to the debt."""
    k, d = debt.shape
    for i in range(d):
        error = s[i] * levels[codes[i]] + o[i] - w[i]
        for a in range(k):
            debt[a, i] += taken[a] * error


@njit(nogil=True, fastmath=True, cache=True)
def _finish(w, s, o, basis, levels, codes, residual, tolerance, steps):
    """Step 2: single steps of single codes that best cancel what is left of the residual.

    Of the steps that bring it within the tolerance, the one that adds least weight error is taken.
    """
    k, d = basis.shape
    top = levels.shape[0] - 1
    for a in range(k):
        total = F(0)
        for i in range(d):
            total += basis[a, i] * (s[i] * levels[codes[i]] + o[i] - w[i])
        residual[a] = total
    for _ in range(steps):
        left = F(0)
        for a in range(k):
            left += residual[a] * residual[a]
        if left <= tolerance * tolerance:
            return
        chosen, move, least, cost = -1, 0, left, F(np.inf)
        enough = False
        for i in range(d):
            code = np.int64(codes[i])
            for direction in (-1, 1):
                other = code + direction
                if other < 0 or other > top:
                    continue
                change = s[i] * (levels[other] - levels[code])
                after = F(0)
                for a in range(k):
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


@njit(nogil=True, fastmath=True, cache=True)
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
    for t in range(first, last):
        start = t * tile
        width = min(n, start + tile) - start
        block = start // group
        for i in range(d):
            s[i] = scales[i, block]
            inv[i] = F(1) / s[i] if s[i] != 0 else F(0)
            o[i] = offsets[i, block]
            for j in range(width):
                w[j, i] = target[i, start + j]
        for j in range(width):
            c = taken[start + j]
            _owed(w[j], debt, c, mean, x)
            _multipliers(
                w[j], s, inv, o, basis, levels, mids, low, high, uniform, codes[j], x, turns,
                tolerance,
            )  # fmt: skip
            _finish(w[j], s, o, basis, levels, codes[j], residual, tolerance, steps)
            if mean > 0:
                _owe(w[j], s, o, levels, codes[j], c, debt)
        for i in range(d):
            for j in range(width):
                out[i, start + j] = codes[j, i]


@njit(nogil=True, fastmath=True, cache=True)
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
    for i in range(first, last):
        for j in range(n):
            s[j] = scales[i, j // group]
            inv[j] = F(1) / s[j] if s[j] != 0 else F(0)
            o[j] = offsets[i, j // group]
        _owed(target[i], debt, taken[i], mean, x)
        _multipliers(
            target[i], s, inv, o, basis, levels, mids, low, high, uniform, out[i], x, turns,
            tolerance,
        )  # fmt: skip
        _finish(target[i], s, o, basis, levels, out[i], residual, tolerance, steps)
        if mean > 0:
            _owe(target[i], s, o, levels, out[i], taken[i], debt)
