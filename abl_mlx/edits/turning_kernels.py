"""Numba kernels of `rounding_kernels` that turn columns to lines, and back."""

from __future__ import annotations

import numpy as np

from convert.base.compiled import compiled


@compiled(plain=True)
def turn(target, start, lines):
    """Copy the columns from ``start`` on to the rows of ``lines``."""
    width, d = lines.shape
    for top in range(0, d, 16):
        bottom = min(d, top + 16)
        for j in range(width):
            for i in range(top, bottom):
                lines[j, i] = target[i, start + j]


@compiled(plain=True)
def turn_codes(codes, start, words, lines):
    """Copy columns of codes, of which ``codes`` holds eight in a uint64, to the rows of lines."""
    eights, d = words.shape
    at = start // 8
    for i in range(d):
        for h in range(eights):
            words[h, i] = codes[i, at + h]
    for h in range(eights):
        row = words[h]
        for j in range(8):
            line, right = lines[8 * h + j], np.uint64(8 * j)
            for i in range(d):
                line[i] = np.uint8(row[i] >> right)


@compiled(plain=True)
def turn_back(lines, words, codes, start):
    """The inverse of `turn_codes`."""
    eights, d = words.shape
    at = start // 8
    for h in range(eights):
        row = words[h]
        row[:] = 0
        for j in range(8):
            line, left = lines[8 * h + j], np.uint64(8 * j)
            for i in range(d):
                row[i] |= np.uint64(line[i]) << left
    for i in range(d):
        for h in range(eights):
            codes[i, at + h] = words[h, i]
