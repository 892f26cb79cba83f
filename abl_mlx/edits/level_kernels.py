"""Numba kernels of `rounding_kernels`: the levels nearest to weights, and sums over these.

Sums over a line are computed as `LANES` partial sums, which are added at the end. So they are the
same on every CPU, while the compiler can still keep the partial sums in a vector register.

Levels are of one of three kinds, and numba compiles only the kind that is given: whole numbers in a
row (``mids`` and ``few`` are None), at most 16 of any sort (``few`` is given), or more (``mids``
is). So each function tests for None first. ``mids`` are the midpoints between levels; ``few`` holds
`MIDPOINTS` midpoints, the gaps between levels at these, as many ones, and an array with the gap
below each level and above the last.
"""

from __future__ import annotations

import numpy as np

from abl_mlx.edits.projection_kernels import total
from convert.base.compiled import compiled
from convert.base.scale_kernels import nearest_whole

F = np.float32

LANES = 32
"""The number of partial sums."""

#: The number of midpoints between at most 16 levels.
MIDPOINTS = 15


@compiled(inner=True)
def nearest_few(x, low, mids, gaps):
    """The level nearest to x, for `MIDPOINTS` midpoints between levels and gaps between these.

    They are written out, because only then do compilers compare a whole register at a time.
    """
    a, b, c, d, e, f, g, h, i, j, k, l, m, n, o = mids
    aa, bb, cc, dd, ee, ff, gg, hh, ii, jj, kk, ll, mm, nn, oo = gaps
    zero = F(0)
    level = low + (aa if x > a else zero)
    level += bb if x > b else zero
    level += cc if x > c else zero
    level += dd if x > d else zero
    level += ee if x > e else zero
    level += ff if x > f else zero
    level += gg if x > g else zero
    level += hh if x > h else zero
    level += ii if x > i else zero
    level += jj if x > j else zero
    level += kk if x > k else zero
    level += ll if x > l else zero
    level += mm if x > m else zero
    level += nn if x > n else zero
    level += oo if x > o else zero
    return level


@compiled(inner=True)
def nearest_code(x, mids):
    """The index of the level nearest to x: the number of midpoints between levels below x."""
    code = 128 if x > mids[127] else 0
    code += 64 if x > mids[code + 63] else 0
    code += 32 if x > mids[code + 31] else 0
    code += 16 if x > mids[code + 15] else 0
    code += 8 if x > mids[code + 7] else 0
    code += 4 if x > mids[code + 3] else 0
    code += 2 if x > mids[code + 1] else 0
    code += 1 if x > mids[code] else 0
    return code


@compiled(inner=True)
def level_sum(z, slope, weight, mu, levels, mids, few, lanes):
    """Σ weight · the level nearest to z − μ slope. The lengths are multiples of `LANES`."""
    lanes[:] = 0
    low, high, width = levels[0], levels[-1], lanes.shape[0]
    for start in range(0, z.shape[0], width):
        zs, slopes = z[start : start + width], slope[start : start + width]
        weights = weight[start : start + width]
        if few is not None:
            for lane in range(width):
                x = zs[lane] - mu * slopes[lane]
                lanes[lane] += weights[lane] * nearest_few(x, low, few[0], few[1])
        elif mids is not None:
            for lane in range(width):
                x = zs[lane] - mu * slopes[lane]
                lanes[lane] += weights[lane] * levels[nearest_code(x, mids)]
        else:
            for lane in range(width):
                x = zs[lane] - mu * slopes[lane]
                lanes[lane] += weights[lane] * nearest_whole(x, low, high)
    return total(lanes)


@compiled(inline=True)
def short_sum(z, slope, weight, count, mu, levels, mids, few):
    """`level_sum` of the first ``count`` weights, where these are few."""
    low, high, found = levels[0], levels[-1], F(0)
    if few is not None:
        for i in range(count):
            found += weight[i] * nearest_few(z[i] - mu * slope[i], low, few[0], few[1])
    elif mids is not None:
        for i in range(count):
            found += weight[i] * levels[nearest_code(z[i] - mu * slope[i], mids)]
    else:
        for i in range(count):
            found += weight[i] * nearest_whole(z[i] - mu * slope[i], low, high)
    return found


@compiled(inline=True)
def between(z, slope, m0, m1, levels, mids, few, moves):
    """For each weight, whether its level differs between two multipliers."""
    low, high = levels[0], levels[-1]
    if few is not None:
        for i in range(z.shape[0]):
            one = nearest_few(z[i] - m0 * slope[i], low, few[0], few[1])
            moves[i] = one != nearest_few(z[i] - m1 * slope[i], low, few[0], few[1])
    elif mids is not None:
        for i in range(z.shape[0]):
            code = nearest_code(z[i] - m0 * slope[i], mids)
            moves[i] = code != nearest_code(z[i] - m1 * slope[i], mids)
    else:
        for i in range(z.shape[0]):
            one = nearest_whole(z[i] - m0 * slope[i], low, high)
            moves[i] = one != nearest_whole(z[i] - m1 * slope[i], low, high)


@compiled(inner=True)
def choose(z, w, s, o, levels, mids, few, codes, e):
    """The codes of the levels nearest to z, and the errors e of their values."""
    low, high = levels[0], levels[-1]
    if few is not None:
        for i in range(w.shape[0]):
            codes[i] = np.uint8(np.int32(nearest_few(z[i], F(0), few[0], few[2])))
            e[i] = s[i] * nearest_few(z[i], low, few[0], few[1]) + o[i] - w[i]
    elif mids is not None:
        for i in range(w.shape[0]):
            code = nearest_code(z[i], mids)
            codes[i] = np.uint8(code)
            e[i] = s[i] * levels[code] + o[i] - w[i]
    else:
        for i in range(w.shape[0]):
            q = nearest_whole(z[i], low, high)
            codes[i] = np.uint8(np.int32(q - low))
            e[i] = s[i] * q + o[i] - w[i]


@compiled(inner=True)
def marked(moves, words, active):
    """Write the indices of weights that are marked, and return how many there are.

    They are few, so eight marks are looked at together.

    Args:
        moves, words: the marks as uint8 (d,), and the same as uint64 (d / 8,).
    """
    count = 0
    for word in range(words.shape[0]):
        if words[word]:
            for i in range(8 * word, 8 * word + 8):
                active[count] = i
                count += moves[i]
    return count


@compiled(inner=True)
def cancelling(codes, s, u, weight, mids, few, residual, tolerance, moves):
    """Mark the weights of which a step up or down leaves nothing of a residual."""
    if few is not None:
        for i in range(codes.shape[0]):
            down, up = u[i] * (s[i] * few[3][codes[i]]), u[i] * (s[i] * few[3][codes[i] + 1])
            moves[i] = (abs(residual - down) <= tolerance) | (abs(residual + up) <= tolerance)
    elif mids is None:
        size = abs(residual)
        for i in range(weight.shape[0]):
            moves[i] = abs(abs(weight[i]) - size) <= tolerance
