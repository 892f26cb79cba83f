"""Writes float weights into a GGUF; ggml quantizes each tensor to the type that it has there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from convert.gguf import ggml
from convert.gguf.file import GgufSource
from convert.gguf.layout import TensorEntry
from convert.gguf.rewrite import Replacement, rewrite


def requantized(
    source: GgufSource, values: Mapping[str, Callable[[], np.ndarray]], out: Path
) -> None:
    """Write ``source`` with new values of some tensors; all others keep their bytes.

    Args:
        values: name -> function that returns its weights, as floats in the tensor's shape.
    """

    def encoded(entry: TensorEntry, new: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
        yield ggml.quantize(new().astype(np.float32).reshape(entry.shape), entry.type)

    rewrite(
        source,
        out,
        tensors={
            name: Replacement(entry.type, entry.shape, partial(encoded, entry, new))
            for name, new in values.items()
            for entry in [source.tensors[name]]
        },
    )


def changed_in(source: GgufSource, edited: GgufSource) -> dict[str, Callable[[], np.ndarray]]:
    """``values`` for `requantized`: the tensors of another file that differ by more than rounding.

    Raises:
        ValueError: when the two do not hold the same tensors.
    """
    if source.tensors.keys() != edited.tensors.keys():
        raise ValueError(f"other tensors: {sorted(source.tensors.keys() ^ edited.tensors.keys())}")
    found: dict[str, Callable[[], np.ndarray]] = {}
    for name in source.tensors:
        before, after = source.values(name), edited.values(name)
        if not np.allclose(before, after, rtol=1e-4, atol=1e-5 * float(np.abs(before).max())):
            found[name] = partial(edited.values, name)
    return found
