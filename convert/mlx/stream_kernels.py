"""Numba kernels of `types`: codes in a little-endian stream of bits, eight at a time."""

from __future__ import annotations

import numpy as np

from convert.base.compiled import compiled

U = np.uint64


@compiled()
def unpack(words, bits, codes):
    """Write the codes of R rows.

    Args:
        words: uint32, (R, n * bits / 32).
        bits: of a code, 2 to 6.
        codes: uint64, (R, n / 8), the result: eight codes in each.
    """
    last, mask = words.shape[1] - 1, U((1 << bits) - 1)
    for row in range(codes.shape[0]):
        for eight in range(codes.shape[1]):
            # Eight codes begin at a whole byte, and lie in two words.
            at = eight * bits // 4
            pair = U(words[row, at]) | U(words[row, min(at + 1, last)]) << U(32)
            pair >>= U(eight * bits * 8 % 32)
            found = U(0)
            for index in range(8):
                found |= ((pair >> U(bits * index)) & mask) << U(8 * index)
            codes[row, eight] = found
