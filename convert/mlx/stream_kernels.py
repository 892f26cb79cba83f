"""Numba kernels of `types`: codes in a little-endian stream of bits, eight at a time.

Eight codes of b bits are 8 b bits in a row. Their upper half is moved to the upper half of a
uint64, then the same is done in each half and in each quarter, so that every code gets a byte.
"""

from __future__ import annotations

import numpy as np

from convert.base.compiled import compiled

U = np.uint64

# One in each half, each quarter and each byte of a uint64.
_HALVES, _QUARTERS, _BYTES = 0x0000000100000001, 0x0001000100010001, 0x0101010101010101


@compiled()
def unpack(words, bits, codes):
    """Write the codes of whole words.

    Args:
        words: uint32, (n * bits / 32,).
        bits: of a code, 2 to 6.
        codes: uint64, (n / 8,), the result: eight codes in each.
    """
    one, two, four = U(bits), U(2 * bits), U(4 * bits)
    a_half, a_quarter, a_byte = (U(1) << four) - U(1), (U(1) << two) - U(1), (U(1) << one) - U(1)
    quarters, bytes_ = a_quarter * U(_HALVES), a_byte * U(_QUARTERS)
    last = words.shape[0] - 1
    if bits == 4:
        for eight in range(codes.shape[0]):
            codes[eight] = words[eight]
    else:
        for eight in range(codes.shape[0]):
            # Eight codes begin at a whole byte, and lie in two words.
            at = (eight * bits) >> 2
            pair = U(words[at]) | U(words[min(at + 1, last)]) << U(32)
            codes[eight] = pair >> U((eight * bits * 8) & 31)
    for eight in range(codes.shape[0]):
        found = codes[eight]
        found = (found & a_half) | ((found >> four) & a_half) << U(32)
        found = (found & quarters) | ((found >> two) & quarters) << U(16)
        codes[eight] = (found & bytes_) | ((found >> one) & bytes_) << U(8)


@compiled()
def join(codes, bits, joined):
    """The codes of each uint64, below 2 ** bits, in its lowest 8 * bits bits: uint64 (n / 8,)."""
    one, two, four = U(bits), U(2 * bits), U(4 * bits)
    for eight in range(codes.shape[0]):
        found = codes[eight]
        found = (found & U(0xFF * _QUARTERS)) | ((found >> U(8)) & U(0xFF * _QUARTERS)) << one
        found = (found & U(0xFFFF * _HALVES)) | ((found >> U(16)) & U(0xFFFF * _HALVES)) << two
        joined[eight] = (found & U(0xFFFFFFFF)) | (found >> U(32)) << four


@compiled()
def to_levels(codes, largest, sign):
    """Codes of sign and magnitude -> indices of ascending levels, in place; see `from_levels`.

    Of magnitudes beyond the largest, as NaN has, at least one index is beyond the last level.

    Args:
        codes: uint64, (n / 8,): eight codes in each.
    """
    shift, middle, magnitudes = U(sign), U(largest * _BYTES), U(((1 << sign) - 1) * _BYTES)
    for eight in range(codes.shape[0]):
        negative = (codes[eight] >> shift) & U(_BYTES)
        negative = (negative << U(8)) - negative  # 255 in each byte whose sign is set
        size = codes[eight] & magnitudes
        codes[eight] = middle + (size & ~negative) - (size & negative)


@compiled()
def from_levels(codes, largest, sign, stored):
    """Indices of ascending levels -> codes of sign and magnitude.

    Args:
        codes: uint8, (n,): magnitude m with either sign has the index largest + m or largest - m.
        largest: the largest magnitude.
        sign: the bit of the sign.
        stored: uint8, (n,), the result; where it was -0 before and is 0 now, it stays -0.
    """
    middle, minus_zero = np.uint8(largest), np.uint8(1 << sign)
    for i in range(codes.shape[0]):
        below = np.uint8(middle - codes[i]) | minus_zero
        above = np.uint8(codes[i] - middle)
        zero = minus_zero if stored[i] == minus_zero else np.uint8(0)
        found = below if codes[i] < middle else above
        stored[i] = zero if codes[i] == middle else found
