"""Quantized weights in MLX's layout, made from GGUF blocks without changing any weight.

A weight in MLX's affine mode with groups of 32 is ``scale * code + bias``. So is one in Q4_0, Q4_1,
Q5_0, Q5_1, Q8_0, Q4_K and Q5_K: the codes stay, and scale and bias are computed from the block.
Scales are stored as float16, or as float32 where a scale or bias of the tensor exceeds float16's
range. MXFP4 differs between the two formats only in the order of the codes.

Codes are packed as one little-endian stream of bits: code i of a row begins at bit i * bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from convert.base.grids import Grid
from convert.gguf.ggml_types import grid_codec

_Q = GGMLQuantizationType

GROUP = 32
"""Weights per scale of all types that are repacked."""

AFFINE: dict[GGMLQuantizationType, int] = {
    _Q.Q4_0: 4, _Q.Q4_1: 4, _Q.Q5_0: 5, _Q.Q5_1: 5, _Q.Q8_0: 8, _Q.Q4_K: 4, _Q.Q5_K: 5,
}  # fmt: skip
"""GGML type -> bits of the affine tensor that it becomes."""

_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class MlxQuantized:
    """R rows of n weights as MLX stores them.

    Attributes:
        weight: uint32, (R, n * bits // 32).
        scales: (R, n // 32): float16 or float32 (affine), uint8 powers of two (mxfp4).
        biases: in the shape of ``scales``; None for mxfp4.
        bits: bits of a code.
        mode: ``affine`` or ``mxfp4``.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None
    bits: int
    mode: str


def is_repacked(ggml_type: GGMLQuantizationType) -> bool:
    """Whether tensors of this type become MLX tensors without requantizing."""
    return ggml_type in AFFINE or ggml_type == _Q.MXFP4


def repack(
    raw: np.ndarray, n: int, ggml_type: GGMLQuantizationType, *, exact: bool = False
) -> MlxQuantized:
    """MLX's arrays with the weights of GGUF blocks.

    Args:
        raw: uint8, (R, bytes per row).
        n: weights per row.
        ggml_type: a key of `AFFINE`, or MXFP4.
        exact: keep scales in float32.

    Raises:
        UserError: when a block's scale is not finite.
    """
    if ggml_type == _Q.MXFP4:
        return _mxfp4(raw, n)
    return affine(grid_codec(ggml_type).decode(raw, n), AFFINE[ggml_type], exact=exact)


def affine(grid: Grid, bits: int, *, exact: bool = False) -> MlxQuantized:
    """The affine tensor of a Grid with groups of 32 and evenly spaced levels."""
    step = np.float64(grid.levels[1]) - np.float64(grid.levels[0])
    scales = grid.scales.astype(np.float64) * step
    biases = grid.scales.astype(np.float64) * np.float64(grid.levels[0])
    if grid.offsets is not None:
        biases = biases + grid.offsets
    dtype = np.float16 if not exact and _fits(scales) and _fits(biases) else np.float32
    return MlxQuantized(
        pack(grid.codes, bits), scales.astype(dtype), biases.astype(dtype), bits, "affine"
    )


def _fits(values: np.ndarray) -> bool:
    """Whether float16 can hold these scales or biases: whether none exceeds its largest number.

    Small ones are no problem: each is a float16 times a whole number, so a multiple of 2^-24, as
    float16's subnormal numbers are.
    """
    return not values.size or float(np.abs(values).max()) <= _LARGEST


def _mxfp4(raw: np.ndarray, n: int) -> MlxQuantized:
    rows = len(raw)
    blocks = raw.reshape(rows, n // GROUP, 17)
    low, high = blocks[..., 1:] & 15, blocks[..., 1:] >> 4
    codes = np.concatenate((low, high), axis=-1).reshape(rows, n)
    return MlxQuantized(pack(codes, 4), np.array(blocks[..., 0]), None, 4, "mxfp4")


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes as MLX does.

    Args:
        codes: uint8, (R, n), each below 2 ** bits; n a multiple of 32.
        bits: 2, 3, 4, 5, 6 or 8.

    Returns:
        uint32, (R, n * bits // 32).
    """
    rows, n = codes.shape
    words = np.empty((rows, n * bits // 32), np.uint32)
    pack_into(codes, bits, words)
    return words


def pack_into(codes: np.ndarray, bits: int, words: np.ndarray) -> None:
    """`pack`, written to ``words``, whose memory is in order."""
    if bits == 8:
        words.view(np.uint8)[...] = codes
        return
    from convert.mlx import stream_kernels as kernels  # lazily: numba takes a third of a second

    eights = np.ascontiguousarray(codes).reshape(-1).view(np.uint64)
    joined = np.empty_like(eights)
    kernels.join(eights, bits, joined)
    if bits == 4:
        np.copyto(words.reshape(-1), joined, casting="unsafe")
    else:  # eight codes take a whole number of bytes
        words.view(np.uint8).reshape(-1, bits)[...] = joined.view(np.uint8).reshape(-1, 8)[:, :bits]


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`: uint8, (R, n)."""
    raw = np.ascontiguousarray(packed).view(np.uint8).reshape(len(packed), -1)
    codes = np.empty((len(raw), raw.shape[1] * 8 // bits), dtype=np.uint8)
    unpack_into(raw, bits, codes)
    return codes


def unpack_into(raw: np.ndarray, bits: int, codes: np.ndarray) -> None:
    """`unpack` of rows as bytes, written to ``codes``, whose memory is in order."""
    if bits == 8:
        codes[...] = raw
        return
    from convert.mlx import stream_kernels as kernels  # lazily: numba takes a third of a second

    # A copy, because bytes of a file may be neither aligned nor in order.
    words = raw.copy().reshape(-1).view(np.uint32)
    kernels.unpack(words, bits, codes.reshape(-1).view(np.uint64))
