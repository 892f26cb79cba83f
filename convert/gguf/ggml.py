"""ggml's own quantizer and dequantizer, called in an installed shared library through ctypes.

gguf-py has no encoder for K-quants. The shared library in the wheel of xllamacpp, or that of
Homebrew's ggml, exports ggml's: ggml_quantize_chunk and dequantize_row_* (ggml/include/ggml.h,
ggml/src/ggml-quants.h).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from convert.base.errors import UserError

ENVIRONMENT = "ABL_MLX_GGML"
"""Environment variable with the path of a shared library of ggml, tried before all others."""

_NEEDED = ("ggml_quantize_init", "ggml_quantize_chunk")

# Weights per call of ggml: enough to be worth a call, few enough to be spread over threads.
_CHUNK = 1 << 20


def available() -> bool:
    """Whether a shared library of ggml was found, which `quantize` and `dequantize` need."""
    return _find() is not None


def library() -> ctypes.CDLL:
    """The loaded shared library of ggml.

    Raises:
        UserError: when none was found, saying what to install.
    """
    found = _find()
    if found is None:
        raise UserError(
            "quantizing to K-quants needs ggml, which was not found: pip install "
            f"'abl-mlx[llamacpp]', or set {ENVIRONMENT} to a libggml-base shared object."
        )
    return found


def quantize(values: np.ndarray, to: GGMLQuantizationType) -> np.ndarray:
    """Encode rows with ggml's quantizer.

    Args:
        values: float32, (..., n), n a multiple of the type's block size.
        to: a quantized type that needs no importance matrix.

    Returns:
        uint8, (..., bytes per row).

    Raises:
        UserError: when ggml was not found, or n is not a multiple of the block size.
    """
    block, size = gguf.GGML_QUANT_SIZES[to]
    width = values.shape[-1]
    if width % block:
        raise UserError(f"rows of {width} do not fit {to.name}, whose blocks hold {block} weights.")
    ggml = library()
    source = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, width)
    row_bytes = width // block * size
    encoded = np.empty((source.shape[0], row_bytes), dtype=np.uint8)

    def encode(first: int, last: int) -> None:
        written = ggml.ggml_quantize_chunk(
            int(to),
            source[first:last].ctypes.data,
            encoded[first:last].ctypes.data,
            0,
            last - first,
            width,
            None,
        )
        if written != (last - first) * row_bytes:
            raise UserError(f"this ggml encodes {to.name} differently from gguf-py: update both.")

    ggml.ggml_quantize_init(int(to))
    _spread(encode, source.shape[0], width)
    return encoded.reshape(*values.shape[:-1], row_bytes)


def dequantize(encoded: np.ndarray, of: GGMLQuantizationType) -> np.ndarray:
    """Decode rows with ggml's own decoder, for comparison with gguf-py's.

    Args:
        encoded: uint8, (..., bytes per row).
        of: the type in which they are encoded.

    Returns:
        float32, (..., n).

    Raises:
        UserError: when ggml was not found, or does not decode this type.
    """
    block, size = gguf.GGML_QUANT_SIZES[of]
    name = "dequantize_row_" + of.name.lower().replace("_k", "_K")
    try:
        decode_row = getattr(library(), name)
    except AttributeError:
        raise UserError(f"this ggml has no {name}: update it.") from None
    decode_row.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode_row.restype = None
    source = np.ascontiguousarray(encoded, dtype=np.uint8).reshape(-1, encoded.shape[-1])
    width = encoded.shape[-1] // size * block
    values = np.empty((source.shape[0], width), dtype=np.float32)

    def decode(first: int, last: int) -> None:
        decode_row(
            source[first:last].ctypes.data, values[first:last].ctypes.data, (last - first) * width
        )

    _spread(decode, source.shape[0], width)
    return values.reshape(*encoded.shape[:-1], width)


def _spread(work: Callable[[int, int], None], rows: int, width: int) -> None:
    step = max(1, _CHUNK // max(width, 1))
    starts = range(0, rows, step)
    if len(starts) <= 1:
        work(0, rows)
        return
    # ctypes releases the interpreter lock while ggml works.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda first: work(first, min(first + step, rows)), starts):
            pass


@functools.cache
def _find() -> ctypes.CDLL | None:
    for candidate in _candidates():
        try:
            loaded = ctypes.CDLL(candidate)
        except OSError:
            continue
        if all(hasattr(loaded, name) for name in _NEEDED):
            loaded.ggml_quantize_init.argtypes = [ctypes.c_int]
            loaded.ggml_quantize_init.restype = None
            loaded.ggml_quantize_chunk.argtypes = [
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_int64,
                ctypes.c_int64,
                ctypes.c_int64,
                ctypes.c_void_p,
            ]
            loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
            return loaded
    return None


def _candidates() -> Iterator[str]:
    named = os.environ.get(ENVIRONMENT)
    if named:
        if not Path(named).is_file():
            raise UserError(f"{ENVIRONMENT} names {named}, which is no file: correct or unset it.")
        yield named
    package = importlib.util.find_spec("xllamacpp")
    for folder in (package.submodule_search_locations or []) if package else []:
        for pattern in ("*.so", "*.dylib", "*.dll"):
            yield from sorted(str(path) for path in Path(folder).glob(pattern))
    system = ctypes.util.find_library("ggml-base")
    if system:
        yield system
    for folder in ("/opt/homebrew/lib", "/usr/local/lib", "/home/linuxbrew/.linuxbrew/lib"):
        for file in ("libggml-base.dylib", "libggml-base.so"):
            if (Path(folder) / file).exists():
                yield str(Path(folder) / file)
