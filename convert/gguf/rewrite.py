"""Write a GGUF file again with some tensors and metadata changed, all other bytes unchanged.

A file to be written is a list of pieces in order: ranges of the source, new bytes, new tensors.
Ranges that follow each other are joined: a file without changes is a single range, and everything
between two changed tensors is copied by one call of the operating system. Only new tensors pass
through this process's memory, one chunk at a time.
"""

from __future__ import annotations

import errno
import io
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from convert.base.atomic import check_new, new_file
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.gguf.layout import ALIGNMENT, Part, TensorEntry, aligned, in_data_order, row_bytes
from convert.gguf.parts import part_paths
from convert.gguf.values import Value, encode_pair

_FIXED = ("general.architecture", ALIGNMENT, "split.no", "split.count", "split.tensors.count")

# Bytes copied at a time; Ctrl-C is noticed and progress reported between two such copies.
_COPY = 1 << 26
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Replacement:
    """New data of a tensor.

    Attributes:
        type: the GGML type in which the data are encoded.
        shape: in NumPy's order: (out, in) or (experts, out, in).
        chunks: called once, when the tensor is to be written; returns arrays or bytes, which are
            written one after the other. Their total length must be that of the type and shape.
    """

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[np.ndarray | bytes]]

    @property
    def nbytes(self) -> int:
        """The total length of the chunks in bytes."""
        return math.prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])


def rewrite(
    source: GgufSource,
    out: Path,
    *,
    tensors: Mapping[str, Replacement] | None = None,
    metadata: Mapping[str, Value | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write ``source`` to ``out`` with some tensors and metadata changed.

    Every other tensor, key and value keeps its bytes and its order; so do padding and anything else
    in the file. A tensor's offset changes only when a tensor before it changes its length; the data
    section moves when the header changes its length. Either all files appear under their names,
    complete and flushed (the first part last), or none does.

    Args:
        source: an open GGUF; it is only read.
        out: must not exist; any name. A split source gives as many parts, whose names are those of
            ``part_paths(out, count)``.
        tensors: name -> its new data.
        metadata: key -> its new value, or None to remove the key. A key that exists keeps its place
            and, if it is a number that fits, its type; new keys come last. In a split model these
            are the keys of the first part.
        progress: called with (bytes written, bytes in all), counted over all parts.

    Returns:
        The files written.

    Raises:
        UserError: naming file, tensor or key, when a tensor does not exist or does not fit its
            type, a key belongs to the file's structure, an output exists or cannot be written, or
            the source changes meanwhile.
        ValueError: when a replacement's chunks are shorter or longer than its type and shape say.
    """
    tensors, metadata = tensors or {}, metadata or {}
    out = Path(out)
    for name, replacement in tensors.items():
        _check_replacement(source, name, replacement)
    paths = part_paths(out, len(source.parts))
    for path in paths:
        check_new(path)
    source.check_unchanged()
    plans = [
        _plan(part, tensors, _new_pairs(part, metadata) if index == 0 else {})
        for index, part in enumerate(source.layouts)
    ]
    total = sum(_length(piece) for plan in plans for piece in plan)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    ours: dict[Path, tuple[int, int]] = {}
    folders = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        with ExitStack() as stack:
            staged = [stack.enter_context(new_file(path)) for path in paths]
            for index, (partial, plan) in enumerate(zip(staged, plans, strict=True)):
                with open(partial, "wb", buffering=0) as stream:
                    _write(stream.fileno(), source.descriptor(index), plan, advance)
                    # A full disk raises here at the latest, before any file has its final name.
                    os.fsync(stream.fileno())
                    status = os.fstat(stream.fileno())
                ours[paths[index]] = (status.st_dev, status.st_ino)
            source.check_unchanged()
    except BaseException:
        _remove(ours, folders)
        raise
    return paths


def _remove(ours: Mapping[Path, tuple[int, int]], folders: list[Path]) -> None:
    """Remove the parts that had got their final names when another part failed to get its own."""
    for path, identity in ours.items():
        with suppress(OSError):
            status = os.lstat(path)
            if (status.st_dev, status.st_ino) == identity:
                path.unlink()
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _check_replacement(source: GgufSource, name: str, replacement: Replacement) -> None:
    source.tensor(name)
    kind, shape = replacement.type, replacement.shape
    if not 1 <= len(shape) <= 4 or min(shape) < 0:
        raise ValueError(f"{name} cannot have the shape {shape}")
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
        raise UserError(
            f"{name} has rows of {shape[-1]} weights, which do not fill {kind.name}'s blocks of "
            f"{block}: write it in another type."
        )


# --------------------------------------------------------------------------------------------------
# The order of the pieces


@dataclass(frozen=True)
class _Range:
    """A range of bytes of the source file."""

    start: int
    end: int


@dataclass(frozen=True)
class _New:
    """The new data of a tensor, as a piece of the file."""

    name: str
    replacement: Replacement


_Piece = _Range | bytes | bytearray | _New


def _length(piece: _Piece) -> int:
    if isinstance(piece, _Range):
        return piece.end - piece.start
    return piece.replacement.nbytes if isinstance(piece, _New) else len(piece)


class _Plan:
    """The pieces of one file in order; neighbouring ranges of the source are joined."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.length = 0

    def add(self, piece: _Piece) -> None:
        length = _length(piece)
        if length == 0 and not isinstance(piece, _New):
            return
        self.length += length
        last = self.pieces[-1] if self.pieces else None
        if isinstance(piece, _Range) and isinstance(last, _Range) and last.end == piece.start:
            self.pieces[-1] = _Range(last.start, piece.end)
        elif isinstance(piece, bytes) and isinstance(last, bytearray):
            last += piece
        elif isinstance(piece, bytes):
            self.pieces.append(bytearray(piece))
        else:
            self.pieces.append(piece)


def _new_pairs(part: Part, metadata: Mapping[str, Value | None]) -> dict[str, bytes]:
    """Key -> the bytes of its new pair, which are empty for a key to be removed."""
    pairs: dict[str, bytes] = {}
    for key, value in metadata.items():
        if key in _FIXED:
            raise UserError(f"{key} is fixed by the file and cannot be given as metadata.")
        if value is None:
            if key in part.fields:
                pairs[key] = b""
            continue
        old = part.fields.get(key)
        pairs[key] = encode_pair(key, value, (old.type, old.item) if old else None)
    return pairs


def _plan(
    part: Part, tensors: Mapping[str, Replacement], pairs: Mapping[str, bytes]
) -> list[_Piece]:
    plan = _Plan()
    removed = sum(not pair for pair in pairs.values())
    added = [pair for key, pair in pairs.items() if key not in part.fields]
    count = len(part.fields) - removed + len(added)
    plan.add(_Range(0, 16))
    plan.add(_Range(16, 24) if count == len(part.fields) else struct.pack("<Q", count))
    for key, field in part.fields.items():
        plan.add(pairs.get(key, _Range(field.start, field.end)))
    for pair in added:
        plan.add(pair)
    data, offsets = _plan_data(part, tensors)
    for name, entry in part.tensors.items():
        start, end = part.entries[name]
        moved = offsets[name] != entry.offset - part.data_start
        if name in tensors or moved:
            plan.add(_entry(entry, tensors.get(name), offsets[name]))
        else:
            plan.add(_Range(start, end))
    _add_padding(plan, part)
    for piece in data:
        plan.add(piece)
    return plan.pieces


def _plan_data(
    part: Part, tensors: Mapping[str, Replacement]
) -> tuple[list[_Piece], dict[str, int]]:
    """The pieces of the data section, and name -> offset of each tensor in that section."""
    pieces: list[_Piece] = []
    offsets: dict[str, int] = {}
    in_order = in_data_order(part.tensors)
    if not in_order:
        return pieces, offsets
    at = in_order[0].offset - part.data_start
    pieces.append(_Range(part.data_start, in_order[0].offset))
    following = [entry.offset for entry in in_order[1:]] + [part.size]
    for entry, next_start in zip(in_order, following, strict=True):
        offsets[entry.name] = at
        end = entry.offset + entry.nbytes
        new = tensors.get(entry.name)
        nbytes = entry.nbytes if new is None else new.nbytes
        pieces.append(_Range(entry.offset, end) if new is None else _New(entry.name, new))
        at += nbytes
        if nbytes != entry.nbytes:
            # New padding replaces the old; bytes after the old padding (usually none) stay.
            padding = aligned(at, part.alignment) - at
            pieces.append(bytes(padding))
            at += padding
            from_start = aligned(end - part.data_start, part.alignment)
            end = min(part.data_start + from_start, next_start)
        pieces.append(_Range(end, next_start))
        at += next_start - end
    return pieces, offsets


def _add_padding(plan: _Plan, part: Part) -> None:
    """Add the bytes between the header and the data, or after a header without data."""
    header_end = len(part.header)
    data_start = min(part.data_start, part.size)
    if plan.length == header_end:
        plan.add(_Range(header_end, data_start))
    elif part.tensors or data_start == part.data_start:
        plan.add(bytes(aligned(plan.length, part.alignment) - plan.length))
    if not part.tensors:
        plan.add(_Range(data_start, part.size))


def _entry(entry: TensorEntry, new: Replacement | None, offset: int) -> bytes:
    name = entry.name.encode("utf-8")
    kind, shape = (entry.type, entry.shape) if new is None else (new.type, new.shape)
    return struct.pack(
        f"<Q{len(name)}sI{len(shape)}QIQ",
        len(name),
        name,
        len(shape),
        *reversed(shape),
        kind,
        offset,
    )


# --------------------------------------------------------------------------------------------------
# Bytes


def _write(target: int, source: int, pieces: list[_Piece], advance: Callable[[int], None]) -> None:
    """Write the pieces to the end of the file ``target``."""
    copy = _Copier(source, target)
    for piece in pieces:
        if isinstance(piece, _New):
            _write_new(target, piece, advance)
        elif isinstance(piece, bytes | bytearray):
            _write_all(target, piece)
            advance(len(piece))
        else:
            at = piece.start
            while at < piece.end:
                count = copy(at, min(piece.end - at, _COPY))
                at += count
                advance(count)


def _write_new(target: int, piece: _New, advance: Callable[[int], None]) -> None:
    expected, found = piece.replacement.nbytes, 0
    for chunk in piece.replacement.chunks():
        data = memoryview(chunk) if isinstance(chunk, bytes) else _bytes_of(chunk)
        found += len(data)
        if found > expected:
            break
        _write_all(target, data)
        advance(len(data))
    if found != expected:
        more = "at least " if found > expected else ""
        raise ValueError(
            f"the new {piece.name} has {more}{found} bytes instead of {expected}, which "
            f"{piece.replacement.type.name} of shape {piece.replacement.shape} takes"
        )


def _bytes_of(chunk: np.ndarray) -> memoryview:
    return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data


def _write_all(target: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(target, view) :]


class _Copier:
    """Copies from one open file to the end of another, by the fastest way that works here.

    os.copy_file_range shares blocks on file systems that can; os.sendfile copies inside the kernel.
    macOS has neither for files, so there the bytes are read and written.
    """

    def __init__(self, source: int, target: int) -> None:
        self.source = source
        self.target = target
        self.stream: io.FileIO | None = None
        self.ways: list[Callable[[int, int], int]] = [self._read_write]
        for name in ("sendfile", "copy_file_range"):
            if hasattr(os, name):
                self.ways.append(getattr(self, f"_{name}"))

    def __call__(self, at: int, count: int) -> int:
        """Copy up to ``count`` bytes from the source's byte ``at`` on; return how many."""
        while True:
            try:
                copied = self.ways[-1](at, count)
            except OSError as error:
                # On a full disk the other ways would fail as well.
                if len(self.ways) == 1 or error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                copied = 0
            if copied:
                return copied
            if len(self.ways) == 1:
                raise UserError("the source became shorter while it was copied: start again.")
            self.ways.pop()

    def _copy_file_range(self, at: int, count: int) -> int:
        return int(getattr(os, "copy_file_range")(self.source, self.target, count, at))  # noqa: B009

    def _sendfile(self, at: int, count: int) -> int:
        return os.sendfile(self.target, self.source, at, count)

    def _read_write(self, at: int, count: int) -> int:
        if self.stream is None:
            self.stream = io.FileIO(self.source, closefd=False)
            self.buffer = memoryview(bytearray(_BUFFER))
        self.stream.seek(at)
        read = self.stream.readinto(self.buffer[:count])
        _write_all(self.target, self.buffer[:read])
        return read
