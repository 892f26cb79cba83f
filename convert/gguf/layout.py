"""Records of where the metadata pairs and the tensors of a GGUF file lie, in bytes.

`convert.gguf.header` describes the format and makes these records from a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType, GGUFValueType

ALIGNMENT = "general.alignment"
"""The metadata key with the alignment: every tensor's offset is a multiple of it, in bytes."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies and how it is stored.

    Attributes:
        name: its GGUF name.
        type: its GGML type.
        shape: in NumPy's order, the slowest dimension first: (out, in) or (experts, out, in).
        part: index into `GgufSource.parts`.
        offset: its first byte, counted from the start of that file.
        nbytes: its length in bytes.
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
        type: the type of the value.
        item: the type of an array's items; None for other values.
        start: where the pair begins, with the length of its key.
        value: where the value begins; that of an array begins with its item type and its count.
        end: where the pair ends.
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
        size: its length in bytes.
        state: `state_of` the file when it was opened, which shows later changes.
        header: the file's bytes up to the end of the last tensor's entry.
        fields: key -> where its pair lies, in file order.
        tensors: name -> entry, in file order.
        entries: tensor name -> (start, end) of its entry in the header, in bytes.
        alignment: every offset is a multiple of this many bytes.
        data_start: the byte where the data section begins, after header and padding.
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


def row_bytes(kind: GGMLQuantizationType, width: int) -> int:
    """Bytes that ``width`` weights take in this type; ``width`` is a multiple of its block size."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(width // block * size)


def aligned(offset: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` that is at least ``offset``."""
    return -(-offset // alignment) * alignment


def in_data_order(tensors: Mapping[str, TensorEntry]) -> list[TensorEntry]:
    """The tensors of one file in the order of their data."""
    return sorted(tensors.values(), key=lambda entry: (entry.offset, entry.nbytes))


def state_of(status: os.stat_result) -> tuple[int, ...]:
    """A file's length, time of change and inode, which show that it was changed or replaced."""
    return status.st_size, status.st_mtime_ns, status.st_ino
