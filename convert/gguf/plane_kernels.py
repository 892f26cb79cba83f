"""Numba kernels of `ggml_blocks`: planes of bits of codes, eight codes in each uint64."""

from __future__ import annotations

import numpy as np

from convert.base.compiled import compiled

U = np.uint64

# One in each byte.
_ONES = 0x0101010101010101


@compiled()
def pack(codes, run, bits, left, words):
    """Add some bits of the codes of B blocks to a plane of zeros.

    Args:
        codes: eight in each uint64, (B, ·).
        run: r / 8; byte i of a run of r bytes gets the bits of codes i, r + i, 2 r + i, ... of the
            run, from its lowest bits upwards.
        bits: how many bits of a code the plane has.
        left: the lowest of these bits in the code.
        words: (B, ·), the result.
    """
    parts = 8 // bits
    mask = U(((1 << bits) - 1) * _ONES)
    for block in range(words.shape[0]):
        for first in range(0, words.shape[1], run):
            for part in range(parts):
                right, at = U(bits * part), first * parts + part * run
                for i in range(run):
                    found = (codes[block, at + i] >> U(left)) & mask
                    words[block, first + i] |= found << right
