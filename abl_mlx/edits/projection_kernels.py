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


@compiled()
def total(lanes):
    """The sum of partial sums, added in float64."""
    total = 0.0
    for lane in range(lanes.shape[0]):
        total += lanes[lane]
    return F(total)


@compiled()
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


@compiled()
def grid_values(codes, scales, offsets, group, uniform, levels, first, values):
    """The weights of a part of a row of a grid: scale · level + offset, from column ``first`` on.

    Args:
        codes, scales, offsets: of the whole row; ``offsets`` may be empty.
        uniform: whether levels are whole numbers in a row.
        values: (width,), the result.
    """
    last, low = first + values.shape[0], levels[0]
    start = first
    while start < last:
        block = start // group
        stop = min(last, block * group + group)
        scale = scales[block]
        part, found = codes[start:stop], values[start - first : stop - first]
        if uniform:
            for j in range(part.shape[0]):
                found[j] = scale * (F(part[j]) + low)
        else:
            for j in range(part.shape[0]):
                found[j] = scale * levels[part[j]]
        if offsets.shape[0]:
            offset = offsets[block]
            for j in range(part.shape[0]):
                found[j] += offset
        start = stop


@compiled()
def grid_down(basis, codes, scales, offsets, group, uniform, levels, out, first, last):
    """`down` of the weights of a grid, to the same bits."""
    k, d = basis.shape
    part, total = np.empty((k, _WIDTH), F), np.empty((k, _WIDTH), np.float64)
    row = np.empty(_WIDTH, F)
    for start in range(first, last, _WIDTH):
        width = min(_WIDTH, last - start)
        total[:] = 0
        for top in range(0, d, _BLOCK):
            part[:] = 0
            for i in range(top, min(d, top + _BLOCK)):
                values = row[:width]
                grid_values(codes[i], scales[i], offsets[i], group, uniform, levels, start, values)
                for a in range(k):
                    u, sums = basis[a, i], part[a]
                    for j in range(width):
                        sums[j] += u * values[j]
            for a in range(k):
                for j in range(width):
                    total[a, j] += part[a, j]
        for a in range(k):
            for j in range(width):
                out[a, start + j] = total[a, j]


@compiled()
def grid_across(basis, codes, scales, offsets, group, uniform, levels, out, first, last):
    """`across` of the weights of a grid, to the same bits."""
    row = np.empty((1, codes.shape[1]), F)
    for i in range(first, last):
        grid_values(codes[i], scales[i], offsets[i], group, uniform, levels, 0, row[0])
        across(basis, row, out[i : i + 1], 0, 1)


@compiled()
def _add_up(u, old, new, before, after):
    """Add u w and u w' to sums."""
    for j in range(old.shape[0]):
        before[j] += u * old[j]
        after[j] += u * new[j]


@compiled()
def _add_squares(old, new, moved, squares):
    """Add (w' − w)² and w² to sums in float32, over a few rows or a part of a row."""
    for j in range(old.shape[0]):
        step = new[j] - old[j]
        moved[j] += step * step
        squares[j] += old[j] * old[j]


@compiled()
def both_down(basis, old, new, before, after, sums, first, last):
    """`grid_down` of two grids in one pass, with Σ (w' − w)² and Σ w² of each column.

    Args:
        old, new: codes, scales, offsets, group, uniformity and levels of each grid.
        before, after: (k, n), the results of `grid_down`.
        sums: float64 (2, n), the squares.
    """
    k, d = basis.shape
    parts = np.empty((2 * k + 2, _WIDTH), F)
    totals, rows = np.empty((2 * k + 2, _WIDTH), np.float64), np.empty((2, _WIDTH), F)
    for start in range(first, last, _WIDTH):
        width = min(_WIDTH, last - start)
        one, other = rows[0, :width], rows[1, :width]
        totals[:] = 0
        for top in range(0, d, _BLOCK):
            parts[:] = 0
            for i in range(top, min(d, top + _BLOCK)):
                grid_values(old[0][i], old[1][i], old[2][i], old[3], old[4], old[5], start, one)
                grid_values(new[0][i], new[1][i], new[2][i], new[3], new[4], new[5], start, other)
                for a in range(k):
                    _add_up(basis[a, i], one, other, parts[a], parts[k + a])
                _add_squares(one, other, parts[2 * k], parts[2 * k + 1])
            for a in range(2 * k + 2):
                part, total = parts[a], totals[a]
                for j in range(width):
                    total[j] += part[j]
        for a in range(k):
            before[a, start : start + width] = totals[a, :width]
            after[a, start : start + width] = totals[k + a, :width]
        sums[:, start : start + width] = totals[2 * k :, :width]


@compiled()
def both_across(basis, old, new, before, after, sums, first, last):
    """`both_down` along rows: (R, k), and squares (2, R)."""
    n = basis.shape[1]
    rows, parts = np.empty((2, n), F), np.empty((2, _BLOCK), F)
    for i in range(first, last):
        one, other = rows[0], rows[1]
        grid_values(old[0][i], old[1][i], old[2][i], old[3], old[4], old[5], 0, one)
        grid_values(new[0][i], new[1][i], new[2][i], new[3], new[4], new[5], 0, other)
        across(basis, rows[:1], before[i : i + 1], 0, 1)
        across(basis, rows[1:], after[i : i + 1], 0, 1)
        parts[:] = 0
        for start in range(0, n, _BLOCK):
            stop = min(n, start + _BLOCK)
            _add_squares(one[start:stop], other[start:stop], parts[0], parts[1])
        for lane in range(_BLOCK):
            sums[0, i] += np.float64(parts[0, lane])
            sums[1, i] += np.float64(parts[1, lane])


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
