"""Unpacking on a CPU, compiled by numba, which is many times faster there than MLX operations."""

from __future__ import annotations

from typing import Any

import numpy as np

from convert.base.compiled import compiled

#: Weights that are unpacked at once; with any number of bits per code they fill whole words.
_BLOCK = 32


def _for_even_levels(bits: int) -> Any:
    """A kernel for codes of ``bits`` bits, a constant with which the compiler unrolls its loops.

    Args:
        bits: 2, 3, 4, 5, 6 or 8.
    """
    mask = np.uint32((1 << bits) - 1)

    @compiled()
    def unpack_even(
        words: np.ndarray,
        group: int,
        start: np.float32,
        scales: np.ndarray,
        offsets: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """Fill ``out`` with (start + code) * scale + offset.

        Args:
            words: uint32, (R, n * bits / 32): one little-endian stream of bits a row.
            group: weights per scale: 16, or a multiple of 32.
            start: the number that code 0 stands for.
            scales: float32, (R, n // group).
            offsets: float32, as ``scales``, or (0, 0).
            out: float32, (R, n); n is a multiple of 32.
        """
        last = words.shape[1] - 1
        wide = min(group, _BLOCK)
        for row in range(out.shape[0]):
            numbers = np.empty(_BLOCK, np.float32)
            for block in range(out.shape[1] // _BLOCK):
                first = block * bits
                # Eight codes take at most 64 bits, and begin at a whole byte.
                for eighth in range(4):
                    at = first + (8 * eighth * bits >> 5)
                    pair = np.uint64(words[row, at])
                    pair |= np.uint64(words[row, min(at + 1, last)]) << np.uint64(32)
                    pair >>= np.uint64(8 * eighth * bits & 31)
                    for index in range(8):
                        code = np.uint32(pair >> np.uint64(bits * index)) & mask
                        numbers[8 * eighth + index] = np.float32(np.int32(code)) + start
                for half in range(_BLOCK // wide):
                    weight = block * _BLOCK + half * wide
                    scale = scales[row, weight // group]
                    offset = np.float32(0)
                    if offsets.shape[0]:
                        offset = offsets[row, weight // group]
                    for index in range(wide):
                        out[row, weight + index] = numbers[half * wide + index] * scale + offset

    return unpack_even


#: Bits of a code -> the kernel for codes that stand for consecutive whole numbers.
EVEN = {bits: _for_even_levels(bits) for bits in (2, 3, 4, 5, 6, 8)}


@compiled()
def unpack(
    codes: np.ndarray,
    levels: np.ndarray,
    group: int,
    scales: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill ``out`` with level * scale, where the levels of the four-bit codes are any numbers.

    Args:
        codes: uint8, (R, n / 2): the lower half of a byte is the first code.
        levels: float32, (16,): the number that each code stands for.
        group: weights per scale.
        scales: float32, (R, n // group).
        out: float32, (R, n).
    """
    for row in range(out.shape[0]):
        for index in range(out.shape[1] // group):
            scale = scales[row, index]
            for pair in range(index * group // 2, (index + 1) * group // 2):
                code = codes[row, pair]
                out[row, 2 * pair] = levels[code & 15] * scale
                out[row, 2 * pair + 1] = levels[code >> 4] * scale
