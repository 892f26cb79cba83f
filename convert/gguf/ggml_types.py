"""Every GGML type in which weights are stored, and its codec.

Most types have a code for each weight (`convert.gguf.ggml_blocks`). IQ1, IQ2 and IQ3 choose whole
vectors of 4 or 8 weights from a codebook (`convert.gguf.ggml_codebooks`). F32, F16 and BF16 have no
codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from convert.base.codebooks import CodebookGrid
from convert.base.errors import UserError
from convert.base.grids import Grid
from convert.base.near_scales import Less, blocks_of
from convert.gguf import ggml
from convert.gguf.ggml_blocks import GRID_CODECS
from convert.gguf.ggml_codebooks import CODEBOOK_CODECS, CodebookCodec
from convert.gguf.ggml_codecs import FloatCodec, GridCodec, check_values

Codec = GridCodec | CodebookCodec | FloatCodec

_FLOAT_CODECS = (
    FloatCodec(GGMLQuantizationType.F32),
    FloatCodec(GGMLQuantizationType.F16),
    FloatCodec(GGMLQuantizationType.BF16),
)
_CODECS: dict[GGMLQuantizationType, Codec] = {
    **{found.type: found for found in GRID_CODECS},
    **{found.type: found for found in CODEBOOK_CODECS},
    **{found.type: found for found in _FLOAT_CODECS},
}

GRID_TYPES: tuple[GGMLQuantizationType, ...] = tuple(found.type for found in GRID_CODECS)
"""The types with a code for each weight."""

CODEBOOK_TYPES: tuple[GGMLQuantizationType, ...] = tuple(found.type for found in CODEBOOK_CODECS)
"""The types whose codes are entries of a codebook: IQ1, IQ2 and IQ3."""


def has_grid(ggml_type: GGMLQuantizationType) -> bool:
    """Whether tensors of this type are quantized: they have a Grid or a CodebookGrid."""
    return ggml_type in GRID_TYPES or ggml_type in CODEBOOK_TYPES


def codec(ggml_type: GGMLQuantizationType) -> Codec:
    """The codec of a type.

    Raises:
        UserError: when the type has none, for instance because it holds no weights.
    """
    if ggml_type in _CODECS:
        return _CODECS[ggml_type]
    raise UserError(
        f"{ggml_type.name} has no codes that can be changed: use a file in another type."
    )


def grid_codec(ggml_type: GGMLQuantizationType) -> GridCodec:
    """The codec of a type that has a code for each weight.

    Raises:
        UserError: when the type has no such codes.
    """
    found = codec(ggml_type)
    if not isinstance(found, GridCodec):
        raise UserError(f"{ggml_type.name} has no code for each weight.")
    return found


def quantized_codec(ggml_type: GGMLQuantizationType) -> GridCodec | CodebookCodec:
    """The codec of a quantized type.

    Raises:
        UserError: when the type has no codec, or is a plain float type.
    """
    found = codec(ggml_type)
    if isinstance(found, FloatCodec):
        raise UserError(f"{ggml_type.name} is a plain float type, without a grid.")
    return found


def fresh(
    values: np.ndarray, ggml_type: GGMLQuantizationType, importance: np.ndarray | None = None
) -> Any:
    """A new grid for these values, whose scales ggml's own quantizer chooses.

    For plain float types use ``FloatCodec.round``.

    Args:
        values: float32, (R, n).
        ggml_type: a type with a grid.
        importance: weights of the columns' squared errors, as for `convert.gguf.ggml.quantize`.

    Raises:
        UserError: when the type has no grid, n does not fit its blocks, a value is not finite, or
            the type needs ggml and it was not found.
    """
    found = quantized_codec(ggml_type)
    check_values(values)
    n = values.shape[1]
    if n % found.block:
        raise UserError(
            f"rows of {n} do not fit {ggml_type.name}, whose blocks hold {found.block} weights."
        )
    values = np.ascontiguousarray(values, dtype=np.float32)
    # ggml crashes on a type that it does not know, so look for the type's decoder first.
    if ggml.available() and not hasattr(ggml.library(), _decoder_name(ggml_type)):
        raise UserError(f"this ggml does not know {ggml_type.name}: update it.")
    if importance is None and ggml_type in CODEBOOK_TYPES:
        # Without any, ggml weights errors by the squares of the weights, or refuses.
        importance = np.ones(n, np.float32)
    raw = ggml.quantize(values, ggml_type, importance)
    return found.decode(raw, n)


def refit(
    grid: Grid | CodebookGrid,
    values: np.ndarray | Less,
    ggml_type: GGMLQuantizationType,
    importance: np.ndarray | None = None,
) -> Grid | CodebookGrid:
    """The grid with new scales for those blocks whose range is too small for the values.

    A block is encoded anew when one of its values lies more than half a step past the ends of its
    group and the new block has a smaller squared error than the old block with its nearest codes.
    All other blocks keep every bit, codes included. A CodebookGrid keeps all its scales.

    Args:
        grid: a tensor's own grid, of this type.
        values: float32, (R, n): the values to be written; or those of a grid less a product, which
            knows the groups that they leave. Then the codes stay, to be chosen by the caller.
        ggml_type: the grid's type.
        importance: float32, (n,): weights of the columns' squared errors; None for equal weights.

    Raises:
        UserError: as `fresh` does.
    """
    if isinstance(values, np.ndarray):
        check_values(values)
    if isinstance(grid, CodebookGrid):
        return grid
    found = grid_codec(ggml_type)
    rows, n = grid.shape
    count, groups = rows * (n // found.block), found.block // found.group
    past = values.past if isinstance(values, Less) else grid.left_by(values)
    outside = np.unique(past // groups)
    if not len(outside):
        return grid
    wanted = blocks_of(values, outside, found.block)
    old = Grid(
        codes=grid.codes.reshape(count, found.block)[outside],
        levels=grid.levels,
        scales=grid.scales.reshape(count, groups)[outside],
        offsets=None if grid.offsets is None else grid.offsets.reshape(count, groups)[outside],
        group=grid.group,
    )
    old = old.with_codes(old.nearest(wanted))
    weights = None
    if importance is not None:
        weights = importance.reshape(-1, found.block)[outside % (n // found.block)]
    new = found.decode(_fresh_blocks(wanted, ggml_type, weights), found.block)
    better = new.squared_error(wanted, weights) < old.squared_error(wanted, weights)
    if not better.any():
        return grid
    chosen = outside[better]

    def merged(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        whole = old.copy()
        whole.reshape(count, -1)[chosen] = new.reshape(len(outside), -1)[better]
        return whole

    if not isinstance(values, Less):
        return found.decode(merged(found.encode(grid), new.frame), n)
    offsets = grid.offsets
    if offsets is not None and new.offsets is not None:
        offsets = merged(offsets, new.offsets)
    return replace(
        grid,
        scales=merged(grid.scales, new.scales),
        offsets=offsets,
        frame=merged(grid.frame, new.frame),
    )


def _fresh_blocks(
    blocks: np.ndarray, kind: GGMLQuantizationType, weights: np.ndarray | None
) -> np.ndarray:
    """New bytes for blocks, each of which has weights of its own: uint8 (B, bytes of a block)."""
    if weights is None:
        return ggml.quantize(blocks, kind)
    return ggml.quantize(blocks[:, None], kind, weights)[:, 0]


def as_rows(data: np.ndarray) -> np.ndarray:
    """Raw rows, uint8 (R, bytes per row), of a tensor's data as gguf-py's reader returns them.

    Args:
        data: uint8 (..., bytes per row), or (..., n) of a float type; one dimension is one row.
    """
    width = data.shape[-1] * data.itemsize
    return np.ascontiguousarray(data).view(np.uint8).reshape(-1, width)


def _decoder_name(ggml_type: GGMLQuantizationType) -> str:
    return "dequantize_row_" + str(ggml_type.name).lower().replace("_k", "_K")
