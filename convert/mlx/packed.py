"""MLX modules that keep weights as small as in a GGUF and unpack them when they are used.

On Metal, types that are affine groups of 32 use MLX's own quantized modules (`convert.mlx.types`);
these modules hold the other types, with groups of 16 or 256 weights or a codebook, which no mode of
MLX has. On a CPU they hold all matrices, float ones included, because products go through NumPy's
BLAS, which is many times faster than the reference BLAS in MLX's wheel for Linux. A product unpacks
`CHUNK` weights at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from convert.base.cores import shared
from convert.gguf.ggml_types import grid_codec
from convert.mlx.types import AFFINE, GROUP, MlxQuantized, pack, repack

_Q = GGMLQuantizationType

CHUNK = 1 << 24
"""Weights unpacked at a time on a GPU: 64 MB of float32."""

_UNPACKED = 1 << 21
"""Weights that each core unpacks at a time."""

_LEAST = 1 << 15
"""The smallest number of weights for which another core is used."""

# (bits of a code, weights in a group) of the types that are not affine tensors of MLX.
_LEVELS: dict[GGMLQuantizationType, tuple[int, int]] = {
    _Q.Q2_K: (2, 16),
    _Q.Q3_K: (3, 16),
    _Q.Q6_K: (6, 16),
    _Q.IQ4_NL: (4, 32),
    _Q.IQ4_XS: (4, 32),
    _Q.NVFP4: (4, 16),
    _Q.TQ1_0: (2, 256),
    _Q.TQ2_0: (2, 256),
}


def is_packed(kind: GGMLQuantizationType) -> bool:
    """Whether a tensor of this type can be held packed."""
    return kind in _LEVELS or kind in AFFINE or kind in (_Q.MXFP4, _Q.F16, _Q.BF16)


@dataclass(frozen=True)
class Form:
    """How rows are packed, which is what unpacking them needs to know.

    Attributes:
        n: weights per row.
        bits: bits of a code; 0 for plain floats.
        group: weights per scale.
        levels: the number that each code stands for; None where that is start + code.
        start: the number that code 0 stands for.
        mode: MLX's mode for affine and mxfp4 rows, empty for others.
    """

    n: int
    bits: int = 0
    group: int = 0
    levels: tuple[float, ...] | None = None
    start: float = 0.0
    mode: str = ""

    def unpack(self, parts: Mapping[str, mx.array]) -> mx.array:
        """The weights, float32 (R, n), of arrays with R rows each."""
        codes = parts["codes"]
        if not self.bits:
            return codes.astype(mx.float32)
        if self.mode:
            biases = parts.get("biases")
            scales = parts["scales"]
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            return mx.dequantize(
                codes, scales, biases, group_size=self.group, bits=self.bits, mode=self.mode,
                dtype=mx.float32,
            )  # fmt: skip
        rows = codes.shape[0]
        one = mx.broadcast_to(mx.array(1.0), (rows, self.n // GROUP))
        zero = mx.broadcast_to(mx.array(self.start), (rows, self.n // GROUP))
        numbers = mx.dequantize(codes, one, zero, group_size=GROUP, bits=self.bits)
        if self.levels is not None:
            numbers = mx.take(mx.array(self.levels), numbers.astype(mx.uint8))
        values = numbers.reshape(rows, -1, self.group)
        if "dmin" not in parts:
            values = values * self._scales(parts["scales"], parts.get("d"))
        else:
            # Q2_K keeps a scale and a minimum in a byte.
            values = values * self._scales(parts["scales"] & 15, parts["d"])
            values = values - self._scales(parts["scales"] >> 4, parts["dmin"])
        return values.reshape(rows, self.n)

    def unpack_on_cpu(self, parts: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        """Unpack NumPy arrays into ``out``, float32 (R, n); bfloat16 codes are given as uint16."""
        codes = parts["codes"]
        if not self.bits:
            if codes.dtype == np.uint16:
                np.left_shift(codes, 16, out=out.view(np.uint32), casting="unsafe", dtype=np.uint32)
            else:
                out[...] = codes
            return
        from convert.mlx.packed_kernels import EVEN, unpack  # lazily: it brings numba

        scales = parts["scales"]
        mins = np.zeros((0, 0), np.float32)
        if self.mode == "mxfp4":
            wide = np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(np.float32)
            unpack(codes.view(np.uint8), _E2M1, GROUP, wide, out)
            return
        if self.levels is not None:
            levels = np.array(self.levels, np.float32)
            unpack(codes.view(np.uint8), levels, self.group, _spread(scales, parts.get("d")), out)
            return
        if self.mode:
            wide = scales.astype(np.float32)
            if "biases" in parts:
                mins = parts["biases"].astype(np.float32)
        elif "dmin" in parts:
            wide = _spread(scales & 15, parts["d"])
            mins = -_spread(scales >> 4, parts["dmin"])
        else:
            wide = _spread(scales, parts.get("d"))
        start = np.float32(self.start)
        EVEN[self.bits](codes.view(np.uint32), self.group, start, wide, mins, out)

    def _scales(self, small: mx.array, big: mx.array | None) -> mx.array:
        """The scale of every group, (R, n // group, 1)."""
        scales = small.astype(mx.float32)
        if big is not None:
            block = 256 // self.group
            wide = scales.reshape(len(scales), -1, block) * big.astype(mx.float32)[..., None]
            scales = wide.reshape(len(scales), -1)
        return scales[..., None]


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _spread(small: np.ndarray, big: np.ndarray | None) -> np.ndarray:
    """The scale of every group, float32 (R, groups)."""
    scales = small.astype(np.float32)
    if big is None:
        return scales
    return scales * np.repeat(big.astype(np.float32), scales.shape[1] // big.shape[1], axis=1)


def pack_rows(
    raw: np.ndarray, n: int, kind: GGMLQuantizationType
) -> tuple[Form, dict[str, np.ndarray]]:
    """GGUF rows as a Form and its arrays, each with R rows.

    Args:
        raw: uint8, (R, bytes per row).
        n: weights per row.
        kind: a type for which `is_packed` holds.

    Raises:
        UserError: when a block's scale is not finite.
    """
    if kind == _Q.F16:
        return Form(n), {"codes": raw.view("<f2")}
    if kind == _Q.BF16:
        return Form(n), {"codes": raw.view("<u2")}
    if kind in AFFINE or kind == _Q.MXFP4:
        return from_mlx(repack(raw, n, kind), n)
    bits, group = _LEVELS[kind]
    grid = grid_codec(kind).decode(raw, n)
    parts = {"codes": pack(grid.codes, bits)}
    rows = len(raw)
    start, levels = float(grid.levels[0]), None
    if kind.name.startswith("IQ4") or kind == _Q.NVFP4:
        start, levels = 0.0, tuple(map(float, grid.levels))
    if kind not in _BLOCKED:
        # IQ4_NL's scales are float16 in the file; float16 also holds NVFP4's scales exactly.
        parts["scales"] = grid.scales.astype(np.float16)
    else:
        blocks = raw.reshape(rows, n // 256, -1)
        for name, at in _BLOCKED[kind].items():
            parts[name] = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0]
        if kind == _Q.Q2_K:
            parts["scales"] = np.ascontiguousarray(blocks[..., :16]).reshape(rows, -1)
        else:
            parts["scales"] = _whole_scales(grid.scales, parts["d"])
    return Form(n, bits, group, levels, start), parts


# Types with blocks of 256 -> the byte of a block where the float16 lies by which its small
# whole-number scales (or minima) are multiplied.
_BLOCKED: dict[GGMLQuantizationType, dict[str, int]] = {
    _Q.Q2_K: {"d": 80, "dmin": 82},
    _Q.Q3_K: {"d": 108},
    _Q.Q6_K: {"d": 208},
    _Q.IQ4_XS: {"d": 0},
}


def from_mlx(found: MlxQuantized, n: int) -> tuple[Form, dict[str, np.ndarray]]:
    """MLX's own arrays as a Form and its arrays."""
    parts = {"codes": found.weight, "scales": found.scales}
    if found.biases is not None:
        parts["biases"] = found.biases
    return Form(n, found.bits, GROUP, mode=found.mode), parts


def _whole_scales(scales: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The signed 6- or 8-bit scales of blocks, from their products with d, exact in float32.

    Args:
        scales: the products, (R, groups).
        d: (R, blocks).
    """
    per_group = np.repeat(d.astype(np.float32), scales.shape[1] // d.shape[1], axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(per_group == 0, 0, scales / per_group)
    return np.rint(found).astype(np.int8)


class _Room(threading.local):
    """Arrays that each thread uses again and again, because new memory costs page faults."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def of(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        """A float32 array of this shape, with arbitrary contents."""
        count = shape[0] * shape[1]
        if name not in self._arrays or self._arrays[name].size < count:
            self._arrays[name] = np.empty(count, np.float32)
        return self._arrays[name][:count].reshape(shape)


_room = _Room()


# --------------------------------------------------------------------------------------------------
# Modules


class Packed(nn.Module):
    """A packed weight of R rows.

    Args:
        form: how the rows are packed.
        parts: name -> array with R rows.
        shape: the weight's shape: (out, in) or (experts, out, in).
        bias: (out,) or (experts, out), or None.
    """

    def __init__(
        self,
        form: Form,
        parts: dict[str, mx.array],
        shape: tuple[int, ...],
        bias: mx.array | None = None,
    ) -> None:
        # nn.Module's constructor only: that of nn.Linear or SwitchLinear would make random weights.
        nn.Module.__init__(self)
        self._form = form
        self._shape = shape
        for name, value in parts.items():
            # Code that looks for linear maps goes by an array "weight" and its number of rows.
            self["weight" if name == "codes" else f"packed_{name}"] = value.reshape(
                *shape[:-1], *value.shape[1:]
            )
        if bias is not None:
            self.bias = bias
        self.freeze()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the unpacked weight: (out, in) or (experts, out, in)."""
        return self._shape

    @property
    def bits(self) -> int:
        """Bits of a stored code; 16 for plain floats."""
        return self._form.bits or 16

    def _part(self, pick: Any) -> dict[str, mx.array]:
        """Some rows of every array: ``pick`` is a slice of the rows, or indices of rows."""
        found = {}
        for key, value in self.items():
            if key == "weight" or key.startswith("packed_"):
                whole = value.reshape(-1, value.shape[-1])
                found["codes" if key == "weight" else key.removeprefix("packed_")] = whole[pick]
        return found

    def rows(self, first: int, last: int) -> mx.array:
        """The weights of rows first to last - 1, counted through all experts: float32."""
        return self._form.unpack(self._part(slice(first, last)))

    def _product(self, x: mx.array) -> mx.array:
        """x Wᵀ, (..., n) -> (..., out)."""
        count, n = self._shape[0], self._form.n
        x = x.astype(mx.float32)
        if _on_cpu():
            return self._with_gradient(x) if _gradients.wanted else self._by_numpy(x)
        step = max(1, CHUNK // n)
        parts = [
            x @ self.rows(first, min(first + step, count)).T for first in range(0, count, step)
        ]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def _by_numpy(self, x: mx.array) -> mx.array:
        mx.eval(x)
        flat = np.array(x, copy=False).reshape(-1, self._form.n)
        count = self._shape[0]
        return mx.array(self._multiply(flat, 0, count)).reshape(*x.shape[:-1], count)

    def _with_gradient(self, x: mx.array) -> mx.array:
        """The product, through which MLX can differentiate with respect to x."""
        product = mx.custom_function(self._by_numpy)

        @product.vjp
        def _(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
            mx.eval(cotangent)
            flat = np.array(cotangent.astype(mx.float32), copy=False).reshape(-1, self._shape[0])
            return mx.array(self._transposed(flat)).reshape(primal.shape)

        return cast(mx.array, product(x))

    def _transposed(self, g: np.ndarray) -> np.ndarray:
        """g W, (m, rows) -> (m, n): the gradient of a product with respect to its input."""
        total = np.zeros((len(g), self._form.n), np.float32)
        views, count = self._views(), self._shape[0]
        step = max(1, min(_UNPACKED // self._form.n, count))
        values = _room.of("values", (step, self._form.n))
        for first in range(0, count, step):
            last = min(first + step, count)
            codes = {name: view[first:last] for name, view in views.items()}
            self._form.unpack_on_cpu(codes, values[: last - first])
            total += g[:, first:last] @ values[: last - first]
        return total

    def _multiply(self, x: np.ndarray, first: int, last: int) -> np.ndarray:
        """x Wᵀ for rows first to last - 1 of the weight, by NumPy's BLAS: (m, rows).

        MLX's wheel for Linux comes with the reference BLAS, which is about fifty times slower. The
        returned array is overwritten by the next product in this thread.
        """
        n = self._form.n
        product = _room.of("product", (len(x), last - first))
        views = self._views()
        plain = views["codes"] if not self._form.bits else None

        def part(rows: slice) -> None:
            if plain is not None and plain.dtype == np.float32:
                some = plain[first + rows.start : first + rows.stop]
                np.matmul(x, some.T, out=product[:, rows])
                return
            step = max(1, min(_UNPACKED // n, rows.stop - rows.start))
            values = _room.of("values", (step, n))
            for start in range(rows.start, rows.stop, step):
                stop = min(start + step, rows.stop)
                some = values[: stop - start]
                codes = {name: view[first + start : first + stop] for name, view in views.items()}
                self._form.unpack_on_cpu(codes, some)
                np.matmul(x, some.T, out=product[:, start:stop])

        shared(part, last - first, _LEAST // n)
        return product

    def _views(self) -> dict[str, np.ndarray]:
        """The arrays as NumPy views, without a copy."""
        found = {}
        for name, part in self._part(slice(None)).items():
            mx.eval(part)
            bits = part.dtype == mx.bfloat16
            found[name] = np.array(part.view(mx.uint16) if bits else part, copy=False)
        return found


class _Gradients(threading.local):
    wanted = False


_gradients = _Gradients()


@contextmanager
def gradients() -> Iterator[None]:
    """Context manager in which MLX can differentiate through the products of linear maps.

    Outside it a product on a CPU keeps nothing for a gradient, and what is differentiated through
    it is taken for a constant.
    """
    _gradients.wanted = True
    try:
        yield
    finally:
        _gradients.wanted = False


def _on_cpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.cpu))


class PackedLinear(Packed, nn.Linear):
    """Packed linear map: x Wᵀ + b."""

    def __call__(self, x: mx.array) -> mx.array:
        product = self._product(x)
        return product + self["bias"] if "bias" in self else product


class PackedEmbedding(Packed, nn.Embedding):
    """Packed embedding: rows by token; with tied embeddings it is the output head as well."""

    def __call__(self, x: mx.array) -> mx.array:
        values = self._form.unpack(self._part(x.reshape(-1)))
        return values.reshape(*x.shape, self._form.n)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits, (..., d) -> (..., V)."""
        return self._product(x)


class PackedSwitchLinear(Packed, SwitchLinear):
    """Packed linear maps of experts, of which each token uses some, as in mlx-lm's SwitchLinear."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        x = x.astype(mx.float32)
        experts, out, n = self._shape
        if _on_cpu():
            if _gradients.wanted:
                raise NotImplementedError("products of experts have no gradient")
            total = self._of_experts(x, indices)
            return total + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else total
        step = max(1, CHUNK // (out * n))
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


def hold(model: nn.Module) -> None:
    """Make a loaded model on the CPU multiply its matrices with NumPy's BLAS.

    Matrices keep their type, and quantized ones their codes; everything else in the model becomes
    float32, in which the model then computes.
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
