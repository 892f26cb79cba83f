"""Pieces of a GGUF that is written: ranges of source files, new bytes, new tensors.

Ranges that follow each other are joined, and are copied by one call of the operating system. Only
new tensors pass through this process's memory, one chunk at a time.
"""

from __future__ import annotations

import errno
import io
import math
import os
import struct
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from convert.base.errors import UserError
from convert.gguf.layout import TensorEntry, row_bytes

# Bytes copied at a time; Ctrl-C is noticed and progress reported between two such copies.
_COPY = 1 << 26
_BUFFER = 1 << 20

# After this number of bytes the disk gets what was written, while more is made.
_FLUSH = 1 << 26

# How many chunks are made at the same time.
_AT_ONCE = 2

#: New bytes, or a function that makes them and may be called in a thread. All those before it are
#: finished when its result is used, which may therefore hold what they made.
Chunk = np.ndarray | bytes | Callable[[], np.ndarray | bytes]


@dataclass(frozen=True)
class Replacement:
    """New data of a tensor.

    Attributes:
        type: the GGML type in which the data are encoded.
        shape: in NumPy's order: (out, in) or (experts, out, in).
        chunks: called once, when the tensor is to be written; returns arrays or bytes, which are
            written one after the other, or functions that make them and may be called in threads.
            Their total length must be that of the type and shape.
    """

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Chunk]]

    @property
    def nbytes(self) -> int:
        """The total length of the chunks in bytes."""
        return math.prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])


def made(chunk: Chunk) -> np.ndarray | bytes:
    """The bytes of a chunk."""
    return chunk() if callable(chunk) else chunk


@dataclass(frozen=True)
class Range:
    """A range of bytes of a part of the source."""

    start: int
    end: int
    part: int = 0

    def is_before(self, other: Range) -> bool:
        """Whether the other range begins where this one ends."""
        return self.part == other.part and self.end == other.start


@dataclass(frozen=True)
class New:
    """The new data of a tensor, as a piece of the file."""

    name: str
    replacement: Replacement


Piece = Range | bytes | bytearray | New

#: What is written of a piece at a time, when it is there.
Part = Range | np.ndarray | bytes | bytearray


def length(piece: Piece) -> int:
    if isinstance(piece, Range):
        return piece.end - piece.start
    return piece.replacement.nbytes if isinstance(piece, New) else len(piece)


class Plan:
    """The pieces of one file in order; neighbouring ranges of the source are joined."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.length = 0

    def add(self, piece: Piece) -> None:
        size = length(piece)
        if size == 0 and not isinstance(piece, New):
            return
        self.length += size
        last = self.pieces[-1] if self.pieces else None
        if isinstance(piece, Range) and isinstance(last, Range) and last.is_before(piece):
            self.pieces[-1] = Range(last.start, piece.end, piece.part)
        elif isinstance(piece, bytes) and isinstance(last, bytearray):
            last += piece
        elif isinstance(piece, bytes):
            self.pieces.append(bytearray(piece))
        else:
            self.pieces.append(piece)


def entry_bytes(entry: TensorEntry, new: Replacement | None, offset: int) -> bytes:
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


def write(
    target: int,
    source: Callable[[int], int],
    pieces: list[Piece],
    advance: Callable[[int], None],
) -> None:
    """Write the pieces to the end of an open file.

    Args:
        target: the file's descriptor.
        source: gives the descriptor of a part of the source.
        pieces: what to write.
        advance: called with the number of bytes just written.
    """
    copiers: dict[int, _Copier] = {}
    lengths: Counter[str] = Counter()
    with _Writer(target, advance) as writer, closing(_in_order(_parts(pieces))) as parts:
        for piece, part in parts:
            if isinstance(part, Range):
                if part.part not in copiers:
                    copiers[part.part] = _Copier(source(part.part), target)
                writer.range(copiers[part.part], part)
                continue
            data = _bytes_of(part)
            if isinstance(piece, New):
                lengths[piece.name] += len(data)
                _check_length(piece, lengths[piece.name], complete=False)
            writer.chunk(data)
    for piece in pieces:
        if isinstance(piece, New):
            _check_length(piece, lengths[piece.name], complete=True)


def _parts(pieces: list[Piece]) -> Iterator[tuple[Piece, Part | Chunk]]:
    """Every piece with what is written of it, one after the other."""
    for piece in pieces:
        if not isinstance(piece, New):
            yield piece, piece
            continue
        for chunk in piece.replacement.chunks():
            yield piece, chunk


def _in_order(
    parts: Iterator[tuple[Piece, Part | Chunk]],
) -> Generator[tuple[Piece, Part], None, None]:
    """Yield the same in order; functions are called in threads while the next parts are found."""
    waiting: deque[tuple[Piece, Any]] = deque()
    pool = ThreadPoolExecutor(_AT_ONCE, "chunks")
    try:
        for piece, part in parts:
            waiting.append((piece, pool.submit(part) if callable(part) else part))
            while waiting and _is_next(waiting):
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _is_next(waiting: deque[tuple[Piece, Any]]) -> bool:
    """Whether the first part is there, or has to be waited for because memory holds enough."""
    first = waiting[0][1]
    held = sum(not isinstance(part, Range) for _, part in waiting)
    return not isinstance(first, Future) or first.done() or held > _AT_ONCE


def _result(piece: Piece, part: Any) -> tuple[Piece, Part]:
    return piece, part.result() if isinstance(part, Future) else part


def _check_length(piece: New, found: int, *, complete: bool) -> None:
    expected = piece.replacement.nbytes
    if found > expected or (complete and found < expected):
        more = "at least " if found > expected else ""
        raise ValueError(
            f"the new {piece.name} has {more}{found} bytes instead of {expected}, which "
            f"{piece.replacement.type.name} of shape {piece.replacement.shape} takes"
        )


class _Writer:
    """Writes to the end of a file in a thread of its own, while the next chunk is made.

    A context manager, at whose end everything is written. At most one chunk waits to be written,
    because chunks are in memory; ranges are not, so any number of them may wait. An error of
    writing is raised by the next call.
    """

    def __init__(self, target: int, advance: Callable[[int], None]) -> None:
        self._target, self._advance = target, advance
        self._pool = ThreadPoolExecutor(1, "writer")
        self._waiting: deque[Future[int]] = deque()
        self._chunk: Future[int] | None = None
        self._unflushed = 0

    def chunk(self, data: memoryview) -> None:
        """Write bytes, which nobody changes any more."""
        self._check(self._chunk)
        self._chunk = self._pool.submit(self._flushed, _write_all, self._target, data)
        self._waiting.append(self._chunk)

    def range(self, copier: _Copier, piece: Range) -> None:
        """Copy a range of the source."""
        for start in range(piece.start, piece.end, _COPY):
            end = min(piece.end, start + _COPY)
            self._waiting.append(self._pool.submit(self._flushed, copier.whole, start, end))
        self._check(None)

    def _flushed(self, write: Callable[..., int], *arguments: Any) -> int:
        """Write, in the thread; the disk works meanwhile, which leaves it little for the end."""
        count = write(*arguments)
        self._unflushed += count
        if self._unflushed >= _FLUSH:
            os.fsync(self._target)
            self._unflushed = 0
        return count

    def _check(self, until: Future[int] | None) -> None:
        """Report what is written by now, and wait for all up to one piece of work."""
        while self._waiting and (self._waiting[0].done() or until in self._waiting):
            self._advance(self._waiting.popleft().result())

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            if raised[0] is None and self._waiting:
                self._check(self._waiting[-1])
        finally:
            self._pool.shutdown(cancel_futures=True)


def _bytes_of(chunk: np.ndarray | bytes | bytearray) -> memoryview:
    if isinstance(chunk, np.ndarray):
        return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
    return memoryview(chunk)


def _write_all(target: int, data: memoryview) -> int:
    view = data
    while len(view):
        view = view[os.write(target, view) :]
    return len(data)


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

    def whole(self, start: int, end: int) -> int:
        """Copy all bytes from ``start`` to ``end``; return how many."""
        at = start
        while at < end:
            at += self(at, end - at)
        return end - start

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
