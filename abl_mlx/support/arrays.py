"""Python values from MLX arrays, typed."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def number(array: mx.array) -> float:
    """The one value of an array of size 1."""
    return float(array.item())  # type: ignore[arg-type]


def numbers(array: mx.array) -> list[Any]:
    """The values of a 1-D array."""
    return list(array.tolist())  # type: ignore[arg-type]


def numpy_of(array: mx.array) -> np.ndarray:
    """An array of floats as float32 in NumPy, which has no bfloat16."""
    return np.array(array.astype(mx.float32))


def parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    """(path, array) of every parameter of a module."""
    return list(tree_flatten(module.parameters()))  # type: ignore[arg-type]


def let_go() -> None:
    """Give the memory of a model that was just deleted back to the system."""
    gc.collect()
    mx.clear_cache()
    if sys.platform == "linux":
        # glibc keeps what was freed in small pieces.
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
