"""Writing safetensors files tensor by tensor, each from a sequence of arrays (slabs)."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

SHARD = 5_000_000_000
"""Bytes of a safetensors file in a written folder, as on the Hugging Face hub."""

_DTYPES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8",
}  # fmt: skip


class Shards:
    """Writes the shards of a model, tensor by tensor; each file's header is written last."""

    def __init__(self, folder: Path, tensors: int) -> None:
        self._folder = folder
        # Bytes left free for the header: ample for a name, a type, a shape and offsets per tensor.
        self._room = 256 * (tensors + 4)
        self._files: list[tuple[Path, dict[str, Any]]] = []
        self._stream: Any = None
        self._at = 0

    def add(self, name: str, slabs: Any, shape: tuple[int, ...] | None = None) -> None:
        """Append a tensor.

        Args:
            name: the tensor's name.
            slabs: arrays, which are joined along the first axis.
            shape: the shape of the whole tensor; its last dimension may be left out.
        """
        if self._stream is None or self._at > SHARD:
            self._finish()
            path = self._folder / f"part-{len(self._files):05d}"
            self._stream = open(path, "wb")  # noqa: SIM115 - closed in _finish
            self._stream.seek(8 + self._room)
            self._files.append((path, {"__metadata__": {"format": "mlx"}}))
            self._at = 0
        start, rows = self._at, 0
        width: tuple[int, ...] = ()
        dtype = mx.float32
        for slab in slabs:
            dtype = slab.dtype
            width = slab.shape[1:]
            rows += slab.shape[0]
            mx.eval(slab)
            data = np.array(slab.view(mx.uint8), copy=False).tobytes()
            self._stream.write(data)
            self._at += len(data)
        if shape is None:
            whole = (rows, *width)
        else:
            whole = shape if int(np.prod(shape)) == rows * int(np.prod(width)) else (*shape, *width)
        self._files[-1][1][name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(whole),
            "data_offsets": [start, self._at],
        }

    def close(self) -> int:
        """Write the headers, give the files their final names, and return their total bytes."""
        self._finish()
        count, size = len(self._files), 0
        index: dict[str, str] = {}
        for number, (path, header) in enumerate(self._files):
            name = (
                "model.safetensors"
                if count == 1
                else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            )
            path.rename(self._folder / name)
            size += (self._folder / name).stat().st_size
            index.update((key, name) for key in header if key != "__metadata__")
        if count > 1:
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
            (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        return size

    def _finish(self) -> None:
        if self._stream is None:
            return
        with self._stream as stream:
            header = json.dumps(self._files[-1][1], separators=(",", ":")).encode()
            assert len(header) <= self._room
            stream.seek(0)
            stream.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._stream = None
