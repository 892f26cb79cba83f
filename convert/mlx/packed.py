"""MLX modules that keep weights as small as in a GGUF and unpack them when they are used.

On Metal, types that are affine groups of 32 use MLX's own quantized modules (`convert.mlx.types`);
these modules hold the other types, with groups of 16 or 256 weights or a codebook, which no mode of
MLX has. On a CPU they hold all matrices, float ones included, because products go through NumPy's
BLAS, which is many times faster than the reference BLAS in MLX's wheel for Linux. A product unpacks
`CHUNK` weights at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from convert.base.cores import shared
from convert.mlx.packed_forms import Form

CHUNK = 1 << 24
"""Weights unpacked at a time on a GPU: 64 MB of float32."""

_UNPACKED = 1 << 21
"""Weights that each core unpacks at a time."""

_FEW = 96
"""At most so many vectors: BLAS is faster then with the weight as its first matrix."""

_LEAST = 1 << 15
"""The smallest number of weights for which another core is used."""


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

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return self._arrays

    @arrays.setter
    def arrays(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays


_room = _Room()


def room() -> dict[str, np.ndarray]:
    """The arrays in which this thread computes products."""
    return _room.arrays


def use_room(arrays: dict[str, np.ndarray]) -> None:
    """Let this thread compute products in the arrays of another one, which rests meanwhile."""
    _room.arrays = arrays


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

    def _arrays(self) -> Iterator[tuple[str, mx.array]]:
        """The arrays of the packed rows, by the names that `Form` gives them."""
        for key, value in self.items():
            if key == "weight":
                yield "codes", value
            elif key.startswith("packed_"):
                yield key.removeprefix("packed_"), value

    def _part(self, pick: Any) -> dict[str, mx.array]:
        """Some rows of every array: ``pick`` is a slice of the rows, or indices of rows."""
        return {name: one.reshape(-1, one.shape[-1])[pick] for name, one in self._arrays()}

    def rows(self, first: int, last: int) -> mx.array:
        """The weights of rows first to last - 1, counted through all experts: float32."""
        return self._form.unpack(self._part(slice(first, last)))

    def _product(self, x: mx.array) -> mx.array:
        """x Wᵀ, (..., n) -> (..., out)."""
        count, n = self._shape[0], self._form.n
        x = x.astype(mx.float32)
        if runs_on_cpu():
            return self._with_gradient(x) if gradients_wanted() else self._by_numpy(x)
        step = max(1, CHUNK // n)
        parts = [
            x @ self.rows(first, min(first + step, count)).T for first in range(0, count, step)
        ]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def _by_numpy(self, x: mx.array) -> mx.array:
        mx.eval(x)
        flat = np.array(x.astype(mx.float32), copy=False).reshape(-1, self._form.n)
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
        columns = np.ascontiguousarray(x.T) if len(x) <= _FEW else None
        views = self._views()

        def multiply(some: np.ndarray, to: np.ndarray) -> None:
            """Put x someᵀ into ``to``."""
            if columns is None:
                np.matmul(x, some.T, out=to)
                return
            turned = _room.of("turned", (len(some), len(x)))
            np.matmul(some, columns, out=turned)
            to[...] = turned.T

        plain = views["codes"] if not self._form.bits else None

        def part(rows: slice) -> None:
            if plain is not None and plain.dtype == np.float32:
                some = plain[first + rows.start : first + rows.stop]
                multiply(some, product[:, rows])
                return
            step = max(1, min(_UNPACKED // n, rows.stop - rows.start))
            values = _room.of("values", (step, n))
            for start in range(rows.start, rows.stop, step):
                stop = min(start + step, rows.stop)
                some = values[: stop - start]
                codes = {name: view[first + start : first + stop] for name, view in views.items()}
                self._form.unpack_on_cpu(codes, some)
                multiply(some, product[:, start:stop])

        shared(part, last - first, _LEAST // n)
        return product

    def _views(self) -> dict[str, np.ndarray]:
        """The arrays as NumPy views with a row for each of the weight's, without a copy."""
        found = {}
        for name, value in self._arrays():
            bits = value.dtype == mx.bfloat16
            view = np.array(value.view(mx.uint16) if bits else value, copy=False)
            found[name] = view.reshape(-1, view.shape[-1])
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


def gradients_wanted() -> bool:
    """Whether this thread is inside of `gradients`."""
    return _gradients.wanted


def runs_on_cpu() -> bool:
    """Whether MLX computes on the CPU, where products go through NumPy."""
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
