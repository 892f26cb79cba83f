"""Codecs of the GGML types IQ1, IQ2 and IQ3, whose codes are entries of a codebook.

The codebooks are those of gguf-py. The block layouts are those of llama.cpp's
ggml/src/ggml-common.h. All types have blocks of 256 weights with a float16 d.

======== ===== ===== ======= ======================= ==================================
type     group bytes entries signs                   scale
======== ===== ===== ======= ======================= ==================================
IQ1_S        8    50    2048 none, shift +-1/8 / 32  d * (2 * 3 bits + 1) / 32
IQ1_M        8    56    2048 none, shift +-1/8 / 8   d * (2 * 3 bits + 1) / 16
IQ2_XXS      8    66     256 an even number negative d * (4 bits + 1/2) / 4 / 32
IQ2_XS       8    74     512 an even number negative d * (4 bits + 1/2) / 4 / 16
IQ2_S        8    82    1024 any                     d * (4 bits + 1/2) / 4 / 16
IQ3_XXS      4    98     256 an even number negative d * (4 bits + 1/2) / 2 / 32
IQ3_S        4   110     512 any                     d * (2 * 4 bits + 1) / 32
======== ===== ===== ======= ======================= ==================================

"/ 32" means: one for 32 weights. IQ3_XXS has an even number of negative signs in 8 weights.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import ClassVar

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from convert.base import codebooks
from convert.base.codebooks import Codebook, CodebookGrid
from convert.base.grids import in_chunks
from convert.gguf.ggml_codecs import BlockCodec, check_rows


class CodebookCodec(BlockCodec):
    """Bytes <-> CodebookGrid for one type.

    Attributes:
        group: weights in a group.
        shared: neighbouring groups that share a scale.
        signs: which signs the type stores.
    """

    group: ClassVar[int] = 8
    shared: ClassVar[int]
    signs: ClassVar[str]

    @property
    def book(self) -> Codebook:
        """The codebook."""
        return _book(self.type, self.signs)

    def decode(self, raw: np.ndarray, n: int) -> CodebookGrid:
        """The grid of R rows.

        Args:
            raw: uint8, (R, bytes per row). The grid keeps it as its frame, without a copy.
            n: weights per row.

        Raises:
            UserError: when sizes do not fit, or a block's scale is not finite.
        """
        check_rows(raw, n, self.block, self.size, self.type)
        raw = np.ascontiguousarray(raw)
        count, groups = len(raw) * (n // self.block), self.block // self.group
        blocks = raw.reshape(count, self.size)
        codes = np.empty((count, groups), dtype=np.uint16)
        signs = np.zeros((count, groups), dtype=np.uint8)
        scales = np.empty((count, groups), dtype=np.float32)
        shifts = np.empty_like(scales) if self.signs == codebooks.NONE else None

        def read(part: slice) -> None:
            self._unpack(blocks[part], codes[part], signs[part])
            with np.errstate(invalid="ignore", over="ignore"):
                scales[part] = np.repeat(self._scales(blocks[part]), self.shared, axis=1)
            if shifts is not None:
                shifts[part] = self._shifts(blocks[part])

        in_chunks(read, count, self.block)
        self._check_finite(scales, n)
        shape = (len(raw), n // self.group)
        return CodebookGrid(
            codes=codes.reshape(shape),
            signs=signs.reshape(shape),
            scales=scales.reshape(shape),
            shifts=None if shifts is None else shifts.reshape(shape),
            book=self.book,
            frame=raw,
        )

    def check_scales(self, raw: np.ndarray, n: int) -> None:
        """Check the bytes of rows without decoding their codes.

        Args:
            raw: uint8, (R, bytes per row).
            n: weights per row.

        Raises:
            UserError: when sizes do not fit, or a block's scale is not finite.
        """
        check_rows(raw, n, self.block, self.size, self.type)
        blocks = np.ascontiguousarray(raw).reshape(-1, self.size)
        with np.errstate(invalid="ignore", over="ignore"):
            self._check_finite(self._scales(blocks), n)

    def encode(self, grid: CodebookGrid) -> np.ndarray:
        """The bytes of a grid that this codec decoded, possibly with other codes and signs.

        Returns:
            uint8, (R, bytes per row): a new array, equal to the grid's frame but for the codes.

        Raises:
            ValueError: when the grid is of another type.
        """
        raw = self._framed(grid.shape, grid.frame, alike=grid.book is self.book)
        blocks = raw.reshape(-1, self.size)
        count, groups = len(blocks), self.block // self.group
        codes, signs = (part.reshape(count, groups) for part in (grid.codes, grid.signs))

        def write(part: slice) -> None:
            self._pack(codes[part], signs[part], blocks[part])

        in_chunks(write, count, self.block)
        return raw

    @abstractmethod
    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        """The scales of B blocks, float32 (B, groups // shared)."""

    def _shifts(self, blocks: np.ndarray) -> np.ndarray:
        """The shifts of B blocks, float32 (B, groups), of a type without signs."""
        raise NotImplementedError

    @abstractmethod
    def _unpack(self, blocks: np.ndarray, codes: np.ndarray, signs: np.ndarray) -> None:
        """Fill ``codes``, uint16 (B, groups), and ``signs``, uint8, from ``blocks``."""

    @abstractmethod
    def _pack(self, codes: np.ndarray, signs: np.ndarray, blocks: np.ndarray) -> None:
        """Replace the codes and signs in ``blocks``."""


@functools.cache
def _book(kind: GGMLQuantizationType, signs: str) -> Codebook:
    table = getattr(gguf.quants, kind.name)
    table.init_grid()
    entries = np.array(table.grid, dtype=np.float32).reshape(table.grid_shape)
    entries.flags.writeable = False
    return Codebook(entries, signs)


def _words(blocks: np.ndarray, at: int, count: int, kind: str) -> np.ndarray:
    """A copy of little-endian numbers in blocks: (B, count)."""
    size = count * np.dtype(kind).itemsize
    return np.ascontiguousarray(blocks[:, at : at + size]).view(kind)


def _put(blocks: np.ndarray, at: int, words: np.ndarray) -> None:
    raw = np.ascontiguousarray(words).view(np.uint8)
    blocks[:, at : at + raw.shape[1]] = raw


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """The lower and the upper half of each byte: (B, bytes) -> float32 (B, 2 * bytes)."""
    halves = np.stack([packed & 15, packed >> 4], axis=2)
    return halves.reshape(len(packed), -1).astype(np.float32)


def _spread(words: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """Several small numbers of each word: (B, words) -> (B, words * shifts)."""
    parts = [(words >> np.array(shift, words.dtype)) & words.dtype.type(mask) for shift in shifts]
    return np.stack(parts, axis=2).reshape(len(words), -1)


def _gather(numbers: np.ndarray, shifts: tuple[int, ...], kind: str) -> np.ndarray:
    """The reverse of `_spread`: (B, words * shifts) -> (B, words), with other bits zero."""
    parts = numbers.astype(kind).reshape(len(numbers), -1, len(shifts))
    words = np.zeros(parts.shape[:2], dtype=kind)
    for index, shift in enumerate(shifts):
        words |= parts[:, :, index] << np.array(shift, words.dtype)
    return words


# The 128 masks of 8 signs with an even number of bits; the lowest seven bits of each are its index.
_EVEN_SIGNS = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, dtype=np.uint8)
_SEVENS = (0, 7, 14, 21)


class _Scaled(CodebookCodec):
    """A float16 d at the beginning of a block, and small scales that `_small` reads.

    Attributes:
        half: 1/4 or 1/2, by which scales are multiplied.
    """

    half: ClassVar[float]

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        d = _words(blocks, 0, 1, "<f2").astype(np.float32)
        return d * (np.float32(0.5) + self._small(blocks)) * np.float32(self.half)

    def _small(self, blocks: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class IQ2_XXS(_Scaled):
    """d; for 32 weights 4 bytes of codes and a word: four times 7 bits of signs, 4 of scale."""

    type, shared, signs, half = GGMLQuantizationType.IQ2_XXS, 4, codebooks.EVEN, 0.25

    def _pairs(self, blocks: np.ndarray) -> np.ndarray:
        return _words(blocks, 2, 16, "<u4").reshape(len(blocks), 8, 2)

    def _small(self, blocks: np.ndarray) -> np.ndarray:
        return (self._pairs(blocks)[:, :, 1] >> np.uint32(28)).astype(np.float32)

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray, signs: np.ndarray) -> None:
        pairs = self._pairs(blocks)
        codes[...] = _spread(pairs[:, :, 0], (0, 8, 16, 24), 255)
        signs[...] = _EVEN_SIGNS[_spread(pairs[:, :, 1], _SEVENS, 127)]

    def _pack(self, codes: np.ndarray, signs: np.ndarray, blocks: np.ndarray) -> None:
        pairs = self._pairs(blocks)
        scales = pairs[:, :, 1] & np.uint32(0xF0000000)
        pairs[:, :, 0] = _gather(codes, (0, 8, 16, 24), "<u4")
        pairs[:, :, 1] = scales | _gather(signs & 127, _SEVENS, "<u4")
        _put(blocks, 2, pairs.reshape(len(blocks), 16))


class IQ2_XS(_Scaled):
    """d; 32 words with 9 bits of code and 7 of signs; 8 bytes of scales."""

    type, shared, signs, half = GGMLQuantizationType.IQ2_XS, 2, codebooks.EVEN, 0.25

    def _small(self, blocks: np.ndarray) -> np.ndarray:
        return _nibbles(blocks[:, 66:74])

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray, signs: np.ndarray) -> None:
        words = _words(blocks, 2, 32, "<u2")
        codes[...] = words & 511
        signs[...] = _EVEN_SIGNS[words >> 9]

    def _pack(self, codes: np.ndarray, signs: np.ndarray, blocks: np.ndarray) -> None:
        _put(blocks, 2, (codes | ((signs & 127).astype("<u2") << 9)).astype("<u2"))


class IQ2_S(_Scaled):
    """d; 32 bytes of codes, 32 of signs, 8 with two more bits of codes, 8 of scales."""

    type, shared, signs, half = GGMLQuantizationType.IQ2_S, 2, codebooks.FREE, 0.25

    def _small(self, blocks: np.ndarray) -> np.ndarray:
        return _nibbles(blocks[:, 74:82])

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray, signs: np.ndarray) -> None:
        high = _spread(blocks[:, 66:74], (0, 2, 4, 6), 3).astype(np.uint16)
        codes[...] = blocks[:, 2:34] | (high << 8)
        signs[...] = blocks[:, 34:66]

    def _pack(self, codes: np.ndarray, signs: np.ndarray, blocks: np.ndarray) -> None:
        blocks[:, 2:34] = codes & 255
        blocks[:, 34:66] = signs
        blocks[:, 66:74] = _gather(codes >> 8, (0, 2, 4, 6), "u1")


class IQ3_XXS(_Scaled):
    """d; 64 bytes of codes; for each 32 weights a word: four times 7 bits of signs, 4 of scale."""

    type, group, shared = GGMLQuantizationType.IQ3_XXS, 4, 8
    signs, half = codebooks.EVEN, 0.5

    def _small(self, blocks: np.ndarray) -> np.ndarray:
        return (_words(blocks, 66, 8, "<u4") >> np.uint32(28)).astype(np.float32)

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray, signs: np.ndarray) -> None:
        codes[...] = blocks[:, 2:66]
        eights = _EVEN_SIGNS[_spread(_words(blocks, 66, 8, "<u4"), _SEVENS, 127)]
        signs[...] = _spread(eights, (0, 4), 15)

    def _pack(self, codes: np.ndarray, signs: np.ndarray, blocks: np.ndarray) -> None:
        blocks[:, 2:66] = codes
        scales = _words(blocks, 66, 8, "<u4") & np.uint32(0xF0000000)
        eights = _gather(signs, (0, 4), "u1") & 127
        _put(blocks, 66, scales | _gather(eights, _SEVENS, "<u4"))


class IQ3_S(CodebookCodec):
    """d; 64 bytes of codes, 8 with their ninth bits, 32 of signs, 4 of scales."""

    type, group, shared = GGMLQuantizationType.IQ3_S, 4, 8
    signs = codebooks.FREE

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        d = _words(blocks, 0, 1, "<f2").astype(np.float32)
        return d * (1 + 2 * _nibbles(blocks[:, 106:110]))

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray, signs: np.ndarray) -> None:
        ninth = np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little").astype(np.uint16)
        codes[...] = blocks[:, 2:66] | (ninth << 8)
        signs[...] = _spread(blocks[:, 74:106], (0, 4), 15)

    def _pack(self, codes: np.ndarray, signs: np.ndarray, blocks: np.ndarray) -> None:
        blocks[:, 2:66] = codes & 255
        ninth = (codes >> 8).astype(np.uint8)
        blocks[:, 66:74] = np.packbits(ninth, axis=1, bitorder="little")
        blocks[:, 74:106] = _gather(signs, (0, 4), "u1")


_DELTA = np.float32(0.125)
_THREES = (0, 3, 6, 9)


class IQ1_S(CodebookCodec):
    """d; 32 bytes of codes; 8 words: four times 3 more bits of codes, 3 of scale, one of shift."""

    type, shared, signs = GGMLQuantizationType.IQ1_S, 4, codebooks.NONE

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        d = _words(blocks, 0, 1, "<f2").astype(np.float32)
        small = (_words(blocks, 34, 8, "<u2") >> np.uint16(12)) & np.uint16(7)
        return d * (2 * small + 1).astype(np.float32)

    def _shifts(self, blocks: np.ndarray) -> np.ndarray:
        minus = _words(blocks, 34, 8, "<u2") >> np.uint16(15)
        return np.repeat(np.where(minus == 0, _DELTA, -_DELTA), 4, axis=1)

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray, signs: np.ndarray) -> None:
        codes[...] = blocks[:, 2:34] | (_spread(_words(blocks, 34, 8, "<u2"), _THREES, 7) << 8)

    def _pack(self, codes: np.ndarray, signs: np.ndarray, blocks: np.ndarray) -> None:
        blocks[:, 2:34] = codes & 255
        kept = _words(blocks, 34, 8, "<u2") & np.uint16(0xF000)
        _put(blocks, 34, kept | _gather(codes >> 8, _THREES, "<u2"))


class IQ1_M(CodebookCodec):
    """32 bytes of codes; 16 with 3 more bits of codes and one of shift; 8 of scales and d."""

    type, shared, signs = GGMLQuantizationType.IQ1_M, 2, codebooks.NONE

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        words = _words(blocks, 48, 4, "<u2")
        bits = _gather(words >> np.uint16(12), (0, 4, 8, 12), "<u2")
        d = bits.view("<f2").astype(np.float32)
        return d * (2 * _spread(words, _THREES, 7) + 1).astype(np.float32)

    def _shifts(self, blocks: np.ndarray) -> np.ndarray:
        minus = _spread(blocks[:, 32:48], (3, 7), 1)
        return np.where(minus == 0, _DELTA, -_DELTA)

    def _unpack(self, blocks: np.ndarray, codes: np.ndarray, signs: np.ndarray) -> None:
        high = _spread(blocks[:, 32:48], (0, 4), 7).astype(np.uint16)
        codes[...] = blocks[:, :32] | (high << 8)

    def _pack(self, codes: np.ndarray, signs: np.ndarray, blocks: np.ndarray) -> None:
        blocks[:, :32] = codes & 255
        blocks[:, 32:48] &= 0x88
        blocks[:, 32:48] |= _gather(codes >> 8, (0, 4), "u1")


CODEBOOK_CODECS: tuple[CodebookCodec, ...] = (
    *(IQ1_S(), IQ1_M(), IQ2_XXS(), IQ2_XS(), IQ2_S(), IQ3_XXS(), IQ3_S()),
)
