"""Tensors of a GGUF in other types: what llama-quantize does, a part of a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Quantization:
    """The type of every tensor of a GGUF that is to be written anew.

    Attributes:
        types: tensor name -> its type.
        file_type: the name of the file type; None where every tensor keeps its type.
        imatrix: the importance matrix that weights the errors of input columns, if any.
    """

    types: Mapping[str, Q]
    file_type: str | None = None
    imatrix: Imatrix | None = None

    @classmethod
    def of(
        cls,
        source: GgufSource,
        file_type: str | None,
        imatrix: Imatrix | None = None,
        *,
        keep: bool = False,
    ) -> Quantization:
        """The types of a GGUF's tensors in a file of another type.

        Args:
            source: the open GGUF.
            file_type: the name of the file type; None to let every tensor keep its type.
            imatrix: the importance matrix.
            keep: let quantized tensors keep their type, so that only floats get another.

        Raises:
            UserError: when there is no such file type, the importance matrix is of another model,
                or a tensor cannot have its new type.
        """
        if imatrix is not None:
            imatrix.check(source.shapes)
        old = {name: entry.type for name, entry in source.tensors.items()}
        if file_type is None:
            return cls(old, None, imatrix)
        name = file_types.file_type(file_type)
        facts = mix.Facts.of(source.metadata, source.architecture)
        tensors = {one: (entry.shape, entry.type) for one, entry in source.tensors.items()}
        types = mix.types(name, tensors, facts, importance=imatrix is not None)
        if keep:
            types |= {one: kind for one, kind in old.items() if kind not in FLOATS}
        changed = {one: kind for one, kind in types.items() if kind != old[one]}
        if imatrix is None:
            mix.check_importance(name, changed)
        ggml.check(changed.values())
        return cls(types, name if changed else None, imatrix)

    def weights(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The importance of a tensor's input columns, as by `Imatrix.weights`."""
        return self.imatrix.weights(name, shape) if self.imatrix else None

    def replacements(self, source: GgufSource) -> dict[str, Replacement]:
        """New data for every tensor whose type changes, for `convert.gguf.rewrite.rewrite`."""
        return {
            name: _replacement(source, source.tensors[name], kind, self)
            for name, kind in self.types.items()
            if kind != source.tensors[name].type
        }

    def metadata(self) -> dict[str, Value | None]:
        """The keys that say what the GGUF was quantized to, and with what importance matrix."""
        if self.file_type is None:
            return {}
        return {
            "general.file_type": int(FILE_TYPES[self.file_type][0]),
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            **(self.imatrix.metadata() if self.imatrix else {}),
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
    source: GgufSource, entry: TensorEntry, kind: Q, quantization: Quantization
) -> Replacement:
    weights = quantization.weights(entry.name, entry.shape)
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
