"""Open GGUF files: metadata and tensors of one file, or of all parts of a split one.

Whatever passes here can be looked at without surprise: `convert.gguf.header` has checked counts,
lengths, types, UTF-8, places and sizes. Tensors' data are only mapped.
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

    A context manager, which closes the files at its end. Metadata stay readable after that, and so
    do arrays that `raw` returned before.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path``, and with any part of a split model all the others; check every header.

        Raises:
            UserError: naming the file and the mend, when a file is missing or damaged, when parts
                do not belong together, or for a version, byte order or type not known here.
        """
        self._descriptors: list[int] = []
        self._maps: dict[int, mmap.mmap] = {}
        # Whoever does not close it leaves no open file behind.
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
        """The same files with everything their headers say."""
        return list(self._parts)

    @property
    def architecture(self) -> str:
        """general.architecture, such as "llama". Raises UserError when there is none."""
        found = self._metadata.get("general.architecture")
        if not isinstance(found, str) or not found:
            raise UserError(
                f"{self._parts[0].path} does not say its general.architecture: get the model from "
                f"elsewhere."
            )
        return found

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Key -> str, int, float, bool or list, of the first part; decoded when asked for."""
        return self._metadata

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by its name, in file order, part after part."""
        return self._tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name, in file order."""
        return {name: entry.shape for name, entry in self._tensors.items()}

    def tensor(self, name: str) -> TensorEntry:
        """The entry of ``name``. Raises UserError when there is no such tensor."""
        try:
            return self._tensors[name]
        except KeyError:
            raise UserError(f"{self._parts[0].path} has no tensor named {name}.") from None

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor: uint8, (rows, bytes per row), a read-only view of the file.

        Rows are the product of all dimensions but the fastest; see `convert.gguf.ggml_types`.
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
        """Give the pages of a tensor that `raw` has brought in back to the system."""
        entry = self.tensor(name)
        if entry.part in self._maps:
            give_back(self._maps[entry.part], entry.offset, entry.nbytes)

    def values(self, name: str) -> np.ndarray:
        """A tensor as float32 in its shape, dequantized by gguf-py; a new array.

        Raises:
            UserError: when there is no such tensor, or its type is not meant for weights.
        """
        entry = self.tensor(name)
        raw = self.raw(name)
        if not raw.size:
            return np.zeros(entry.shape, dtype=np.float32)
        # Damaged scales may be infinite or no number: that is the values' business.
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
        """Raise UserError when a file was written to since its header was read."""
        for index, part in enumerate(self._parts):
            if state_of(os.fstat(self.descriptor(index))) != part.state:
                raise UserError(f"{part.path} was changed while it was in use: start again.")

    def close(self) -> None:
        """Close the files."""
        while self._maps:
            _, mapped = self._maps.popitem()
            # While a view from `raw` is alive, the mapping goes with it instead.
            with suppress(BufferError):
                mapped.close()
        _close(self._descriptors)

    def _map(self, part: int) -> mmap.mmap:
        if part not in self._maps:
            self.check_unchanged()
            self._maps[part] = mmap.mmap(self.descriptor(part), 0, access=mmap.ACCESS_READ)
        return self._maps[part]


# --------------------------------------------------------------------------------------------------
# Questions about one file


def open_gguf(path: Path) -> GgufSource:
    """The source at ``path``, kept open while its files stay the same.

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


# The last two, the latest at the end.
_opened: dict[Path, GgufSource] = {}


def _same_files(source: GgufSource) -> bool:
    try:
        return all(state_of(os.stat(part.path)) == part.state for part in source.layouts)
    except OSError:
        return False


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Tensor ``name`` dequantized to float32, row-major: (out, in), or (experts, out, in).

    Raises:
        UserError: naming the file and the tensor when it is not there.
    """
    return open_gguf(path).values(name)


def tensor_types(path: Path) -> dict[str, GGMLQuantizationType]:
    """Every tensor's name and GGML type, in file order."""
    return {name: entry.type for name, entry in open_gguf(path).tensors.items()}


def metadata(path: Path) -> dict[str, Any]:
    """Every metadata key and its value, as str, int, float, bool or a list of one of these."""
    return dict(open_gguf(path).metadata)


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
