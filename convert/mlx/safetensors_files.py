"""Random access to the tensors of a model folder's safetensors files.

The format (https://github.com/huggingface/safetensors): 8 bytes of little-endian header size, a
JSON header of {name: {dtype, shape, data_offsets}}, then the data, without gaps or overlaps.
"""

from __future__ import annotations

import math
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.base import escape, json_text
from convert.base.closing import Closing
from convert.base.errors import UserError
from convert.base.foreign import foreign
from convert.base.mapped import give_back
from convert.base.schema import Refused, map_of, record, text

INDEX = "model.safetensors.index.json"

# Longest header in bytes; the reference implementation has the same limit.
_MAX_HEADER = 100_000_000

# Most values in a tensor's entry: 64 dimensions, the most that array libraries have, and 2 offsets.
_MAX_DIMENSIONS = 64 + 2

# safetensors name -> (bytes per element, NumPy type of the stored bits, MLX type to view them as).
# MLX has no 8-bit floats and reads them as bytes, and so does this module.
_DTYPES: dict[str, tuple[int, type[np.generic], mx.Dtype | None]] = {
    "F64": (8, np.float64, None),
    "F32": (4, np.float32, None),
    "F16": (2, np.float16, None),
    "BF16": (2, np.uint16, mx.bfloat16),
    "I64": (8, np.int64, None),
    "I32": (4, np.int32, None),
    "I16": (2, np.int16, None),
    "I8": (1, np.int8, None),
    "U64": (8, np.uint64, None),
    "U32": (4, np.uint32, None),
    "U16": (2, np.uint16, None),
    "U8": (1, np.uint8, None),
    "BOOL": (1, np.bool_, None),
    "F8_E4M3": (1, np.uint8, None),
    "F8_E5M2": (1, np.uint8, None),
    "F8_E8M0": (1, np.uint8, None),
}


_INDEX = record(
    {"metadata": record({})}, {"weight_map": map_of(text(r"[^\x00]{1,255}", "the name of a file"))}
)


def type_size(dtype: str) -> int:
    """Bytes of one element of a safetensors type."""
    return _DTYPES[dtype][0]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        dtype: its type as safetensors names it: F32, F16, BF16, U32, ...
        shape: its dimensions, the slowest first.
        file: the file that holds it.
        offset: its first byte, counted from the start of the file.
        nbytes: its length in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """One file's header: its tensors in file order, and its string metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


class TensorFiles(Closing):
    """The tensors of a folder, memory-mapped; data are read from disk when they are used.

    Usable as a context manager, which unmaps the files at its end. Arrays returned by `read` are
    copies and outlive it.
    """

    def __init__(self, folder: Path) -> None:
        """Read and check every header of ``folder``.

        The files are those that model.safetensors.index.json names, or, without an index, all
        model*.safetensors, as mlx-lm loads them.

        Raises:
            UserError: naming the file and what to do, when there is no such file, a header is
                malformed, tensors overlap or reach past the end, or the index does not fit.
        """
        self.folder = Path(folder)
        index = self.folder / INDEX
        expected: dict[str, str] = {}
        if index.exists():
            expected = _read_index(index)
            self.files = [self.folder / file for file in sorted(set(expected.values()))]
        else:
            self.files = sorted(self.folder.glob("model*.safetensors"))
        if not self.files:
            raise UserError(
                f"{self.folder} holds no model*.safetensors: give the folder of an MLX or "
                f"Hugging Face model."
            )
        self._infos: dict[str, TensorInfo] = {}
        self._metadata: dict[Path, dict[str, str]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file in self.files:
            if not file.exists():
                raise UserError(
                    f"{index} names {file.name}, which is not there: download the model again."
                )
            header = read_header(file)
            self._metadata[file] = header.metadata
            for name, info in header.tensors.items():
                if name in self._infos:
                    raise UserError(
                        f"{name} is both in {self._infos[name].file} and in {file.name}: remove "
                        f"the file that does not belong to the model."
                    )
                self._infos[name] = info
        for name, file_name in expected.items():
            if name not in self._infos:
                raise UserError(
                    f"{index} places {name} in {file_name}, which does not hold it: download the "
                    f"model again."
                )

    @property
    def names(self) -> list[str]:
        """Every tensor's name, file by file, in file order."""
        return list(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of the tensor ``name``.

        Raises:
            UserError: when there is no such tensor.
        """
        try:
            return self._infos[name]
        except KeyError:
            raise UserError(f"{self.folder} has no tensor named {name}.") from None

    def metadata(self, file: Path) -> dict[str, str]:
        """The ``__metadata__`` strings of one of `files`."""
        return dict(self._metadata[file])

    def bytes(self, name: str) -> memoryview:
        """The stored bytes of ``name``, a view of the mapped file; release it before `close`."""
        info = self.info(name)
        if info.nbytes == 0:
            return memoryview(b"")
        if info.file not in self._maps:
            with open(info.file, "rb") as stream:
                self._maps[info.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._maps[info.file])[info.offset : info.offset + info.nbytes]

    def release(self, name: str) -> None:
        """Let the system drop from memory the pages of a tensor that was read through `bytes`."""
        info = self.info(name)
        if info.file in self._maps:
            give_back(self._maps[info.file], info.offset, info.nbytes)

    def read(self, name: str) -> mx.array:
        """``name`` as an MLX array in its storage type (8-bit floats as uint8, F64 as float32)."""
        info = self.info(name)
        _, bits, view = _DTYPES[info.dtype]
        flat = np.frombuffer(self.bytes(name), dtype=bits)
        if info.dtype == "F64":
            # Metal has no float64.
            flat = flat.astype(np.float32)
        array = mx.array(flat.reshape(info.shape))
        return array if view is None else array.view(view)

    def close(self) -> None:
        """Unmap the files."""
        while self._maps:
            _, mapped = self._maps.popitem()
            # A mapping with a living view from `bytes` cannot be closed; it ends with that view.
            with suppress(BufferError):
                mapped.close()


def read_header(file: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    try:
        stream = open(file, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from None
    with stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(8)
        if len(head) < 8:
            raise _broken(file, f"it has only {size} bytes")
        if head.startswith(b"version "):
            raise UserError(
                f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder, "
                f"or download the model again."
            )
        length = int.from_bytes(head, "little")
        if length > _MAX_HEADER or length > size - 8:
            raise _broken(file, f"its header claims {length} bytes of a file of {size}")
        raw = stream.read(length)
    try:
        parsed = json_text.parse(raw, longest=_MAX_HEADER)
    except Refused as refused:
        raise _broken(file, f"of its header, {refused}") from None
    if not isinstance(parsed, dict):
        raise _broken(file, "its header is no JSON object")
    metadata = parsed.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise _broken(file, "its __metadata__ is no object")
    start = 8 + length
    tensors = {name: _tensor_info(file, name, entry, start) for name, entry in parsed.items()}
    in_order = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    end = start
    for name, info in in_order:
        if info.offset < end:
            raise _broken(file, f"{name} overlaps the tensor before it")
        if info.offset > end:
            raise _broken(file, f"{info.offset - end} bytes before {name} belong to no tensor")
        end = info.offset + info.nbytes
        if end > size:
            raise _broken(file, f"{name} ends at byte {end} of a file of {size}: it is truncated")
    if end != size:
        raise _broken(file, f"{size - end} bytes after the last tensor belong to none")
    return Header(dict(in_order), {str(key): str(value) for key, value in metadata.items()})


def load(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """All tensors of one file by name (MLX reads each when it is used), and the file's metadata.

    Raises:
        UserError: as `read_header` does.
    """
    header = read_header(file)
    with foreign(f"{file} could not be read"):
        loaded: Any = mx.load(str(file), format="safetensors")
    return dict(loaded), header.metadata


def _tensor_info(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _broken(file, f"{name} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UserError(
            f"{name} in {file} is stored as {escape.shortened(str(dtype), 40)}, which is not "
            "supported: convert the model to float16 or bfloat16 first."
        )
    numbers = [*shape, first, last] if isinstance(shape, list) else [None]
    plain = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    if not plain or len(numbers) > _MAX_DIMENSIONS:
        raise _broken(file, f"{name} has a malformed shape or data_offsets")
    nbytes = math.prod(shape) * _DTYPES[dtype][0]
    if last - first != nbytes:
        raise _broken(
            file, f"{name} is {dtype} of shape {shape}, {nbytes} bytes, but spans {last - first}"
        )
    return TensorInfo(dtype, tuple(shape), file, start + first, nbytes)


def _read_index(index: Path) -> dict[str, str]:
    mend = "download it again, or remove it to load every model*.safetensors"
    entries: dict[str, str] = json_text.read(index, _INDEX, mend=mend)["weight_map"]
    for file in set(entries.values()):
        if Path(file).name != file:
            raise UserError(f"{index} points outside its folder, to {file}: do not use this model.")
    return entries


def _broken(file: Path, why: str) -> UserError:
    return UserError(f"{file} is not a valid safetensors file: {why}; download it again.")
