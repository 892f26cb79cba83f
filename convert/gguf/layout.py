"""Where things lie in a GGUF file: its metadata pairs and its tensors, in bytes.

The format is described in `convert.gguf.header`, which reads these records.
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
"""The metadata key of what every tensor's offset is a multiple of, in bytes."""


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


def row_bytes(kind: GGMLQuantizationType, width: int) -> int:
    """Bytes of ``width`` weights, a multiple of the type's block, in this type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(width // block * size)


def aligned(offset: int, alignment: int) -> int:
    """The next multiple of ``alignment``."""
    return -(-offset // alignment) * alignment


def in_data_order(tensors: Mapping[str, TensorEntry]) -> list[TensorEntry]:
    """Tensors of one file as their data follow each other."""
    return sorted(tensors.values(), key=lambda entry: (entry.offset, entry.nbytes))


def state_of(status: os.stat_result) -> tuple[int, ...]:
    """What tells when a file is changed or replaced: its length, time of change and inode."""
    return status.st_size, status.st_mtime_ns, status.st_ino
