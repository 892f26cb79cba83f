"""Numba kernels of `ggml_blocks`: planes of bits of codes, eight codes in each uint64."""

from __future__ import annotations

import numpy as np

from convert.base.compiled import compiled

U = np.uint64

# One in each byte.
_ONES = 0x0101010101010101


@compiled()
def unpack(words, run, bits, left, merge, codes):
    """Write some bits of the codes of B blocks.

    Args:
        words: (B, ·), a plane; byte i of a run holds the bits of codes i, r + i, 2 r + i, ...
            of a run of r bytes, from its lowest bits upwards.
        run: r / 8.
        bits: how many bits of a code the plane has.
        left: the lowest of these bits in the code.
        merge: whether the other bits of the codes are kept.
        codes: (B, ·), the result.
    """
    parts = 8 // bits
    mask, kept = U(((1 << bits) - 1) * _ONES), U(0)
    if merge:
        kept = ~(mask << U(left))
    for block in range(words.shape[0]):
        for first in range(0, words.shape[1], run):
            for part in range(parts):
                right, to = U(bits * part), first * parts + part * run
                for i in range(run):
                    found = ((words[block, first + i] >> right) & mask) << U(left)
                    codes[block, to + i] = (codes[block, to + i] & kept) | found


@compiled()
def pack(codes, run, bits, left, words):
    """The inverse of `unpack`, added to words of zeros."""
    parts = 8 // bits
    mask = U(((1 << bits) - 1) * _ONES)
    for block in range(words.shape[0]):
        for first in range(0, words.shape[1], run):
            for part in range(parts):
                right, at = U(bits * part), first * parts + part * run
                for i in range(run):
                    found = (codes[block, at + i] >> U(left)) & mask
                    words[block, first + i] |= found << right
