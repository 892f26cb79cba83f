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
def across(basis, values, out, first, last):
    """Σ_j u_j w_ij of the rows ``first`` to ``last``: (k, n) and (R, n) -> ``out`` (R, k)."""
    k, n = basis.shape
    lanes = np.empty(_BLOCK, F)
    whole = n // _BLOCK * _BLOCK
    for i in range(first, last):
        row = values[i]
        for a in range(k):
            u = basis[a]
            lanes[:] = 0
            for start in range(0, whole, _BLOCK):
                ws, us = row[start : start + _BLOCK], u[start : start + _BLOCK]
                for lane in range(_BLOCK):
                    lanes[lane] += us[lane] * ws[lane]
            for j in range(whole, n):
                lanes[j - whole] += u[j] * row[j]
            total = 0.0
            for lane in range(_BLOCK):
                total += lanes[lane]
            out[i, a] = total


@compiled()
def less_down(basis, components, values, out, first, last):
    """w_ij − Σ_a u_ai c_aj of the rows ``first`` to ``last`` of (d, n)."""
    k = basis.shape[0]
    for i in range(first, last):
        row, made = values[i], out[i]
        u, c = basis[0, i], components[0]
        for j in range(row.shape[0]):
            made[j] = row[j] - u * c[j]
        for a in range(1, k):
            u, c = basis[a, i], components[a]
            for j in range(row.shape[0]):
                made[j] -= u * c[j]


@compiled()
def less_across(basis, components, values, out, first, last):
    """w_ij − Σ_a c_ia u_aj of the rows ``first`` to ``last`` of (R, n)."""
    k = basis.shape[0]
    for i in range(first, last):
        row, made = values[i], out[i]
        c, u = components[i, 0], basis[0]
        for j in range(row.shape[0]):
            made[j] = row[j] - c * u[j]
        for a in range(1, k):
            c, u = components[i, a], basis[a]
            for j in range(row.shape[0]):
                made[j] -= c * u[j]


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
