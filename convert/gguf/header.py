"""Read the header of a GGUF file, checking everything in it before it is used.

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
    u32      GGML type, which sets the number of weights in a block, of which ne0 is a multiple,
             and the number of bytes in a block
    u64      offset of the tensor's data, counted from the beginning of the data section

    zeros up to the next multiple of general.alignment (a power of two, 32 unless given); there the
    data section begins, and every offset in it is a multiple of the same alignment

A large model may be split into NAME-00001-of-0000N.gguf and so on. Every part is a GGUF file; the
first has the metadata, all have split.no (from 0), split.count and split.tensors.count.

gguf-py's own reader fails assertions, loops or allocates without end on damaged files, and does not
tell where in the file a value is stored; so this module has its own parser. It checks counts,
lengths, types, UTF-8, offsets and sizes. It needs as much memory as the header is long; data are
not read.
"""

from __future__ import annotations

import codecs
import math
import os
import struct
from array import array
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert.base.errors import UserError
from convert.gguf.layout import (
    ALIGNMENT,
    Field,
    Part,
    TensorEntry,
    aligned,
    in_data_order,
    state_of,
)
from convert.gguf.values import FORMATS, U64, VALUE_TYPES

MAGIC = b"GGUF"

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

_TYPES = {int(kind): kind for kind in GGMLQuantizationType if kind in gguf.GGML_QUANT_SIZES}


class _Cursor:
    """Reads a header from its start, and no more of the file than the header is long.

    Attributes:
        at: the next byte to be read, counted from the start of the file.
        what: the name of the part that is being read, for messages.
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
        """Number of bytes of the file that have not been read."""
        return self.size - self.at

    def reach(self, end: int) -> None:
        """Read the file's bytes up to ``end`` into the buffer."""
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
        """Read the next ``count`` bytes."""
        self.reach(self.at + count)
        found = bytes(self.buffer[self.at : self.at + count])
        self.at += count
        return found

    def u32(self) -> int:
        return int.from_bytes(self.bytes(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.bytes(8), "little")

    def name(self, what: str, longest: int) -> str:
        """Read a key or a tensor's name of 1 to ``longest`` bytes; ``what`` describes it."""
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
        """Check and skip a value; return the type of an array's items, None for other values."""
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
        """Check and skip many strings quickly: a vocabulary has hundreds of thousands."""
        if count > _MAX_STRINGS:
            raise self.broken(f"{self.what} claims {count} strings, more than any vocabulary has")
        start, at = self.at, self.at
        buffer, have, length_at = self.buffer, len(self.buffer), U64.unpack_from
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
        """Check that the bytes from ``start`` to here are UTF-8.

        Args:
            start: the first byte.
            lengths: of the strings of an array, whose length fields between them are not checked.
        """
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
        if number not in VALUE_TYPES:
            raise self.broken(f"{self.what} is of value type {number}, which does not exist")
        return VALUE_TYPES[number]

    def _too_long(self, what: str, length: int) -> UserError:
        return self.broken(
            f"{self.what} claims {what} of at least {length} bytes where {self.left} are left, so "
            f"it is truncated or damaged"
        )

    def broken(self, why: str) -> UserError:
        return broken(self.path, why)


def read_part(path: Path, descriptor: int, index: int) -> Part:
    """Read and check the header of one file.

    Args:
        path: the file, for messages.
        descriptor: of the file, open for reading.
        index: which part of a split model the file is, counted from 0.

    Raises:
        UserError: naming the file and what to do, when it is damaged or of an unsupported kind.
    """
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
        cursor.what = f"the metadata {shown_name(key)}"
        if key in fields:
            raise cursor.broken(f"the metadata key {shown_name(key)} occurs twice")
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
            raise cursor.broken(f"the tensor {shown_name(entry.name)} occurs twice")
        tensors[entry.name] = entry
        entries[entry.name] = (start, cursor.at)
    header = bytes(cursor.buffer[: cursor.at])
    data_start = aligned(len(header), alignment)
    tensors = {
        name: replace(entry, offset=data_start + entry.offset) for name, entry in tensors.items()
    }
    _check_data(path, status.st_size, tensors)
    return Part(
        path=path,
        size=status.st_size,
        state=state_of(status),
        header=header,
        fields=fields,
        tensors=tensors,
        entries=entries,
        alignment=alignment,
        data_start=data_start,
    )


def _check_start(path: Path, start: bytes, size: int) -> None:
    """Check a file's magic and version, and recognize common files that are no GGUF."""
    if size < 24:
        raise broken(path, f"it has only {size} bytes, which is less than a header")
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
        raise broken(path, f"it begins with {start[:4]!r} instead of {MAGIC!r}")
    if little not in (2, 3):
        mend = (
            "get a newer file of the model"
            if little == 1
            else "download it again, or update abl-mlx if the format is that new"
        )
        raise UserError(
            f"{path} is in version {little} of GGUF, but only versions 2 and 3 are known here: "
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
    """Read a tensor's entry, with its offset counted from the beginning of the data section."""
    name = cursor.name(f"the name of {which}", 63)
    shown = shown_name(name)
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
            f"{version('gguf')} does not know: pip install -U gguf, or get the model in another "
            f"type."
        )
    kind = _TYPES[number]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Sizes of 0 count as 1: NumPy also limits the product of the other dimensions.
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


def _check_data(path: Path, size: int, tensors: Mapping[str, TensorEntry]) -> None:
    end, before = 0, ""
    for entry in in_data_order(tensors):
        if entry.offset < end:
            raise broken(
                path, f"the data of {shown_name(entry.name)} overlap those of {shown_name(before)}"
            )
        end, before = entry.offset + entry.nbytes, entry.name
        if end > size:
            raise broken(
                path,
                f"the data of {shown_name(entry.name)} would end at byte {end} of a file of "
                f"{size}, so it is truncated",
            )


def shown_name(name: str) -> str:
    """A name from a file, made safe and short for one line of a terminal."""
    short = name if len(name) <= 80 else name[:77] + "..."
    return short if short.isprintable() else ascii(short)


def broken(path: Path, why: str) -> UserError:
    """The error to raise for a damaged file; ``why`` says what is wrong."""
    return UserError(f"{path} is no readable GGUF file: {why}; download it again.")
