"""Read GGUF files, strictly: what a header claims is checked before it is believed.

The format, little-endian throughout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    4 bytes  "GGUF"
    u32      version, 2 or 3, which differ only in that 3 may be big-endian
    u64      number of tensors
    u64      number of metadata pairs

    per pair:
    string   key; a string is its length in bytes, u64, and that much UTF-8
    u32      type of the value
    ...      the value: a number, a string, or an array: u32 item type, u64 count, the items

    per tensor:
    string   name, under 64 bytes
    u32      number of dimensions, 1 to 4
    u64 each dimensions, the fastest first: ne0, ne1, ...; ne0 is the input of a linear layer
    u32      GGML type, which sets the block that ne0 is a multiple of, and a block's bytes
    u64      offset of the data, counted from where the data begin

    zeros up to the next multiple of general.alignment (a power of two, 32 unless given): here the
    data begin; every offset is a multiple of the same alignment

A large model may be split into NAME-00001-of-0000N.gguf and so on. Every part is a GGUF file; the
first has the metadata, all have split.no (from 0), split.count and split.tensors.count.

gguf-py's own reader asserts, loops or allocates without end on damaged files, and keeps no place of
a value, so this module parses by itself. Whatever passes here can be looked at without surprise:
counts, lengths, types, UTF-8, places and sizes have all been checked. Reading needs a header's
length of memory, and data are only mapped.
"""

from __future__ import annotations

import codecs
import math
import mmap
import os
import re
import struct
import weakref
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert.base.errors import UserError
from convert.base.mapped import give_back
from convert.base.suffixes import GGUF, without
from convert.gguf.keys import check_keys
from convert.gguf.values import FORMATS

MAGIC = b"GGUF"
ALIGNMENT = "general.alignment"

# Limits far above every real file, so that a damaged count cannot cost minutes or gigabytes.
# A vocabulary of 256,000 tokens with its merges takes about 20 MB, a whole tokenizer.json 35 MB.
_MAX_HEADER = 1 << 27
_MAX_PAIRS = 1 << 16
_MAX_STRINGS = 1 << 22
_MAX_TENSORS = 1 << 18
_MAX_ALIGNMENT = 1 << 20
_MAX_NESTING = 4

# Fewest bytes of a metadata pair and of a tensor's entry.
_PAIR = 8 + 1 + 4 + 1
_ENTRY = 8 + 1 + 4 + 8 + 4 + 8

_CHUNK = 1 << 20
_U64 = struct.Struct("<Q")

_TYPES = {int(kind): kind for kind in GGMLQuantizationType if kind in gguf.GGML_QUANT_SIZES}
_VALUES = {int(kind): kind for kind in GGUFValueType}

_Q = GGMLQuantizationType
_PLAIN = {_Q.I8: "<i1", _Q.I16: "<i2", _Q.I32: "<i4", _Q.I64: "<i8", _Q.F64: "<f8"}

_SPLIT_NAME = re.compile(r"(?P<name>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies and how it is stored.

    Attributes:
        name: its GGUF name.
        type: its GGML type.
        shape: in NumPy's order, the slowest dimension first: (out, in) or (experts, out, in).
        part: index into `GgufSource.parts`.
        offset: of its first byte, counted from the start of that file.
        nbytes: its length.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    part: int
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Product of all dimensions but the fastest."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of blocks."""
        return row_bytes(self.type, self.shape[-1])


@dataclass(frozen=True)
class Field:
    """Where one metadata pair lies, in bytes from the start of its file.

    Attributes:
        type: of the value.
        item: of an array's items; None for other values.
        start: of the pair, which is where the length of its key is.
        value: of the value; an array's item type and count come first.
        end: of the pair.
    """

    type: GGUFValueType
    item: GGUFValueType | None
    start: int
    value: int
    end: int


@dataclass(frozen=True)
class Part:
    """One file of a source, as its header describes it.

    Attributes:
        path: the file.
        size: its length.
        state: what tells when it is changed or replaced.
        header: its bytes up to the last tensor's entry.
        fields: key -> its place, in file order.
        tensors: in file order.
        entries: tensor name -> (start, end) of its entry in the header.
        alignment: of offsets.
        data_start: what offsets count from, header and padding before it.
    """

    path: Path
    size: int
    state: tuple[int, ...]
    header: bytes
    fields: dict[str, Field]
    tensors: dict[str, TensorEntry]
    entries: dict[str, tuple[int, int]]
    alignment: int
    data_start: int


class GgufSource:
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
        self._metadata = _Metadata(self._parts[0])
        try:
            first = self._parts[0]
            check_keys(first.path, first.fields, self._metadata, self._tensors)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> list[Part]:
        first = self._add(path, 0)
        named = _SPLIT_NAME.fullmatch(path.name)
        count = _split_number(first, "split.count")
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
        _check_parts(parts)
        return parts

    def _add(self, path: Path, index: int) -> Part:
        if not path.is_file():
            raise UserError(f"{path} is no file: give the path of a .gguf file.")
        try:
            descriptor = os.open(path, os.O_RDONLY)
            self._descriptors.append(descriptor)
            return _read_part(path, descriptor, index)
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
            if _state(os.fstat(self.descriptor(index))) != part.state:
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

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def part_paths(path: Path, count: int) -> list[Path]:
    """The names of the parts of a model split into ``count`` files; of one file, ``path`` itself.

    Args:
        path: NAME, NAME.gguf or the path of any part.
        count: how many.
    """
    if count <= 1:
        return [path]
    named = _SPLIT_NAME.fullmatch(path.name)
    name = named["name"] if named else without(path.name, GGUF)
    return [
        path.with_name(f"{name}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)
    ]


def size_of(path: Path) -> int:
    """Bytes of a GGUF, all parts of it where ``path`` is one; nothing of it is read."""
    parts = re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-*-of-\1.gguf", path.name)
    files = [path] if parts == path.name else path.parent.glob(parts)
    return sum(file.stat().st_size for file in files)


def row_bytes(kind: GGMLQuantizationType, width: int) -> int:
    """Bytes of ``width`` weights, a multiple of the type's block, in this type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(width // block * size)


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
        return all(_state(os.stat(part.path)) == part.state for part in source.layouts)
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


# --------------------------------------------------------------------------------------------------
# Metadata


class _Metadata(Mapping[str, Any]):
    """A part's metadata, decoded from its header at the first request for each key."""

    def __init__(self, part: Part) -> None:
        self._header = part.header
        self._fields = part.fields
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            field = self._fields[key]
            self._decoded[key], _ = _decode(self._header, field.type, field.value)
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, key: object) -> bool:
        return key in self._fields


def _decode(header: bytes, kind: GGUFValueType, at: int) -> tuple[Any, int]:
    """A checked value, and where it ends."""
    if kind == GGUFValueType.STRING:
        start = at + 8
        end = start + _U64.unpack_from(header, at)[0]
        return str(header[start:end], "utf-8"), end
    if kind != GGUFValueType.ARRAY:
        spelled = FORMATS[kind]
        return struct.unpack_from(spelled, header, at)[0], at + struct.calcsize(spelled)
    number, count = struct.unpack_from("<IQ", header, at)
    item, at = _VALUES[number], at + 12
    if item in FORMATS:
        found = np.frombuffer(header, FORMATS[item], count=count, offset=at)
        return found.tolist(), at + found.nbytes
    items = []
    for _ in range(count):
        one, at = _decode(header, item, at)
        items.append(one)
    return items, at


# --------------------------------------------------------------------------------------------------
# Parsing


class _Cursor:
    """Reads a header from its start, never more of the file than the header is long.

    Attributes:
        at: what comes next, in bytes from the start of the file.
        what: what is being read, for messages.
    """

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path = path
        self.size = size
        self.at = 0
        self.what = "its first 24 bytes"
        self.arrays = 0
        self.buffer = bytearray()
        self._descriptor = descriptor

    @property
    def left(self) -> int:
        """Bytes of the file behind this place."""
        return self.size - self.at

    def reach(self, end: int) -> None:
        """Have the file's bytes up to ``end`` in the buffer."""
        if end <= len(self.buffer):
            return
        if end > self.size:
            raise self.broken(
                f"{self.what} would end at byte {end} of a file of {self.size}, so it is truncated "
                f"or damaged"
            )
        if end > _MAX_HEADER:
            raise self.broken(
                f"{self.what} would end at byte {end}, further than any header reaches"
            )
        wanted = min(max(end, 2 * len(self.buffer), _CHUNK), self.size, _MAX_HEADER)
        while len(self.buffer) < wanted:
            more = os.pread(self._descriptor, wanted - len(self.buffer), len(self.buffer))
            if not more:
                raise self.broken("it became shorter while it was read")
            self.buffer += more

    def bytes(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        self.reach(self.at + count)
        found = bytes(self.buffer[self.at : self.at + count])
        self.at += count
        return found

    def u32(self) -> int:
        return int.from_bytes(self.bytes(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.bytes(8), "little")

    def name(self, what: str, longest: int) -> str:
        """A key or a tensor's name."""
        self.what = what
        length = self.u64()
        if not 0 < length <= longest:
            raise self.broken(f"{what} claims a name of {length} bytes instead of 1 to {longest}")
        try:
            found = self.bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken(f"{what} is not UTF-8") from None
        if "\0" in found:
            raise self.broken(f"{what} contains a zero byte")
        return found

    def skip(self, kind: GGUFValueType, depth: int = 0) -> GGUFValueType | None:
        """Check and skip a value; return an array's item type."""
        if kind in FORMATS:
            self._skip_numbers(kind, 1)
        elif kind == GGUFValueType.STRING:
            self._skip_string()
        else:
            return self._skip_array(depth)
        return None

    def _skip_numbers(self, kind: GGUFValueType, count: int) -> None:
        start = self.at
        self.at += count * struct.calcsize(FORMATS[kind])
        self.reach(self.at)
        if kind == GGUFValueType.BOOL and self.buffer[start : self.at].translate(None, b"\0\1"):
            raise self.broken(f"{self.what} is a bool that is neither 0 nor 1")

    def _skip_string(self) -> None:
        length = self.u64()
        if length > self.left:
            raise self._too_long("a string", length)
        start = self.at
        self.at += length
        self.reach(self.at)
        self._check_utf8(start)

    def _skip_array(self, depth: int) -> GGUFValueType:
        self.arrays += 1
        if depth >= _MAX_NESTING or self.arrays > _MAX_PAIRS:
            raise self.broken(f"{self.what} nests arrays too deep or too often")
        kind = self.value_type()
        count = self.u64()
        least = struct.calcsize(FORMATS[kind]) if kind in FORMATS else 8
        if count > self.left // least:
            raise self._too_long("an array", count * least)
        if kind in FORMATS:
            self._skip_numbers(kind, count)
        elif kind == GGUFValueType.STRING:
            self._skip_strings(count)
        else:
            for _ in range(count):
                self._skip_array(depth + 1)
        return kind

    def _skip_strings(self, count: int) -> None:
        """Skip many: a vocabulary has hundreds of thousands of them."""
        if count > _MAX_STRINGS:
            raise self.broken(f"{self.what} claims {count} strings, more than any vocabulary has")
        start, at = self.at, self.at
        buffer, have, length_at = self.buffer, len(self.buffer), _U64.unpack_from
        starts = array("q")
        for _ in range(count):
            if at + 8 > have:
                self.reach(at + 8)
                have = len(buffer)
            starts.append(at)
            at += 8 + length_at(buffer, at)[0]
            if at > have:
                self.reach(at)
                have = len(buffer)
        self.at = at
        self._check_utf8(start, starts)

    def _check_utf8(self, start: int, lengths: array[int] | None = None) -> None:
        """Check what lies between ``start`` and here, zeros put over the lengths in between."""
        text = np.array(self.buffer[start : self.at], dtype=np.uint8)
        if lengths:
            places = np.frombuffer(lengths, dtype=np.int64) - start
            for offset in range(8):
                text[places + offset] = 0
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for at in range(0, len(text), _CHUNK):
                decoder.decode(text[at : at + _CHUNK].data)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise self.broken(f"{self.what} is not UTF-8") from None

    def value_type(self) -> GGUFValueType:
        number = self.u32()
        if number not in _VALUES:
            raise self.broken(f"{self.what} is of value type {number}, which does not exist")
        return _VALUES[number]

    def _too_long(self, what: str, length: int) -> UserError:
        return self.broken(
            f"{self.what} claims {what} of at least {length} bytes where {self.left} are left, so "
            f"it is truncated or damaged"
        )

    def broken(self, why: str) -> UserError:
        return _broken(self.path, why)


def _read_part(path: Path, descriptor: int, index: int) -> Part:
    status = os.fstat(descriptor)
    cursor = _Cursor(path, descriptor, status.st_size)
    _check_start(path, os.pread(descriptor, 16, 0), status.st_size)
    cursor.at = 8
    tensor_count, pair_count = cursor.u64(), cursor.u64()
    for count, least, most, what in (
        (tensor_count, _ENTRY, _MAX_TENSORS, "tensors"),
        (pair_count, _PAIR, _MAX_PAIRS, "metadata pairs"),
    ):
        if count * least > cursor.left or count > most:
            raise cursor.broken(
                f"it claims {count} {what}, which a file of {status.st_size} bytes cannot hold"
                if count * least > cursor.left
                else f"it claims {count} {what}, more than any model has"
            )
    fields: dict[str, Field] = {}
    for number in range(pair_count):
        start = cursor.at
        key = cursor.name(f"metadata key {number + 1} of {pair_count}", 65535)
        cursor.what = f"the metadata {_shown(key)}"
        if key in fields:
            raise cursor.broken(f"the metadata key {_shown(key)} occurs twice")
        kind = cursor.value_type()
        value = cursor.at
        item = cursor.skip(kind)
        fields[key] = Field(kind, item, start, value, cursor.at)
    alignment = _alignment(cursor, fields)
    tensors: dict[str, TensorEntry] = {}
    entries: dict[str, tuple[int, int]] = {}
    for number in range(tensor_count):
        start = cursor.at
        entry = _read_entry(cursor, f"tensor {number + 1} of {tensor_count}", alignment, index)
        if entry.name in tensors:
            raise cursor.broken(f"the tensor {_shown(entry.name)} occurs twice")
        tensors[entry.name] = entry
        entries[entry.name] = (start, cursor.at)
    header = bytes(cursor.buffer[: cursor.at])
    data_start = aligned(len(header), alignment)
    tensors = {name: _placed(entry, data_start + entry.offset) for name, entry in tensors.items()}
    _check_data(path, status.st_size, tensors)
    return Part(
        path=path,
        size=status.st_size,
        state=_state(status),
        header=header,
        fields=fields,
        tensors=tensors,
        entries=entries,
        alignment=alignment,
        data_start=data_start,
    )


def aligned(offset: int, alignment: int) -> int:
    """The next multiple of ``alignment``."""
    return -(-offset // alignment) * alignment


def _check_start(path: Path, start: bytes, size: int) -> None:
    """Magic and version, and what people have instead of a model."""
    if size < 24:
        raise _broken(path, f"it has only {size} bytes, which is less than a header")
    if start.startswith(b"version https://"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the model: run `git lfs pull` in its folder, or "
            f"download it again."
        )
    if start.startswith((b"tjgg", b"ggjt", b"lmgg", b"ggml", b"fmgg", b"ggmf")):
        raise UserError(
            f"{path} is in a format from before GGUF: get a newer file of the model in GGUF."
        )
    magic, version = start[:4], start[4:8]
    little, big = int.from_bytes(version, "little"), int.from_bytes(version, "big")
    if magic == MAGIC[::-1] or (magic == MAGIC and little > 0xFFFF and big <= 0xFFFF):
        raise UserError(
            f"{path} is big-endian, made for machines such as IBM Z: get or convert the model in "
            f"little-endian order."
        )
    if magic != MAGIC:
        raise _broken(path, f"it begins with {start[:4]!r} instead of {MAGIC!r}")
    if little not in (2, 3):
        mend = (
            "get a newer file of the model"
            if little == 1
            else "download it again, or update abl-mlx if the format is that new"
        )
        raise UserError(
            f"{path} is in version {little} of GGUF, and only versions 2 and 3 are known here: "
            f"{mend}."
        )


def _alignment(cursor: _Cursor, fields: Mapping[str, Field]) -> int:
    if ALIGNMENT not in fields:
        return int(gguf.GGUF_DEFAULT_ALIGNMENT)
    field = fields[ALIGNMENT]
    if field.type != GGUFValueType.UINT32:
        raise cursor.broken(f"its {ALIGNMENT} is of type {field.type.name} instead of UINT32")
    found = int.from_bytes(cursor.buffer[field.value : field.end], "little")
    if not 0 < found <= _MAX_ALIGNMENT or found & (found - 1):
        raise cursor.broken(
            f"its {ALIGNMENT} is {found} and should be a power of two, at most {_MAX_ALIGNMENT}"
        )
    return found


def _read_entry(cursor: _Cursor, which: str, alignment: int, part: int) -> TensorEntry:
    """A tensor's entry, its offset still counted from where the data begin."""
    name = cursor.name(f"the name of {which}", 63)
    shown = _shown(name)
    cursor.what = f"the entry of tensor {shown}"
    dimensions = cursor.u32()
    if not 1 <= dimensions <= 4:
        raise cursor.broken(f"the tensor {shown} has {dimensions} dimensions instead of 1 to 4")
    sizes = struct.unpack(f"<{dimensions}Q", cursor.bytes(8 * dimensions))
    number, offset = cursor.u32(), cursor.u64()
    shape = tuple(reversed(sizes))
    if number not in _TYPES:
        raise UserError(
            f"{cursor.path} stores the tensor {shown} in GGML type {number}, which gguf "
            f"{_gguf_version()} does not know: pip install -U gguf, or get the model in another "
            f"type."
        )
    kind = _TYPES[number]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # The product of what is not zero: NumPy wants that to be countable, too.
    if math.prod(max(size, 1) for size in shape) >= 2**56:
        raise cursor.broken(f"the tensor {shown} has the absurd shape {shape}")
    if shape[-1] % block:
        raise cursor.broken(
            f"the tensor {shown} has rows of {shape[-1]} weights, which do not fill {kind.name}'s "
            f"blocks of {block}"
        )
    if offset % alignment:
        raise cursor.broken(
            f"the tensor {shown} has the offset {offset}, which is no multiple of {alignment}"
        )
    return TensorEntry(name, kind, shape, part, offset, math.prod(shape) // block * size)


def _placed(entry: TensorEntry, offset: int) -> TensorEntry:
    return TensorEntry(entry.name, entry.type, entry.shape, entry.part, offset, entry.nbytes)


def in_data_order(tensors: Mapping[str, TensorEntry]) -> list[TensorEntry]:
    """Tensors of one file as their data follow each other."""
    return sorted(tensors.values(), key=lambda entry: (entry.offset, entry.nbytes))


def _check_data(path: Path, size: int, tensors: Mapping[str, TensorEntry]) -> None:
    end, before = 0, ""
    for entry in in_data_order(tensors):
        if entry.offset < end:
            raise _broken(
                path, f"the data of {_shown(entry.name)} overlap those of {_shown(before)}"
            )
        end, before = entry.offset + entry.nbytes, entry.name
        if end > size:
            raise _broken(
                path,
                f"the data of {_shown(entry.name)} would end at byte {end} of a file of {size}, so "
                f"it is truncated",
            )


def _split_number(part: Part, key: str) -> int | None:
    if key not in part.fields:
        return None
    found = _Metadata(part)[key]
    if type(found) is not int or found < 0:
        raise _broken(part.path, f"its {key} is {str(found)[:40]!r} instead of a count")
    return found


def _check_parts(parts: list[Part]) -> None:
    names: dict[str, Path] = {}
    for index, part in enumerate(parts):
        number, count = _split_number(part, "split.no"), _split_number(part, "split.count")
        if number not in (None, index) or count not in (None, len(parts)):
            raise UserError(
                f"{part.path} calls itself part {(number or 0) + 1} of {count or len(parts)}: give "
                f"the parts their own names back, or download them again."
            )
        for name in part.tensors:
            if name in names:
                raise UserError(
                    f"the tensor {_shown(name)} is both in {names[name]} and in {part.path}: "
                    f"download the parts again."
                )
            names[name] = part.path
    total = _split_number(parts[0], "split.tensors.count")
    if total not in (None, len(names)):
        raise UserError(
            f"{parts[0].path} and its other parts hold {len(names)} tensors instead of {total}: "
            f"download the parts again."
        )


def _shown(name: str) -> str:
    """A name from a file, fit for one line of a terminal."""
    short = name if len(name) <= 80 else name[:77] + "..."
    return short if short.isprintable() else ascii(short)


def _gguf_version() -> str:
    from importlib.metadata import version

    return version("gguf")


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path} is no readable GGUF file: {why}; download it again.")
