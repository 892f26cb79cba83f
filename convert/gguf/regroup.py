"""A GGUF in other parts than its source: joined into one file, or split by size.

The layout of a split model is llama.cpp's (tools/gguf-split): the first part has all metadata, and
every part has its number, the number of parts and the number of all tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from gguf import GGUFValueType

from convert.gguf.file import GgufSource
from convert.gguf.layout import ALIGNMENT, TensorEntry, aligned, in_data_order
from convert.gguf.pieces import New, Piece, Plan, Range, Replacement, entry_bytes
from convert.gguf.values import encode_pair

SPLIT = {
    "split.no": GGUFValueType.UINT16,
    "split.count": GGUFValueType.UINT16,
    "split.tensors.count": GGUFValueType.INT32,
}
"""The keys of a split model's parts and their types."""

# Magic number, version, and the numbers of tensors and of metadata pairs.
_COUNTS = 24


@dataclass(frozen=True)
class NewParts:
    """Into how many files a GGUF is written.

    Attributes:
        largest: the largest size of a file in bytes; None for a single file. A file with a single
            tensor may be larger.
    """

    largest: int | None = None


def plans(
    source: GgufSource,
    parts: NewParts,
    tensors: Mapping[str, Replacement],
    pairs: Mapping[str, bytes],
) -> list[list[Piece]]:
    """The pieces of every new file.

    Args:
        source: the open GGUF.
        parts: the parts to write.
        tensors: name -> its new data.
        pairs: key -> the bytes of its new pair, which are empty for a key to be removed.
    """
    first = source.layouts[0]
    kept: dict[str, bytes] = {}
    for part in source.layouts:
        for key, field in part.fields.items():
            if key not in SPLIT:
                kept.setdefault(key, part.header[field.start : field.end])
    kept = {key: pair for key, pair in {**kept, **pairs}.items() if pair}
    others = {ALIGNMENT: kept[ALIGNMENT]} if ALIGNMENT in kept else {}
    entries = [entry for part in source.layouts for entry in in_data_order(part.tensors)]
    groups = _groups(entries, parts.largest, tensors, (kept, others), first.alignment)
    return [
        _file(
            first.header[:8],
            {**(others if number else kept), **_split_pairs(number, len(groups), len(entries))},
            group,
            tensors,
            first.alignment,
        )
        for number, group in enumerate(groups)
    ]


def _groups(
    entries: list[TensorEntry],
    largest: int | None,
    tensors: Mapping[str, Replacement],
    pairs: tuple[Mapping[str, bytes], Mapping[str, bytes]],
    alignment: int,
) -> list[list[TensorEntry]]:
    """The tensors of each file, in order."""
    if largest is None or not entries:
        return [entries]
    split = sum(map(len, _split_pairs(0, 2, 0).values()))
    heads = [_COUNTS + split + sum(map(len, kept.values())) for kept in pairs]
    groups: list[list[TensorEntry]] = []
    head = data = 0
    for entry in entries:
        name = len(entry_bytes(entry, None, 0))
        size = aligned(_size(entry, tensors), alignment)
        if not groups or aligned(head + name, alignment) + data + size > largest:
            head, data = heads[min(len(groups), 1)], 0
            groups.append([])
        groups[-1].append(entry)
        head, data = head + name, data + size
    return groups


def _size(entry: TensorEntry, tensors: Mapping[str, Replacement]) -> int:
    return tensors[entry.name].nbytes if entry.name in tensors else entry.nbytes


def _split_pairs(number: int, count: int, tensors: int) -> dict[str, bytes]:
    if count == 1:
        return {}
    values = {"split.no": number, "split.count": count, "split.tensors.count": tensors}
    return {key: encode_pair(key, value, (SPLIT[key], None)) for key, value in values.items()}


def _file(
    magic: bytes,
    pairs: Mapping[str, bytes],
    entries: list[TensorEntry],
    tensors: Mapping[str, Replacement],
    alignment: int,
) -> list[Piece]:
    plan = Plan()
    plan.add(magic + struct.pack("<QQ", len(entries), len(pairs)))
    for pair in pairs.values():
        plan.add(pair)
    at = 0
    for entry in entries:
        plan.add(entry_bytes(entry, tensors.get(entry.name), at))
        at += aligned(_size(entry, tensors), alignment)
    plan.add(bytes(aligned(plan.length, alignment) - plan.length))
    for entry in entries:
        new = tensors.get(entry.name)
        plan.add(
            Range(entry.offset, entry.offset + entry.nbytes, entry.part)
            if new is None
            else New(entry.name, new)
        )
        plan.add(bytes(aligned(plan.length, alignment) - plan.length))
    return plan.pieces
