"""Importance matrices: how large the inputs of each matrix of a model are, column by column.

An importance matrix has, for each matrix and each of its input columns, the mean of the squared
inputs over the tokens of some text. A quantizer that weights the squared error of a column by it
keeps the matrix's outputs nearer to what they were.

Two forms are read, those of llama.cpp's llama-imatrix:

- a GGUF with the tensors NAME.in_sum2 (sums of squares: E rows of n columns, E > 1 for experts) and
  NAME.counts (the number of inputs, for each row), and the keys imatrix.datasets,
  imatrix.chunk_count and imatrix.chunk_size;
- the older binary form: the number of entries, then for each entry the length of its name, the
  name, the number of calls, the number of values, and the values (sums of means, which are divided
  by the number of calls); then the number of chunks, and the length and the text of a data set's
  name. Numbers are int32 and float32, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from convert.base.atomic import check_new, new_file
from convert.base.errors import UserError
from convert.gguf.file import GgufSource

SUMS, COUNTS = ".in_sum2", ".counts"
"""Endings of the names of an importance matrix's tensors."""

CHUNK = 512
"""Tokens of a chunk, in which llama.cpp counts the text."""

_MEND = "make it anew, by `measure` or by llama-imatrix"
_LONGEST_NAME = 1 << 10


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.

    Attributes:
        path: its file.
        entries: name of a GGUF tensor -> float32, (E, n): the mean squares of its input columns,
            for each of E experts; E = 1 for a single matrix.
        datasets: names of the texts that it was made from.
        chunks: in how many chunks of text; 0 where the file does not say.
    """

    path: Path
    entries: Mapping[str, np.ndarray]
    datasets: tuple[str, ...] = ()
    chunks: int = 0

    def weights(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The importance of a tensor's input columns: float32, (E, n); None if it has none.

        Args:
            name: the tensor's GGUF name.
            shape: in NumPy's order: (out, n) or (E, out, n).

        Raises:
            UserError: when the file has it for a tensor of another shape.
        """
        found = self.entries.get(name)
        if found is None:
            return None
        experts = shape[0] if len(shape) > 2 else 1
        if found.size != experts * shape[-1]:
            if name == "token_embd.weight":
                return None  # llama.cpp does not use it either
            raise UserError(
                f"{self.path} has {found.size} values for {name}, which has {experts} x "
                f"{shape[-1]} input columns: it was made from another model."
            )
        return found.reshape(experts, shape[-1])

    def check(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """Check that it belongs to a model with these tensors.

        Raises:
            UserError: when it has nothing for any of them, or for one of another shape.
        """
        found = [name for name, shape in tensors.items() if self.weights(name, shape) is not None]
        if not found:
            raise UserError(
                f"{self.path} has no tensor of this model, but {next(iter(self.entries))} and the "
                "like: it was made from another model."
            )

    def metadata(self) -> dict[str, Any]:
        """The keys that llama-quantize writes into a GGUF made with it."""
        return {
            "quantize.imatrix.file": self.path.name,
            **({"quantize.imatrix.dataset": self.datasets[0]} if self.datasets else {}),
            "quantize.imatrix.entries_count": len(self.entries),
            **({"quantize.imatrix.chunks_count": self.chunks} if self.chunks else {}),
        }


def read(path: Path) -> Imatrix:
    """Read an importance matrix in either form.

    Raises:
        UserError: when the file is missing, is no importance matrix, is damaged, or holds a value
            that is no mean of squares.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file: give the path of an importance matrix.")
    try:
        with path.open("rb") as stream:
            is_gguf = stream.read(4) == b"GGUF"
        found = _read_gguf(path) if is_gguf else _read_binary(path, path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    for name, values in found.entries.items():
        if not np.isfinite(values).all() or values.min() < 0:
            raise UserError(f"{path} has a value for {name} that is no mean of squares: {_MEND}.")
    return found


def check_name(path: Path) -> None:
    """Check the name of an importance matrix that is to be written.

    Raises:
        UserError: when it does not end in .gguf.
    """
    if path.suffix.lower() != ".gguf":
        raise UserError(f"{path}: the name of an importance matrix ends in .gguf.")


def given(path: Path | None) -> Imatrix | None:
    """The importance matrix in a file, or None without a file."""
    return None if path is None else read(path)


def write(
    path: Path,
    sums: Mapping[str, np.ndarray],
    counts: Mapping[str, np.ndarray],
    datasets: Sequence[str],
    tokens: int,
) -> None:
    """Write an importance matrix in llama.cpp's GGUF form.

    Args:
        path: the file, which must not exist.
        sums: GGUF tensor name -> sums of squared inputs, (E, n).
        counts: the same names -> the number of inputs, (E,).
        datasets: names of the texts.
        tokens: the number of tokens in all texts.

    Raises:
        UserError: when the file exists or cannot be written.
    """
    check_new(path)
    with new_file(path) as partial:
        writer = gguf.GGUFWriter(partial, "")
        writer.kv_data[0].pop("general.architecture", None)
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", list(datasets) or ["unnamed"])
        writer.add_uint32("imatrix.chunk_count", max(1, -(-tokens // CHUNK)))
        writer.add_uint32("imatrix.chunk_size", CHUNK)
        for name in sorted(sums):
            writer.add_tensor(name + SUMS, np.ascontiguousarray(sums[name], np.float32))
            count = np.ascontiguousarray(counts[name], np.float32).reshape(-1, 1)
            writer.add_tensor(name + COUNTS, count)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _read_gguf(path: Path) -> Imatrix:
    with GgufSource(path) as source:
        names = [name.removesuffix(SUMS) for name in source.tensors if name.endswith(SUMS)]
        if not names:
            raise UserError(f"{path} is a GGUF, but no importance matrix: {_MEND}.")
        entries = {name: _means(source, path, name) for name in sorted(names)}
        said = source.metadata.get("imatrix.datasets")
        chunks = source.metadata.get("imatrix.chunk_count")
    return Imatrix(
        path,
        entries,
        tuple(said) if isinstance(said, list) else (),
        chunks if type(chunks) is int else 0,
    )


def _means(source: GgufSource, path: Path, name: str) -> np.ndarray:
    if name + COUNTS not in source.tensors:
        raise UserError(f"{path} has {name}{SUMS}, but no {name}{COUNTS}: {_MEND}.")
    sums, counts = source.values(name + SUMS), source.values(name + COUNTS).reshape(-1)
    if not counts.size or sums.size % counts.size:
        raise UserError(f"{path} has {counts.size} counts for {sums.size} sums of {name}: {_MEND}.")
    counts = np.rint(counts).astype(np.float32).reshape(-1, 1)
    sums = sums.reshape(len(counts), -1)
    # An expert that saw no token has no preference among its columns.
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)


def _read_binary(path: Path, data: bytes) -> Imatrix:
    reader = _Reader(path, data)
    entries = {}
    for _ in reader.counted(1):
        name = reader.text()
        calls = reader.number()
        values = reader.floats(reader.number())
        entries[name] = (values / np.float32(calls) if calls > 0 else values).reshape(1, -1)
    chunks = reader.number() if reader.left else 0
    dataset = reader.text() if reader.left else ""
    return Imatrix(path, entries, (dataset,) if dataset else (), max(0, chunks))


class _Reader:
    """Reads the binary form, and refuses what is shorter than it says."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at = path, data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise UserError(f"{self.path} is no importance matrix, or it is damaged: {_MEND}.")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])

    def counted(self, least: int) -> Iterable[int]:
        count = self.number()
        # An entry takes 13 bytes or more, which bounds what a damaged count can ask for.
        if not least <= count <= self.left // 13:
            self.take(-1)
        return range(count)

    def text(self) -> str:
        length = self.number()
        if length > _LONGEST_NAME:
            self.take(-1)
        return self.take(length).decode("utf-8", "replace")

    def floats(self, count: int) -> np.ndarray:
        if count < 1:
            self.take(-1)
        return np.frombuffer(self.take(4 * count), "<f4").astype(np.float32)
