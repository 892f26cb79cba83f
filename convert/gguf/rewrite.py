"""Write a GGUF file again with some tensors and metadata changed, all other bytes unchanged.

A file to be written is a list of pieces in order: ranges of the source, new bytes, new tensors.
Ranges that follow each other are joined: a file without changes is a single range, and everything
between two changed tensors is copied by one call of the operating system. Only new tensors pass
through this process's memory, one chunk at a time.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import gguf

from convert.base.atomic import check_new, new_file
from convert.base.errors import UserError
from convert.gguf import regroup
from convert.gguf.file import GgufSource
from convert.gguf.layout import ALIGNMENT, Part, aligned, in_data_order
from convert.gguf.parts import part_paths
from convert.gguf.pieces import New, Piece, Plan, Range, Replacement, entry_bytes, length, write
from convert.gguf.regroup import SPLIT, NewParts
from convert.gguf.values import Value, encode_pair

__all__ = ["NewParts", "Replacement", "rewrite"]

_FIXED = ("general.architecture", ALIGNMENT, *SPLIT)


def rewrite(
    source: GgufSource,
    out: Path,
    *,
    tensors: Mapping[str, Replacement] | None = None,
    metadata: Mapping[str, Value | None] | None = None,
    parts: NewParts | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write ``source`` to ``out`` with some tensors and metadata changed.

    Every other tensor, key and value keeps its bytes and its order; so do padding and anything else
    in the file. A tensor's offset changes only when a tensor before it changes its length; the data
    section moves when the header changes its length. Either all files appear under their names,
    complete and flushed (the first part last), or none does.

    Args:
        source: an open GGUF; it is only read.
        out: must not exist; any name. Several parts get the names of ``part_paths(out, count)``.
        tensors: name -> its new data.
        metadata: key -> its new value, or None to remove the key. A key that exists keeps its place
            and, if it is a number that fits, its type; new keys come last. In a split model these
            are the keys of the first part.
        parts: the parts to write; None for those of the source.
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
    pairs = _new_pairs(source.layouts[0], metadata)
    if parts is None:
        plans = [
            _plan(part, tensors, pairs if index == 0 else {})
            for index, part in enumerate(source.layouts)
        ]
    else:
        plans = regroup.plans(source, parts, tensors, pairs)
    paths = part_paths(out, len(plans))
    for path in paths:
        check_new(path)
    source.check_unchanged()
    total = sum(length(piece) for plan in plans for piece in plan)
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
                    write(stream.fileno(), _descriptor(source, index, parts), plan, advance)
                    # A full disk raises here at the latest, before any file has its final name.
                    os.fsync(stream.fileno())
                    status = os.fstat(stream.fileno())
                ours[paths[index]] = (status.st_dev, status.st_ino)
            source.check_unchanged()
    except BaseException:
        _remove(ours, folders)
        raise
    return paths


def split(path: Path, parts: NewParts | None) -> list[Path]:
    """Replace a GGUF in one file by its parts, and return them; a small one stays as it is.

    Raises:
        UserError: when a part exists or cannot be written.
    """
    if parts is None or parts.largest is None or path.stat().st_size <= parts.largest:
        return [path]
    with GgufSource(path) as source:
        files = rewrite(source, path, parts=parts)
    path.unlink()
    return files


def _descriptor(source: GgufSource, index: int, parts: NewParts | None) -> Callable[[int], int]:
    """Part of the source -> its descriptor; without new parts every file has one part's bytes."""
    return (lambda part: source.descriptor(index)) if parts is None else source.descriptor


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
) -> list[Piece]:
    plan = Plan()
    removed = sum(not pair for pair in pairs.values())
    added = [pair for key, pair in pairs.items() if key not in part.fields]
    count = len(part.fields) - removed + len(added)
    plan.add(Range(0, 16))
    plan.add(Range(16, 24) if count == len(part.fields) else struct.pack("<Q", count))
    for key, field in part.fields.items():
        plan.add(pairs.get(key, Range(field.start, field.end)))
    for pair in added:
        plan.add(pair)
    data, offsets = _plan_data(part, tensors)
    for name, entry in part.tensors.items():
        start, end = part.entries[name]
        moved = offsets[name] != entry.offset - part.data_start
        if name in tensors or moved:
            plan.add(entry_bytes(entry, tensors.get(name), offsets[name]))
        else:
            plan.add(Range(start, end))
    _add_padding(plan, part)
    for piece in data:
        plan.add(piece)
    return plan.pieces


def _plan_data(
    part: Part, tensors: Mapping[str, Replacement]
) -> tuple[list[Piece], dict[str, int]]:
    """The pieces of the data section, and name -> offset of each tensor in that section."""
    pieces: list[Piece] = []
    offsets: dict[str, int] = {}
    in_order = in_data_order(part.tensors)
    if not in_order:
        return pieces, offsets
    at = in_order[0].offset - part.data_start
    pieces.append(Range(part.data_start, in_order[0].offset))
    following = [entry.offset for entry in in_order[1:]] + [part.size]
    for entry, next_start in zip(in_order, following, strict=True):
        offsets[entry.name] = at
        end = entry.offset + entry.nbytes
        new = tensors.get(entry.name)
        nbytes = entry.nbytes if new is None else new.nbytes
        pieces.append(Range(entry.offset, end) if new is None else New(entry.name, new))
        at += nbytes
        if nbytes != entry.nbytes:
            # New padding replaces the old; bytes after the old padding (usually none) stay.
            padding = aligned(at, part.alignment) - at
            pieces.append(bytes(padding))
            at += padding
            from_start = aligned(end - part.data_start, part.alignment)
            end = min(part.data_start + from_start, next_start)
        pieces.append(Range(end, next_start))
        at += next_start - end
    return pieces, offsets


def _add_padding(plan: Plan, part: Part) -> None:
    """Add the bytes between the header and the data, or after a header without data."""
    header_end = len(part.header)
    data_start = min(part.data_start, part.size)
    if plan.length == header_end:
        plan.add(Range(header_end, data_start))
    elif part.tensors or data_start == part.data_start:
        plan.add(bytes(aligned(plan.length, part.alignment) - plan.length))
    if not part.tensors:
        plan.add(Range(data_start, part.size))
