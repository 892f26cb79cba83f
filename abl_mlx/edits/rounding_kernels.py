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
    F,
    between,
    cancelling,
    choose,
    level_sum,
    marked,
    short_sum,
)
from abl_mlx.edits.projection_kernels import dot
from convert.base.compiled import compiled
from convert.base.scale_kernels import finite_inverse

# Most evaluations of the residual in a search for a multiplier, besides those that bracket it.
_EVALUATIONS = 10
_BRACKETS = 6

# Up to this number weights are summed one by one.
_SHORT = 128

# Twice the share of the accumulated errors that an average line compensates.
_PAID = F(0.5)


@compiled(inner=True, plain=True)
def _search(z, slope, weight, kept, mu, levels, mids, few, tolerance, moves, words, active, parts,
            lanes):  # fmt: skip
    """Step 1 for one direction: the multiplier nearest to a residual of 0, from ``mu`` on.

    The residual is kept + Σ weight · level, where a weight's level is the one nearest to
    z − μ slope. It falls as μ grows, in steps; so it is bracketed, then searched by false position,
    and the best value seen is kept. (The function is long because splitting it would hand a dozen
    numbers back and forth.)
    """
    best = m0 = m1 = mu
    f0 = f1 = least = step = F(0)
    for turn in range(_BRACKETS + 2):
        f1 = kept + level_sum(z, slope, weight, m1, levels, mids, few, lanes)
        if turn == 0:
            least = abs(f1)
            # On average the values follow the line, so f falls by one as μ grows by one.
            step = f1 * F(1.5)
        elif f0 * f1 <= 0 or turn == _BRACKETS + 1:
            break
        else:
            step *= F(2)
        if least <= tolerance:
            break
        m0, f0 = m1, f1
        m1 += step
    if least > tolerance:
        if abs(f0) < least:
            best, least = m0, abs(f0)
        if abs(f1) < least:
            best, least = m1, abs(f1)
    if f0 * f1 < 0 and least > tolerance:
        between(z, slope, m0, m1, levels, mids, few, moves)
        count = marked(moves, words, active)
        # From here on only the weights that can change are looked at.
        padded = (count + LANES - 1) // LANES * LANES
        zs, slopes, weights = parts[0, :padded], parts[1, :padded], parts[2, :padded]
        for j in range(count):
            i = active[j]
            zs[j], slopes[j], weights[j] = z[i], slope[i], weight[i]
        for j in range(count, padded):
            zs[j], slopes[j], weights[j] = 0, 0, 0
        rest, m, side = F(0), m1, 0
        for turn in range(_EVALUATIONS + 1):
            if turn > 0:
                m = m0 + (m1 - m0) * f0 / (f0 - f1)
                # The point is kept away from the ends, so that the bracket also shrinks at a steep
                # step.
                width = abs(m1 - m0)
                left = (m0 if m0 <= m1 else m1) + F(0.1) * width
                right = (m0 if m0 <= m1 else m1) + F(0.9) * width
                m = left if m < left else m
                m = right if m > right else m
            if count <= _SHORT:
                f = rest + short_sum(zs, slopes, weights, count, m, levels, mids, few)
            else:
                f = rest + level_sum(zs, slopes, weights, m, levels, mids, few, lanes)
            if turn == 0:
                rest = f1 - f
                continue
            if abs(f) < least:
                best, least = m, abs(f)
            if abs(f) <= tolerance:
                break
            # The value at an end that stays is halved (the Illinois rule), so that a flat stretch
            # on its side does not slow the search.
            if f * f0 > 0:
                m0, f0 = m, f
                f1 *= F(0.5) if side == 1 else F(1)
                side = 1
            else:
                m1, f1 = m, f
                f0 *= F(0.5) if side == -1 else F(1)
                side = -1
    return best


@compiled(inner=True, plain=True)
def _change(scale, levels, code, other):
    """What another code changes in a weight; 0 where there is no such level."""
    last = levels.shape[0] - 1
    other = other if other > 0 else 0
    other = other if other < last else last
    return scale * (levels[other] - levels[code])


@compiled(inner=True, plain=True)
def _lefts(some, which, count, changes, basis, residual, lefts):
    """The square of the residual that each step would leave, (2, count)."""
    for way in range(2):
        for j in range(count):
            lefts[way, j] = 0
        for a in range(basis.shape[0]):
            first = residual[a]
            for j in range(count):
                i = which[j] if some else j
                part = first + basis[a, i] * changes[way, j]
                lefts[way, j] += part * part


@compiled(inner=True, plain=True)
def _finish(which, count, e, s, basis, weights, levels, codes, residual, tolerance, most,
            changes, lefts):  # fmt: skip
    """Step 2: change single codes by one step each, so as to cancel the remaining residual.

    Of the steps that bring the residual within the tolerance, the one that adds the least
    weighted error is taken; if there are none, the one that leaves the smallest residual.

    Args:
        which: indices of the weights that may change, of which there are ``count``; unused if these
            are all.
        most: how many steps at most.
        changes, lefts: scratch, (2, d): what a step down and one up change, and leave.

    Returns:
        Whether the residual is within the tolerance.
    """
    k, some = basis.shape[0], count < codes.shape[0]
    within = tolerance * tolerance
    for step in range(most + 1):
        left = F(0)
        for a in range(k):
            left += residual[a] * residual[a]
        if left <= within or step == most:
            return left <= within
        if step == 0:
            for j in range(count):
                i = which[j] if some else j
                code = np.int64(codes[i])
                changes[0, j] = _change(s[i], levels, code, code - 1)
                changes[1, j] = _change(s[i], levels, code, code + 1)
        _lefts(some, which, count, changes, basis, residual, lefts)
        chosen, up, least, cost = -1, 0, left, F(np.inf)
        enough = False
        for j in range(count):
            bound = least if least > within else within
            if lefts[0, j] > bound and lefts[1, j] > bound:
                continue
            i = which[j] if some else j
            for way in range(2):
                after, change = lefts[way, j], changes[way, j]
                if after <= within:
                    added = weights[i] * (change * (change + F(2) * e[i]))
                    if not enough or added < cost:
                        enough, cost = True, added
                        chosen, up = j, way
                elif not enough and after < least:
                    least = after
                    chosen, up = j, way
        if chosen < 0:
            return False
        i = which[chosen] if some else chosen
        change = changes[up, chosen]
        for a in range(k):
            residual[a] += basis[a, i] * change
        e[i] += change
        code = np.int64(codes[i]) + 2 * up - 1
        codes[i] = np.uint8(code)
        changes[0, chosen] = _change(s[i], levels, code, code - 1)
        changes[1, chosen] = _change(s[i], levels, code, code + 1)
    return False


@compiled(plain=True)
def lines(
    target, scales, offsets, old_scales, old_offsets, old_levels, low, share, group, basis, shifts,
    weights, levels, mids, few, taken, heft, mean, codes, turns, tolerance, steps, scratch,
):  # fmt: skip
    """Choose the codes of some lines; each has a constraint on Σ_i u_i Ŵ_i.

    Step 1: codes Q(x − Σ μ_a v_a), where each μ_a is found in turn. v_a is u_a, or u_a divided by
    the weights of the errors (``shifts``). Each residual falls as its own multiplier grows, so this
    is coordinate ascent on the Lagrangian dual. Step 2 changes single codes.

    x is not the exact weights w: it is w minus the share of earlier lines' errors that this line
    compensates. Why: if a line's weights lie on levels and the edit removes c u, then the codes
    with the least error are nearly all the old ones; only a few weights, those with the largest u,
    move. The component along u would be gone, but c could be read along those few weights: it would
    be rotated, not removed. So the sum of every weight's error times c is kept (``debt``, as in
    error diffusion), and later lines are rounded from a point that reduces it.

    (The function is long because numba takes a tenth of a second for each function, and optimizes
    it again in each that calls it.)

    Args:
        target: (L, d), the exact edited weights; or None where they are those of ``codes``, as they
            enter, less the components ``taken``.
        scales, offsets: (S, d / group), those of the new grid; ``share`` lines have each in common.
        old_scales, old_offsets: those of the codes that enter, or None.
        old_levels: levels of the codes that enter; None for the whole numbers from ``low`` on.
        shifts: (k, d), v.
        weights: (d,), of the errors of a line.
        levels, mids, few: see `level_kernels`.
        taken: (L, k), c of each line.
        heft: (L,), the weight of each line's errors beside those of other lines.
        mean: heft Σ_a c_a², averaged over all lines.
        codes: (L, d), the result.
        turns: how often each direction's multiplier is found.
        tolerance: of a residual.
        steps: the most steps that finish a line.
        scratch: see `abl_mlx.edits.rounding`.
    """
    k, d = basis.shape
    numbers, debt, slope, weight, z, moves, words, active, parts, lanes, mu, residual = scratch[:12]
    changes, lefts = scratch[12:]
    s, inv, o, e = numbers[0], numbers[1], numbers[2], numbers[3]
    old_s, old_o, w = numbers[4], numbers[5], numbers[6]
    for t in range(codes.shape[0]):
        code = codes[t]
        if t % share == 0:
            for block in range(scales.shape[1]):
                scale, offset = scales[t // share, block], offsets[t // share, block]
                inverse = finite_inverse(scale)
                for i in range(block * group, block * group + group):
                    s[i], o[i], inv[i] = scale, offset, inverse
                if old_scales is not None:
                    scale, offset = old_scales[t // share, block], old_offsets[t // share, block]
                    for i in range(block * group, block * group + group):
                        old_s[i], old_o[i] = scale, offset
            for a in range(k):
                for i in range(d):
                    slope[a, i] = shifts[a, i] * inv[i]
                    weight[a, i] = basis[a, i] * s[i]
        if target is not None:
            w = target[t]
        if old_scales is not None:
            if old_levels is None:
                for i in range(d):
                    w[i] = old_s[i] * (F(code[i]) + low) + old_o[i]
            else:
                for i in range(d):
                    w[i] = old_s[i] * old_levels[code[i]] + old_o[i]
            for a in range(k):
                c = taken[t, a]
                for i in range(d):
                    w[i] -= basis[a, i] * c
        square = mean
        for a in range(k):
            square += heft[t] * (taken[t, a] * taken[t, a])
        for a in range(k):
            part = _PAID * taken[t, a] / square if mean > 0 else F(0)
            if a == 0:
                for i in range(d):
                    e[i] = w[i] - part * debt[0, i]
            elif mean > 0:
                for i in range(d):
                    e[i] -= part * debt[a, i]
        for i in range(d):
            z[i] = (e[i] - o[i]) * inv[i]
            e[i] = o[i] - w[i]
        for time in range(turns):
            for a in range(k):
                kept = dot(basis[a], e, lanes)
                if time > 0:
                    for i in range(d):
                        z[i] += mu[a] * slope[a, i]  # takes this direction's shift out of z
                found = _search(z, slope[a], weight[a], kept, mu[a] if time > 0 else F(0), levels,
                                mids, few, tolerance, moves, words, active, parts,
                                lanes)  # fmt: skip
                mu[a] = found
                for i in range(d):
                    z[i] -= found * slope[a, i]
        choose(z, w, s, o, levels, mids, few, code, e)
        for a in range(k):
            residual[a] = dot(basis[a], e, lanes)
        # First those weights are looked at of which one step leaves nothing, which are few.
        # (There is one call, because numba would make two copies of what is called.)
        first, count, most, done = k == 1 and mids is None, d, steps, False
        if first:
            cancelling(code, s, basis[0], weight[0], mids, few, residual[0], tolerance, moves)
            count, most = marked(moves, words, active), 1 if steps > 1 else steps
        for _ in range(2 if first else 1):
            if not done:
                done = _finish(active, count, e, s, basis, weights, levels, code, residual,
                               tolerance, most, changes, lefts)  # fmt: skip
            count, most = d, steps
        if mean > 0:
            for a in range(k):
                part = heft[t] * taken[t, a]
                for i in range(d):
                    debt[a, i] += part * e[i]
