"""Numba kernels of `codebook_rounding`: one strip of groups at a time, in float32.

A strip is the set of groups that share constraints. Down columns it is the G columns that the
groups of every row cover together, with a constraint for each column; along a row it is the row,
with one constraint. Both are given as L groups of G weights, with a share u of the direction for
each weight. ``spread`` says that every position in a group has a constraint of its own.

A candidate of a group is another entry near its present one. Tables give, for each entry, the M
nearest: candidate 0 is the entry itself. The changes of weights are told for positive signs.
"""

from __future__ import annotations

import numpy as np

from convert.base.compiled import compiled

F = np.float32

_EVALUATIONS = 20

# Twice the share of the accumulated errors that an average line compensates.
_PAID = F(0.5)

# How much more residual than tolerated the search for prices may leave to single changes.
_ROUGH = F(60)

# The error that a finishing move may add, beside what it takes off the residual.
_THRIFT = F(0.05)


@compiled()
def neighbours(entries, flips, limit, codes, signs, changes):
    """For each entry the nearest ones with any of the ``flips`` of signs, the nearest first.

    Args:
        entries: float32, (K, G).
        flips: uint8, (S,): masks of signs that may change; the first is 0.
        limit: the largest number of candidates, M.
        codes: uint16, (K, M), the result: candidates' entries.
        signs: uint8, (K, M), the result: which signs differ.
        changes: float32, (K, G, M), the result: how the weights change.
    """
    count, group = entries.shape
    near = np.empty(limit, F)
    for one in range(count):
        found = 0
        for other in range(count):
            plain = F(0)
            for j in range(group):
                step = entries[other, j] - entries[one, j]
                plain += step * step
            for flip in flips:
                distance = plain
                for j in range(group):
                    if flip >> j & 1:
                        distance += F(4) * entries[other, j] * entries[one, j]
                if found == limit and distance >= near[limit - 1]:
                    continue
                at = min(found, limit - 1)
                while at > 0 and near[at - 1] > distance:
                    near[at] = near[at - 1]
                    codes[one, at], signs[one, at] = codes[one, at - 1], signs[one, at - 1]
                    at -= 1
                near[at] = distance
                codes[one, at], signs[one, at] = other, flip
                found = min(found + 1, limit)
        for m in range(limit):
            for j in range(group):
                value = entries[codes[one, m], j]
                if signs[one, m] >> j & 1:
                    value = -value
                changes[one, j, m] = value - entries[one, j]


@compiled(inner=True)
def _prepare(i, x, weights, scale, shift, code, sign, entries, changes, steps, costs):
    """Fill the steps and costs of a group: scale times signs, (G,), and added errors, (M,)."""
    group = entries.shape[1]
    one = code[i]
    costs[i, :] = 0
    for j in range(group):
        step = -scale[i] if sign[i] >> j & 1 else scale[i]
        steps[i, j] = step
        value = step * entries[one, j] + scale[i] * shift[i]
        slope = F(2) * weights[i, j] * step * (value - x[i, j])
        square = weights[i, j] * step * step
        line, row = costs[i], changes[one, j]
        for m in range(line.shape[0]):
            line[m] += row[m] * (slope + square * row[m])


@compiled(inner=True)
def _residual(w, u, scale, shift, code, entries, steps, spread, residual):
    """Σ u (value − w) for every constraint, (k, J)."""
    residual[:] = 0
    for a in range(u.shape[0]):
        for i in range(w.shape[0]):
            for j in range(w.shape[1]):
                value = steps[i, j] * entries[code[i], j] + scale[i] * shift[i]
                residual[a, j if spread else 0] += u[a, i, j] * (value - w[i, j])


@compiled(inner=True)
def _least(i, price, u, code, changes, steps, costs, spread, work):
    """The candidate of a group with the least error plus 2 Σ price · its change of residuals."""
    work[:] = costs[i]
    for j in range(changes.shape[1]):
        factor = F(0)
        for a in range(u.shape[0]):
            factor += price[a, j if spread else 0] * u[a, i, j]
        factor *= F(2) * steps[i, j]
        row = changes[code[i], j]
        for m in range(work.shape[0]):
            work[m] += factor * row[m]
    best, least = 0, work[0]
    for m in range(1, work.shape[0]):
        if work[m] < least:
            best, least = m, work[m]
    return best


@compiled(inner=True)
def _evaluate(price, base, u, code, changes, steps, costs, spread, work, chosen, residual):
    """The candidates under these prices, and the residual that they leave."""
    residual[:] = base
    for i in range(code.shape[0]):
        m = _least(i, price, u, code, changes, steps, costs, spread, work)
        chosen[i] = m
        if m:
            for j in range(changes.shape[1]):
                change = steps[i, j] * changes[code[i], j, m]
                for a in range(u.shape[0]):
                    residual[a, j if spread else 0] += u[a, i, j] * change


@compiled(inner=True)
def _square(values):
    total = F(0)
    for a in range(values.shape[0]):
        for j in range(values.shape[1]):
            total += values[a, j] * values[a, j]
    return total


@compiled(inner=True)
def _prices(price, best, ends, base, slope, u, code, changes, steps, costs, spread, tolerance,
            work, chosen, residual):  # fmt: skip
    """Find a price for each constraint at which its residual is small, all at the same time.

    Each residual falls as its own price grows, and depends less on the prices of others. So each
    has its own bracket, in which false position finds the next price.
    """
    k, count = price.shape
    ends[:] = np.nan
    stride = np.empty((k, count), F)
    least = F(np.inf)
    for turn in range(_EVALUATIONS):
        _evaluate(price, base, u, code, changes, steps, costs, spread, work, chosen, residual)
        square = _square(residual)
        if square < least:
            least = square
            best[:] = price
        if square <= tolerance * tolerance:
            break
        for a in range(k):
            for j in range(count):
                f = residual[a, j]
                if turn == 0:
                    stride[a, j] = F(1.5) * f * slope[a, j]
                side = 0 if f > 0 else 1
                other = 1 - side
                m0, f0 = price[a, j], f
                m1, f1 = ends[a, j, other, 0], ends[a, j, other, 1]
                ends[a, j, side, 0], ends[a, j, side, 1] = m0, f0
                again = ends[a, j, 2, 0] == side
                ends[a, j, 2, 0] = side
                if m1 == m1 and again and ends[a, j, 2, 1] == side:
                    # Three times on one side: other prices have moved the root past the far end.
                    stride[a, j] = m1 - m0
                    ends[a, j, other, 0] = np.nan
                    ends[a, j, 2, :] = np.nan
                    price[a, j] = m1
                elif m1 == m1:
                    if again:
                        # An end that stays is made less steep, so that it is left sooner.
                        ends[a, j, other, 1] *= F(0.5)
                        f1 *= F(0.5)
                        ends[a, j, 2, 1] = side
                    share = min(max(f0 / (f0 - f1), F(0.1)), F(0.9))
                    price[a, j] = m0 + (m1 - m0) * share
                else:
                    price[a, j] += stride[a, j]
                    stride[a, j] *= F(1.5)
    price[:] = best


@compiled(inner=True)
def _take(i, m, code, sign, codes, signs):
    """Make candidate m of group i its entry."""
    one = code[i]
    code[i] = codes[one, m]
    sign[i] ^= signs[one, m]


@compiled(inner=True)
def _finish(w, x, weights, u, norms, scale, shift, code, sign, entries, codes, signs, changes,
            steps, costs, spread, tolerance, moves, work, residual):  # fmt: skip
    """Change single groups, each time the one that best cancels the residuals of all constraints.

    A change is the better the less it leaves of the residual, and the less error it adds.
    """
    k = u.shape[0]
    part = np.empty(work.shape[0], F)
    share_of_error = _THRIFT
    for _ in range(moves):
        left = _square(residual)
        if left <= tolerance * tolerance:
            return
        best_i, best_m, least = -1, 0, F(0)
        for i in range(code.shape[0]):
            one = code[i]
            if scale[i] == 0:
                continue
            # An error of one step costs as much as this share of the residual.
            thrift = share_of_error * left / (scale[i] * scale[i] * norms[one, 1])
            for m in range(work.shape[0]):
                work[m] = thrift * max(costs[i, m], F(0))
            if spread:
                share = F(0)
                for a in range(k):
                    share += u[a, i, 0] * u[a, i, 0]
                share *= scale[i] * scale[i]
                for m in range(work.shape[0]):
                    work[m] += share * norms[one, m]
                for j in range(w.shape[1]):
                    factor = F(0)
                    for a in range(k):
                        factor += residual[a, j] * u[a, i, j]
                    factor *= F(2) * steps[i, j]
                    row = changes[one, j]
                    for m in range(work.shape[0]):
                        work[m] += factor * row[m]
            else:
                for a in range(k):
                    part[:] = 0
                    for j in range(w.shape[1]):
                        factor = u[a, i, j] * steps[i, j]
                        row = changes[one, j]
                        for m in range(work.shape[0]):
                            part[m] += factor * row[m]
                    twice = F(2) * residual[a, 0]
                    for m in range(work.shape[0]):
                        work[m] += part[m] * (part[m] + twice)
            for m in range(1, work.shape[0]):
                if work[m] < least:
                    best_i, best_m, least = i, m, work[m]
        if best_i < 0 and share_of_error == 0:
            return
        if best_i < 0:
            share_of_error = F(0)
            continue
        _move(best_i, best_m, w, x, weights, u, scale, shift, code, sign, entries, codes, signs,
              changes, steps, costs, spread, residual)  # fmt: skip


@compiled(inner=True)
def _move(i, m, w, x, weights, u, scale, shift, code, sign, entries, codes, signs, changes, steps,
          costs, spread, residual):  # fmt: skip
    for j in range(w.shape[1]):
        change = steps[i, j] * changes[code[i], j, m]
        for a in range(u.shape[0]):
            residual[a, j if spread else 0] += u[a, i, j] * change
    _take(i, m, code, sign, codes, signs)
    _prepare(i, x, weights, scale, shift, code, sign, entries, changes, steps, costs)


@compiled(inner=True)
def _round(w, x, weights, u, slope, scale, shift, code, sign, entries, codes, signs, changes,
           norms, spread, tolerance, rounds, moves, scratch):  # fmt: skip
    """Choose the entries of a strip."""
    steps, costs, work, chosen, residual, base, price, best, ends = scratch
    price[:] = 0
    rough = _ROUGH * tolerance
    for turn in range(rounds):
        for i in range(code.shape[0]):
            _prepare(i, x, weights, scale, shift, code, sign, entries, changes, steps, costs)
        _residual(w, u, scale, shift, code, entries, steps, spread, base)
        residual[:] = base
        _prices(price, best, ends, base, slope, u, code, changes, steps, costs, spread,
                rough, work, chosen, residual)  # fmt: skip
        _evaluate(price, base, u, code, changes, steps, costs, spread, work, chosen, residual)
        for i in range(code.shape[0]):
            _take(i, chosen[i], code, sign, codes, signs)
        if turn > 0 and _square(residual) <= rough * rough:
            break
    for i in range(code.shape[0]):
        _prepare(i, x, weights, scale, shift, code, sign, entries, changes, steps, costs)
    _residual(w, u, scale, shift, code, entries, steps, spread, residual)
    _finish(w, x, weights, u, norms, scale, shift, code, sign, entries, codes, signs, changes,
            steps, costs, spread, tolerance, moves, work, residual)  # fmt: skip


@compiled(inner=True)
def _scratch(length, group, limit, k, constraints):
    return (
        np.empty((length, group), F), np.empty((length, limit), F), np.empty(limit, F),
        np.empty(length, np.int64), np.empty((k, constraints), F), np.empty((k, constraints), F),
        np.empty((k, constraints), F), np.empty((k, constraints), F),
        np.empty((k, constraints, 3, 2), F),
    )  # fmt: skip


@compiled()
def columns(
    target, out_codes, out_signs, scales, shifts, basis, weights, taken, heft, mean, entries, codes,
    signs, changes, norms, tolerance, rounds, moves, first, last,
):  # fmt: skip
    """Round the strips ``first`` to ``last`` of G columns each; d groups, one in each row."""
    d = target.shape[0]
    k, group = basis.shape[0], entries.shape[1]
    u = np.empty((k, d, group), F)
    for a in range(k):
        for i in range(d):
            u[a, i, :] = basis[a, i]
    w, x, heavy = np.empty((d, group), F), np.empty((d, group), F), np.empty((d, group), F)
    slope = np.empty((k, group), F)
    debt = np.zeros((k, d), F)
    scratch = _scratch(d, group, codes.shape[1], k, group)
    scale, shift = np.empty(d, F), np.zeros(d, F)
    code, sign = np.empty(d, np.int64), np.empty(d, np.uint8)
    share = np.empty((k, group), F)
    for t in range(first, last):
        start = t * group
        square = mean
        for j in range(group):
            slope[:, j] = weights[start + j]
            for a in range(k):
                square += heft[start + j] * taken[start + j, a] * taken[start + j, a]
        for j in range(group):
            for a in range(k):
                share[a, j] = _PAID * taken[start + j, a] / square if mean > 0 else F(0)
        for i in range(d):
            scale[i], code[i], sign[i] = scales[i, t], out_codes[i, t], out_signs[i, t]
            if shifts.shape[0]:
                shift[i] = shifts[i, t]
            for j in range(group):
                w[i, j] = x[i, j] = target[i, start + j]
                heavy[i, j] = weights[start + j]
                for a in range(k):
                    x[i, j] -= share[a, j] * debt[a, i]
        _round(w, x, heavy, u, slope, scale, shift, code, sign, entries, codes, signs, changes,
               norms, True, tolerance, rounds, moves, scratch)  # fmt: skip
        steps = scratch[0]
        for i in range(d):
            out_codes[i, t], out_signs[i, t] = code[i], sign[i]
            for j in range(group):
                error = steps[i, j] * entries[code[i], j] + scale[i] * shift[i] - w[i, j]
                for a in range(k):
                    debt[a, i] += heft[start + j] * taken[start + j, a] * error


@compiled()
def rows(
    target, out_codes, out_signs, scales, shifts, basis, weights, taken, heft, mean, entries, codes,
    signs, changes, norms, tolerance, rounds, moves, first, last,
):  # fmt: skip
    """Round the rows ``first`` to ``last``."""
    n = target.shape[1]
    k, group = basis.shape[0], entries.shape[1]
    length = n // group
    u = np.empty((k, length, group), F)
    heavy = np.empty((length, group), F)
    slope = np.zeros((k, 1), F)
    for i in range(length):
        for j in range(group):
            heavy[i, j] = weights[i * group + j]
            for a in range(k):
                u[a, i, j] = basis[a, i * group + j]
                slope[a, 0] += u[a, i, j] * u[a, i, j] / heavy[i, j]
    for a in range(k):
        slope[a, 0] = F(1) / slope[a, 0]
    w, x = np.empty((length, group), F), np.empty((length, group), F)
    debt = np.zeros((k, length, group), F)
    scratch = _scratch(length, group, codes.shape[1], k, 1)
    scale, shift = np.empty(length, F), np.zeros(length, F)
    code, sign = np.empty(length, np.int64), np.empty(length, np.uint8)
    for t in range(first, last):
        square = mean
        for a in range(k):
            square += heft[t] * taken[t, a] * taken[t, a]
        for i in range(length):
            scale[i], code[i], sign[i] = scales[t, i], out_codes[t, i], out_signs[t, i]
            if shifts.shape[0]:
                shift[i] = shifts[t, i]
            for j in range(group):
                w[i, j] = x[i, j] = target[t, i * group + j]
                for a in range(k):
                    if mean > 0:
                        x[i, j] -= _PAID * taken[t, a] / square * debt[a, i, j]
        _round(w, x, heavy, u, slope, scale, shift, code, sign, entries, codes, signs, changes,
               norms, False, tolerance, rounds, moves, scratch)  # fmt: skip
        steps = scratch[0]
        for i in range(length):
            out_codes[t, i], out_signs[t, i] = code[i], sign[i]
            for j in range(group):
                error = steps[i, j] * entries[code[i], j] + scale[i] * shift[i] - w[i, j]
                for a in range(k):
                    debt[a, i, j] += heft[t] * taken[t, a] * error
