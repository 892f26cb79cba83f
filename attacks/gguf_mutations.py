"""Mutations of a GGUF that keep its structure: header, metadata, entries of tensors, data.

The reader and the writer in this module are minimal, and independent of the tool's own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from attacks import mutations

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Pair:
    """A metadata pair: its key, the number of its type, and its value as bytes."""

    key: bytes
    kind: int
    value: bytes


@dataclass(frozen=True)
class Entry:
    """A tensor's name, dimensions in the file's order, type and offset."""

    name: bytes
    dimensions: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class File:
    """A file, divided into its parts."""

    pairs: tuple[Pair, ...]
    entries: tuple[Entry, ...]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int, int] | None = None

    def __bytes__(self) -> bytes:
        tensors, pairs = self.counts or (len(self.entries), len(self.pairs))
        head = self.magic + struct.pack("<IQQ", _u32(self.version), _u64(tensors), _u64(pairs))
        head += b"".join(
            _text(p.key) + struct.pack("<I", _u32(p.kind)) + p.value for p in self.pairs
        )
        for entry in self.entries:
            shape = [_u64(size) for size in entry.dimensions]
            head += _text(entry.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            head += struct.pack("<IQ", _u32(entry.kind), _u64(entry.offset))
        return head + bytes(-len(head) % 32) + self.data


def _u32(value: int) -> int:
    return value % (1 << 32)


def _u64(value: int) -> int:
    return value % (1 << 64)


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def read(raw: bytes) -> File:
    """Read a sound file into its parts."""
    at = 24

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", raw, at)
        at += struct.calcsize(f"<{form}")
        return value

    def text() -> bytes:
        nonlocal at
        size = take("Q")
        at += size
        return raw[at - size : at]

    def skip(kind: int) -> None:
        nonlocal at
        if kind == _STRING:
            text()
        elif kind == _ARRAY:
            item, count = take("I"), take("Q")
            for _ in range(count):
                skip(item)
        else:
            at += struct.calcsize(_SCALARS[kind])

    tensors, metadata = struct.unpack_from("<QQ", raw, 8)
    pairs = []
    for _ in range(metadata):
        key, kind = text(), take("I")
        start = at
        skip(kind)
        pairs.append(Pair(key, kind, raw[start:at]))
    entries = []
    for _ in range(tensors):
        name, rank = text(), take("I")
        shape = tuple(take("Q") for _ in range(rank))
        entries.append(Entry(name, shape, take("I"), take("Q")))
    return File(tuple(pairs), tuple(entries), raw[at + (-at % 32) :])


def mutate(rng: Random, raw: bytes) -> bytes:
    """Change one or several parts of the file."""
    if rng.random() < 0.1:
        return mutations.bytes_of(rng, raw)
    file = read(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        file = rng.choice([_header, _metadata, _metadata, _metadata, _entry, _entry, _data])(
            rng, file
        )
    return bytes(file)


def _integer(rng: Random, old: int) -> int:
    near = [old + 1, old - 1, old * 2, old // 2, 0, old * 1000]
    return int(
        rng.choice([*near, rng.choice([n for n in mutations.NUMBERS if isinstance(n, int)])])
    )


def _header(rng: Random, file: File) -> File:
    what = rng.randrange(3)
    if what == 0:
        return replace(file, version=_integer(rng, file.version))
    if what == 1:
        return replace(file, magic=mutations.bytes_of(rng, file.magic)[:4].ljust(4, b"\0"))
    counts = [len(file.entries), len(file.pairs)]
    which = rng.randrange(2)
    counts[which] = _integer(rng, counts[which])
    return replace(file, counts=(counts[0], counts[1]))


def _metadata(rng: Random, file: File) -> File:
    pairs = list(file.pairs)
    if not pairs:
        return file
    at = rng.randrange(len(pairs))
    pair = pairs[at]
    what = rng.randrange(8)
    if what == 0:
        del pairs[at]
    elif what == 1:
        pairs.insert(rng.randrange(len(pairs)), pair)
    elif what == 2:
        pairs[at] = replace(pair, key=_name(rng, pair.key))
    elif what == 3:
        kind, packed = _any_value(rng)
        pairs[at] = Pair(pair.key, kind, packed)
    elif what == 4:
        pairs[at] = replace(pair, kind=rng.choice([*_SCALARS, _STRING, _ARRAY, 13, 255]))
    else:
        pairs[at] = replace(pair, value=_value(rng, pair.kind, pair.value))
    return replace(file, pairs=tuple(pairs))


def _name(rng: Random, old: bytes) -> bytes:
    new = mutations.text(rng, old.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
    return new[:200] if rng.random() < 0.8 else mutations.bytes_of(rng, old)


def _any_value(rng: Random) -> tuple[int, bytes]:
    kind = rng.choice([*_SCALARS, _STRING, _ARRAY])
    return kind, _fresh(rng, kind)


def _fresh(rng: Random, kind: int) -> bytes:
    if kind == _STRING:
        return _text(rng.choice(mutations.TEXTS).encode("utf-8", "surrogatepass"))
    if kind == _ARRAY:
        item = rng.choice([*_SCALARS, _STRING])
        count = rng.choice([0, 1, 3, 512])
        return struct.pack("<IQ", item, count) + b"".join(_fresh(rng, item) for _ in range(count))
    form = _SCALARS[kind]
    if form == "?":
        return bytes([rng.choice([0, 1, 2])])
    number = mutations.number(rng)
    if form in "fd":
        try:
            return struct.pack(f"<{form}", float(number))
        except OverflowError:
            return struct.pack(f"<{form}", float("inf"))
    size = struct.calcsize(form)
    whole = int(number) if number == number and abs(number) != float("inf") else 0
    return (whole % (1 << (8 * size))).to_bytes(size, "little")


def _value(rng: Random, kind: int, old: bytes) -> bytes:
    """A value of the same type, changed."""
    if kind == _STRING:
        changed = mutations.text(rng, old[8:].decode("utf-8", "replace"))
        return _text(changed.encode("utf-8", "surrogatepass"))
    if kind in _SCALARS:
        return _fresh(rng, kind)
    # An array may have been changed by an earlier mutation.
    if kind != _ARRAY or len(old) < 12 or old[0] not in (*_SCALARS, _STRING):
        return mutations.bytes_of(rng, old)
    item, count = struct.unpack_from("<IQ", old)
    items = old[12:]
    what = rng.randrange(4)
    if what == 0:  # its length differs from what it says
        return struct.pack("<IQ", item, _u64(_integer(rng, count))) + items
    if what == 1:
        return struct.pack("<IQ", item, 0)
    parts = _items(item, count, items)
    if parts is None or not parts:
        return struct.pack("<IQ", item, count) + mutations.bytes_of(rng, items)
    if what == 2:
        parts = parts[: rng.randrange(len(parts) + 1)]
    for _ in range(rng.choice([1, 1, 5, 50])):
        if parts:
            parts[rng.randrange(len(parts))] = rng.choice([_fresh(rng, item), rng.choice(parts)])
    return struct.pack("<IQ", item, len(parts)) + b"".join(parts)


def _items(item: int, count: int, data: bytes) -> list[bytes] | None:
    """The bytes of each item of an array."""
    if item == _ARRAY:
        return None
    parts: list[bytes] = []
    at = 0
    for _ in range(count):
        if at + 8 > len(data) and item == _STRING:
            return None
        if item == _STRING:
            (length,) = struct.unpack_from("<Q", data, at)
            size = 8 + length
        else:
            size = struct.calcsize(_SCALARS[item])
        parts.append(data[at : at + size])
        at += size
    return parts


def _entry(rng: Random, file: File) -> File:
    entries = list(file.entries)
    if not entries:
        return file
    at = rng.randrange(len(entries))
    entry = entries[at]
    what = rng.randrange(7)
    if what == 0:
        del entries[at]
    elif what == 1:
        entries.insert(rng.randrange(len(entries)), entry)
    elif what == 2:
        entries[at] = replace(entry, name=_name(rng, entry.name))
    elif what == 3:
        shape = [*entry.dimensions]
        if shape and rng.random() < 0.7:
            which = rng.randrange(len(shape))
            shape[which] = _integer(rng, shape[which])
        else:
            shape = rng.choice([shape[::-1], [*shape, 1], shape[:-1], [], [1] * 5])
        entries[at] = replace(entry, dimensions=tuple(shape))
    elif what == 4:
        entries[at] = replace(entry, kind=rng.choice([*range(42), 255, 2**32 - 1]))
    elif what == 5:
        entries[at] = replace(entry, offset=_integer(rng, entry.offset))
    else:
        other = rng.randrange(len(entries))
        entries[at], entries[other] = (
            replace(entry, name=entries[other].name),
            replace(entries[other], name=entry.name),
        )
    return replace(file, entries=tuple(entries))


def _data(rng: Random, file: File) -> File:
    data = bytearray(file.data)
    if rng.random() < 0.4 or not file.entries:
        return replace(file, data=mutations.bytes_of(rng, bytes(data)))
    # NaN, infinity or noise at the start of a tensor, in one of the float types
    start = rng.choice(file.entries).offset
    fill = rng.choice(
        [b"\x00\x7e", b"\x00\x7c", b"\x00\x00\xc0\x7f", b"\xff", b"\0", rng.randbytes(64)]
    )
    count = rng.choice([1, 2, 100])
    piece = (fill * count)[: max(0, len(data) - start)]
    data[start : start + len(piece)] = piece
    return replace(file, data=bytes(data))
