"""Numba kernels of `projection`: sums over the residual stream in a fixed order."""

from __future__ import annotations

import numpy as np

from convert.base.compiled import compiled

F = np.float32

# How many numbers are summed in float32 before the result is added to a float64 sum.
_BLOCK = 32

# How many columns are processed together, so that their sums stay in the CPU's cache.
_WIDTH = 512


@compiled()
def down(basis, values, out, first, last):
    """Σ_i u_i w_ij of the columns ``first`` to ``last``: (k, d) and (d, n) -> ``out`` (k, n)."""
    k, d = basis.shape
    part, total = np.empty(_WIDTH, F), np.empty(_WIDTH, np.float64)
    for start in range(first, last, _WIDTH):
        width = min(_WIDTH, last - start)
        for a in range(k):
            total[:] = 0
            for top in range(0, d, _BLOCK):
                part[:] = 0
                for i in range(top, min(d, top + _BLOCK)):
                    u, row = basis[a, i], values[i, start : start + width]
                    for j in range(width):
                        part[j] += u * row[j]
                for j in range(width):
                    total[j] += part[j]
            for j in range(width):
                out[a, start + j] = total[j]


@compiled(inner=True)
def total(lanes):
    """The sum of partial sums, added in float64."""
    total = 0.0
    for lane in range(lanes.shape[0]):
        total += lanes[lane]
    return F(total)


@compiled(inner=True)
def dot(u, e, lanes):
    """Σ u e, in float32 partial sums: ``lanes`` holds them."""
    lanes[:] = 0
    d, width = u.shape[0], lanes.shape[0]
    whole = d // width * width
    for start in range(0, whole, width):
        us, es = u[start : start + width], e[start : start + width]
        for lane in range(width):
            lanes[lane] += us[lane] * es[lane]
    for i in range(whole, d):
        lanes[i - whole] += u[i] * e[i]
    return total(lanes)


@compiled()
def across(basis, values, out, first, last):
    """Σ_j u_j w_ij of the rows ``first`` to ``last``: (k, n) and (R, n) -> ``out`` (R, k)."""
    lanes = np.empty(_BLOCK, F)
    for i in range(first, last):
        for a in range(basis.shape[0]):
            out[i, a] = dot(basis[a], values[i], lanes)


@compiled(inner=True)
def grid_values(codes, scales, offsets, group, uniform, levels, values):
    """The weights of some groups of a row of a grid: scale · level + offset.

    Views of arrays and steps of loops over groups would take longer than the arithmetic, so each
    place is computed from its group's first.

    Args:
        codes, scales, offsets: of the groups; ``offsets`` may be empty.
        uniform: whether levels are whole numbers in a row.
        values: the result, as long as ``codes``.
    """
    low, shifted = levels[0], offsets.shape[0] > 0
    for block in range(scales.shape[0]):
        scale, first = scales[block], block * group
        offset = offsets[block] if shifted else F(0)
        if uniform:
            for j in range(group):
                values[first + j] = scale * (F(codes[first + j]) + low) + offset
        else:
            for j in range(group):
                values[first + j] = scale * levels[codes[first + j]] + offset


@compiled()
def grid_down(basis, codes, scales, offsets, group, uniform, levels, strip, out, first, last):
    """`down` of the weights of a grid, to the same bits, for strips of columns.

    Args:
        strip: columns in a strip: whole groups.
        first, last: the strips.
    """
    k, d = basis.shape
    part, total = np.empty((k, strip), F), np.empty((k, strip), np.float64)
    row = np.empty(strip, F)
    for start in range(first * strip, min(last * strip, codes.shape[1]), strip):
        stop = min(start + strip, codes.shape[1])
        left, right = start // group, stop // group
        values = row[: stop - start]
        total[:] = 0
        for top in range(0, d, _BLOCK):
            part[:] = 0
            for i in range(top, min(d, top + _BLOCK)):
                grid_values(codes[i, start:stop], scales[i, left:right], offsets[i, left:right],
                            group, uniform, levels, values)  # fmt: skip
                for a in range(k):
                    u = basis[a, i]
                    for j in range(values.shape[0]):
                        part[a, j] += u * values[j]
            for a in range(k):
                for j in range(values.shape[0]):
                    total[a, j] += part[a, j]
        for a in range(k):
            for j in range(values.shape[0]):
                out[a, start + j] = total[a, j]


@compiled()
def grid_across(basis, codes, scales, offsets, group, uniform, levels, out, first, last):
    """`across` of the weights of a grid, to the same bits."""
    row, lanes = np.empty(codes.shape[1], F), np.empty(_BLOCK, F)
    for i in range(first, last):
        grid_values(codes[i], scales[i], offsets[i], group, uniform, levels, row)
        for a in range(basis.shape[0]):
            out[i, a] = dot(basis[a], row, lanes)


@compiled()
def both_down(basis, old, new, sums):
    """Sums over the rows of two grids, w and w', to be added up over other rows.

    Args:
        basis: (k, R), for the R rows of the grids.
        old, new: codes, scales, offsets, group, uniformity and levels of each grid.
        sums: float64 (2k + 2, n), to which Σ u w, Σ u w', Σ (w' − w)² and Σ w² of each column are
            added.
    """
    k, d = basis.shape
    n = sums.shape[1]
    parts = np.empty((2 * k + 2, n), F)
    one, other = np.empty(n, F), np.empty(n, F)
    for top in range(0, d, _BLOCK):
        parts[:] = 0
        for i in range(top, min(d, top + _BLOCK)):
            grid_values(old[0][i], old[1][i], old[2][i], old[3], old[4], old[5], one)
            grid_values(new[0][i], new[1][i], new[2][i], new[3], new[4], new[5], other)
            for a in range(k):
                u = basis[a, i]
                for j in range(n):
                    parts[a, j] += u * one[j]
                    parts[k + a, j] += u * other[j]
            for j in range(n):
                step = other[j] - one[j]
                parts[2 * k, j] += step * step
                parts[2 * k + 1, j] += one[j] * one[j]
        for a in range(2 * k + 2):
            for j in range(n):
                sums[a, j] += parts[a, j]


@compiled()
def both_across(basis, old, new, sums):
    """`both_down` along rows; ``sums`` is (2k + 2, R)."""
    k, n = basis.shape
    one, other, step, lanes = np.empty(n, F), np.empty(n, F), np.empty(n, F), np.empty(_BLOCK, F)
    for i in range(sums.shape[1]):
        grid_values(old[0][i], old[1][i], old[2][i], old[3], old[4], old[5], one)
        grid_values(new[0][i], new[1][i], new[2][i], new[3], new[4], new[5], other)
        for j in range(n):
            step[j] = other[j] - one[j]
        for a in range(k):
            sums[a, i] += dot(basis[a], one, lanes)
            sums[k + a, i] += dot(basis[a], other, lanes)
        sums[2 * k, i] += dot(step, step, lanes)
        sums[2 * k + 1, i] += dot(one, one, lanes)


@compiled()
def squares_down(values, out, first, last):
    """Σ_i w_ij² of the columns ``first`` to ``last``: (d, n) -> ``out`` float64 (n,)."""
    for j in range(first, last):
        out[j] = 0
    for i in range(values.shape[0]):
        row = values[i]
        for j in range(first, last):
            out[j] += np.float64(row[j]) * np.float64(row[j])


@compiled()
def squares_across(values, out, first, last):
    """Σ_j w_ij² of the rows ``first`` to ``last``: (R, n) -> ``out`` float64 (R,)."""
    lanes = np.empty(_BLOCK, np.float64)
    n = values.shape[1]
    whole = n // _BLOCK * _BLOCK
    for i in range(first, last):
        row = values[i]
        lanes[:] = 0
        for start in range(0, whole, _BLOCK):
            ws = row[start : start + _BLOCK]
            for lane in range(_BLOCK):
                lanes[lane] += np.float64(ws[lane]) * np.float64(ws[lane])
        for j in range(whole, n):
            lanes[j - whole] += np.float64(row[j]) * np.float64(row[j])
        total = 0.0
        for lane in range(_BLOCK):
            total += lanes[lane]
        out[i] = total
