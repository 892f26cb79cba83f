"""Codecs of the quantized GGML types that store one code for each weight, one class each.

The block layouts are those of llama.cpp's ggml/src/ggml-common.h; the arithmetic is that of
ggml/src/ggml-quants.c and of gguf-py's quants.py. "d / 32" means: one scale d for 32 weights.

======== ===== ========== =============================== ================================
type     block bits/weight scale, offset per group         levels
======== ===== ========== =============================== ================================
Q4_0        32     4.5     d / 32                          -8 .. 7
Q4_1        32     5       d, m / 32                       0 .. 15
Q5_0        32     5.5     d / 32                          -16 .. 15
Q5_1        32     6       d, m / 32                       0 .. 31
Q8_0        32     8.5     d / 32                          -128 .. 127 (ggml never writes -128)
Q2_K       256     2.625   d * 4 bits, -dmin * 4 bits / 16 0 .. 3
Q3_K       256     3.4375  d * signed 6 bits / 16          -4 .. 3
Q4_K       256     4.5     d * 6 bits, -dmin * 6 bits / 32 0 .. 15
Q5_K       256     5.5     d * 6 bits, -dmin * 6 bits / 32 0 .. 31
Q6_K       256     6.5625  d * signed 8 bits / 16          -32 .. 31
IQ4_NL      32     4.5     d / 32                          the IQ4 table, -127 .. 113
IQ4_XS     256     4.25    d * signed 6 bits / 32          the IQ4 table
MXFP4       32     4.25    power of two / 32               E2M1, doubled: -12 .. 12
NVFP4       64     4.5     unsigned E4M3 / 16              E2M1, doubled
TQ1_0      256     1.6875  d / 256                         -1 .. 1
TQ2_0      256     2.0625  d / 256                         -1 .. 1
======== ===== ========== =============================== ================================

d, dmin and m are float16. E2M1 has two zeros, 0 and -0: both are one level here, and a weight that
was stored as -0 is written as -0 again.
"""

from __future__ import annotations

import math

import numpy as np
from gguf import GGMLQuantizationType

from convert.base.errors import UserError
from convert.gguf.block_layout import (
    EIGHT,
    FOUR_BITS,
    SIGNED_BYTES,
    SIX_BITS,
    SIXTEEN,
    TABLE,
    Layout,
)
from convert.gguf.ggml_codecs import GridCodec


def _levels(*values: int) -> np.ndarray:
    table = np.array(values, dtype=np.float32)
    table.flags.writeable = False
    return table


def _bytes(blocks: np.ndarray, at: int, count: int) -> np.ndarray:
    """Some bytes from ``at`` on of each of B blocks: a copy, uint8 (B, count).

    NumPy copies them as items ten times faster than byte by byte.
    """
    return blocks[:, at : at + count].view(f"V{count}").copy().view(np.uint8)


class Q4_0(GridCodec):
    """float16 d, 16 bytes of codes."""

    type, group, levels = GGMLQuantizationType.Q4_0, 32, _levels(*range(-8, 8))
    layout = Layout(((2, 16, 4, 0),))


class Q4_1(GridCodec):
    """float16 d, float16 m, 16 bytes of codes."""

    type, group, levels = GGMLQuantizationType.Q4_1, 32, _levels(*range(16))
    layout = Layout(((4, 16, 4, 0),), dmin=2)


class _FifthBits(GridCodec):
    """Low four bits as in Q4_0, and 4 bytes before them, whose bit i is weight i's fifth bit."""

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        super()._pack(codes, blocks)
        at = self.layout.fifth
        assert at is not None
        blocks[:, at : at + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")


class Q5_0(_FifthBits):
    """float16 d, 4 bytes of fifth bits, 16 bytes of low bits."""

    type, group, levels = GGMLQuantizationType.Q5_0, 32, _levels(*range(-16, 16))
    layout = Layout(((6, 16, 4, 0),), fifth=2)


class Q5_1(_FifthBits):
    """float16 d, float16 m, 4 bytes of fifth bits, 16 bytes of low bits."""

    type, group, levels = GGMLQuantizationType.Q5_1, 32, _levels(*range(32))
    layout = Layout(((8, 16, 4, 0),), fifth=4, dmin=2)


class Q8_0(GridCodec):
    """float16 d, 32 signed bytes. The code is the byte with its sign bit flipped."""

    type, group, levels = GGMLQuantizationType.Q8_0, 32, _levels(*range(-128, 128))
    layout = Layout(((2, 32, 8, 0),), flip=0x80)

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        blocks[:, 2:34].view("V32")[...] = np.bitwise_xor(codes, 0x80).view("V32")


class Q2_K(GridCodec):
    """16 bytes of 4-bit scales and offsets, 64 bytes of codes, float16 d, float16 dmin."""

    type, group, levels = GGMLQuantizationType.Q2_K, 16, _levels(*range(4))
    layout = Layout(((16, 32, 2, 0),), how=FOUR_BITS, d=80, dmin=82)


class Q3_K(GridCodec):
    """32 bytes of third bits, 64 bytes of low bits, 12 bytes of 6-bit scales, float16 d.

    Where a weight's third bit is set, its code is 4 to 7, which means the levels 0 to 3.
    """

    type, group, levels = GGMLQuantizationType.Q3_K, 16, _levels(*range(-4, 4))
    layout = Layout(((32, 32, 2, 0), (0, 32, 1, 2)), how=SIXTEEN, at=96, d=108)


def six_bits(blocks: np.ndarray, kind: int) -> np.ndarray:
    """The numbers of a Q4_K's or Q5_K's scales (0) or offsets (1): uint8 (B, 8)."""
    words = _bytes(blocks, 4, 12).view(np.uint32)  # four numbers at a time
    first, last = words[:, kind], words[:, 2] >> np.uint32(4 * kind)
    numbers = np.empty((len(blocks), 2), np.uint32)
    numbers[:, 0] = first & 0x3F3F3F3F
    numbers[:, 1] = (last & 0x0F0F0F0F) | ((first >> 2) & 0x30303030)
    return numbers.view(np.uint8)


class Q4_K(GridCodec):
    """float16 d, float16 dmin, 12 bytes of 6-bit scales and offsets, 128 bytes of codes."""

    type, group, levels = GGMLQuantizationType.Q4_K, 32, _levels(*range(16))
    layout = Layout(((16, 32, 4, 0),), how=SIX_BITS, at=4, dmin=2)


class Q5_K(GridCodec):
    """As Q4_K, with 32 bytes of fifth bits before 128 bytes of low bits."""

    type, group, levels = GGMLQuantizationType.Q5_K, 32, _levels(*range(32))
    layout = Layout(((48, 32, 4, 0), (16, 32, 1, 4)), how=SIX_BITS, at=4, dmin=2)


class Q6_K(GridCodec):
    """128 bytes of low four bits, 64 bytes of upper two, 16 signed bytes of scales, float16 d."""

    type, group, levels = GGMLQuantizationType.Q6_K, 16, _levels(*range(-32, 32))
    layout = Layout(((0, 64, 4, 0), (128, 32, 2, 4)), how=SIGNED_BYTES, at=192, d=208)


_IQ4 = _levels(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class IQ4_NL(GridCodec):
    """float16 d, 16 bytes of codes."""

    type, group, levels = GGMLQuantizationType.IQ4_NL, 32, _IQ4
    layout = Layout(((2, 16, 4, 0),))


class IQ4_XS(GridCodec):
    """float16 d, 8 six-bit scales (2 bytes of upper bits, 4 bytes of lower), 128 bytes of codes."""

    type, group, levels = GGMLQuantizationType.IQ4_XS, 32, _IQ4
    layout = Layout(((8, 16, 4, 0),), how=EIGHT, at=2)


# Twice the E2M1 number of each stored code, so that all are whole numbers; stored code 8 is -0.
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_E2M1_LEVELS = _levels(*sorted(set(_E2M1)))
_E2M1_RANK = np.searchsorted(_E2M1_LEVELS, np.array(_E2M1)).astype(np.uint8)
_E2M1_STORED = np.array([_E2M1.index(int(level)) for level in _E2M1_LEVELS], dtype=np.uint8)


class _Fp4(GridCodec):
    """Weights are E2M1 numbers, stored as sign and magnitude."""

    levels = _E2M1_LEVELS

    def _read(
        self, blocks: np.ndarray, codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray
    ) -> int:
        bad = super()._read(blocks, codes, scales, offsets)
        np.take(_E2M1_RANK, codes, out=codes, mode="clip")
        return bad

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        stored, nothing = np.empty_like(codes), np.empty((len(blocks), 0), np.float32)
        super()._read(blocks, stored, nothing, nothing)
        minus_zero = stored == 8
        np.take(_E2M1_STORED, codes, out=stored, mode="clip")
        minus_zero &= stored == 0
        stored |= minus_zero.view(np.uint8) << 3
        super()._pack(stored, blocks)


class MXFP4(_Fp4):
    """One byte e, 16 bytes of codes. The scale is 2 ** (e - 128), as the levels are doubled.

    e = 255 means NaN, as in the OCP Microscaling specification and in llama.cpp's check.
    """

    type, group = GGMLQuantizationType.MXFP4, 32
    layout = Layout(
        ((1, 16, 4, 0),), how=TABLE, table=(*np.ldexp(1.0, np.arange(-128, 127)), math.nan)
    )


def _unsigned_e4m3() -> np.ndarray:
    """float32 (256,): half of the number that each byte means, as the levels are doubled.

    ggml reads 0x7F as zero and ignores the sign bit.
    """
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    table = np.where(exponent == 0, np.ldexp(mantissa, -9), normal) / 2
    table[0x7F] = 0
    return table.astype(np.float32)


class NVFP4(_Fp4):
    """Four scales, one byte each, 32 bytes of codes."""

    type, group = GGMLQuantizationType.NVFP4, 16
    layout = Layout(((4, 8, 4, 0),), how=TABLE, table=tuple(_unsigned_e4m3()))


class TQ2_0(GridCodec):
    """64 bytes of two-bit codes, float16 d. No quantizer writes the code 3, which would mean 2."""

    type, group, levels = GGMLQuantizationType.TQ2_0, 256, _levels(-1, 0, 1)
    layout = Layout(((0, 32, 2, 0),), d=64)

    def _read(
        self, blocks: np.ndarray, codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray
    ) -> int:
        bad = super()._read(blocks, codes, scales, offsets)
        if codes.size and codes.max() > 2:
            raise UserError(
                "a TQ2_0 code is 3, which is no ternary weight: the file is damaged, "
                "download it again."
            )
        return bad


class TQ1_0(GridCodec):
    """48 bytes with five codes each, 4 bytes with four, float16 d.

    A byte holds the codes as the digits of a fraction in base 3. Codes whose byte is unchanged keep
    it, because several bytes stand for the same codes.
    """

    type, group, levels = GGMLQuantizationType.TQ1_0, 256, _levels(-1, 0, 1)
    layout = Layout(d=52)
    # First byte, number of bytes, first weight and digits in a byte. Digit i of byte j is that of
    # the weight first + bytes * i + j.
    _parts = ((0, 32, 0, 5), (32, 16, 160, 5), (48, 4, 240, 4))

    def _read(
        self, blocks: np.ndarray, codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray
    ) -> int:
        if codes.size:
            self._digits(blocks, codes)
        return super()._read(blocks, codes[:, :0], scales, offsets)

    def _digits(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        for at, count, first, digits in self._parts:
            for digit in range(digits):
                rest = blocks[:, at : at + count] * np.uint8(3**digit)
                start = first + count * digit
                codes[:, start : start + count] = (rest.astype(np.uint16) * 3) >> 8

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        stored = np.empty_like(codes)
        self._digits(blocks, stored)
        for at, count, first, digits in self._parts:
            part = slice(first, first + count * digits)
            wanted = codes[:, part].reshape(-1, digits, count)
            changed = (wanted != stored[:, part].reshape(-1, digits, count)).any(axis=1)
            places = (3 ** np.arange(4, 4 - digits, -1)).astype(np.uint16)
            number = (wanted * places[:, None]).sum(axis=1, dtype=np.uint16)
            packed = ((number * 256 + 242) // 243).astype(np.uint8)
            np.copyto(blocks[:, at : at + count], packed, where=changed)


GRID_CODECS: tuple[GridCodec, ...] = (
    *(Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q8_0()),
    *(Q2_K(), Q3_K(), Q4_K(), Q5_K(), Q6_K()),
    *(IQ4_NL(), IQ4_XS(), MXFP4(), NVFP4(), TQ1_0(), TQ2_0()),
)
