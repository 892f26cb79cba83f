"""Mutations of a safetensors file: of its header's length, its header and its data."""

from __future__ import annotations

import json
import struct
from random import Random

from attacks import mutations


def mutate(rng: Random, raw: bytes) -> bytes:
    """Change one part of the file."""
    (size,) = struct.unpack_from("<Q", raw)
    header, data = raw[8 : 8 + size], raw[8 + size :]
    what = rng.random()
    if what < 0.1:
        return mutations.bytes_of(rng, raw)
    if what < 0.2:
        wrong = rng.choice([0, 1, 2, size - 1, size + 1, len(raw), 2**31, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", wrong) + header + data
    if what < 0.35:
        return struct.pack("<Q", size) + header + _data(rng, data)
    changed = mutations.json_bytes(rng, header) if rng.random() < 0.6 else _entries(rng, header)
    return struct.pack("<Q", len(changed)) + changed + data


def _entries(rng: Random, header: bytes) -> bytes:
    """A tensor's type, shape or place changed."""
    entries = json.loads(header)
    names = [name for name in entries if name != "__metadata__"]
    for _ in range(rng.choice([1, 1, 3])):
        one = entries[rng.choice(names)]
        what = rng.randrange(4)
        if what == 0:
            one["dtype"] = rng.choice(
                [
                    "F64",
                    "F32",
                    "F16",
                    "BF16",
                    "I64",
                    "I8",
                    "U8",
                    "BOOL",
                    "U32",
                    "F8_E4M3",
                    "C64",
                    "X",
                ]
            )
        elif what == 1:
            one["shape"] = mutations.json_value(rng, one["shape"])
        elif what == 2:
            one["data_offsets"] = mutations.json_value(rng, one["data_offsets"])
        else:
            other = entries[rng.choice(names)]
            one["data_offsets"], one["shape"] = other["data_offsets"], other["shape"]
    return json.dumps(entries).encode()


def _data(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.5:
        return mutations.bytes_of(rng, data)
    at = rng.randrange(len(data) + 1) & ~3
    fill = rng.choice([b"\x00\x7e\x00\x7e", b"\x00\x7c\x00\x7c", b"\x00\x00\xc0\x7f", b"\xff" * 4])
    return data[:at] + fill + data[at + 4 :]
