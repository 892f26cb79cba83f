"""Unpacking on a CPU, compiled by numba: many times faster than as MLX operations there."""

from __future__ import annotations

import numba
import numpy as np

from convert.compiled import compiled


@compiled(parallel=True)
def unpack(
    codes: np.ndarray,
    bits: int,
    group: int,
    levels: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill ``out`` with level * scale + offset.

    Args:
        codes: uint8, (R, n * bits / 8): one little-endian stream of bits a row.
        bits: per code, at most 8.
        group: weights per scale.
        levels: float32: what each code stands for.
        scales: float32, (R, n // group).
        offsets: float32, as ``scales``, or (0, 0).
        out: float32, (R, n).
    """
    mask = (1 << bits) - 1
    width = codes.shape[1]
    for row in numba.prange(out.shape[0]):
        at = 0
        for index in range(out.shape[1] // group):
            scale = scales[row, index]
            offset = offsets[row, index] if offsets.shape[0] else np.float32(0)
            for weight in range(group):
                byte = at >> 3
                word = np.uint32(codes[row, byte])
                if (at & 7) + bits > 8 and byte + 1 < width:
                    word |= np.uint32(codes[row, byte + 1]) << np.uint32(8)
                code = (word >> np.uint32(at & 7)) & np.uint32(mask)
                out[row, index * group + weight] = levels[code] * scale + offset
                at += bits
