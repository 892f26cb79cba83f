"""Tensors of a GGUF in other types: what llama-quantize does, a part of a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

from convert.base.errors import UserError
from convert.gguf import file_types, ggml, ggml_types, mix
from convert.gguf.file import GgufSource
from convert.gguf.file_types import FILE_TYPES, FLOATS
from convert.gguf.imatrix import Imatrix
from convert.gguf.layout import TensorEntry
from convert.gguf.rewrite import Replacement
from convert.gguf.values import Value

# Weights that are decoded and encoded at a time.
_PART = 1 << 22


def choose(
    source: GgufSource, file_type: str, imatrix: Imatrix | None = None, *, keep: bool = False
) -> dict[str, Q]:
    """The type of every tensor, for a GGUF that is to become one of another file type.

    Args:
        source: the open GGUF.
        file_type: a file type's name.
        imatrix: the importance matrix that will be used.
        keep: let quantized tensors keep their type; only floats get another.

    Raises:
        UserError: when there is no such file type, the importance matrix is of another model, or a
            tensor cannot have its new type.
    """
    name = file_types.file_type(file_type)
    if imatrix is not None:
        imatrix.check(source.shapes)
    entries = source.tensors
    facts = mix.Facts.of(source.metadata, source.architecture)
    tensors = {one: (entry.shape, entry.type) for one, entry in entries.items()}
    types = mix.types(name, tensors, facts, importance=imatrix is not None)
    if keep:
        types |= {one: entry.type for one, entry in entries.items() if entry.type not in FLOATS}
    changed = {one: kind for one, kind in types.items() if kind != entries[one].type}
    if imatrix is None:
        mix.check_importance(name, changed)
    ggml.check(changed.values())
    return types


def replacements(
    source: GgufSource, types: Mapping[str, Q], imatrix: Imatrix | None = None
) -> dict[str, Replacement]:
    """New data for every tensor whose type changes, for `convert.gguf.rewrite.rewrite`.

    Args:
        source: the open GGUF.
        types: tensor name -> its new type.
        imatrix: weights the errors of input columns.
    """
    return {
        name: _replacement(source, source.tensors[name], kind, imatrix)
        for name, kind in types.items()
        if kind != source.tensors[name].type
    }


def metadata(file_type: str, imatrix: Imatrix | None = None) -> dict[str, Value | None]:
    """The keys that say what a GGUF was quantized to, and with what importance matrix."""
    return {
        "general.file_type": int(FILE_TYPES[file_types.file_type(file_type)][0]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **(imatrix.metadata() if imatrix else {}),
    }


def encode(values: np.ndarray, kind: Q, name: str, importance: np.ndarray | None) -> np.ndarray:
    """Encode float32 rows in any type.

    Args:
        values: float32, (R, n).
        kind: the type.
        name: the tensor's name, for messages.
        importance: float32, (n,): weights of the columns' squared errors; None for equal weights.

    Returns:
        uint8, (R, bytes per row).

    Raises:
        UserError: when a value is not finite or too large for the type.
    """
    try:
        codec = ggml_types.codec(kind) if kind in FLOATS else None
        if isinstance(codec, ggml_types.FloatCodec):
            return codec.encode(codec.round(values))
        if not np.isfinite(values).all():
            raise UserError("a weight is not finite.")
        return ggml.quantize(values, kind, importance)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _replacement(
    source: GgufSource, entry: TensorEntry, kind: Q, imatrix: Imatrix | None
) -> Replacement:
    weights = imatrix.weights(entry.name, entry.shape) if imatrix else None
    n = entry.shape[-1]
    rows = math.prod(entry.shape[-2:-1])
    step = max(1, _PART // max(1, n))

    def chunks() -> Iterator[np.ndarray]:
        raw = source.raw(entry.name)
        for first in range(0, entry.rows, rows):
            importance = None if weights is None else weights[first // rows]
            for start in range(first, first + rows, step):
                part = raw[start : min(start + step, first + rows)]
                yield encode(_decoded(part, entry.type, n), kind, entry.name, importance)
                source.release(entry.name)

    return Replacement(kind, entry.shape, chunks)


def _decoded(raw: np.ndarray, kind: Q, n: int) -> np.ndarray:
    """Rows of a tensor as float32, (R, n)."""
    if kind in FLOATS or ggml_types.has_grid(kind):
        return ggml_types.codec(kind).decode(np.ascontiguousarray(raw), n).values()
    return np.asarray(gguf.quants.dequantize(raw, kind), dtype=np.float32).reshape(-1, n)
