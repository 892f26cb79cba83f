"""(weight, scales, biases) of a quantized MLX module <-> Grid, for each of MLX's modes.

======  =====================  ==================  ==============================  ===============
mode    bits                   weights per scale   scale, bias per group           levels
======  =====================  ==================  ==============================  ===============
affine  2, 3, 4, 5, 6, 8       32, 64, 128         floats of one type, both        0 .. 2 ^ bits -1
mxfp4   4                      32                  2 ^ (byte - 127)                E2M1, -6 .. 6
mxfp8   8                      32                  2 ^ (byte - 127)                E4M3, -448 .. 448
nvfp4   4                      16                  E4M3 (times global / 2688)      E2M1, -6 .. 6
======  =====================  ==================  ==============================  ===============

A weight is ``level * scale + bias``, computed in float32 from scale and bias in float32, as in MLX
when scales are stored in float32. (``mx.dequantize(..., dtype=mx.float32)`` with bfloat16 scales
differs: it computes in bfloat16 and widens the result.) In nvfp4 a matrix may have a
``global_scale``, one float32 for each expert; every scale is then multiplied by
global_scale / 2688, where 2688 = 6 * 448.

E2M1 and E4M3 have two zeros, 0 and -0: both are one level here, and a weight that was stored as -0
is written as -0 again. E4M3 has no infinities; its NaNs are not levels. Each row's codes are packed
as one little-endian stream of bits (`convert.mlx.types`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from convert.base import halves
from convert.base.errors import UserError
from convert.base.grids import Grid, in_chunks
from convert.base.near_scales import Less, blocks_of
from convert.gguf.ggml_types import FloatCodec
from convert.mlx.types import pack_into, unpack_into

#: The largest nvfp4 scale times the largest E2M1 number: the unit of a global scale.
_GLOBAL = np.float32(448 * 6)


@dataclass(frozen=True)
class Quantization:
    """How a module is quantized: its entry in config.json's "quantization"."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __str__(self) -> str:
        if self.mode != "affine":
            return self.mode
        return f"{self.bits}-bit, groups of {self.group_size}"

    def entry(self) -> dict[str, int | str]:
        """The entry as it stands in config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


class Rows(NamedTuple):
    """R rows of a quantized matrix as they are stored, uint8 (R, bytes per row) each.

    Attributes:
        weight: packed codes.
        scales: one for each group.
        biases: one for each group; None for all modes but affine.
        global_scale: float32, (R,): the global scale of each row's expert; None if there is none.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None = None
    global_scale: np.ndarray | None = None


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


def _e4m3() -> np.ndarray:
    """float32 (127,): the E4M3 number of each byte below 0x7F, which is NaN; bit 7 is the sign."""
    byte = np.arange(0x7F)
    exponent, mantissa = byte >> 3, byte & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    return np.where(exponent == 0, np.ldexp(mantissa, -9), normal).astype(np.float32)


_E4M3 = _e4m3()


def _signed(magnitudes: np.ndarray) -> np.ndarray:
    """The ascending levels of a format that stores sign and magnitude.

    Args:
        magnitudes: the numbers of the stored codes 0, 1, ..., ascending.
    """
    levels = np.concatenate((-magnitudes[:0:-1], magnitudes))
    levels.flags.writeable = False
    return levels


_POWERS = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.nan).astype(np.float32)
_E4M3_SCALES = np.concatenate((_E4M3, [np.nan], -_E4M3, [np.nan])).astype(np.float32)

_CODEBOOKS = {
    "mxfp4": (_signed(_E2M1), _POWERS),
    "nvfp4": (_signed(_E2M1), _E4M3_SCALES),
    "mxfp8": (_signed(_E4M3), _POWERS),
}

_MX_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


class MlxCodec:
    """Rows <-> Grid for one kind of quantized module.

    Any run of rows, and any run of whole groups in them, may be decoded and encoded separately.

    Args:
        quantization: how the module is quantized.
        dtype: how scales and biases are stored: F32, F16 or BF16; U8 for all modes but affine.

    Raises:
        UserError: when MLX has no such mode. The message does not name the module; the caller adds
            its name.
    """

    def __init__(self, quantization: Quantization, dtype: str) -> None:
        self.quantization, self.dtype = quantization, dtype
        bits, group, mode = quantization.bits, quantization.group_size, quantization.mode
        affine = mode == "affine" and bits in (2, 3, 4, 5, 6, 8) and group in (32, 64, 128)
        if not (affine or _MX_MODES.get(mode) == (bits, group)):
            raise UserError(f"MLX has no mode {mode} with {bits} bits in groups of {group}.")
        if dtype not in (("F32", "F16", "BF16") if affine else ("U8",)):
            raise UserError(f"{quantization} cannot have scales of type {dtype}.")
        self.is_affine = affine
        if affine:
            self.levels = np.arange(1 << bits, dtype=np.float32)
            self._floats = FloatCodec(GGMLQuantizationType[dtype])
        else:
            self.levels, self._scale_table = _CODEBOOKS[mode]

    def row_bytes(self, n: int) -> dict[str, int]:
        """Part (weight, scales, biases) -> its bytes in a row of n weights."""
        wide = n // self.quantization.group_size * (self._floats.size if self.is_affine else 1)
        found = {"weight": n * self.quantization.bits // 8, "scales": wide}
        return found | ({"biases": wide} if self.is_affine else {})

    def decode(self, rows: Rows) -> Grid:
        """The grid of these rows; it keeps ``rows`` as its frame, without a copy.

        Raises:
            UserError: when a scale or a code is not a finite number.
        """
        count = len(rows.weight)
        n = rows.weight.shape[1] * 8 // self.quantization.bits
        sizes = self.row_bytes(n)
        for part, size in sizes.items():
            raw = getattr(rows, part)
            if raw is None or raw.shape != (count, size):
                raise UserError(f"{part} of a width that does not fit {self.quantization}.")
        codes = self._unpack(rows.weight, n)
        if self.is_affine:
            assert rows.biases is not None
            scales, offsets = self._read(rows.scales, rows.biases)
            return self._grid(codes, scales, offsets, rows)
        # A NaN of E4M3 has a code beyond the last level.
        if self.quantization.mode == "mxfp8" and codes.size and codes.max() >= len(self.levels):
            raise UserError("a weight is NaN: the file is damaged, get it again.")
        return self._grid(codes, self._byte_scales(rows), None, rows)

    def encode(self, grid: Grid) -> Rows:
        """The stored rows of a grid that this codec made, possibly changed by ``Grid.with_codes``.

        Raises:
            ValueError: when the grid is of another type.
        """
        frame = grid.frame
        same = grid.group == self.quantization.group_size
        if not (same and isinstance(frame, Rows) and len(grid.levels) == len(self.levels)):
            raise ValueError(f"a grid of another kind, to be encoded as {self.quantization}")
        return frame._replace(weight=self._pack(grid.codes, frame.weight))

    def fresh(self, values: np.ndarray, global_scale: np.ndarray | None = None) -> Grid:
        """A new grid for these values, with the scales that ``mx.quantize`` chooses.

        Args:
            values: float32, (R, n), finite.
            global_scale: float32, (R,), or None; it is used as it is.

        Raises:
            UserError: when a value is not finite, or too large for the scales' type.
        """
        if not np.isfinite(values).all():
            raise UserError("a weight is not finite.")
        values = np.ascontiguousarray(values, dtype=np.float32)
        rows, n = values.shape
        none = np.zeros((rows, 0), dtype=np.uint8)
        if self.is_affine:
            packed, scales, biases = mx.quantize(
                mx.array(values), self.quantization.group_size, self.quantization.bits
            )
            mx.eval(packed, scales, biases)
            raw = np.array(packed.view(mx.uint8)).reshape(rows, -1)
            # Scales are rounded to their stored type first, because codes depend on them.
            found = [self._floats.round(np.array(part.astype(mx.float32))) for part in
                     (scales, biases)]  # fmt: skip
            frame = Rows(none, *(self._floats.encode(part) for part in found))
            return self._grid(self._unpack(raw, n), found[0].numbers, found[1].numbers, frame)
        frame = Rows(none, self._new_scales(values, global_scale), None, global_scale)
        zeros = np.zeros((rows, n), dtype=np.uint8)
        grid = self._grid(zeros, self._byte_scales(frame), None, frame)
        # A group of zeros may have a scale of zero; then any code means the same.
        grid = grid.with_codes(np.full_like(zeros, len(self.levels) // 2))
        return grid.with_codes(grid.nearest(values))

    def refit(self, grid: Grid, values: np.ndarray | Less, past: np.ndarray | None = None) -> Grid:
        """The grid with new scales for those groups whose range is too small for the values.

        A group is encoded anew when one of its values lies more than half a step past its ends and
        the new group has a smaller squared error than the old one with its nearest codes.

        Args:
            grid: a matrix's own grid.
            values: float32, (R, n): the values to be written.
        """
        outside = values.past if isinstance(values, Less) else grid.left_by(values)
        if not len(outside):
            return grid
        per_row = grid.scales.shape[1]
        wanted = blocks_of(values, outside, grid.group)
        old = grid.groups(outside)
        old = old.with_codes(old.nearest(wanted))
        frame = grid.frame
        shared = None if frame.global_scale is None else frame.global_scale[outside // per_row]
        new = self.fresh(wanted, shared)
        new = new.with_codes(new.nearest(wanted))
        better = new.squared_error(wanted) < old.squared_error(wanted)
        if not better.any():
            return grid
        chosen = outside[better]

        def merged(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            whole = old.copy()
            whole.reshape(per_row * len(old), -1)[chosen] = new[better]
            return whole

        offsets, biases = grid.offsets, frame.biases
        if offsets is not None and new.offsets is not None:
            offsets, biases = merged(offsets, new.offsets), merged(biases, new.frame.biases)
        scales = merged(frame.scales, new.frame.scales)
        return replace(
            grid,
            codes=merged(grid.codes, new.codes),
            scales=merged(grid.scales, new.scales),
            offsets=offsets,
            frame=frame._replace(scales=scales, biases=biases),
        )

    def _grid(
        self, codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None, frame: Rows
    ) -> Grid:
        for found in (scales, offsets):
            if found is not None and not np.isfinite(found).all():
                row = int(np.argmin(np.isfinite(found).all(axis=1)))
                raise UserError(
                    f"row {row} has a scale or bias that is not finite: the file is damaged, get "
                    "it again."
                )
        return Grid(codes, self.levels, scales, offsets, self.quantization.group_size, frame)

    def _read(self, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
        """Stored scales and biases as float32 (2, R, groups)."""
        found = np.empty((2, len(scales), scales.shape[1] // self._floats.size), np.float32)
        for raw, numbers in zip((scales, biases), found, strict=True):
            # A copy, because bytes of a file may be neither aligned nor in order.
            bits = raw.copy()
            if self.dtype == "F32":
                numbers[...] = bits.view(np.float32)
            else:
                halves.widen_into(bits.view(np.uint16), self.dtype, numbers)
        return found

    def _byte_scales(self, rows: Rows) -> np.ndarray:
        scales = np.take(self._scale_table, rows.scales, mode="clip")  # there are 256 of them
        if rows.global_scale is not None:
            scales = scales * (rows.global_scale.astype(np.float32) / _GLOBAL)[:, None]
        return scales

    def _new_scales(self, values: np.ndarray, global_scale: np.ndarray | None) -> np.ndarray:
        """The scales that ``mx.quantize`` chooses, as stored bytes: uint8 (R, groups)."""
        rows, n = values.shape
        group = self.quantization.group_size
        grouped = values.reshape(rows, n // group, group)
        largest = np.maximum(grouped.max(axis=2), -grouped.min(axis=2))
        wanted = largest / self.levels[-1]
        if self.quantization.mode == "nvfp4":
            if global_scale is not None:
                wanted = wanted / (global_scale.astype(np.float32) / _GLOBAL)[:, None]
            # Ties go to the even mantissa, which is the even byte.
            above = np.clip(np.searchsorted(_E4M3, wanted), 1, len(_E4M3) - 1)
            middle = (_E4M3[above - 1] + _E4M3[above]) / 2
            up = (wanted > middle) | ((wanted == middle) & (above % 2 == 0))
            return np.where(up, above, above - 1).astype(np.uint8)
        # The smallest power of two that is at least as large, so that no weight is clipped.
        fraction, exponent = np.frexp(wanted)
        exponent = np.where(fraction == 0.5, exponent - 1, exponent)
        exponent = np.where(wanted == 0, 0, exponent)
        return np.clip(exponent + 127, 0, 254).astype(np.uint8)

    def _unpack(self, weight: np.ndarray, n: int) -> np.ndarray:
        """The codes of packed rows: uint8 (R, n)."""
        codes = np.empty((len(weight), n), dtype=np.uint8)
        bits, levels = self.quantization.bits, len(self.levels)

        def work(part: slice) -> None:
            unpack_into(weight[part], bits, codes[part])
            if not self.is_affine:
                from convert.mlx import stream_kernels as kernels  # lazily: numba

                kernels.to_levels(codes[part].reshape(-1).view(np.uint64), levels // 2, bits - 1)

        in_chunks(work, len(weight), n)
        return codes

    def _pack(self, codes: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Packed rows, uint8 (R, bytes), of codes (R, n), and of the rows that they replace."""
        rows, n = codes.shape
        bits, levels = self.quantization.bits, len(self.levels)
        words = np.empty((rows, n * bits // 32), np.uint32)

        def work(part: slice) -> None:
            if self.is_affine:
                pack_into(codes[part], bits, words[part])
                return
            from convert.mlx import stream_kernels as kernels  # lazily: numba

            stored = np.zeros(codes[part].shape, np.uint8)
            if before.size:
                unpack_into(before[part], bits, stored)
            flat = np.ascontiguousarray(codes[part]).reshape(-1)
            kernels.from_levels(flat, levels // 2, bits - 1, stored.reshape(-1))
            pack_into(stored, bits, words[part])

        in_chunks(work, rows, n)
        return words.view(np.uint8)
