"""Typed conversions from MLX arrays to Python and NumPy values."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from convert.base import halves


def number(array: mx.array) -> float:
    """The value of an array of size 1."""
    return float(array.item())  # type: ignore[arg-type]


def numbers(array: mx.array) -> list[Any]:
    """The values of an array of one dimension."""
    return list(array.tolist())  # type: ignore[arg-type]


def numpy_of(array: mx.array) -> np.ndarray:
    """An array of floats as float32 in NumPy, which does not have bfloat16: a copy."""
    kind = HALVES.get(array.dtype)
    if kind is None:
        return np.array(array.astype(mx.float32))
    return halves.widened(np.array(array.view(mx.uint16), copy=False), kind)


#: Float types of 16 bits, which MLX converts slowly on a CPU -> their names in `halves`.
HALVES = {mx.float16: "F16", mx.bfloat16: "BF16"}


def parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    """Pairs (path, array) of all parameters of a module."""
    return list(tree_flatten(module.parameters()))  # type: ignore[arg-type]


def evaluate(*values: Any) -> None:
    """Evaluate all arrays in values: modules, records, mappings and sequences are looked into.

    An array that is not evaluated can only be evaluated in the thread that made it.
    """
    waiting, seen, arrays = list(values), set(), []
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, mx.array):
            arrays.append(value)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        if is_dataclass(value) or isinstance(value, nn.Module):
            waiting += vars(value).values()
    for one in arrays:
        mx.eval(one)


def let_go() -> None:
    """Return the memory of deleted models to the operating system."""
    gc.collect()
    trim()


def trim() -> None:
    """Return the memory of freed arrays to the operating system."""
    mx.clear_cache()
    if sys.platform == "linux":
        # glibc keeps freed small pieces unless it is told to return them.
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
