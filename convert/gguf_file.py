"""Read GGUF files: metadata, tensor types, and tensors as float32."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from convert.errors import UserError


def open_gguf(path: Path) -> gguf.GGUFReader:
    """A memory-mapped reader of ``path``, kept while the file stays the same.

    Parsing a vocabulary of 150,000 tokens takes gguf-py seconds, so it is done once.

    Raises:
        UserError: naming the file when it is missing, truncated or no GGUF.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file: give the path of a .gguf file.")
    status = path.stat()
    return _open(path.absolute(), status.st_mtime_ns, status.st_size, status.st_ino)


@functools.lru_cache(maxsize=2)
def _open(path: Path, *state: int) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise UserError(f"{path} is no readable GGUF file ({error}): download it again.") from None


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Tensor ``name`` dequantized to float32, row-major: (out, in), or (experts, out, in).

    Raises:
        UserError: naming the file and the tensor when it is not there.
    """
    for tensor in open_gguf(path).tensors:
        if tensor.name == name:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            return np.array(values, dtype=np.float32).reshape(shape)
    raise UserError(f"{path} has no tensor named {name}.")


def tensor_types(path: Path) -> dict[str, GGMLQuantizationType]:
    """Every tensor's name and GGML type, in file order."""
    return {tensor.name: tensor.tensor_type for tensor in open_gguf(path).tensors}


def metadata(path: Path) -> dict[str, Any]:
    """Every metadata key and its value, as str, int, float, bool or a list of one of these."""
    reader = open_gguf(path)
    return {
        name: field.contents()
        for name, field in reader.fields.items()
        # gguf-py presents the file's header as fields too.
        if not name.startswith("GGUF.")
    }
