"""Edits the tensors of a GGUF in their own types, and measures the leak in written files.

A slab is edited at a time, so memory is bounded by the slab and the tensor's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from abl_mlx.edits import rounding
from abl_mlx.edits.edit import Leak, leak_read, rounded, stream_axis
from abl_mlx.edits.leak import Details
from abl_mlx.edits.projection import Pair
from abl_mlx.edits.slabs import Slab, exact_edit, sample, slabs
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.models.from_gguf import writer_of
from abl_mlx.models.writers import Writer
from abl_mlx.outputs.folder_plan import TensorEdit
from convert.architectures.gguf_writers import GgufWriter
from convert.base.codebooks import CodebookGrid
from convert.base.cores import once
from convert.base.errors import UserError
from convert.base.grids import CHUNK, FloatGrid, Grid
from convert.gguf import ggml, ggml_types, near_scales
from convert.gguf.file import GgufSource
from convert.gguf.pieces import Chunk, made
from convert.gguf.quantize import Quantization
from convert.gguf.rewrite import Replacement
from convert.mlx.folder import FLOAT_DTYPES


def stored_values(gguf: GgufSource, name: str) -> mx.array:
    """A tensor in float32, in the file's layout; the file's pages are dropped from memory."""
    values = mx.array(gguf.values(name))
    gguf.release(name)
    return values


@dataclass(frozen=True)
class TensorPlan:
    """The edit of one tensor of a GGUF.

    Attributes:
        name: the tensor's name.
        edit: the edit.
        writer: the writer's kind, layer and gain; its module is empty.
        parameter: ``weight`` or ``bias``.
        old, new: the tensor's type in the source, and the type in which it is written. They differ
            if another type was asked for.
        importance: (E, n) float32: the importance of the input columns, for each of E experts; None
            if it is not known.
    """

    name: str
    edit: WeightEdit
    writer: Writer
    parameter: str
    old: GGMLQuantizationType
    new: GGMLQuantizationType
    importance: np.ndarray | None = None

    @property
    def axis(self) -> int:
        """The axis along which the edit's lines run: -1 or -2."""
        return self.edit.axis(self.writer, self.parameter)

    def part(self, slab: Slab) -> TensorPlan:
        """The edit of a slab."""
        return replace(self, edit=self.edit.of_slab(slab.rows, slab.columns))

    def weights(self, slab: Slab, shape: tuple[int, ...]) -> np.ndarray | None:
        """The importance of a slab's columns, (columns,), of a tensor of this shape."""
        if self.importance is None:
            return None
        expert = slab.rows.start // shape[-2] if len(self.importance) > 1 else 0
        return np.ascontiguousarray(self.importance[expert, slab.columns], np.float32)


def plan(
    source: GgufSource,
    edit: WeightEdit,
    writers: list[GgufWriter],
    *,
    readers: Sequence[Writer] = (),
    quantization: Quantization | None = None,
) -> dict[str, TensorPlan]:
    """Find the tensors that an edit changes, and the type in which each is written.

    Args:
        source: the open GGUF.
        edit: the edit.
        writers: its residual writers.
        readers: the tensors that read the stream, or the biases of routers, for an edit of these.
        quantization: the types that were asked for; None for the tensors' own.

    Raises:
        UserError: when the edit changes nothing, or a direction has another width than the model.
    """
    found: list[tuple[Writer, dict[str, str]]] = [
        (writer_of(source, one), {"weight": one.name, **({"bias": one.bias} if one.bias else {})})
        for one in writers
    ]
    found += [(one, {one.router or "weight": one.path}) for one in readers]
    edit.chosen([writer for writer, _ in found])
    plans: dict[str, TensorPlan] = {}
    for writer, parameters in found:
        if not edit.touches(writer):
            continue
        for parameter in edit.parameters(writer):
            name = parameters[parameter]
            entry = source.tensors[name]
            axis = stream_axis(writer.kind, parameter)
            width = entry.shape[axis]
            if edit.width and width != edit.width:
                raise UserError(
                    f"the direction has {edit.width} dimensions, but {name} in "
                    f"{source.parts[0]} has {width}: it was measured on another model."
                )
            asked = quantization.types[name] if quantization else entry.type
            weights = quantization.weights(name, entry.shape) if quantization else None
            plans[name] = TensorPlan(name, edit, writer, parameter, entry.type, asked, weights)
    return plans


# --- slabs -------------------------------------------------------------------------------------


def read(raw: np.ndarray, kind: GGMLQuantizationType, slab: Slab) -> Any:
    """A slab of a tensor's bytes as a Grid, a CodebookGrid or a FloatGrid."""
    part = np.ascontiguousarray(_bytes(raw, kind, slab), dtype=np.uint8)
    return ggml_types.codec(kind).decode(part, slab.columns.stop - slab.columns.start)


def _bytes(raw: np.ndarray, kind: GGMLQuantizationType, slab: Slab) -> np.ndarray:
    """The bytes of a slab, as a view of a tensor's."""
    block, size = _block(kind)
    return raw[
        slab.rows, slab.columns.start // block * size : -(-slab.columns.stop // block) * size
    ]


def values_of(decoded: Any) -> np.ndarray:
    """The float32 values of a result of `read`."""
    return decoded if isinstance(decoded, np.ndarray) else decoded.values()


def weights_of(decoded: Any) -> np.ndarray | Grid:
    """A result of `read`: a Grid, or the float32 values of anything else."""
    return decoded if isinstance(decoded, Grid) else values_of(decoded)


def _block(kind: GGMLQuantizationType) -> tuple[int, int]:
    from gguf.constants import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return block, size


def encoders(kind: GGMLQuantizationType, importance: np.ndarray | None = None) -> rounding.Encoders:
    """ggml's functions that choose new scales for a type.

    Args:
        kind: the type.
        importance: weights of the columns' squared errors, (columns,).
    """

    def refit(own: Any, edited: rounding.Edited) -> Any:
        less = edited.less
        if less is None or less.grid is not own:
            return ggml_types.refit(own, edited.target, kind, importance)
        moved, past = near_scales.near(less, ggml_types.grid_codec(kind), importance)
        return ggml_types.refit(moved, replace(less, past=past), kind, importance)

    return rounding.Encoders(
        fresh=lambda values: ggml_types.fresh(values, kind, importance),
        refit=refit,
        available=ggml.available(),
    )


def better_source(one: TensorPlan, raw: np.ndarray, shape: tuple[int, ...]) -> Callable[[], str]:
    """The result of `rounding.better_source` for a sample of a tensor: ``own`` or ``fresh``.

    Returns:
        A function that finds it when it is first called, in any thread.
    """
    part = sample(shape, one.axis, _block(one.old)[0])
    own: Any = read(raw, one.old, part)
    if isinstance(own, FloatGrid):
        return lambda: "own"  # a float type, which has no grid to choose
    importance = one.weights(part, shape)
    edited = replace(exact_edit(one.part(part), weights_of(own)), importance=importance)
    return once(lambda: rounding.better_source(own, edited, encoders(one.new, importance)))


def edit_slab(
    one: TensorPlan,
    decoded: Any,
    source: str,
    *,
    plain: bool = False,
    importance: np.ndarray | None = None,
) -> np.ndarray:
    """The bytes, uint8 (R, bytes_per_row), of an edited slab in the tensor's new type.

    Args:
        one: the edit of the slab's rows.
        decoded: the slab, from `read`.
        source: ``own`` or ``fresh``: the grid to round to.
        plain: round every weight to its nearest level, without preserving the edit.
        importance: that of the slab's columns, if it is known.
    """
    chunk = _edited(one, decoded, lambda: source, plain, importance)
    return chunk() if callable(chunk) else chunk


def _edited(
    one: TensorPlan,
    decoded: Any,
    source: Callable[[], str],
    plain: bool,
    importance: np.ndarray | None,
) -> np.ndarray | Callable[[], np.ndarray]:
    """The result of `edit_slab`, or a function that makes it and may be called in any thread.

    What MLX computes is computed here, because MLX works in the thread that began.
    """
    edited = replace(exact_edit(one, weights_of(decoded)), importance=importance)
    codec: Any = ggml_types.codec(one.new)
    if isinstance(codec, ggml_types.FloatCodec):
        values = edited.target
        if not plain:
            dtype = FLOAT_DTYPES[one.new.name]
            kept = rounded(one.edit, one.writer, one.parameter, mx.array(values), dtype)
            values = np.asarray(kept.astype(mx.float32))
        return codec.encode(codec.round(values))

    def onto_grid() -> np.ndarray:
        if plain and isinstance(codec, ggml_types.CodebookCodec):
            return codec.encode(ggml_types.fresh(edited.target, one.new, importance))
        if plain:
            changed = one.new != one.old
            own = ggml_types.fresh(edited.target, one.new, importance) if changed else decoded
            return codec.encode(own.with_codes(own.nearest(edited.target)))
        # Where nothing changes, every code may stay.
        stays = one.new == one.old and not edited.taken_any
        chosen = "own" if stays else source()
        encoding = encoders(one.new, importance)
        return codec.encode(rounding.round_onto(decoded, edited, encoding, chosen))

    return onto_grid


def quantize(
    one: TensorEdit,
    values: np.ndarray,
    kind: GGMLQuantizationType,
    importance: np.ndarray | None = None,
) -> np.ndarray:
    """The bytes of an edited float tensor in a quantized type, with the edit kept intact.

    Args:
        one: the edit that made the values.
        values: float32, (out, in), (E, out, in) or (V, d).
        kind: a type with a grid.
        importance: (E, in) float32: that of the input columns of each expert; None for equal ones.

    Returns:
        uint8, (..., bytes_per_row).
    """
    codec: Any = ggml_types.quantized_codec(kind)
    stream = one.edit.axis(one.writer, one.parameter)
    rows = values.reshape(-1, values.shape[-1])
    basis = np.asarray(one.edit.basis(one.writer).astype(mx.float32))
    out = np.empty((len(rows), values.shape[-1] // codec.block * codec.size), np.uint8)
    for slab in slabs(values.shape, stream, codec.block):
        exact = np.array(rows[slab.rows, slab.columns], dtype=np.float32)
        # The removed component is not known here, so the component along a random direction is
        # taken, which is the least that a refusal direction can be expected to have.
        removed = float(np.sqrt(np.mean(exact * exact)))
        weights = None
        if importance is not None:
            expert = slab.rows.start // values.shape[-2] if len(importance) > 1 else 0
            weights = np.ascontiguousarray(importance[expert, slab.columns], np.float32)
        edited = rounding.Edited(
            exact, basis, 1 if stream == -1 else 0, removed, importance=weights
        )
        grid = edited.on(ggml_types.fresh(exact, kind, weights))
        first = slab.columns.start // codec.block * codec.size
        encoded = codec.encode(grid)
        out[slab.rows, first : first + encoded.shape[1]] = encoded
    return out.reshape(*values.shape[:-1], -1)


def rounded_to_float(one: TensorEdit, values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Edited values rounded to float32 numbers that a float dtype holds, preserving the edit."""
    return np.asarray(one.rounded(mx.array(values), dtype).astype(mx.float32))


def replacement(
    source: GgufSource,
    one: TensorPlan,
    *,
    grid: str = "auto",
    plain: bool = False,
) -> Replacement:
    """The edited tensor for `convert.gguf.rewrite.rewrite`, computed when it is written.

    Args:
        source: the open GGUF.
        one: the edit.
        grid: ``own``, ``fresh``, or ``auto`` for the better of the two.
        plain: round every weight to its nearest level, without preserving the edit.
    """
    entry = source.tensors[one.name]

    def chunks() -> Iterator[Chunk]:
        raw = source.raw(one.name)

        def released(chunk: Chunk) -> np.ndarray | bytes:
            found = made(chunk)
            source.release(one.name)
            return found

        for chunk in _edited_rows(one, raw, entry.shape, grid, plain):
            yield partial(released, chunk)

    return Replacement(one.new, entry.shape, chunks)


def edit_blocks(
    one: TensorEdit,
    blocks: np.ndarray,
    kind: GGMLQuantizationType,
    importance: np.ndarray | None = None,
    *,
    grid: str = "auto",
    plain: bool = False,
) -> np.ndarray:
    """The bytes of an edited tensor that keeps its quantized type.

    Args:
        one: the edit of the tensor.
        blocks: its unedited bytes, uint8 (..., bytes per row).
        kind: its type.
        importance: (E, in) float32: that of the input columns of each expert; None for equal ones.
        grid, plain: as for `replacement`.
    """
    block, size = _block(kind)
    shape = (*blocks.shape[:-1], blocks.shape[-1] // size * block)
    planned = TensorPlan("weight", one.edit, one.writer, one.parameter, kind, kind, importance)
    rows = blocks.reshape(-1, blocks.shape[-1])
    edited = map(made, _edited_rows(planned, rows, shape, grid, plain))
    return np.concatenate([one for one in edited if len(one)]).reshape(blocks.shape)


def _edited_rows(
    one: TensorPlan, raw: np.ndarray, shape: tuple[int, ...], grid: str, plain: bool
) -> Iterator[Chunk]:
    """Yield the bytes of the edited rows, uint8 (R, bytes per row), in file order.

    Args:
        one: the edit.
        raw: the tensor's bytes, uint8 (R, bytes per row).
        shape: its shape in weights.
        grid, plain: as for `replacement`.
    """
    axis = one.axis
    block, size = _block(one.new)
    n, grid_source = shape[-1], grid if one.new == one.old else "fresh"
    if grid_source == "auto" and not plain:
        better = better_source(one, raw, shape)
    else:
        better = partial(str, grid_source)
    whole = np.empty((0, 0), np.uint8)
    for slab in slabs(shape, axis, max(block, _block(one.old)[0])):
        decoded, weights = read(raw, one.old, slab), one.weights(slab, shape)
        edited = _edited(one.part(slab), decoded, better, plain, weights)
        if slab.columns == slice(0, n):
            yield edited
            continue
        # Slabs hold some columns each, and are written when an expert's columns are complete.
        if slab.columns.start == 0:
            whole = np.empty((slab.shape[0], n // block * size), np.uint8)
        columns = slice(slab.columns.start // block * size, slab.columns.stop // block * size)
        yield partial(_placed, edited, whole, columns)


def _placed(edited: Chunk, whole: np.ndarray, columns: slice) -> np.ndarray | bytes:
    """Put some columns in their place; all of them are returned after the last ones."""
    whole[:, columns] = made(edited)
    return whole if columns.stop == whole.shape[1] else b""


# --- what was written --------------------------------------------------------------------------


def compare(before: GgufSource, after: GgufSource, one: TensorPlan) -> tuple[Leak, Details]:
    """Compare one tensor in two files."""
    entry, written = before.tensors[one.name], after.tensors[one.name]
    if written.shape != entry.shape:
        raise UserError(
            f"{one.name} has the shape {written.shape} in {after.parts[0]} and {entry.shape} in "
            f"{before.parts[0]}: these are not the same model."
        )
    axis = one.axis
    cut = max(_block(entry.type)[0], _block(written.type)[0])
    old, new = before.raw(one.name), after.raw(one.name)
    same = entry.type == written.type
    total, counts, changed = Leak(), [], 0

    def pair(slab: Slab) -> Pair:
        def read_both(rows: slice, columns: slice) -> tuple[np.ndarray | Grid, np.ndarray | Grid]:
            piece = slab.part(rows, columns)
            first, second = read(old, entry.type, piece), read(new, written.type, piece)
            if same and isinstance(first, Grid | CodebookGrid):
                counts.append((first.changed(second), math.prod(first.shape)))
            return weights_of(first), weights_of(second)

        return read_both

    for slab in slabs(entry.shape, axis, cut):
        part = one.part(slab)
        total += leak_read(part.edit, part.writer, part.parameter, pair(slab), slab.shape)
        if same:  # here, because these bytes are in memory now
            changed += bytes_changed(_bytes(old, entry.type, slab), _bytes(new, entry.type, slab))
        before.release(one.name)
        after.release(one.name)
    codes, weights = map(sum, zip(*counts, strict=True)) if counts else (0, 0)
    name = written.type.name if same else f"{entry.type.name} -> {written.type.name}"
    share = codes / weights if weights else None
    return total, Details(share, changed if same else None, name)


def bytes_changed(old: np.ndarray, new: np.ndarray) -> int:
    """The number of bytes that differ between two arrays of one shape, (R, bytes per row)."""
    step = max(1, CHUNK // max(1, old.shape[1]))
    return sum(
        int(np.count_nonzero(old[start : start + step] != new[start : start + step]))
        for start in range(0, len(old), step)
    )
