"""How rows of a matrix are packed, and how they are unpacked: `Form`.

Types that are affine groups of 32 are held as MLX's own arrays (`convert.mlx.types`). The others
have groups of 16 or 256 weights, or a codebook for single weights. IQ1, IQ2 and IQ3, whose codes
are whole groups of weights, stay the bytes of the file and are unpacked by ggml on the CPU: a GPU
that shares its memory with the CPU, as a Mac's does, reads the result where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from convert.base import halves
from convert.gguf import ggml
from convert.gguf.ggml_codebooks import CodebookCodec
from convert.gguf.ggml_types import CODEBOOK_TYPES, codec, grid_codec
from convert.mlx.types import AFFINE, GROUP, MlxQuantized, pack, repack

_Q = GGMLQuantizationType

# (bits of a code, weights in a group) of the types that are not affine tensors of MLX.
_LEVELS: dict[GGMLQuantizationType, tuple[int, int]] = {
    _Q.Q2_K: (2, 16),
    _Q.Q3_K: (3, 16),
    _Q.Q6_K: (6, 16),
    _Q.IQ4_NL: (4, 32),
    _Q.IQ4_XS: (4, 32),
    _Q.NVFP4: (4, 16),
    _Q.TQ1_0: (2, 256),
    _Q.TQ2_0: (2, 256),
}


def is_packed(kind: GGMLQuantizationType) -> bool:
    """Whether a tensor of this type can be held packed."""
    return (
        kind in _LEVELS
        or kind in AFFINE
        or kind in (_Q.MXFP4, _Q.F16, _Q.BF16)
        or kind in CODEBOOK_TYPES
    )


@dataclass(frozen=True)
class Form:
    """How rows are packed, which is what unpacking them needs to know.

    Attributes:
        n: weights per row.
        bits: bits of a code; 0 for plain floats.
        group: weights per scale.
        levels: the number that each code stands for; None where that is start + code.
        start: the number that code 0 stands for.
        mode: MLX's mode for affine and mxfp4 rows, empty for others.
        stored: the type whose bytes ``codes`` are, uint8; None for others.
    """

    n: int
    bits: int = 0
    group: int = 0
    levels: tuple[float, ...] | None = None
    start: float = 0.0
    mode: str = ""
    stored: GGMLQuantizationType | None = None

    def unpack(self, parts: Mapping[str, mx.array]) -> mx.array:
        """The weights, float32 (R, n), of arrays with R rows each."""
        codes = parts["codes"]
        if self.stored is not None:
            mx.eval(codes)
            raw = np.array(codes.astype(mx.uint8), copy=False)
            return mx.array(_decoded(raw, self.stored, self.n))
        if not self.bits:
            return codes.astype(mx.float32)
        if self.mode:
            biases = parts.get("biases")
            scales = parts["scales"]
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            return mx.dequantize(
                codes, scales, biases, group_size=self.group, bits=self.bits, mode=self.mode,
                dtype=mx.float32,
            )  # fmt: skip
        rows = codes.shape[0]
        one = mx.broadcast_to(mx.array(1.0), (rows, self.n // GROUP))
        zero = mx.broadcast_to(mx.array(self.start), (rows, self.n // GROUP))
        numbers = mx.dequantize(codes, one, zero, group_size=GROUP, bits=self.bits)
        if self.levels is not None:
            numbers = mx.take(mx.array(self.levels), numbers.astype(mx.uint8))
        values = numbers.reshape(rows, -1, self.group)
        if "dmin" not in parts:
            values = values * self._scales(parts["scales"], parts.get("d"))
        else:
            # Q2_K keeps a scale and a minimum in a byte.
            values = values * self._scales(parts["scales"] & 15, parts["d"])
            values = values - self._scales(parts["scales"] >> 4, parts["dmin"])
        return values.reshape(rows, self.n)

    def unpack_on_cpu(self, parts: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        """Unpack NumPy arrays into ``out``, float32 (R, n); bfloat16 codes are given as uint16."""
        codes = parts["codes"]
        if self.stored is not None:
            codes = np.ascontiguousarray(codes)
            if ggml.available():
                ggml.dequantize_into(codes, self.stored, out)
            else:
                out[...] = _decoded(codes, self.stored, self.n)
            return
        if not self.bits:
            if codes.dtype.itemsize == 2:
                kind = "BF16" if codes.dtype == np.uint16 else "F16"
                halves.widen_into(codes.view(np.uint16), kind, out)
            else:
                out[...] = codes
            return
        from convert.mlx.packed_kernels import EVEN, unpack  # lazily: it brings numba

        scales = parts["scales"]
        mins = np.zeros((0, 0), np.float32)
        if self.mode == "mxfp4":
            wide = np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(np.float32)
            unpack(codes.view(np.uint8), _E2M1, GROUP, wide, out)
            return
        if self.levels is not None:
            levels = np.array(self.levels, np.float32)
            unpack(codes.view(np.uint8), levels, self.group, _spread(scales, parts.get("d")), out)
            return
        if self.mode:
            wide = scales.astype(np.float32)
            if "biases" in parts:
                mins = parts["biases"].astype(np.float32)
        elif "dmin" in parts:
            wide = _spread(scales & 15, parts["d"])
            mins = -_spread(scales >> 4, parts["dmin"])
        else:
            wide = _spread(scales, parts.get("d"))
        start = np.float32(self.start)
        EVEN[self.bits](codes.view(np.uint32), self.group, start, wide, mins, out)

    def _scales(self, small: mx.array, big: mx.array | None) -> mx.array:
        """The scale of every group, (R, n // group, 1)."""
        scales = small.astype(mx.float32)
        if big is not None:
            block = 256 // self.group
            wide = scales.reshape(len(scales), -1, block) * big.astype(mx.float32)[..., None]
            scales = wide.reshape(len(scales), -1)
        return scales[..., None]


def _decoded(raw: np.ndarray, kind: GGMLQuantizationType, n: int) -> np.ndarray:
    """The weights, float32 (R, n), of uint8 (R, bytes per row)."""
    if ggml.available():
        return ggml.dequantize(raw, kind)
    return codec(kind).decode(raw, n).values()


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _spread(small: np.ndarray, big: np.ndarray | None) -> np.ndarray:
    """The scale of every group, float32 (R, groups)."""
    scales = small.astype(np.float32)
    if big is None:
        return scales
    return scales * np.repeat(big.astype(np.float32), scales.shape[1] // big.shape[1], axis=1)


def pack_rows(
    raw: np.ndarray, n: int, kind: GGMLQuantizationType
) -> tuple[Form, dict[str, np.ndarray]]:
    """GGUF rows as a Form and its arrays, each with R rows.

    Args:
        raw: uint8, (R, bytes per row).
        n: weights per row.
        kind: a type for which `is_packed` holds.

    Raises:
        UserError: when a block's scale is not finite.
    """
    if kind == _Q.F16:
        return Form(n), {"codes": raw.view("<f2")}
    if kind == _Q.BF16:
        return Form(n), {"codes": raw.view("<u2")}
    if kind in AFFINE or kind == _Q.MXFP4:
        return from_mlx(repack(raw, n, kind), n)
    found = codec(kind)
    if isinstance(found, CodebookCodec):
        found.check_scales(raw, n)
        return Form(n, 8 * found.size // found.block, stored=kind), {"codes": raw}
    bits, group = _LEVELS[kind]
    grid = grid_codec(kind).decode(raw, n)
    parts = {"codes": pack(grid.codes, bits)}
    rows = len(raw)
    start, levels = float(grid.levels[0]), None
    if kind.name.startswith("IQ4") or kind == _Q.NVFP4:
        start, levels = 0.0, tuple(map(float, grid.levels))
    if kind not in _BLOCKED:
        # IQ4_NL's scales are float16 in the file; float16 also holds NVFP4's scales exactly.
        parts["scales"] = grid.scales.astype(np.float16)
    else:
        blocks = raw.reshape(rows, n // 256, -1)
        for name, at in _BLOCKED[kind].items():
            parts[name] = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0]
        if kind == _Q.Q2_K:
            parts["scales"] = np.ascontiguousarray(blocks[..., :16]).reshape(rows, -1)
        else:
            parts["scales"] = _whole_scales(grid.scales, parts["d"])
    return Form(n, bits, group, levels, start), parts


# Types with blocks of 256 -> the byte of a block where the float16 lies by which its small
# whole-number scales (or minima) are multiplied.
_BLOCKED: dict[GGMLQuantizationType, dict[str, int]] = {
    _Q.Q2_K: {"d": 80, "dmin": 82},
    _Q.Q3_K: {"d": 108},
    _Q.Q6_K: {"d": 208},
    _Q.IQ4_XS: {"d": 0},
}


def from_mlx(found: MlxQuantized, n: int) -> tuple[Form, dict[str, np.ndarray]]:
    """MLX's own arrays as a Form and its arrays."""
    parts = {"codes": found.weight, "scales": found.scales}
    if found.biases is not None:
        parts["biases"] = found.biases
    return Form(n, found.bits, GROUP, mode=found.mode), parts


def _whole_scales(scales: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The signed 6- or 8-bit scales of blocks, from their products with d, exact in float32.

    Args:
        scales: the products, (R, groups).
        d: (R, blocks).
    """
    per_group = np.repeat(d.astype(np.float32), scales.shape[1] // d.shape[1], axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(per_group == 0, 0, scales / per_group)
    return np.rint(found).astype(np.int8)
