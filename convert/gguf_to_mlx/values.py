"""Reads the values of a parameter from tensors of a GGUF, a part (slab) of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from convert.architectures.moves import whole_groups
from convert.architectures.weights import Weight
from convert.base.errors import UserError
from convert.base.grids import Grid
from convert.gguf.file import GgufSource
from convert.gguf.ggml_types import grid_codec
from convert.gguf.layout import TensorEntry
from convert.gguf_to_mlx.parameters import shape_of
from convert.mlx import types

_Q = GGMLQuantizationType

FLOATS = {_Q.F32: mx.float32, _Q.F16: mx.float16, _Q.BF16: mx.bfloat16, _Q.F64: mx.float32}

SLAB = 1 << 25
"""Number of weights in a slab."""


def type_of(source: GgufSource, weight: Weight) -> GGMLQuantizationType | None:
    """The GGML type of all pieces of a weight.

    None when the types differ, or when columns are reordered within groups that share a scale.
    """
    kinds = {source.tensor(piece.tensor).type for piece in weight.pieces}
    if len(kinds) > 1 or weight.change is not None:
        return None
    return next(iter(kinds))


def can_move(weight: Weight, kind: GGMLQuantizationType) -> bool:
    """Whether the blocks of a weight can be moved without decoding their values."""
    for piece in weight.pieces:
        if piece.columns is None or kind in FLOATS:
            continue
        if kind not in types.AFFINE or whole_groups(piece.columns, types.GROUP) is None:
            return False
    return True


def raw_slabs(source: GgufSource, weight: Weight) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the raw rows of all pieces in order, as contiguous slabs with the piece's index."""
    for index, piece in enumerate(weight.pieces):
        entry = source.tensor(piece.tensor)
        raw = source.raw(piece.tensor)
        step = max(1, SLAB // entry.shape[-1])
        count = len(raw) if piece.rows is None else len(piece.rows)
        for first in range(0, count, step):
            part = slice(first, min(first + step, count))
            yield raw[part] if piece.rows is None else raw[piece.rows[part]], index
        source.release(piece.tensor)


def values_of(source: GgufSource, weight: Weight) -> np.ndarray:
    """The values of a parameter, float32, in its shape."""
    parts = []
    for piece in weight.pieces:
        entry = source.tensor(piece.tensor)
        values = source.values(piece.tensor)
        source.release(piece.tensor)
        if len(entry.shape) == 1:
            parts.append(values if piece.rows is None else values[piece.rows])
            continue
        if piece.rows is None and piece.columns is None and len(weight.pieces) == 1:
            parts.append(values)
            break
        values = values.reshape(-1, entry.shape[-1])
        if piece.rows is not None:
            values = values[piece.rows]
        if piece.columns is not None:
            values = values[:, piece.columns]
        parts.append(values)
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    whole = whole.reshape(shape_of(source, weight))
    return whole if weight.change is None else np.asarray(weight.change(whole), dtype=np.float32)


def float_slabs(source: GgufSource, weight: Weight) -> Iterator[mx.array]:
    """Yield a matrix's values as slabs of float32 (rows, n); only for weights without a change."""
    for raw, index in raw_slabs(source, weight):
        piece = weight.pieces[index]
        entry = source.tensor(piece.tensor)
        values = mx.array(_decode(raw, entry))
        yield values if piece.columns is None else values[:, mx.array(piece.columns)]


def _decode(raw: np.ndarray, entry: TensorEntry) -> np.ndarray:
    with np.errstate(all="ignore"):
        found = gguf.quants.dequantize(np.ascontiguousarray(raw), entry.type)
    return np.asarray(found, dtype=np.float32).reshape(len(raw), entry.shape[-1])


def moved_slabs(
    source: GgufSource, weight: Weight, kind: GGMLQuantizationType, *, exact: bool = False
) -> Iterator[Any]:
    """Yield MLX's arrays of a weight whose type is repacked, a slab of rows at a time."""
    for raw, index in raw_slabs(source, weight):
        piece = weight.pieces[index]
        n = source.tensor(piece.tensor).shape[-1]
        try:
            if piece.columns is None:
                yield types.repack(raw, n, kind, exact=exact)
                continue
            grid = grid_codec(kind).decode(raw, n)
            turned = _with_columns(grid, piece.columns)
            yield types.affine(turned, types.AFFINE[kind], exact=exact)
        except UserError as error:
            raise UserError(f"{piece.tensor} in {source.parts[0]}: {error}") from None


def _with_columns(grid: Grid, columns: np.ndarray) -> Grid:
    """The grid with its columns in another order, which keeps whole groups of 32 together."""
    groups = whole_groups(columns, grid.group)
    assert groups is not None
    return Grid(
        codes=np.ascontiguousarray(grid.codes[:, columns]),
        levels=grid.levels,
        scales=np.ascontiguousarray(grid.scales[:, groups]),
        offsets=None if grid.offsets is None else np.ascontiguousarray(grid.offsets[:, groups]),
        group=grid.group,
    )


def joined(slabs: list[types.MlxQuantized]) -> types.MlxQuantized:
    if len(slabs) == 1:
        return slabs[0]
    first = slabs[0]
    return types.MlxQuantized(
        np.concatenate([slab.weight for slab in slabs]),
        # If one slab's scales are float32, concatenation makes all of them float32.
        np.concatenate([slab.scales for slab in slabs]),
        None
        if first.biases is None
        else np.concatenate([slab.biases for slab in slabs if slab.biases is not None]),
        first.bits,
        first.mode,
    )
