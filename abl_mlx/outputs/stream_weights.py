"""The weights of a model file's residual writers, as vectors that are added to the stream.

This works for all formats: MLX and Hugging Face folders, float or quantized, and GGUFs of any type.
The model is not run, and weights are not kept in memory: a slab is decoded when it is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from abl_mlx.edits.edit import stream_axis
from abl_mlx.edits.slabs import Slab, slabs
from abl_mlx.models import chat_model
from abl_mlx.models.writers import Writer, component_of, find_writers
from abl_mlx.outputs import gguf_plan
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.flags import said
from convert import gguf_to_mlx
from convert.architectures import gguf_writers
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.mlx.matrix import Matrix, find_matrix
from convert.mlx.parameters import Stored, locate
from convert.mlx.safetensors_files import TensorFiles

#: Slabs are cut at multiples of this number of columns, so that blocks of all types are whole.
_CUT = 256


@dataclass(frozen=True)
class StreamWeight:
    """One residual writer's weight.

    Attributes:
        name: the tensor's name in the file (for a stack from several tensors, the first one).
        path: the module's path in mlx-lm's model, which is the same for files of all formats; None
            if it is not known.
        role: its name without the layer's number.
        layer: the number of its layer; -1 for embeddings.
        shape: (out, in), (E, out, in) or (V, d).
        axis: the axis of the residual stream: -2, or -1 for an embedding.
        gain: the gain between its output and the stream, (d,); None if there is none.
        type: its type as stored, for tables.
        read: decodes a slab to float32 in the file's layout.
        release: lets the system drop from memory the pages that were read.
        columns_moved: whether its columns have another order than in mlx-lm's model.
        tensors: names of the tensors in the file that hold it.
    """

    name: str
    path: str | None
    layer: int
    shape: tuple[int, ...]
    axis: int
    gain: np.ndarray | None
    type: str
    read: Callable[[Slab], np.ndarray] = field(repr=False)
    release: Callable[[], None] = field(repr=False)
    columns_moved: bool = False
    tensors: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        """The name without the layer's number."""
        return re.sub(r"\.\d+\.", ".", self.name)

    @property
    def component(self) -> str:
        """``embedding``, ``mlp`` or ``attention``, as of a `Writer`."""
        if self.layer < 0 or self.axis == -1:
            return "embedding"
        return "mlp" if len(self.shape) == 3 else component_of(self.name)

    @property
    def width(self) -> int:
        """d."""
        return self.shape[self.axis]

    @property
    def lines(self) -> int:
        """The number of vectors: columns of a writer, rows of an embedding."""
        return math.prod(self.shape) // self.width

    def slabs(self) -> Iterator[Slab]:
        """Yield slabs that together cover the weight."""
        return slabs(self.shape, self.axis, _CUT)

    def values(self, slab: Slab) -> np.ndarray:
        """A slab as c vectors in the stream, multiplied by the gain: float32 (d, c).

        Raises:
            UserError: when it holds NaN or infinity.
        """
        found = self.read(slab)
        if not np.isfinite(found).all():
            raise UserError(f"{self.name} holds NaN or infinity: the file is damaged.")
        if self.axis == -1:
            found = found.T
        return found if self.gain is None else found * self.gain[:, None]

    def each(self) -> Iterator[np.ndarray]:
        """Yield the `values` of all slabs, one after the other."""
        for slab in self.slabs():
            yield self.values(slab)
            self.release()


@dataclass(frozen=True)
class StreamWeights:
    """All residual writers of a model.

    Attributes:
        architecture: the architecture's name.
        layers: the number of layers.
        width: d.
        writers: embeddings first, then layer by layer.
        tied: whether the embedding is the output head as well.
    """

    architecture: str
    layers: int
    width: int
    writers: list[StreamWeight]
    tied: bool


class Unreachable(UserError):
    """The residual writers of this model cannot be found, although the file is sound."""


# --- GGUF --------------------------------------------------------------------------------------


def of_gguf(gguf: GgufSource) -> StreamWeights:
    """The residual writers of a GGUF, which must stay open while they are used.

    Raises:
        Unreachable: when the writers of the architecture cannot be found.
    """
    try:
        named = gguf_writers.find(gguf.architecture, gguf.shapes, gguf.metadata)
    except UserError as error:
        raise Unreachable(said(error)) from None
    paths, moved = _mlx_paths(gguf)
    writers = [
        replace(_gguf_weight(gguf, one), path=paths.get(one.name), columns_moved=one.name in moved)
        for one in named
    ]
    return StreamWeights(
        gguf.architecture,
        1 + max(one.layer for one in writers),
        writers[0].width,
        sorted(writers, key=lambda one: one.layer),
        any(one.tied for one in named),
    )


def _mlx_paths(gguf: GgufSource) -> tuple[dict[str, str], set[str]]:
    """Tensor -> path of its module in mlx-lm's model; and the tensors with reordered columns."""
    try:
        _, weights = gguf_to_mlx.described(gguf)
    except UserError:
        return {}, set()
    paths = {
        name: _plain(places[0].removesuffix(".weight"))
        for name, places in gguf_to_mlx.places(weights).items()
        if len(places) == 1
    }
    moved = {
        piece.tensor
        for weight in weights.values()
        for piece in weight.pieces
        if piece.columns is not None or piece.rows is not None or weight.change is not None
    }
    return paths, moved


def _plain(path: str) -> str:
    return path.removeprefix("language_model.")


def _gguf_weight(gguf: GgufSource, one: gguf_writers.GgufWriter) -> StreamWeight:
    entry = gguf.tensors[one.name]
    gain = None
    if one.gains:
        gain = np.prod([gguf.values(name) for name in one.gains], axis=0).astype(np.float32)

    def read(slab: Slab) -> np.ndarray:
        return gguf_plan.values_of(gguf_plan.read(gguf.raw(one.name), entry.type, slab))

    return StreamWeight(
        one.name, None, one.layer, entry.shape, stream_axis(one.kind, "weight"), gain,
        entry.type.name, read, lambda: gguf.release(one.name), tensors=(one.name,),
    )  # fmt: skip


# --- folders -----------------------------------------------------------------------------------


def of_folder(folder: Path, files: TensorFiles) -> StreamWeights:
    """The residual writers of an MLX or Hugging Face folder, whose files must stay open.

    Raises:
        Unreachable: when the writers of the architecture cannot be found.
    """
    chat = chat_model.load_lazily(folder)
    try:
        found = find_writers(chat)
    except UserError as error:
        raise Unreachable(said(error)) from None
    empty = chat_model.skeleton(chat.config)
    widths = {path: module["weight"].shape[-1] for path, module in empty.named_modules()
              if "weight" in module}  # fmt: skip
    try:
        places = locate(empty, files, [f"{one.path}.weight" for one in found])
    except UserError as error:
        raise Unreachable(said(error)) from None
    writers = [
        _folder_weight(files, one, places[f"{one.path}.weight"], widths[one.path]) for one in found
    ]
    tied = any(one.tied for one in found)
    return StreamWeights(
        chat.model_type,
        len(chat.layers),
        chat.width,
        sorted(writers, key=lambda one: one.layer),
        tied,
    )


def _folder_weight(files: TensorFiles, one: Writer, stored: Stored, n: int) -> StreamWeight:
    gain = None if one.gain is None else numpy_of(one.gain)
    parts = [_reader(files, name, stored.transposed, n) for name in stored.tensors]
    shape, kind = parts[0].shape, parts[0].type
    if len(parts) > 1 or (one.kind == "experts" and len(shape) == 2):
        shape = (len(parts), *shape)
    rows = math.prod(parts[0].shape[:-1])

    def read(slab: Slab) -> np.ndarray:
        # A slab never spans more than one expert.
        index = 0 if len(parts) == 1 else slab.rows.start // rows
        first = index * rows
        inside = Slab(slice(slab.rows.start - first, slab.rows.stop - first), slab.columns)
        return parts[index].read(inside)

    def release() -> None:
        for part in parts:
            part.release()

    return StreamWeight(
        f"{one.path}.weight", _plain(one.path), one.layer, shape,
        stream_axis(one.kind, "weight"), gain, kind, read, release, tensors=stored.tensors,
    )  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """A tensor of the files in the model's layout."""

    shape: tuple[int, ...]
    type: str
    read: Callable[[Slab], np.ndarray]
    release: Callable[[], None]


def _reader(files: TensorFiles, name: str, transposed: bool, n: int) -> _Part:
    matrix = None if transposed else find_matrix(files, name, n)
    if matrix is not None:
        return _quantized(files, matrix)
    info = files.info(name)
    if info.dtype not in ("F32", "F16", "BF16", "F64"):
        raise Unreachable(f"{name} in {info.file} is stored as {info.dtype}, which is not read.")
    shape = (*info.shape[:-2], info.shape[-1], info.shape[-2]) if transposed else info.shape

    def read(slab: Slab) -> np.ndarray:
        stored = info.shape
        if not transposed:
            return _floats(files, name, math.prod(stored[:-1]), slab.rows, slab.columns)
        # Rows of the model are columns of the file, of one expert.
        index, rows = slab.rows.start // shape[-2], shape[-2]
        inside = slice(slab.rows.start - index * rows, slab.rows.stop - index * rows)
        lines = slice(
            index * stored[-2] + slab.columns.start, index * stored[-2] + slab.columns.stop
        )
        return _floats(files, name, math.prod(stored[:-1]), lines, inside).T

    return _Part(shape, info.dtype, read, lambda: files.release(name))


def _floats(files: TensorFiles, name: str, rows: int, at: slice, columns: slice) -> np.ndarray:
    """Some rows (counted through all experts) and columns of a float tensor, float32."""
    dtype = files.info(name).dtype
    bits = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype]
    flat = np.frombuffer(files.bytes(name), np.dtype(bits)).reshape(rows, -1)[at, columns]
    if dtype == "BF16":
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(np.float32)


def _quantized(files: TensorFiles, matrix: Matrix) -> _Part:
    def read(slab: Slab) -> np.ndarray:
        return matrix.read(files, slab.rows, slab.columns).values()

    return _Part(matrix.shape, str(matrix.quantization), read, lambda: matrix.release(files))
