"""What a record holds so that an edit can be made again: its directions, and hashes of outputs."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits.update import Factors
from abl_mlx.outputs.record_parts import file_hashes
from abl_mlx.outputs.staging import FOLDER, GGUF, Written, companions, format_of
from abl_mlx.records.edits import (
    Directions,
    Edited,
    OutputHashes,
    Reproduction,
    StoredArray,
    StoredUpdate,
)
from abl_mlx.support import interrupts
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.clock import Clock
from convert.base import json_text
from convert.base.errors import UserError
from convert.base.schema import OBJECT
from convert.gguf.file import GgufSource
from convert.mlx.safetensors_files import TensorFiles

#: Characters of directions beyond which a record does not hold them.
_MOST = 3 << 20

#: With more tensors than this, one hash is of all tensors of a layer.
_TENSORS = 1000

# Bytes of a tensor that are hashed at a time; then they may leave the memory.
_PIECE = 1 << 20

_KEPT = ("recipe", "pins", "embedding_scale", "summary")


def read_record(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """The record that a path names, or that lies in the folder or beside the GGUF of this name.

    Returns:
        Its place and its values.

    Raises:
        UserError: when there is none, or it is damaged.
    """
    record = path
    if path.is_dir() or format_of(path) == GGUF:
        record = companions(path)["record"]
    try:
        return record, json_text.read(record, OBJECT, mend="give the abl.json of `run` or `apply`")
    except FileNotFoundError:
        raise UserError(
            f"there is no {record}: give the abl.json of `run` or `apply`, or the model beside it."
        ) from None


def described(
    known: Edited, direction: DirectionFile, written: Sequence[Written], clock: Clock
) -> Edited:
    """The parts of a record, with what `reproduce` needs."""
    with clock.step("hash the outputs"):
        outputs = {
            one.output.path.name: hashes
            for one in written
            if (hashes := _of_output(one)) is not None
        }
    made = Reproduction(directions=_directions(direction), outputs=outputs)
    return replace(known, reproduction=made)


def _directions(direction: DirectionFile) -> Directions | None:
    updates = [
        StoredUpdate(
            layer=layer,
            left=_stored(one.left),
            right=_stored(one.right),
            keys=_stored(one.keys),
        )
        for layer, one in sorted((direction.updates or {}).items())
    ]
    selected = _stored(numpy_of(direction.selected))
    arrays = [selected, *(part for one in updates for part in (one.left, one.right, one.keys))]
    if sum(len(one.float32) for one in arrays) > _MOST:
        return None
    return Directions(
        shape=selected.shape,
        float32=selected.float32,
        metadata={key: direction.metadata[key] for key in _KEPT if key in direction.metadata},
        updates=updates or None,
    )


def direction_of(stored: Directions) -> DirectionFile:
    """The direction file that a record holds.

    Raises:
        ValueError: when the record is damaged.
    """
    updates = {
        one.layer: Factors(_values(one.left), _values(one.right), _values(one.keys))
        for one in stored.updates or ()
    }
    return DirectionFile(
        mx.array(_values(stored)), metadata=dict(stored.metadata), updates=updates or None
    )


def _stored(values: np.ndarray) -> StoredArray:
    raw = np.ascontiguousarray(values, "<f4").tobytes()
    return StoredArray(shape=list(values.shape), float32=base64.b64encode(raw).decode())


def _values(stored: StoredArray) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(stored.float32, validate=True), "<f4")
    return values.reshape(stored.shape).astype(np.float32)


def _of_output(written: Written) -> OutputHashes | None:
    """The hashes of a folder or a GGUF; None for adapters."""
    staged = written.output.staged
    if written.output.format == FOLDER:
        with TensorFiles(staged) as folder:
            return _hashes(folder.files, sorted(folder.names), folder.bytes, folder.release)
    if written.output.format != GGUF:
        return None
    parts = written.facts.files
    with GgufSource(staged if not parts else staged.with_name(Path(parts[0]).name)) as gguf:
        return _hashes(
            gguf.parts, list(gguf.tensors), lambda name: gguf.raw(name).reshape(-1), gguf.release
        )


def _hashes(
    files: Sequence[Path],
    names: Sequence[str],
    read: Callable[[str], Any],
    release: Callable[[str], None],
) -> OutputHashes:
    groups: dict[str, Any] = {}
    piece = np.empty(_PIECE, np.uint8)

    def tensors() -> dict[str, str]:
        for name in names:
            layer = re.match(r".*?\.\d+\.", name)
            group = layer[0].rstrip(".") if layer and len(names) > _TENSORS else name
            digest = groups.setdefault(group, hashlib.sha256())
            for start in range(0, len(read(name)), _PIECE):
                interrupts.check()
                # Copied, because a view would keep the file open.
                some = piece[: len(read(name)) - start]
                some[:] = np.frombuffer(read(name)[start : start + _PIECE], np.uint8)
                digest.update(some)
                release(name)
        return {group: digest.hexdigest()[:16] for group, digest in groups.items()}

    # hashlib releases the interpreter lock, and the two read the same bytes at about the same time.
    with ThreadPoolExecutor(1, "hashes") as pool:
        by_name = pool.submit(tensors)
        return OutputHashes(files=file_hashes(files), tensors=by_name.result())
