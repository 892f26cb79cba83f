"""Open GGUF files: metadata and tensors of one file, or of all parts of a split one.

`convert.gguf.header` has checked counts, lengths, types, UTF-8, offsets and sizes of every file
that is opened here. The tensors' data are memory-mapped and not read until they are used.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from convert.base.closing import Closing
from convert.base.errors import UserError
from convert.base.mapped import give_back
from convert.gguf.header import read_part
from convert.gguf.keys import check_keys
from convert.gguf.layout import Part, TensorEntry, state_of
from convert.gguf.metadata import Metadata
from convert.gguf.parts import SPLIT_NAME, check_parts, part_paths, split_number

_Q = GGMLQuantizationType
_PLAIN = {_Q.I8: "<i1", _Q.I16: "<i2", _Q.I32: "<i4", _Q.I64: "<i8", _Q.F64: "<f8"}


class GgufSource(Closing):
    """A GGUF file, or all parts of a split one, open for reading.

    It is a context manager, which closes the files at its end. The metadata, and arrays that `raw`
    returned before, can still be read after that.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` (for a part of a split model: all its parts) and check every header.

        Raises:
            UserError: naming the file and what to do, when a file is missing or damaged, when parts
                do not belong together, or when a version, byte order or type is not supported.
        """
        self._descriptors: list[int] = []
        self._maps: dict[int, mmap.mmap] = {}
        # Closes the files of an object that is dropped without `close`.
        weakref.finalize(self, _close, self._descriptors)
        try:
            self._parts = self._open(Path(path))
        except BaseException:
            self.close()
            raise
        self._tensors = {
            name: entry for part in self._parts for name, entry in part.tensors.items()
        }
        self._metadata = Metadata(self._parts[0])
        try:
            first = self._parts[0]
            check_keys(first.path, first.fields, self._metadata, self._tensors)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> list[Part]:
        first = self._add(path, 0)
        named = SPLIT_NAME.fullmatch(path.name)
        count = split_number(first, "split.count")
        if count is None:
            count = int(named["count"]) if named else 1
        if count <= 1:
            return [first]
        if named is None or int(named["count"]) != count:
            raise UserError(
                f"{path} is one of {count} parts, which its name does not say: name the parts "
                f"NAME-00001-of-{count:05d}.gguf and so on."
            )
        paths = part_paths(path, count)
        _close(self._descriptors)
        parts = []
        for index, part in enumerate(paths):
            if not part.is_file():
                raise UserError(
                    f"{part} is missing, one of {count} parts of the model: put all of them into "
                    f"one folder."
                )
            parts.append(self._add(part, index))
        check_parts(parts)
        return parts

    def _add(self, path: Path, index: int) -> Part:
        if not path.is_file():
            raise UserError(f"{path} is no file: give the path of a .gguf file.")
        try:
            descriptor = os.open(path, os.O_RDONLY)
            self._descriptors.append(descriptor)
            return read_part(path, descriptor, index)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None

    @property
    def parts(self) -> list[Path]:
        """The files, in order: one, unless the model is split."""
        return [part.path for part in self._parts]

    @property
    def layouts(self) -> list[Part]:
        """What the header of each file says, in the order of `parts`."""
        return list(self._parts)

    @property
    def architecture(self) -> str:
        """The value of general.architecture, such as "llama".

        Raises:
            UserError: when there is none.
        """
        found = self._metadata.get("general.architecture")
        if not isinstance(found, str) or not found:
            raise UserError(
                f"{self._parts[0].path} does not say its general.architecture: get the model from "
                f"elsewhere."
            )
        return found

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The first part's metadata: key -> str, int, float, bool or list, decoded when read."""
        return self._metadata

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Name -> entry of every tensor, in file order, part after part."""
        return self._tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, in file order."""
        return {name: entry.shape for name, entry in self._tensors.items()}

    def tensor(self, name: str) -> TensorEntry:
        """The entry of the tensor ``name``.

        Raises:
            UserError: when there is no such tensor.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise UserError(f"{self._parts[0].path} has no tensor named {name}.") from None

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor: uint8, (rows, bytes per row), a read-only view of the file.

        The number of rows is the product of all dimensions but the fastest.
        """
        entry = self.tensor(name)
        shape = (entry.rows, entry.row_bytes)
        if entry.nbytes == 0:
            empty = np.empty(shape, dtype=np.uint8)
            empty.flags.writeable = False
            return empty
        mapped = self._map(entry.part)
        flat = np.frombuffer(mapped, np.uint8, count=entry.nbytes, offset=entry.offset)
        return flat.reshape(shape)

    def release(self, name: str) -> None:
        """Let the system drop from memory the pages of a tensor that was read through `raw`."""
        entry = self.tensor(name)
        if entry.part in self._maps:
            give_back(self._maps[entry.part], entry.offset, entry.nbytes)

    def values(self, name: str) -> np.ndarray:
        """A tensor dequantized by gguf-py: a new float32 array of the tensor's shape.

        Raises:
            UserError: when there is no such tensor, or gguf-py cannot dequantize its type.
        """
        entry = self.tensor(name)
        raw = self.raw(name)
        if not raw.size:
            return np.zeros(entry.shape, dtype=np.float32)
        # Damaged scales may be infinite or NaN; then so are the values, which callers check.
        with np.errstate(all="ignore"):
            if entry.type in _PLAIN:
                found = raw.view(_PLAIN[entry.type])
            else:
                try:
                    found = gguf.quants.dequantize(raw, entry.type)
                except NotImplementedError:
                    raise UserError(
                        f"{name} in {self.parts[entry.part]} is stored as {entry.type.name}, which "
                        f"cannot be read as numbers: use a file in another type."
                    ) from None
            return np.array(found, dtype=np.float32).reshape(entry.shape)

    def descriptor(self, part: int) -> int:
        """The open file descriptor of a part, for reading."""
        if not self._descriptors:
            raise ValueError(f"{self.parts[part]} is closed")
        return self._descriptors[part]

    def check_unchanged(self) -> None:
        """Check that no file was written to since its header was read.

        Raises:
            UserError: naming the file that was changed.
        """
        for index, part in enumerate(self._parts):
            if state_of(os.fstat(self.descriptor(index))) != part.state:
                raise UserError(f"{part.path} was changed while it was in use: start again.")

    def close(self) -> None:
        """Close the files."""
        while self._maps:
            _, mapped = self._maps.popitem()
            # A mapping with a living view from `raw` cannot be closed; it ends with that view.
            with suppress(BufferError):
                mapped.close()
        _close(self._descriptors)

    def _map(self, part: int) -> mmap.mmap:
        if part not in self._maps:
            self.check_unchanged()
            self._maps[part] = mmap.mmap(self.descriptor(part), 0, access=mmap.ACCESS_READ)
        return self._maps[part]


# --------------------------------------------------------------------------------------------------
# Functions of a path


def open_gguf(path: Path) -> GgufSource:
    """The source at ``path``; opening the same unchanged files again returns the same object.

    Raises:
        UserError: naming the file when it is missing, damaged or no GGUF.
    """
    path = Path(path).absolute()
    known = _opened.pop(path, None)
    if known is None or not _same_files(known):
        known = GgufSource(path)
    while len(_opened) > 1:
        _opened.pop(next(iter(_opened)))
    _opened[path] = known
    return known


# The two sources that were opened last, the latest at the end.
_opened: dict[Path, GgufSource] = {}


def _same_files(source: GgufSource) -> bool:
    try:
        return all(state_of(os.stat(part.path)) == part.state for part in source.layouts)
    except OSError:
        return False


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Tensor ``name`` dequantized to float32, row-major: (out, in), or (experts, out, in).

    Raises:
        UserError: naming the file and the tensor when there is no such tensor.
    """
    return open_gguf(path).values(name)


def tensor_types(path: Path) -> dict[str, GGMLQuantizationType]:
    """Name -> GGML type of every tensor, in file order."""
    return {name: entry.type for name, entry in open_gguf(path).tensors.items()}


def metadata(path: Path) -> dict[str, Any]:
    """Key -> value of all metadata: str, int, float, bool or a list of one of these."""
    return dict(open_gguf(path).metadata)


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
