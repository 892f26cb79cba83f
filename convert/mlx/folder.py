"""Write a model folder again with some tensors changed and everything else as it was."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np

from convert.base import json_text
from convert.base.errors import OPTION, UserError
from convert.mlx.finite import all_finite
from convert.mlx.safetensors_files import INDEX, TensorFiles, TensorInfo, type_size

#: A function from a tensor's values, of any float type, to the edited ones, of the same shape.
TensorEdit = Callable[[mx.array], mx.array]

#: Name of a float type in safetensors and GGUF -> MLX's dtype.
FLOAT_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}

# Files that are not copied: weights in formats that are not edited, which would still be unedited.
_OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".safetensors", ".h5", ".msgpack", ".npz",
)  # fmt: skip


class Piece(NamedTuple):
    """A run of bytes of a tensor.

    Attributes:
        name: the tensor.
        offset: where the run begins, in bytes from the start of the tensor.
        data: the bytes, contiguous in memory.
    """

    name: str
    offset: int
    data: np.ndarray


@dataclass(frozen=True)
class Rewrite:
    """New data for some tensors that are made together, such as the codes and scales of a matrix.

    Attributes:
        old: names of the source's tensors that are replaced.
        tensors: name -> safetensors type and shape of the new tensors. If they equal those of the
            source, the shard keeps its layout.
        pieces: called once, when the tensors are to be written; together the pieces must fill them.
    """

    old: frozenset[str]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    pieces: Callable[[], Iterator[Piece]]


def rewrite_folder(
    source: Path,
    files: TensorFiles,
    out: Path,
    edits: Mapping[str, TensorEdit],
    *,
    config: Mapping[str, Any],
    rewrites: Sequence[Rewrite] = (),
    skip: tuple[str, ...] = ("README.md",),
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Write an edited copy of the model folder ``source`` into the existing folder ``out``.

    Shards keep their names, and their layout unless a rewrite changes the size of a tensor: each is
    copied as bytes, then the edited tensors are replaced one by one in their place. Peak memory is
    a few times the largest edited tensor, whatever the model's size.

    Args:
        source: the model's folder; it is only read.
        files: the tensors of ``source``.
        out: an existing, empty folder.
        edits: tensor name -> function of its values, whatever their dtype, which the tensor keeps.
        config: written as config.json.
        rewrites: new data for other tensors.
        skip: top-level files that are not copied.
        progress: called with the number of bytes just written.

    Returns:
        Names of files that were not copied because they hold weights in a format not edited here.

    Raises:
        UserError: when an edited tensor is of no float type, or its edited values overflow it.
    """
    left_out = _copy_others(source, files, out, skip)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    places: dict[str, tuple[Path, int, int]] = {}
    for shard in files.files:
        places.update(_lay_out(files, shard, out / shard.name, rewrites))
        if progress:
            progress((out / shard.name).stat().st_size)
    if (source / INDEX).exists() and any(_moves(files, one) for one in rewrites):
        _write_index(source / INDEX, out / INDEX, places)
    with ExitStack() as stack:
        streams: dict[Path, BinaryIO] = {
            out / shard.name: stack.enter_context(open(out / shard.name, "r+b"))
            for shard in files.files
        }

        def write(name: str, offset: int, data: Any) -> None:
            file, start, size = places[name]
            data = memoryview(data).cast("B")
            if offset + len(data) > size:
                raise ValueError(f"{len(data)} bytes at {offset} of {name}, which has {size}")
            streams[file].seek(start + offset)
            streams[file].write(data)
            if progress:
                progress(len(data))

        for name, edit in edits.items():
            write(name, 0, edited_bytes(files, name, edit))
        for one in rewrites:
            for name, offset, data in one.pieces():
                write(name, offset, np.ascontiguousarray(data, dtype=np.uint8))
        for stream in streams.values():
            stream.flush()
            os.fsync(stream.fileno())
    return left_out


def _lay_out(
    files: TensorFiles, shard: Path, target: Path, rewrites: Sequence[Rewrite]
) -> dict[str, tuple[Path, int, int]]:
    """Write a shard in its final layout, with all data but those of rewritten tensors.

    Returns:
        Tensor name -> file, offset of its first byte in that file, and its size in bytes.
    """
    here = [name for name in files.names if files.info(name).file == shard]
    gone: set[str] = set()
    for one in rewrites:
        if _moves(files, one):
            gone |= one.old
    if not gone & set(here):
        shutil.copyfile(shard, target)
        infos = {name: files.info(name) for name in here}
        return {name: (target, info.offset, info.nbytes) for name, info in infos.items()}
    # New tensors with other names lie where the first tensor that they replace lay.
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in here:
        if name not in gone:
            layout[name] = (files.info(name).dtype, files.info(name).shape)
            continue
        for one in rewrites:
            if name in one.old and next(iter(one.tensors)) == name:
                layout.update(one.tensors)
    return _write_shard(files, shard, target, layout, gone)


def _moves(files: TensorFiles, one: Rewrite) -> bool:
    """Whether a rewrite changes names, types or shapes, and so the layout of its shard."""
    old = {name: (files.info(name).dtype, files.info(name).shape) for name in one.old}
    return old != dict(one.tensors)


def _write_shard(
    files: TensorFiles,
    shard: Path,
    target: Path,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    gone: set[str],
) -> dict[str, tuple[Path, int, int]]:
    header: dict[str, Any] = {}
    if metadata := files.metadata(shard):
        header["__metadata__"] = metadata
    end = 0
    for name, (dtype, shape) in layout.items():
        size = type_size(dtype) * math.prod(shape)
        offsets = [end, end + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {}
    with open(target, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(start + end)
        for name in layout:
            first, last = header[name]["data_offsets"]
            places[name] = (target, start + first, last - first)
            if name in files and name not in gone:
                stream.seek(start + first)
                stream.write(files.bytes(name))
                files.release(name)
    return places


def _write_index(old: Path, new: Path, places: Mapping[str, tuple[Path, int, int]]) -> None:
    """Write the index of shards again with the new tensors' names and total size."""
    index = json_text.read(old)
    index["weight_map"] = {name: places[name][0].name for name in sorted(places)}
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] = sum(size for _, _, size in places.values())
    new.write_text(json.dumps(index, indent=4) + "\n", encoding="utf-8")


def edited_bytes(files: TensorFiles, name: str, edit: TensorEdit) -> memoryview:
    """The bytes of a tensor after ``edit``, in the tensor's own dtype.

    Raises:
        UserError: when the edited values are not finite in that dtype.
    """
    info = files.info(name)
    dtype = float_dtype(info, name)
    values = edit(files.read(name)).astype(dtype)
    if tuple(values.shape) != info.shape:
        raise UserError(f"the edit of {name} changed its shape, which it must not.")
    if not all_finite(values):
        raise UserError(
            f"the edited {name} does not fit {info.dtype} (NaN or overflow): the source's values "
            f"are damaged, or {OPTION} is too large.",
            option="strength",
        )
    # Bytes are taken through a view as unsigned integers: memoryview does not support bfloat16.
    bits = values.reshape(-1).view(mx.uint32 if info.dtype == "F32" else mx.uint16)
    mx.eval(bits)
    return memoryview(bits).cast("B")  # type: ignore[arg-type]


def float_dtype(info: TensorInfo, name: str = "a tensor to be edited") -> mx.Dtype:
    """The MLX dtype of a float tensor.

    Raises:
        UserError: when the tensor is stored in another type.
    """
    if info.dtype not in FLOAT_DTYPES:
        raise UserError(
            f"{name} in {info.file} is stored as {info.dtype}: only F32, F16 and BF16 can be "
            "edited in place; take the model in one of these types."
        )
    return FLOAT_DTYPES[info.dtype]


def _copy_others(source: Path, files: TensorFiles, out: Path, skip: tuple[str, ...]) -> list[str]:
    shards = {shard.name for shard in files.files}
    left_out = []
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(folder).relative_to(source)
        for name in sorted(names):
            relative = inside / name
            top = inside == Path(".")
            if name.startswith(".") or (top and (name in skip or name in shards)):
                continue
            if top and name == "config.json":
                continue
            if name.lower().endswith(_OTHER_WEIGHTS):
                left_out.append(str(relative))
                continue
            (out / inside).mkdir(parents=True, exist_ok=True)
            # Links are followed: in a Hugging Face cache every file is a link.
            shutil.copyfile(Path(folder) / name, out / relative)
    return left_out
