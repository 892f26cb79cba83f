"""Attention and activations in float32 on a CPU, computed by NumPy because MLX is slow there.

MLX's wheel for Linux multiplies with a reference BLAS and computes exponentials without vector
instructions. With matrices multiplied through NumPy (`convert.mlx.packed`), attention and SwiGLU
would take a third of a forward pass. `install` replaces the functions that mlx-lm's models call.
The originals still run on a GPU, for other types, inside ``mx.compile`` and for gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from convert.base.cores import shared

# Attention scores that are computed at a time: 32 MB of float32.
_SCORES = 1 << 23

# The smallest number of values for which another core is used.
_LEAST = 1 << 14

# The score of a masked position. It is finite, so that a row with no visible position is not NaN.
_HIDDEN = np.float32(np.finfo(np.float32).min)

Function = Callable[..., Any]


def install() -> None:
    """Make the model modules that are imported so far use NumPy for attention and activations."""
    if not hasattr(mx.fast.scaled_dot_product_attention, "_abl_original"):
        _replace(mx.fast, "scaled_dot_product_attention", _attention)
        _replace(nn, "silu", _elementwise(_silu))
        _replace(nn, "gelu_approx", _elementwise(_gelu_approx))
    for name, module in list(sys.modules.items()):
        found = getattr(module, "swiglu", None) if name.startswith("mlx_lm.models.") else None
        if found is not None and not hasattr(found, "_abl_original"):
            _replace(module, "swiglu", _elementwise(_swiglu))


def _replace(module: Any, name: str, ours: Callable[..., Any]) -> None:
    """Replace ``module.name`` by ``ours``; gradients are still those of the original function.

    Inside a gradient the arrays look like any others, so ``ours`` cannot step aside there; instead
    the replacement declares the original's derivative as its own.
    """
    original = getattr(module, name)

    def function(*arrays: Any, **more: Any) -> Any:
        found = ours(*arrays, **more) if mx.default_device() == mx.Device(mx.cpu) else None
        if found is None:
            return original(*arrays, **more)

        def back(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
            several = list(primals) if isinstance(primals, tuple | list) else [primals]
            gradients = mx.vjp(lambda *at: original(*at, **more), several, [cotangent])[1]
            return gradients if len(several) > 1 else gradients[0]

        differentiable = mx.custom_function(lambda *_: found)
        differentiable.vjp(back)
        return differentiable(*arrays)

    function._abl_original = original  # type: ignore[attr-defined]
    setattr(module, name, function)


def _numpy(*arrays: Any) -> list[np.ndarray] | None:
    """NumPy views of float32 arrays (masks may be bool); None where there can be no view."""
    for array in arrays:
        if not isinstance(array, mx.array) or array.dtype not in (mx.float32, mx.bool_):
            return None
    try:
        mx.eval(*arrays)
    except (ValueError, RuntimeError):  # inside of mx.compile
        return None
    return [
        np.array(array, np.bool_, copy=False)
        if array.dtype == mx.bool_
        else np.array(array.astype(mx.float32), copy=False)
        for array in arrays
    ]


# --- activations ---------------------------------------------------------------------------------


def _elementwise(work: Callable[..., None]) -> Function:
    """A function of float32 MLX arrays of one shape, from a NumPy function that fills ``out``."""

    def function(*arrays: Any) -> mx.array | None:
        found = _numpy(*arrays)
        if found is None or any(one.shape != found[0].shape for one in found):
            return None
        flat = [np.ascontiguousarray(one, np.float32).reshape(-1) for one in found]
        out = np.empty(flat[0].shape, np.float32)

        def part(here: slice) -> None:
            with np.errstate(over="ignore"):
                work(*(one[here] for one in flat), out[here])

        shared(part, out.size, _LEAST)
        return mx.array(out).reshape(found[0].shape)

    return function


def _silu(x: np.ndarray, out: np.ndarray) -> None:
    np.negative(x, out=out)
    np.exp(out, out=out)
    out += 1
    np.divide(x, out, out=out)


def _swiglu(gate: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    _silu(gate, out)
    out *= x


def _gelu_approx(x: np.ndarray, out: np.ndarray) -> None:
    # x / 2 (1 + tanh y) = x / (1 + exp(−2 y)), y = √(2/π) (x + 0.044715 x³)
    np.multiply(x, x, out=out)
    out *= np.float32(-2 * 0.044715 * (2 / np.pi) ** 0.5)
    out -= np.float32(2 * (2 / np.pi) ** 0.5)
    out *= x
    np.exp(out, out=out)
    out += 1
    np.divide(x, out, out=out)


# --- attention -----------------------------------------------------------------------------------


def _attention(
    q: Any, k: Any, v: Any, *, scale: float, mask: Any = None, sinks: Any = None, **more: Any
) -> mx.array | None:
    masked = isinstance(mask, mx.array)
    given = _numpy(q, k, v, *([mask] if masked else []), *([] if sinks is None else [sinks]))
    causal = isinstance(mask, str) and mask == "causal"
    if given is None or more or not (mask is None or masked or causal):
        return None
    queries, keys, values, *rest = given
    return mx.array(
        attention(
            queries, keys, values, scale=scale,
            mask=rest[0] if masked else None, causal=causal,
            sinks=rest[-1] if sinks is not None else None,
        )
    )  # fmt: skip


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    mask: np.ndarray | None = None,
    causal: bool = False,
    sinks: np.ndarray | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """softmax(scale q kᵀ + mask) v, float32, (B, H, T, Dv).

    Args:
        q: (B, H, T, D).
        k: (B, K, S, D); H is a multiple of K.
        v: (B, K, S, Dv).
        scale: factor of the scores.
        mask: bool (true where a key is visible) or float32 (added to the scores); broadcasts with
            (B, H, T, S).
        causal: the queries are the last T of S positions, and no query attends to a later position.
        sinks: (H,): one more score for each head, which takes part in the softmax but has no value.
        softcap: c; scores become c tanh(score / c) before they are masked.
    """
    batch, heads, length, depth = q.shape
    kv, seen = k.shape[1], k.shape[2]
    group = heads // kv
    q = np.ascontiguousarray(q, np.float32).reshape(batch, kv, group, length, depth)
    out = np.empty((batch, kv, group, length, v.shape[-1]), np.float32)
    hiding: np.ndarray | None = None
    if mask is not None:
        four: tuple[int, ...] = (1,) * (4 - mask.ndim) + mask.shape
        apart = (kv, group) if four[1] > 1 else (1, 1)
        hiding = mask.reshape(four[0], *apart, *four[2:])
    tall = max(1, min(length, _SCORES // (heads * seen)))
    wide = max(1, _SCORES // (heads * tall * seen))

    def work(some: slice, of: slice) -> None:
        """Compute some prompts of the batch, for some heads of keys and values."""
        for top in range(0, length, tall):
            rows = slice(top, min(length, top + tall))
            # No row of these attends to a position after the last of them.
            reach = seen - length + rows.stop if causal else seen
            part = q[some, of, :, rows]
            shape = part.shape
            scores = np.matmul(
                part.reshape(*shape[:2], -1, depth), k[some, of, :reach].swapaxes(-1, -2)
            ).reshape(*shape[:-1], reach)
            scores *= np.float32(scale)
            if softcap is not None:
                _cap(scores, softcap)
            if causal:
                at = np.arange(rows.start, rows.stop) + seen - length
                scores[..., np.arange(reach) > at[:, None]] = _HIDDEN
            if hiding is not None:
                _hide(scores, hiding, some, of, rows)
            sink = None if sinks is None else sinks.reshape(kv, group, 1, 1)[of]
            out[some, of, :, rows] = _weighted(scores, v[some, of, :reach], sink)

    def prompts(part: slice) -> None:
        for b in range(part.start, part.stop, wide):
            work(slice(b, min(b + wide, part.stop)), slice(None))

    if batch > 1:
        shared(prompts, batch)
    else:
        shared(lambda part: work(slice(None), part), kv)
    return out.reshape(batch, heads, length, -1)


def _cap(scores: np.ndarray, softcap: float) -> None:
    scores /= np.float32(softcap)
    np.tanh(scores, out=scores)
    scores *= np.float32(softcap)


def _hide(scores: np.ndarray, hiding: np.ndarray, some: slice, of: slice, rows: slice) -> None:
    """Apply to these scores their part of a mask (B or 1, K or 1, G or 1, T or 1, S), in place."""
    hidden = hiding[some if hiding.shape[0] > 1 else slice(None)]
    hidden = hidden[:, of if hidden.shape[1] > 1 else slice(None)]
    hidden = hidden[:, :, :, rows if hidden.shape[3] > 1 else slice(None)]
    if hidden.dtype == np.bool_:
        np.copyto(scores, _HIDDEN, where=~hidden)
    else:
        scores += hidden


def _weighted(scores: np.ndarray, v: np.ndarray, sinks: np.ndarray | None) -> np.ndarray:
    """softmax(scores) v: (b, K, G, t, Dv). The scores are overwritten.

    Args:
        scores: (b, K, G, t, s).
        v: (b, K, s, Dv).
        sinks: (K, G, 1, 1), or None.
    """
    b, kv, group, rows, seen = scores.shape
    most = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        most = np.maximum(most, sinks)
    scores -= most
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks - most)
    made = np.matmul(scores.reshape(b, kv, group * rows, seen), v)
    made = made.reshape(b, kv, group, rows, -1)
    made /= total
    weighted: np.ndarray = made
    return weighted
