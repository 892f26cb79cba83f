"""Edits the quantized matrices of an MLX folder, and measures the leak in written files.

A matrix keeps its mode, and its scales and biases keep their type, or with ``--writer-bits`` it is
written with more bits. A slab is edited at a time, so memory is bounded by the slab and the packed
bytes of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.edits import rounding, rounding_arrays
from abl_mlx.edits.edit import Leak, leak_read, rounded
from abl_mlx.edits.slabs import Slab, exact_edit, sample, slabs
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.models.writers import Writer
from convert.base import near_scales
from convert.base.errors import UserError
from convert.base.grids import Grid
from convert.mlx.folder import FLOAT_DTYPES, Piece, Rewrite
from convert.mlx.grids import MlxCodec, Quantization, Rows
from convert.mlx.matrix import Matrix
from convert.mlx.safetensors_files import TensorFiles

#: The accepted values of ``--writer-bits``: bits of MLX's affine mode, or a float type.
WRITER_BITS = ("3", "4", "5", "6", "8", "bf16")


@dataclass(frozen=True)
class MatrixEdit:
    """The edit of one quantized matrix.

    Attributes:
        edit: the edit.
        writer: the writer whose weight the matrix is.
        old: the matrix in the source.
        new: the matrix as it is written; None if it becomes a plain float tensor.
        float_type: F16 or BF16: the type of new scales, or of the plain float tensor.
        module: its name in config.json's "quantization"; empty if that is the writer's path.
    """

    edit: WeightEdit
    writer: Writer
    old: Matrix
    new: Matrix | None
    float_type: str = "BF16"
    module: str = ""

    parameter = "weight"

    @property
    def name(self) -> str:
        """The name of the tensor that holds the codes."""
        return self.old.name

    @property
    def axis(self) -> int:
        """The axis along which the edit's lines run in the weight: -1 or -2."""
        return self.edit.axis(self.writer, self.parameter)

    def part(self, slab: Slab) -> MatrixEdit:
        """The edit of a slab."""
        return replace(self, edit=self.edit.of_slab(slab.rows, slab.columns))

    @property
    def is_promoted(self) -> bool:
        """Whether it is written in another mode than it had."""
        return self.new != self.old

    @property
    def type(self) -> str:
        """The type in which it is written, for messages."""
        return self.float_type if self.new is None else str(self.new.quantization)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> type and shape of each tensor that is written."""
        if self.new is None:
            return {self.name: (self.float_type, self.old.shape)}
        return self.new.tensors()


def promoted(one: MatrixEdit, writer_bits: str) -> MatrixEdit:
    """The edit, written with ``writer_bits`` if the matrix has fewer bits.

    Args:
        one: the edit.
        writer_bits: one of `WRITER_BITS`.

    Raises:
        UserError: when its rows do not fit the groups of the new mode.
    """
    old = one.old.quantization
    if writer_bits == "bf16":
        return replace(one, new=None)
    bits = int(writer_bits)
    if bits < old.bits or (bits == old.bits and old.mode == "affine"):
        return one
    group = old.group_size if old.mode == "affine" else 32
    if one.old.shape[-1] % group:
        raise UserError(
            f"{one.name} has rows of {one.old.shape[-1]}, which do not fit groups of {group}: use "
            "--writer-bits bf16."
        )
    stem = one.name.removesuffix("weight")
    new = Matrix(
        {part: f"{stem}{part}" for part in ("weight", "scales", "biases")},
        one.old.shape,
        Quantization(bits, group),
        one.old.dtype if old.mode == "affine" else one.float_type,
    )
    return replace(one, new=new)


def encoders(codec: MlxCodec, global_scale: np.ndarray | None) -> rounding.Encoders:
    """MLX's functions that choose new scales, and codes, for a mode."""

    def refit(own: Grid, edited: rounding.Edited) -> Grid:
        less = edited.less
        if less is None or less.grid is not own:
            return codec.refit(own, edited.target)
        _, past = near_scales.search(less, near_scales.Choices.none(own))
        return codec.refit(own, replace(less, past=past))

    return rounding.Encoders(
        lambda values: codec.fresh(values, global_scale), refit, on=rounding_arrays.on
    )


def better_source(files: TensorFiles, one: MatrixEdit) -> str:
    """``own`` or ``fresh``: the result of `rounding.better_source` for a sample of a matrix."""
    part = sample(one.old.shape, one.axis, one.old.quantization.group_size)
    own = one.old.read(files, part.rows, part.columns)
    found = encoders(one.old.codec, own.frame.global_scale)
    return rounding.better_source(own, exact_edit(one.part(part), own), found)


def edit_slab(one: MatrixEdit, own: Grid, source: str, *, plain: bool = False) -> Rows:
    """An edited slab as it is stored; for a plain float tensor it has only ``weight``.

    Args:
        one: the edit.
        own: the slab in the source.
        source: ``own`` or ``fresh``: the grid to round to.
        plain: round every weight to its nearest level, without preserving the edit.
    """
    edited = exact_edit(one, own)
    if one.new is None:
        dtype = FLOAT_DTYPES[one.float_type]
        exact = mx.array(edited.target)
        kept = (
            exact.astype(dtype) if plain else rounded(one.edit, one.writer, "weight", exact, dtype)
        )
        return Rows(np.array(kept.view(mx.uint8)), np.empty((0, 0), np.uint8))
    codec = one.new.codec
    found = encoders(codec, own.frame.global_scale if one.new == one.old else None)
    if plain:
        grid = found.fresh(edited.target) if one.is_promoted else own
        return codec.encode(grid.with_codes(grid.nearest(edited.target)))
    if not edited.taken_any:
        source = "own"  # nothing changes here, so every code may stay
    how = "fresh" if one.is_promoted else source
    return codec.encode(rounding.round_onto(own, edited, found, how))


def rewrite(
    files: TensorFiles,
    one: MatrixEdit,
    *,
    grid: str = "auto",
    plain: bool = False,
) -> Rewrite:
    """The edited matrix for `convert.mlx.folder.rewrite_folder`, computed when it is written.

    Args:
        files: the source's tensors.
        one: the edit.
        grid: ``own``, ``fresh``, or ``auto`` for the better of the two.
        plain: round every weight to its nearest level, without preserving the edit.
    """

    def pieces() -> Iterator[Piece]:
        n = one.old.shape[-1]
        automatic = grid == "auto" and not plain and not one.is_promoted
        source = better_source(files, one) if automatic else grid
        waiting: dict[str, np.ndarray] = {}
        for slab in slabs(one.old.shape, one.axis, _cut(one)):
            own = one.old.read(files, slab.rows, slab.columns)
            parts = _named(one, edit_slab(one.part(slab), own, source, plain=plain))
            one.old.release(files)
            for name, part in parts.items():
                if slab.columns == slice(0, n):
                    yield Piece(name, slab.rows.start * part.shape[1], part)
                    continue
                # Slabs hold some columns each; they are written when an expert is complete.
                width = part.shape[1] * n // (slab.columns.stop - slab.columns.start)
                if slab.columns.start == 0:
                    waiting[name] = np.empty((len(part), width), np.uint8)
                first = slab.columns.start * width // n
                waiting[name][:, first : first + part.shape[1]] = part
                if slab.columns.stop == n:
                    yield Piece(name, slab.rows.start * width, waiting.pop(name))

    kept = set(one.old.names.values()) if one.is_promoted else set(one.tensors())
    return Rewrite(frozenset(kept), one.tensors(), pieces)


def _cut(one: MatrixEdit) -> int:
    """Slabs may be cut at multiples of this number of columns."""
    sizes = [m.quantization.group_size for m in (one.old, one.new) if m is not None]
    return max(sizes)


def _named(one: MatrixEdit, rows: Rows) -> dict[str, np.ndarray]:
    """Tensor name -> the bytes of its rows."""
    if one.new is None:
        return {one.name: rows.weight}
    parts = {part: getattr(rows, part) for part in ("weight", "scales", "biases")}
    return {one.new.names[part]: raw for part, raw in parts.items() if raw is not None}


# --- what was written --------------------------------------------------------------------------


def compare(before: TensorFiles, after: TensorFiles, one: MatrixEdit) -> Leak:
    """The leak of one matrix, from the source's and the output's files."""
    total = Leak()
    for slab in slabs(one.old.shape, one.axis, _cut(one)):

        def pair(rows: slice, columns: slice, slab: Slab = slab) -> tuple[Grid, np.ndarray | Grid]:
            piece = slab.part(rows, columns)
            return one.old.read(before, piece.rows, piece.columns), _written(after, one, piece)

        part = one.part(slab)
        total += leak_read(part.edit, part.writer, part.parameter, pair, slab.shape)
        one.old.release(before)
        for name in one.tensors():
            after.release(name)
    return total


def _written(files: TensorFiles, one: MatrixEdit, slab: Slab) -> np.ndarray | Grid:
    if one.new is not None:
        return one.new.read(files, slab.rows, slab.columns)
    size = 2 * one.old.shape[-1]
    whole = np.frombuffer(files.bytes(one.name), np.uint8).reshape(-1, size)
    part = whole[slab.rows, 2 * slab.columns.start : 2 * slab.columns.stop].copy()
    floats = mx.array(part).view(FLOAT_DTYPES[one.float_type])
    return np.array(floats.astype(mx.float32))


def quantization_changes(edits: Mapping[str, MatrixEdit]) -> dict[str, dict[str, Any] | bool]:
    """Module path -> its new entry in config.json's "quantization", for the entries that change."""
    return {
        one.module or one.writer.path: False if one.new is None else one.new.quantization.entry()
        for one in edits.values()
        if one.is_promoted
    }


def comparisons(
    before: TensorFiles, after: TensorFiles, edits: Mapping[str, MatrixEdit]
) -> dict[str, Callable[[], Leak]]:
    """Tensor name -> a function that measures its leak."""

    def comparing(one: MatrixEdit) -> Callable[[], Leak]:
        return lambda: compare(before, after, one)

    return {name: comparing(one) for name, one in edits.items()}
