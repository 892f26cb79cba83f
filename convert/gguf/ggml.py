"""ggml's own quantizer and dequantizer, called in an installed shared library through ctypes.

gguf-py has no encoder for K-quants. The shared library libggml-base exports ggml's own:
ggml_quantize_chunk and dequantize_row_* (ggml/include/ggml.h, ggml/src/ggml-quants.h). The package
libggml-python brings it; those in xllamacpp and of Homebrew's ggml serve as well.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from convert.base.cores import in_pieces
from convert.base.errors import UserError

ENVIRONMENT = "ABL_MLX_GGML"
"""Environment variable with the path of a shared library of ggml, tried before all others."""

# Package -> the files in it that may be a library with ggml's quantizer.
_PACKAGES = {
    "libggml": ("lib*/libggml-base.so", "lib*/libggml-base.dylib", "bin/ggml-base.dll"),
    "xllamacpp": ("*.so", "*.dylib", "*.dll"),
}

_NEEDED = ("ggml_quantize_init", "ggml_quantize_chunk")

# Types that gguf-py can encode, to the same bytes as ggml.
_IN_GGUF_PY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")

# Weights per call of ggml: enough to be worth a call, few enough to be spread over threads.
_CHUNK = 1 << 18


def available() -> bool:
    """Whether a shared library of ggml was found, which `quantize` and `dequantize` need."""
    return _find() is not None


def check(types: Iterable[GGMLQuantizationType]) -> None:
    """Check that tensors can be encoded in these types.

    Raises:
        UserError: when one of them needs ggml and it was not found, saying what to install.
    """
    for kind in types:
        if kind.name not in (*_IN_GGUF_PY, "F32", "F16", "BF16") and not available():
            raise _missing(kind.name)


def library() -> ctypes.CDLL:
    """The loaded shared library of ggml.

    Raises:
        UserError: when none was found, saying what to install.
    """
    found = _find()
    if found is None:
        raise _missing("this")
    return found


def _missing(what: str) -> UserError:
    return UserError(
        f"{what} needs ggml, which was not found: pip install libggml-python, or set {ENVIRONMENT} "
        "to a libggml-base shared object."
    )


def quantize(
    values: np.ndarray, to: GGMLQuantizationType, importance: np.ndarray | None = None
) -> np.ndarray:
    """Encode rows with ggml's quantizer.

    Args:
        values: float32, (..., n), n a multiple of the type's block size.
        to: a quantized type.
        importance: the weight of each column's squared error, from an importance matrix: float32,
            (n,) for all rows, or (E, n) for ``values`` of shape (E, ..., n). IQ1, IQ2 and IQ3_XXS
            need it.

    Returns:
        uint8, (..., bytes per row).

    Raises:
        UserError: when ggml was not found, n is not a multiple of the block size, or the importance
            is of another shape.
    """
    block, size = gguf.GGML_QUANT_SIZES[to]
    width = values.shape[-1]
    if width % block:
        raise UserError(f"rows of {width} do not fit {to.name}, whose blocks hold {block} weights.")
    if not available():
        if importance is not None or to.name not in _IN_GGUF_PY:
            raise _missing(to.name)
        return gguf.quants.quantize(values, to)
    ggml = library()
    source = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, width)
    row_bytes = width // block * size
    encoded = np.empty((source.shape[0], row_bytes), dtype=np.uint8)
    weights = _weights(values, importance)

    def encode(weight: np.ndarray | None, start: int, first: int, last: int) -> None:
        first, last = start + first, start + last
        written = ggml.ggml_quantize_chunk(
            int(to),
            source[first:last].ctypes.data,
            encoded[first:last].ctypes.data,
            0,
            last - first,
            width,
            None if weight is None else weight.ctypes.data,
        )
        if written != (last - first) * row_bytes:
            raise UserError(f"this ggml encodes {to.name} differently from gguf-py: update both.")

    ggml.ggml_quantize_init(int(to))
    each = len(source) // max(1, len(weights))
    for index, weight in enumerate(weights):
        _spread(functools.partial(encode, weight, index * each), each, width)
    return encoded.reshape(*values.shape[:-1], row_bytes)


def _weights(values: np.ndarray, importance: np.ndarray | None) -> list[np.ndarray] | list[None]:
    """The weights of the columns, for equal parts of the rows."""
    if importance is None:
        return [None]
    width = values.shape[-1]
    weights = np.ascontiguousarray(importance, dtype=np.float32).reshape(-1, width)
    if len(weights) not in (1, values.shape[0] if values.ndim > 2 else 1):
        raise UserError(
            f"importance of shape {importance.shape} does not fit weights of shape {values.shape}."
        )
    return list(weights)


def dequantize(encoded: np.ndarray, of: GGMLQuantizationType) -> np.ndarray:
    """Decode rows with ggml's own decoder, shared among threads.

    Args:
        encoded: uint8, (..., bytes per row).
        of: the type in which they are encoded.

    Returns:
        float32, (..., n).

    Raises:
        UserError: when ggml was not found, or does not decode this type.
    """
    block, size = gguf.GGML_QUANT_SIZES[of]
    source = np.ascontiguousarray(encoded, dtype=np.uint8).reshape(-1, encoded.shape[-1])
    width = encoded.shape[-1] // size * block
    values = np.empty((source.shape[0], width), dtype=np.float32)

    def decode(first: int, last: int) -> None:
        dequantize_into(source[first:last], of, values[first:last])

    _spread(decode, source.shape[0], width)
    return values.reshape(*encoded.shape[:-1], width)


def dequantize_into(encoded: np.ndarray, of: GGMLQuantizationType, out: np.ndarray) -> None:
    """Decode rows as `dequantize` does, in this thread and into memory that is there.

    Args:
        encoded: uint8, (R, bytes per row), contiguous.
        of: the type in which they are encoded.
        out: float32, (R, n), contiguous.

    Raises:
        UserError: when ggml was not found, or does not decode this type.
        ValueError: when the arrays do not fit each other or are not contiguous.
    """
    block, size = gguf.GGML_QUANT_SIZES[of]
    fits = encoded.dtype == np.uint8 and out.dtype == np.float32
    fits = fits and encoded.flags.c_contiguous and out.flags.c_contiguous
    if not fits or encoded.size // size * block != out.size:
        raise ValueError(f"{encoded.shape} bytes of {of.name} do not fit {out.shape} weights")
    _decoder(of)(encoded.ctypes.data, out.ctypes.data, out.size)


@functools.cache
def _decoder(of: GGMLQuantizationType) -> Callable[[int, int, int], None]:
    """ggml's decoder of a type: (address of the bytes, address of the float32, weights)."""
    name = "dequantize_row_" + of.name.lower().replace("_k", "_K")
    try:
        found: Any = getattr(library(), name)
    except AttributeError:
        raise UserError(f"this ggml has no {name}: update it.") from None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    found.restype = None
    return cast("Callable[[int, int, int], None]", found)


def _spread(work: Callable[[int, int], None], rows: int, width: int) -> None:
    # ctypes releases the interpreter lock while ggml works.
    in_pieces(lambda p: work(p.start, p.stop), rows, max(1, _CHUNK // max(width, 1)))


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
    for package, patterns in _PACKAGES.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for pattern in patterns:
                yield from sorted(str(path) for path in Path(folder).glob(pattern))
    system = ctypes.util.find_library("ggml-base")
    if system:
        yield system
    for folder in ("/opt/homebrew/lib", "/usr/local/lib", "/home/linuxbrew/.linuxbrew/lib"):
        for file in ("libggml-base.dylib", "libggml-base.so"):
            if (Path(folder) / file).exists():
                yield str(Path(folder) / file)
