"""Numba kernels of `halves`: the bits that NumPy and MLX make, in a third of their time or less."""

from __future__ import annotations

import numpy as np

from convert.base.compiled import compiled

U, F = np.uint32, np.float32


@compiled()
def widen(halves: np.ndarray, bits: np.ndarray, out: np.ndarray) -> None:
    """Write float16 numbers as float32.

    A number's exponent is moved by 112; that of infinity and NaN becomes the largest, and what has
    none in float16 (0 and subnormal numbers) gets 2⁻¹⁴ more, which is subtracted again.

    Args:
        halves: the bits of the float16 numbers, uint16 (R, n).
        bits: uint32, the memory of ``out``.
        out: float32, (R, n).
    """
    for row in range(halves.shape[0]):
        for i in range(halves.shape[1]):
            half = U(halves[row, i])
            exponent = half & U(0x7C00)
            more = U(112 << 23) if exponent else U(113 << 23)
            more = U(224 << 23) if exponent == U(0x7C00) else more
            bits[row, i] = ((half & U(0x7FFF)) << U(13)) + more
        for i in range(halves.shape[1]):
            none = (halves[row, i] & np.uint16(0x7C00)) == 0
            out[row, i] -= F(2.0**-14) if none else F(0)
        for i in range(halves.shape[1]):
            bits[row, i] |= (U(halves[row, i]) & U(0x8000)) << U(16)


@compiled()
def narrow(bits: np.ndarray, values: np.ndarray, halves: np.ndarray) -> None:
    """Write float32 numbers as float16.

    Half a unit in the last place, less for numbers whose last bit is even, is added to the bits
    before the last 13 are cut off. What is below 2⁻¹⁴ is rounded by adding 0.5, beside which
    float32 has the step of float16's subnormal numbers.

    Args:
        bits: uint32, the memory of ``values``.
        values: float32, (R, n).
        halves: the bits of the float16 numbers, uint16 (R, n).
    """
    shifted = np.empty(values.shape[1], F)
    tiny = shifted.view(U)
    for row in range(values.shape[0]):
        for i in range(values.shape[1]):
            shifted[i] = abs(values[row, i]) + F(0.5)
        for i in range(values.shape[1]):
            size = bits[row, i] & U(0x7FFFFFFF)
            half = (size - U(112 << 23) + U(0xFFF) + ((size >> U(13)) & U(1))) >> U(13)
            half = tiny[i] - U(126 << 23) if size < U(113 << 23) else half
            half = U(0x7C00) if size >= U(143 << 23) else half
            half = U(0x7E00) if size > U(255 << 23) else half
            halves[row, i] = half | ((bits[row, i] >> U(16)) & U(0x8000))


@compiled()
def narrow_bfloat16(bits: np.ndarray, halves: np.ndarray) -> None:
    """Write float32 numbers as bfloat16.

    Args:
        bits: of the float32 numbers, uint32 (R, n).
        halves: the bits of the bfloat16 numbers, uint16 (R, n).
    """
    for row in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            whole = bits[row, i]
            half = (whole + U(0x7FFF) + ((whole >> U(16)) & U(1))) >> U(16)
            halves[row, i] = U(0x7FC0) if whole & U(0x7FFFFFFF) > U(255 << 23) else half
