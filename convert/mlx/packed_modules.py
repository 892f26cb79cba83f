"""mlx-lm's modules with matrices, and their counterparts that hold these packed.

`convert.mlx.packed` says why. It is another module because mlx-lm takes seconds to import, which
work on files alone does not need.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from convert.mlx import packed
from convert.mlx.packed import Packed, PackedEmbedding, PackedLinear
from convert.mlx.packed_forms import Form
from convert.mlx.types import GROUP


class PackedSwitchLinear(Packed, SwitchLinear):
    """Packed linear maps of experts, of which each token uses some, as in mlx-lm's SwitchLinear."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        x = x.astype(mx.float32)
        experts, out, n = self._shape
        if packed.runs_on_cpu():
            if packed.gradients_wanted():
                raise NotImplementedError("products of experts have no gradient")
            total = self._of_experts(x, indices)
            return total + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else total
        step = max(1, packed.CHUNK // (out * n))
        total = mx.array(0.0)
        for first in range(0, experts, step):
            last = min(first + step, experts)
            stack = self.rows(first * out, last * out).reshape(last - first, out, n)
            here = mx.clip(indices.astype(mx.int32) - first, 0, last - first - 1)
            product = mx.gather_mm(x, stack.swapaxes(-1, -2), rhs_indices=here)
            if step >= experts:
                total = product
                break
            chosen = (indices >= first) & (indices < last)
            total = total + mx.where(chosen[..., None, None], product, 0)
        if "bias" in self:
            total = total + mx.expand_dims(self["bias"][indices], -2)
        return total

    def _of_experts(self, x: mx.array, indices: mx.array) -> mx.array:
        """Inputs (..., m, n) and expert indices (...) that broadcast with them -> (..., m, out)."""
        _, out, n = self._shape
        mx.eval(x, indices)
        values = np.array(x.astype(mx.float32), copy=False)
        chosen = np.array(indices.astype(mx.int32), copy=False)
        batch = np.broadcast_shapes(values.shape[:-2], chosen.shape)
        rows = values.shape[-2]
        flat = np.broadcast_to(values, (*batch, rows, n)).reshape(-1, rows, n)
        which = np.broadcast_to(chosen, batch).reshape(-1)
        product = np.empty((len(flat), rows, out), np.float32)
        for expert in np.unique(which):
            here = which == expert
            first = int(expert) * out
            made = self._multiply(flat[here].reshape(-1, n), first, first + out)
            product[here] = made.reshape(-1, rows, out)
        return mx.array(product).reshape(*batch, rows, out)


def hold(model: nn.Module, *, lazy: bool = False) -> None:
    """Make a loaded model on the CPU multiply its matrices with NumPy's BLAS.

    Matrices keep their type, and quantized ones their codes; everything else in the model becomes
    float32, in which the model then computes.

    Args:
        model: the model.
        lazy: whether to leave all arrays unevaluated.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        held = _held(module)
        if held is not None:
            found[path] = held
    model.update_modules(tree_unflatten(list(found.items())))
    for path, module in model.named_modules():
        for name, value in module.items():
            matrix = path in found and name == "weight"
            if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
                module[name] = value if matrix else value.astype(mx.float32)
                if not lazy:
                    mx.eval(module[name])


def _held(module: nn.Module) -> nn.Module | None:
    """The packed counterpart of a module with a matrix; None for any other module."""
    kind = type(module)
    if kind in (nn.Linear, nn.Embedding, SwitchLinear):
        weight = module["weight"]
        form, shape, parts = Form(weight.shape[-1]), weight.shape, {"codes": weight}
    elif kind in (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear):
        weight, mode, group = module["weight"], module.mode, module.group_size
        if mode != "affine" and (mode, group) != ("mxfp4", GROUP):
            return None
        n = module["scales"].shape[-1] * group
        form, shape = Form(n, module.bits, group, mode=mode), (*weight.shape[:-1], n)
        parts = {"codes": weight, "scales": module["scales"]}
        if mode == "affine":
            # NumPy has no bfloat16.
            parts["biases"] = module["biases"].astype(mx.float32)
            parts["scales"] = parts["scales"].astype(mx.float32)
    else:
        return None
    flat = {name: part.reshape(-1, part.shape[-1]) for name, part in parts.items()}
    return packed_module(module, form, flat, shape, module.get("bias"))


def packed_module(
    like: nn.Module,
    form: Form,
    parts: dict[str, mx.array],
    shape: tuple[int, ...],
    bias: mx.array | None,
) -> nn.Module | None:
    """The packed counterpart of the mlx-lm module ``like``; None if its class has none."""
    if isinstance(like, nn.Embedding | nn.QuantizedEmbedding):
        return PackedEmbedding(form, parts, shape)
    if isinstance(like, SwitchLinear | QuantizedSwitchLinear):
        return PackedSwitchLinear(form, parts, shape, bias)
    if isinstance(like, nn.Linear | nn.QuantizedLinear):
        return PackedLinear(form, parts, shape, bias)
    return None
