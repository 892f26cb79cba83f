"""Bytes of a GGUF tensor <-> Grid, one small class per GGML type.

The block layouts are those of llama.cpp's ggml/src/ggml-common.h, the arithmetic that of
ggml/src/ggml-quants.c and of gguf-py's quants.py. Every codec handles R rows of n weights at once:
R is the product of all dimensions but ne0, n is ne0, and a row's blocks follow each other. Any run
of rows may be decoded and encoded on its own.

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
======== ===== ========== =============================== ================================

d, dmin and m are float16. E2M1 has two zeros: they are one level here, and a zero that was stored
as -0 stays -0.

Of the types without a codec, IQ1, IQ2 and IQ3 choose whole vectors of 4 or 8 weights from a
codebook. TQ1_0 and TQ2_0 do have levels of their own (-1, 0, 1), but a step is as large as a weight
and one scale serves 256 weights, which leaves an edit no room. ``finer_type`` names the type to
write instead:

======== ==== ========= ====== ==== ===== ========= ========================================
type     bits its error to     bits error re-encode why nothing smaller
======== ==== ========= ====== ==== ===== ========= ========================================
IQ1_S    1.56 .486      Q2_K   2.63 .297  .050      the smallest there is
IQ1_M    1.75 .452      Q2_K   2.63 .297  .166      the smallest there is
IQ2_XXS  2.06 .344      Q2_K   2.63 .297  .295      the smallest there is
IQ2_XS   2.31 .300      Q3_K   3.44 .151  .162      Q2_K re-encodes at .304
IQ2_S    2.56 .249      Q3_K   3.44 .151  .160      Q2_K is coarser
IQ3_XXS  3.06 .182      Q3_K   3.44 .151  .144      Q2_K is coarser
IQ3_S    3.44 .137      IQ4_XS 4.25 .077  .078      Q3_K is coarser
TQ1_0    1.69 0         Q4_K   4.5  .072  .002      below it, -d, 0, d come back at .05 or worse
TQ2_0    2.06 0         Q4_K   4.5  .072  .002      the same
======== ==== ========= ====== ==== ===== ========= ========================================

Errors are root mean squares relative to the weights, by ggml's own quantizer without an importance
matrix on Gaussian weights (ternary ones for TQ); "re-encode" is the error that the new type adds to
what the old one held. The rule: the smallest type whose error and whose re-encoding error are both
no more than the old type's own error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from convert.base.errors import UserError
from convert.base.grids import FloatGrid, Grid, in_chunks
from convert.gguf import ggml

# Types that gguf-py encodes too, to the same bytes as ggml.
_ENCODED_BY_GGUF_PY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")


def _levels(*values: int) -> np.ndarray:
    table = np.array(values, dtype=np.float32)
    table.flags.writeable = False
    return table


class GridCodec(ABC):
    """Bytes <-> Grid for one quantized type.

    Attributes:
        type: the GGML type.
        group: weights per scale.
        levels: float32, (K,), ascending: what a code stands for.
    """

    type: ClassVar[GGMLQuantizationType]
    group: ClassVar[int]
    levels: ClassVar[np.ndarray]
    is_grid: ClassVar[bool] = True

    @property
    def block(self) -> int:
        """Weights per block; n must be a multiple of it."""
        return int(gguf.GGML_QUANT_SIZES[self.type][0])

    @property
    def size(self) -> int:
        """Bytes per block."""
        return int(gguf.GGML_QUANT_SIZES[self.type][1])

    @property
    def bits(self) -> float:
        """Bits per weight in the file, scales included."""
        return 8 * self.size / self.block

    def decode(self, raw: np.ndarray, n: int) -> Grid:
        """The grid of some rows.

        Args:
            raw: uint8, (R, bytes per row). The grid keeps it as its frame, uncopied.
            n: weights per row.

        Raises:
            UserError: when sizes do not fit, or a block's scale is not a finite number; names no
                tensor, which the caller knows.
        """
        _check_rows(raw, n, self.block, self.size, self.type)
        raw = np.ascontiguousarray(raw)
        rows, count = len(raw), len(raw) * (n // self.block)
        blocks = raw.reshape(count, self.size)
        codes = np.empty((count, self.block), dtype=np.uint8)
        groups = self.block // self.group
        scales = np.empty((count, groups), dtype=np.float32)
        offsets = np.empty_like(scales) if self._has_offsets() else None

        def read(part: slice) -> None:
            self._unpack(blocks[part], codes[part])
            # A damaged block's scale is infinite or no number, and is told of below.
            with np.errstate(invalid="ignore"):
                scales[part] = self._scales(blocks[part])
                if offsets is not None:
                    offsets[part] = self._offsets(blocks[part])

        in_chunks(read, count, self.block)
        for found in (scales, offsets):
            if found is not None and not np.isfinite(found).all():
                bad = int(np.argmin(np.isfinite(found).all(axis=1)))
                row, block = divmod(bad, n // self.block)
                raise UserError(
                    f"block {block} of row {row} has a {self.type.name} scale that is not finite: "
                    "the file is damaged, get it again."
                )
        shape = (rows, n // self.group)
        return Grid(
            codes=codes.reshape(rows, n),
            levels=self.levels,
            scales=scales.reshape(shape),
            offsets=None if offsets is None else offsets.reshape(shape),
            group=self.group,
            frame=raw,
        )

    def encode(self, grid: Grid) -> np.ndarray:
        """The bytes of a grid that this codec decoded, or of ``with_codes`` of one.

        Returns:
            uint8, (R, bytes per row): a new array, equal to the grid's frame in all but code bits.

        Raises:
            ValueError: for another type's grid.
        """
        rows, n = grid.shape
        frame = grid.frame
        fits = isinstance(frame, np.ndarray) and frame.shape == (rows, n // self.block * self.size)
        if not fits or grid.group != self.group or not np.array_equal(grid.levels, self.levels):
            raise ValueError(f"a grid of another type, to be encoded as {self.type.name}")
        count = rows * (n // self.block)
        raw = np.array(frame)
        blocks = raw.reshape(count, self.size)
        codes = np.ascontiguousarray(grid.codes).reshape(count, self.block)

        def write(part: slice) -> None:
            self._pack(codes[part], blocks[part])

        in_chunks(write, count, self.block)
        return raw

    @abstractmethod
    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        """Float32 (B, block // group) of uint8 (B, size)."""

    def _offsets(self, blocks: np.ndarray) -> np.ndarray:
        """The same for offsets, where the type has any."""
        raise NotImplementedError

    @abstractmethod
    def _unpack(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        """Fill ``codes``, uint8 (B, block), from ``blocks``, uint8 (B, size)."""

    @abstractmethod
    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        """Write ``codes`` over the code bits of ``blocks``, which hold the old ones."""

    @classmethod
    def _has_offsets(cls) -> bool:
        return cls._offsets is not GridCodec._offsets


class FloatCodec:
    """Bytes <-> FloatGrid for F32, F16 or BF16, which have no codes.

    Attributes:
        type: the GGML type.
    """

    is_grid: ClassVar[bool] = False
    block: ClassVar[int] = 1

    def __init__(self, kind: GGMLQuantizationType) -> None:
        self.type = kind

    @property
    def size(self) -> int:
        """Bytes per weight."""
        return int(gguf.GGML_QUANT_SIZES[self.type][1])

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8.0 * self.size

    def decode(self, raw: np.ndarray, n: int) -> FloatGrid:
        """The weights of some rows: uint8 (R, bytes per row), n weights each.

        Raises:
            UserError: when sizes do not fit, or a weight is not finite.
        """
        _check_rows(raw, n, self.block, self.size, self.type)
        numbers = self._read(np.ascontiguousarray(raw))
        if not np.isfinite(numbers).all():
            row = int(np.argmin(np.isfinite(numbers).all(axis=1)))
            raise UserError(f"row {row} holds a weight that is not finite: get the file again.")
        return FloatGrid(numbers)

    def encode(self, grid: FloatGrid) -> np.ndarray:
        """The bytes, uint8 (R, bytes per row), of a grid from ``decode`` or ``round``."""
        return self._write(np.ascontiguousarray(grid.numbers, dtype=np.float32))

    def round(self, values: np.ndarray) -> FloatGrid:
        """Each value on the type's nearest number, ties to even: float32 (R, n).

        Raises:
            UserError: when a value is not finite or too large for the type.
        """
        _check_values(values)
        numbers = self._read(self._write(np.ascontiguousarray(values, dtype=np.float32)))
        if not np.isfinite(numbers).all():
            largest = float(np.abs(values).max())
            raise UserError(f"a weight of {largest:g} does not fit {self.type.name}: write F32.")
        return FloatGrid(numbers)

    def _read(self, raw: np.ndarray) -> np.ndarray:
        if self.type == GGMLQuantizationType.F32:
            return np.array(raw.view("<f4"), dtype=np.float32)
        if self.type == GGMLQuantizationType.F16:
            return raw.view("<f2").astype(np.float32)
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)

    def _write(self, numbers: np.ndarray) -> np.ndarray:
        if self.type == GGMLQuantizationType.F32:
            return numbers.astype("<f4").view(np.uint8)
        if self.type == GGMLQuantizationType.F16:
            with np.errstate(over="ignore"):
                return numbers.astype("<f2").view(np.uint8)
        bits = numbers.view(np.uint32)
        # Finite float32 only: adding up to half of the last place kept cannot wrap around.
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        return (bits >> np.uint32(16)).astype("<u2").view(np.uint8)


class _Halves(GridCodec):
    """Four bits of a code: byte i of a sub-block holds its weights i (low) and half + i (high).

    Attributes:
        at: the byte of a block where they begin.
        half: bytes per sub-block, which are half as many as its weights.
    """

    at: ClassVar[int]
    half: ClassVar[int]

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        packed, pairs = self._packed(blocks), self._pairs(codes)
        np.bitwise_and(packed, 15, out=pairs[:, :, 0])
        np.right_shift(packed, 4, out=pairs[:, :, 1])

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        pairs = self._pairs(codes)
        packed = pairs[:, :, 1] << 4
        packed |= pairs[:, :, 0] & 15
        used = self.block // 2
        blocks[:, self.at : self.at + used] = packed.reshape(len(blocks), used)

    def _packed(self, blocks: np.ndarray) -> np.ndarray:
        used = self.block // 2
        found = blocks[:, self.at : self.at + used]
        return found.reshape(len(blocks), used // self.half, self.half)

    def _pairs(self, codes: np.ndarray) -> np.ndarray:
        return codes.reshape(len(codes), self.block // (2 * self.half), 2, self.half)


class Q4_0(_Halves):
    """float16 d, 16 bytes of codes."""

    type, group, levels = GGMLQuantizationType.Q4_0, 32, _levels(*range(-8, 8))
    at, half = 2, 16

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return _float16(blocks, 0)


class Q4_1(_Halves):
    """float16 d, float16 m, 16 bytes of codes."""

    type, group, levels = GGMLQuantizationType.Q4_1, 32, _levels(*range(16))
    at, half = 4, 16

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return _float16(blocks, 0)

    def _offsets(self, blocks: np.ndarray) -> np.ndarray:
        return _float16(blocks, 2)


class _FifthBits(_Halves):
    """Low four bits as in Q4_0; before them, in 4 bytes, the fifth bit of weight i in bit i."""

    half = 16

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        super()._unpack(blocks, codes)
        high = np.unpackbits(blocks[:, self.at - 4 : self.at], axis=1, bitorder="little")
        high <<= 4
        codes |= high

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        super()._pack(codes, blocks)
        blocks[:, self.at - 4 : self.at] = np.packbits(codes >> 4, axis=1, bitorder="little")


class Q5_0(_FifthBits):
    """float16 d, 4 bytes of fifth bits, 16 bytes of low bits."""

    type, group, levels = GGMLQuantizationType.Q5_0, 32, _levels(*range(-16, 16))
    at = 6

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return _float16(blocks, 0)


class Q5_1(_FifthBits):
    """float16 d, float16 m, 4 bytes of fifth bits, 16 bytes of low bits."""

    type, group, levels = GGMLQuantizationType.Q5_1, 32, _levels(*range(32))
    at = 8

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return _float16(blocks, 0)

    def _offsets(self, blocks: np.ndarray) -> np.ndarray:
        return _float16(blocks, 2)


class Q8_0(GridCodec):
    """float16 d, 32 signed bytes. A byte's sign bit flipped is its rank."""

    type, group, levels = GGMLQuantizationType.Q8_0, 32, _levels(*range(-128, 128))

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return _float16(blocks, 0)

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        np.bitwise_xor(blocks[:, 2:], 0x80, out=codes)

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        np.bitwise_xor(codes, 0x80, out=blocks[:, 2:])


class Q2_K(GridCodec):
    """16 bytes of 4-bit scales and offsets, 64 bytes of codes, float16 d, float16 dmin."""

    type, group, levels = GGMLQuantizationType.Q2_K, 16, _levels(*range(4))

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return _float16(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)

    def _offsets(self, blocks: np.ndarray) -> np.ndarray:
        return -(_float16(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32))

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        _unpack_quarters(blocks[:, 16:80], codes, left=0)

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        blocks[:, 16:80] = _pack_quarters(codes & 3)


class Q3_K(GridCodec):
    """32 bytes of third bits, 64 bytes of low bits, 12 bytes of 6-bit scales, float16 d.

    A third bit that is set means codes 4 to 7, which are the levels 0 to 3.
    """

    type, group, levels = GGMLQuantizationType.Q3_K, 16, _levels(*range(-4, 4))

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        low, high = blocks[:, 96:104], blocks[:, 104:108]
        scales = np.empty((len(blocks), 16), dtype=np.uint8)
        scales[:, :8], scales[:, 8:] = low & 15, low >> 4
        for part in range(4):
            scales[:, 4 * part : 4 * part + 4] |= ((high >> (2 * part)) & 3) << 4
        return _float16(blocks, 108) * (scales.astype(np.float32) - np.float32(32))

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        _unpack_quarters(blocks[:, 32:96], codes, left=0)
        _unpack_eighths(blocks[:, :32], codes, left=2)

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        blocks[:, 32:96] = _pack_quarters(codes & 3)
        blocks[:, :32] = _pack_eighths(codes >> 2)


class _SixBitScales(GridCodec):
    """float16 d, float16 dmin, then 12 bytes with 8 scales and 8 offsets of six bits each.

    Bytes 0-3 and 4-7 are the first four scales and offsets; bytes 8-11 the low four bits of the
    other four, whose upper two are the upper two of bytes 0-7.
    """

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return _float16(blocks, 0) * self._six_bits(blocks, 4, 0)

    def _offsets(self, blocks: np.ndarray) -> np.ndarray:
        return -(_float16(blocks, 2) * self._six_bits(blocks, 8, 4))

    @staticmethod
    def _six_bits(blocks: np.ndarray, at: int, shift: int) -> np.ndarray:
        first, last = blocks[:, at : at + 4], blocks[:, 12:16]
        numbers = np.empty((len(blocks), 8), dtype=np.float32)
        numbers[:, :4] = first & 63
        numbers[:, 4:] = ((last >> shift) & 15) | ((first >> 2) & 48)
        return numbers


class Q4_K(_SixBitScales, _Halves):
    """16 bytes of scales, 128 bytes of codes."""

    type, group, levels = GGMLQuantizationType.Q4_K, 32, _levels(*range(16))
    at, half = 16, 32


class Q5_K(_SixBitScales, _Halves):
    """16 bytes of scales, 32 bytes of fifth bits, 128 bytes of low bits."""

    type, group, levels = GGMLQuantizationType.Q5_K, 32, _levels(*range(32))
    at, half = 48, 32

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        super()._unpack(blocks, codes)
        _unpack_eighths(blocks[:, 16:48], codes, left=4)

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        super()._pack(codes, blocks)
        blocks[:, 16:48] = _pack_eighths(codes >> 4)


class Q6_K(_Halves):
    """128 bytes of low four bits, 64 bytes of upper two, 16 signed bytes of scales, float16 d."""

    type, group, levels = GGMLQuantizationType.Q6_K, 16, _levels(*range(-32, 32))
    at, half = 0, 64

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return _float16(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        super()._unpack(blocks, codes)
        _unpack_quarters(blocks[:, 128:192], codes, left=4, merge=True)

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        super()._pack(codes, blocks)
        blocks[:, 128:192] = _pack_quarters(codes >> 4)


_IQ4 = _levels(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class IQ4_NL(_Halves):
    """float16 d, 16 bytes of codes."""

    type, group, levels = GGMLQuantizationType.IQ4_NL, 32, _IQ4
    at, half = 2, 16

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return _float16(blocks, 0)


class IQ4_XS(_Halves):
    """float16 d, 8 scales of six bits (2 bytes of upper two, 4 of low four), 128 bytes of codes."""

    type, group, levels = GGMLQuantizationType.IQ4_XS, 32, _IQ4
    at, half = 8, 16

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        scales = np.empty((len(blocks), 8), dtype=np.uint8)
        scales[:, 0::2], scales[:, 1::2] = blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4
        for part in range(4):
            scales[:, part::4] |= ((blocks[:, 2:4] >> (2 * part)) & 3) << 4
        return _float16(blocks, 0) * (scales.astype(np.float32) - np.float32(32))


# E2M1, doubled so that all are whole numbers, by stored code; 8 is -0.
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_E2M1_LEVELS = _levels(*sorted(set(_E2M1)))
_E2M1_RANK = np.searchsorted(_E2M1_LEVELS, np.array(_E2M1)).astype(np.uint8)
_E2M1_STORED = np.array([_E2M1.index(int(level)) for level in _E2M1_LEVELS], dtype=np.uint8)


class _Fp4(_Halves):
    """Codes are E2M1 numbers, stored as sign and magnitude."""

    levels = _E2M1_LEVELS

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        super()._unpack(blocks, codes)
        np.take(_E2M1_RANK, codes, out=codes, mode="clip")

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        stored = np.empty_like(codes)
        super()._unpack(blocks, stored)
        minus_zero = stored == 8
        np.take(_E2M1_STORED, codes, out=stored, mode="clip")
        minus_zero &= stored == 0
        stored |= minus_zero.view(np.uint8) << 3
        super()._pack(stored, blocks)


class MXFP4(_Fp4):
    """One byte e, 16 bytes of codes. The scale is 2 ** (e - 128), levels being doubled.

    e = 255 is no number, as in the OCP Microscaling specification and in llama.cpp's check.
    """

    type, group = GGMLQuantizationType.MXFP4, 32
    at, half = 1, 16
    _table = np.append(np.ldexp(np.float32(1), np.arange(-128, 127)), np.nan).astype(np.float32)

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return self._table[blocks[:, :1]]


def _unsigned_e4m3() -> np.ndarray:
    """Half of what each byte means, levels being doubled. ggml reads 0x7F as zero, no sign bit."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    table = np.where(exponent == 0, np.ldexp(mantissa, -9), normal) / 2
    table[0x7F] = 0
    return table.astype(np.float32)


class NVFP4(_Fp4):
    """Four scales, one byte each, 32 bytes of codes."""

    type, group = GGMLQuantizationType.NVFP4, 16
    at, half = 4, 8
    _table = _unsigned_e4m3()

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return self._table[blocks[:, :4]]


Codec = GridCodec | FloatCodec

_GRID_CODECS: tuple[GridCodec, ...] = (
    *(Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q8_0()),
    *(Q2_K(), Q3_K(), Q4_K(), Q5_K(), Q6_K()),
    *(IQ4_NL(), IQ4_XS(), MXFP4(), NVFP4()),
)
_FLOAT_CODECS = (
    FloatCodec(GGMLQuantizationType.F32),
    FloatCodec(GGMLQuantizationType.F16),
    FloatCodec(GGMLQuantizationType.BF16),
)
_CODECS: dict[GGMLQuantizationType, Codec] = {
    **{found.type: found for found in _GRID_CODECS},
    **{found.type: found for found in _FLOAT_CODECS},
}

_FINER = {
    GGMLQuantizationType.IQ1_S: GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.IQ1_M: GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.IQ2_XXS: GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.IQ2_XS: GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.IQ2_S: GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.IQ3_XXS: GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.IQ3_S: GGMLQuantizationType.IQ4_XS,
    GGMLQuantizationType.TQ1_0: GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.TQ2_0: GGMLQuantizationType.Q4_K,
}

GRID_TYPES: tuple[GGMLQuantizationType, ...] = tuple(found.type for found in _GRID_CODECS)
"""The types with codes: all that have a codec but F32, F16 and BF16."""


def has_grid(ggml_type: GGMLQuantizationType) -> bool:
    """Whether tensors of this type have a Grid; False for plain floats and for vector codebooks."""
    return ggml_type in GRID_TYPES


def codec(ggml_type: GGMLQuantizationType) -> Codec:
    """The codec of a type: a GridCodec, or a FloatCodec for F32, F16 and BF16.

    Raises:
        UserError: for a type without one, naming the type to write instead if there is.
    """
    if ggml_type in _CODECS:
        return _CODECS[ggml_type]
    mend = (
        f"write the tensor as {_FINER[ggml_type].name}"
        if ggml_type in _FINER
        else "use a file in another type"
    )
    raise UserError(f"{ggml_type.name} has no codes that can be changed one by one: {mend}.")


def grid_codec(ggml_type: GGMLQuantizationType) -> GridCodec:
    """The same for a type with a Grid.

    Raises:
        UserError: for plain floats too.
    """
    found = codec(ggml_type)
    if not isinstance(found, GridCodec):
        raise UserError(f"{ggml_type.name} is a plain float type, without a grid.")
    return found


def finer_type(ggml_type: GGMLQuantizationType) -> GGMLQuantizationType:
    """The smallest grid type that is at least as fine; a type with a codec is its own.

    The module's second table says why.

    Raises:
        UserError: when none is known, as for types that are no weights.
    """
    if ggml_type in _FINER:
        return _FINER[ggml_type]
    return codec(ggml_type).type


def fresh(values: np.ndarray, ggml_type: GGMLQuantizationType) -> Grid:
    """A new grid for these values, its scales chosen by ggml's own quantizer.

    For plain floats there is ``FloatCodec.round`` instead.

    Args:
        values: float32, (R, n).
        ggml_type: a type with a grid.

    Raises:
        UserError: when the type has no grid, n does not fit its blocks, a value is not finite, or
            the type needs a ggml that is not there.
    """
    found = grid_codec(ggml_type)
    _check_values(values)
    n = values.shape[1]
    if n % found.block:
        raise UserError(
            f"rows of {n} do not fit {ggml_type.name}, whose blocks hold {found.block} weights."
        )
    values = np.ascontiguousarray(values, dtype=np.float32)
    # An older ggml would crash on a type that it does not know.
    if ggml.available() and hasattr(ggml.library(), _decoder_name(ggml_type)):
        raw = ggml.quantize(values, ggml_type)
    elif ggml_type.name in _ENCODED_BY_GGUF_PY:
        raw = gguf.quants.quantize(values, ggml_type)
    elif ggml.available():
        raise UserError(f"this ggml does not know {ggml_type.name}: update it.")
    else:
        raise UserError(
            f"a new {ggml_type.name} grid needs ggml, which was not found: pip install "
            f"'abl-mlx[llamacpp]', or set {ggml.ENVIRONMENT} to a libggml-base shared object."
        )
    return found.decode(raw, n)


def refit(grid: Grid, values: np.ndarray, ggml_type: GGMLQuantizationType) -> Grid:
    """The grid with new scales where the values leave it, the rest as it was.

    A block is encoded anew when one of its values lies more than half a step past the ends of its
    group, and the new block holds them with less squared error than the old one at its nearest
    codes. All other blocks keep every bit, codes included.

    Args:
        grid: a tensor's own grid, of this type.
        values: float32, (R, n): what shall be written.
        ggml_type: the grid's type.

    Raises:
        UserError: as `fresh`.
    """
    _check_values(values)
    found = grid_codec(ggml_type)
    rows, n = grid.shape
    count, groups = rows * (n // found.block), found.block // found.group
    past = np.zeros(count * groups, dtype=bool)
    past[grid.left_by(values)] = True
    outside = np.flatnonzero(past.reshape(count, groups).any(axis=1))
    if not len(outside):
        return grid
    wanted = np.ascontiguousarray(values, dtype=np.float32)
    wanted = wanted.reshape(count, found.block)[outside]
    old = Grid(
        codes=grid.codes.reshape(count, found.block)[outside],
        levels=grid.levels,
        scales=grid.scales.reshape(count, groups)[outside],
        offsets=None if grid.offsets is None else grid.offsets.reshape(count, groups)[outside],
        group=grid.group,
    )
    old = old.with_codes(old.nearest(wanted))
    new = fresh(wanted, ggml_type)
    better = new.squared_error(wanted) < old.squared_error(wanted)
    if not better.any():
        return grid
    raw = found.encode(grid)
    raw.reshape(count, found.size)[outside[better]] = new.frame[better]
    return found.decode(raw, n)


def as_rows(data: np.ndarray) -> np.ndarray:
    """A tensor's data as gguf-py's reader gives it, as raw rows: uint8, (R, bytes per row).

    Args:
        data: (..., bytes per row) of uint8, or (..., n) of a float type; one dimension is one row.
    """
    width = data.shape[-1] * data.itemsize
    return np.ascontiguousarray(data).view(np.uint8).reshape(-1, width)


def _decoder_name(ggml_type: GGMLQuantizationType) -> str:
    return "dequantize_row_" + str(ggml_type.name).lower().replace("_k", "_K")


def _check_rows(
    raw: np.ndarray, n: int, block: int, size: int, ggml_type: GGMLQuantizationType
) -> None:
    if raw.ndim != 2 or raw.dtype != np.uint8:
        raise UserError(f"raw rows are uint8 of 2 dimensions, not {raw.dtype} of {raw.ndim}.")
    if n < 1 or n % block:
        raise UserError(
            f"rows of {n} do not fit {ggml_type.name}, whose blocks hold {block} weights."
        )
    if raw.shape[1] != n // block * size:
        raise UserError(
            f"a row of {n} weights takes {n // block * size} bytes in {ggml_type.name}, "
            f"but has {raw.shape[1]}."
        )


def _check_values(values: np.ndarray) -> None:
    if values.ndim != 2:
        raise UserError(f"rows of weights have 2 dimensions, not {values.ndim}.")
    if not np.isfinite(values).all():
        raise UserError("a weight is not finite.")


def _float16(blocks: np.ndarray, at: int) -> np.ndarray:
    """Float32 (B, 1) of the two bytes at ``at``."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


# Two bits of 256 weights in 64 bytes: byte i of the first 32 holds the weights i, 32 + i, 64 + i
# and 96 + i from its lowest bits upwards; the other 32 bytes hold the other 128 weights.


def _unpack_quarters(packed: np.ndarray, codes: np.ndarray, left: int, merge: bool = False) -> None:
    packed = packed.reshape(len(packed), 2, 32)
    quarters = codes.reshape(len(codes), 2, 4, 32)
    for part in range(4):
        bits = ((packed >> (2 * part)) & 3) << left
        if merge:
            quarters[:, :, part] |= bits
        else:
            quarters[:, :, part] = bits


def _pack_quarters(bits: np.ndarray) -> np.ndarray:
    quarters = bits.reshape(len(bits), 2, 4, 32)
    packed = quarters[:, :, 0].copy()
    for part in range(1, 4):
        packed |= quarters[:, :, part] << (2 * part)
    return packed.reshape(len(bits), 64)


# One bit of 256 weights in 32 bytes: byte i holds the weights i, 32 + i, .. 224 + i.


def _unpack_eighths(packed: np.ndarray, codes: np.ndarray, left: int) -> None:
    eighths = codes.reshape(len(codes), 8, 32)
    for part in range(8):
        eighths[:, part] |= ((packed >> part) & 1) << left


def _pack_eighths(bits: np.ndarray) -> np.ndarray:
    eighths = bits.reshape(len(bits), 8, 32)
    packed = eighths[:, 0].copy()
    for part in range(1, 8):
        packed |= eighths[:, part] << part
    return packed
