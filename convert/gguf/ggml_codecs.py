"""Codecs of GGML types: bytes of a GGUF tensor <-> Grid, for R rows of n weights.

n is the tensor's fastest dimension (ne0), R the product of all others; a row's blocks follow each
other. Any run of rows may be decoded and encoded separately. The codecs of the quantized types are
in `convert.gguf.ggml_blocks`.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import replace
from typing import ClassVar

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from convert.base import halves
from convert.base.errors import UserError
from convert.base.grids import FloatGrid, Grid, in_chunks
from convert.gguf.block_layout import Layout


class BlockCodec(ABC):
    """What the codecs of all quantized types have in common.

    Attributes:
        type: the GGML type.
    """

    type: ClassVar[GGMLQuantizationType]
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

    def _check_finite(self, found: np.ndarray, n: int) -> None:
        """Check scales or offsets of B blocks, (B, ·), of rows of n weights.

        Raises:
            UserError: naming the first block with one that is not finite.
        """
        if not np.isfinite(found).all():
            raise self._not_finite(int(np.argmin(np.isfinite(found).all(axis=1))), n)

    def _not_finite(self, bad: int, n: int) -> UserError:
        """The error of a block, of rows of n weights, with a scale or offset that is not finite."""
        row, block = divmod(bad, n // self.block)
        return UserError(
            f"block {block} of row {row} has a {self.type.name} scale that is not finite: "
            "the file is damaged, download it again."
        )

    def _framed(self, shape: tuple[int, int], frame: object, *, alike: bool) -> np.ndarray:
        """A copy of a grid's frame, uint8, (R, bytes per row).

        Args:
            shape: the grid's, (R, n).
            frame: the bytes from which it was decoded.
            alike: whether the grid is otherwise of this type.

        Raises:
            ValueError: when the grid is of another type.
        """
        rows, n = shape
        size = (rows, n // self.block * self.size)
        if not alike or not isinstance(frame, np.ndarray) or frame.shape != size:
            raise ValueError(f"a grid of another type, to be encoded as {self.type.name}")
        return np.array(frame)


class GridCodec(BlockCodec):
    """Bytes <-> Grid for one quantized type whose codes are levels.

    Attributes:
        group: number of weights that share a scale.
        levels: float32, (K,), ascending: the number that each code stands for.
        layout: where a block has its codes, scales and offsets.
    """

    group: ClassVar[int]
    levels: ClassVar[np.ndarray]
    layout: ClassVar[Layout]

    def decode(self, raw: np.ndarray, n: int) -> Grid:
        """The grid of R rows.

        Args:
            raw: uint8, (R, bytes per row). The grid keeps it as its frame, without a copy.
            n: weights per row.

        Raises:
            UserError: when sizes do not fit, or a block's scale is not finite. The message does
                not name the tensor; the caller adds its name.
        """
        check_rows(raw, n, self.block, self.size, self.type)
        raw = np.ascontiguousarray(raw)
        rows, count = len(raw), len(raw) * (n // self.block)
        blocks = raw.reshape(count, self.size)
        codes = np.empty((count, self.block), dtype=np.uint8)
        scales, offsets = self._empty(count)
        bad: list[int] = []

        def read(part: slice) -> None:
            found = self._read(blocks[part], codes[part], scales[part], offsets[part])
            if found >= 0:
                bad.append(part.start + found)

        in_chunks(read, count, self.block)
        if bad:
            raise self._not_finite(min(bad), n)
        shape = (rows, n // self.group)
        return Grid(
            codes=codes.reshape(rows, n),
            levels=self.levels,
            scales=scales.reshape(shape),
            offsets=offsets.reshape(shape) if offsets.shape[1] else None,
            group=self.group,
            frame=raw,
        )

    def with_scales(self, grid: Grid, raw: np.ndarray) -> Grid:
        """A grid that this codec decoded, with the scales of other bytes and its own codes.

        Args:
            raw: uint8, (R, bytes per row). The grid keeps it as its frame.
        """
        blocks, shape = raw.reshape(-1, self.size), grid.scales.shape
        scales, offsets = self._empty(len(blocks))
        self._read(blocks, np.empty((len(blocks), 0), np.uint8), scales, offsets)
        shifted = offsets.reshape(shape) if offsets.shape[1] else None
        return replace(grid, scales=scales.reshape(shape), offsets=shifted, frame=raw)

    def encode(self, grid: Grid) -> np.ndarray:
        """The bytes of a grid that this codec decoded, possibly changed by ``Grid.with_codes``.

        Returns:
            uint8, (R, bytes per row): a new array, equal to the grid's frame but for the code bits.

        Raises:
            ValueError: when the grid is of another type.
        """
        alike = grid.group == self.group and np.array_equal(grid.levels, self.levels)
        raw = self._framed(grid.shape, grid.frame, alike=alike)
        blocks = raw.reshape(-1, self.size)
        count = len(blocks)
        codes = np.ascontiguousarray(grid.codes).reshape(count, self.block)

        def write(part: slice) -> None:
            self._pack(codes[part], blocks[part])

        in_chunks(write, count, self.block)
        return raw

    def _empty(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Arrays for the scales and offsets of some blocks; none for offsets that a type lacks."""
        groups = self.block // self.group
        scales = np.empty((count, groups), np.float32)
        return scales, np.empty((count, 0 if self.layout.dmin is None else groups), np.float32)

    def _read(
        self, blocks: np.ndarray, codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray
    ) -> int:
        """Decode B blocks.

        Args:
            blocks: uint8, (B, size).
            codes: the result, uint8 (B, block); or (B, 0), to read scales and offsets alone.
            scales, offsets: the result, as from `_empty`; or (B, 0), to read codes alone.

        Returns:
            The first block with a scale or offset that is not finite, or -1.
        """
        from convert.gguf import block_kernels as kernels  # lazily: it brings numba

        data = blocks.reshape(-1)
        data.flags.writeable = False  # as mapped bytes are, so that one function serves both
        eights = codes.view(np.uint64) if codes.size else np.empty((len(blocks), 0), np.uint64)
        numbers = self.layout.numbers
        return int(kernels.decode(data, self.size, *numbers, eights, scales, offsets))

    def _pack(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        """Replace the code bits of ``blocks``, uint8 (B, size), by ``codes``, uint8 (B, block)."""
        from convert.gguf import plane_kernels as kernels  # lazily: it brings numba

        eights = codes.view(np.uint64)
        for at, run, bits, left in self.layout.planes:
            words = np.zeros((len(blocks), self.block * bits // 64), np.uint64)
            kernels.pack(eights, run // 8, bits, left, words)
            count = 8 * words.shape[1]
            blocks[:, at : at + count].view(f"V{count}")[...] = words.view(f"V{count}")


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
        """The weights of R rows.

        Args:
            raw: uint8, (R, bytes per row).
            n: weights per row.

        Raises:
            UserError: when sizes do not fit, or a weight is not finite.
        """
        check_rows(raw, n, self.block, self.size, self.type)
        numbers = self._read(np.ascontiguousarray(raw))
        if not np.isfinite(numbers).all():
            row = int(np.argmin(np.isfinite(numbers).all(axis=1)))
            raise UserError(f"row {row} holds a weight that is not finite: get the file again.")
        return FloatGrid(numbers)

    def encode(self, grid: FloatGrid) -> np.ndarray:
        """The bytes of a grid from ``decode`` or ``round``: uint8 (R, bytes per row)."""
        return self._write(np.ascontiguousarray(grid.numbers, dtype=np.float32))

    def round(self, values: np.ndarray) -> FloatGrid:
        """Each value of float32 (R, n) rounded to the nearest number of the type, ties to even.

        Raises:
            UserError: when a value is not finite or too large for the type.
        """
        check_values(values)
        numbers = self._read(self._write(np.ascontiguousarray(values, dtype=np.float32)))
        if not np.isfinite(numbers).all():
            largest = float(np.abs(values).max())
            raise UserError(f"a weight of {largest:g} does not fit {self.type.name}: write F32.")
        return FloatGrid(numbers)

    def _read(self, raw: np.ndarray) -> np.ndarray:
        if self.type == GGMLQuantizationType.F32:
            return np.array(raw.view("<f4"), dtype=np.float32)
        return halves.widened(raw.view(np.uint16), self.type.name)

    def _write(self, numbers: np.ndarray) -> np.ndarray:
        if self.type == GGMLQuantizationType.F32:
            return numbers.astype("<f4").view(np.uint8)
        return halves.narrowed(numbers, self.type.name).view(np.uint8)


def check_rows(
    raw: np.ndarray, n: int, block: int, size: int, ggml_type: GGMLQuantizationType
) -> None:
    """Check that each of the raw rows holds ``n`` weights of this type.

    Raises:
        UserError: when the rows' type, number of dimensions or length is another.
    """
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


def check_values(values: np.ndarray) -> None:
    """Check that values are a matrix of finite numbers.

    Raises:
        UserError: when they are not.
    """
    if values.ndim != 2:
        raise UserError(f"rows of weights have 2 dimensions, not {values.ndim}.")
    if not np.isfinite(values).all():
        raise UserError("a weight is not finite.")
