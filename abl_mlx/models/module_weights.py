"""The weights of loaded modules in float32, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from convert.mlx.packed import Packed

#: The number of weights that are dequantized at a time.
SLAB = 1 << 23

Parts = Iterable[tuple[tuple[Any, ...], mx.array]]
"""A weight in parts: pairs of an index into the whole array and the float32 values there."""


def module_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's dequantized weight."""
    weight = module["weight"]
    if isinstance(module, Packed):
        return module.shape
    if "scales" not in module:
        return tuple(weight.shape)
    return (*weight.shape[:-1], weight.shape[-1] * 32 // module.bits)


def module_parts(module: nn.Module) -> Parts:
    """A module's weight in float32, dequantized, some rows at a time."""
    shape = module_shape(module)
    experts = range(shape[0]) if len(shape) == 3 else [None]
    step = max(1, SLAB // shape[-1])
    for expert in experts:
        first = () if expert is None else (expert,)
        for start in range(0, shape[-2], step):
            rows = slice(start, min(start + step, shape[-2]))
            yield (*first, rows, slice(0, shape[-1])), _rows(module, (*first, rows))


def _rows(module: nn.Module, index: tuple[Any, ...]) -> mx.array:
    if isinstance(module, Packed):
        first = module.shape[-2] * index[0] if len(index) == 2 else 0
        return module.rows(first + index[-1].start, first + index[-1].stop)
    if "scales" not in module:
        return module["weight"][index].astype(mx.float32)
    parts = {
        name: module[name][index] for name in ("scales", "biases") if module.get(name) is not None
    }
    if module.mode == "affine":
        parts = {name: value.astype(mx.float32) for name, value in parts.items()}
    whole = module.get("global_scale")
    if whole is not None and len(index) == 2:
        whole = whole[index[0]]
    return mx.dequantize(
        module["weight"][index], parts["scales"], parts.get("biases"),
        group_size=module.group_size, bits=module.bits, mode=module.mode, global_scale=whole,
        dtype=mx.float32,
    )  # fmt: skip
