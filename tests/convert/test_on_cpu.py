"""Attention and activations through NumPy are those of MLX."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from convert.mlx import on_cpu

ATTENTION = getattr(
    mx.fast.scaled_dot_product_attention, "_abl_original", mx.fast.scaled_dot_product_attention
)


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def masks(batch: int, heads: int, length: int, seen: int) -> dict[str, object]:
    causal = mx.arange(seen)[None] <= mx.arange(seen - length, seen)[:, None]
    padded = (mx.arange(seen)[None] >= mx.arange(batch)[:, None])[:, None, None] & causal
    return {
        "none": None,
        "causal": "causal",
        "rows": causal,
        "batch": padded,
        "added": mx.where(padded, 0.0, -1e9),
        "heads": random(batch, heads, length, seen, seed=5),
    }


@pytest.mark.parametrize("chunk", [1 << 23, 150])
@pytest.mark.parametrize("name", list(masks(1, 1, 1, 1)))
@pytest.mark.parametrize(("heads", "kv"), [(6, 2), (4, 4), (5, 1)])
def test_attention(
    heads: int, kv: int, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_cpu, "_SCORES", chunk)
    for length, seen in ((7, 7), (3, 9), (1, 9)):
        # As models hand them over: turned, and cut from a longer cache.
        q = random(3, length, heads, 8).swapaxes(1, 2)
        k, v = (random(3, kv, 16, size, seed=size)[:, :, :seen] for size in (8, 12))
        mask = masks(3, heads, length, seen)[name]
        for sinks in (None, random(heads, seed=9)):
            found = on_cpu._attention(q, k, v, scale=0.3, mask=mask, sinks=sinks)
            expected = ATTENTION(q, k, v, scale=0.3, mask=mask, sinks=sinks)
            assert found.shape == expected.shape
            assert mx.abs(found - expected).max() < 2e-6


def test_a_row_that_sees_nothing_is_finite() -> None:
    hidden = mx.zeros((1, 1, 2, 2), mx.bool_)
    q = random(1, 2, 2, 4)
    assert mx.isfinite(on_cpu._attention(q, q, q, scale=1.0, mask=hidden)).all()


def test_other_types_are_left_to_mlx() -> None:
    half = random(1, 2, 2, 4).astype(mx.bfloat16)
    assert on_cpu._attention(half, half, half, scale=1.0) is None
    assert on_cpu._elementwise(on_cpu._silu)(half) is None


@pytest.mark.parametrize("scale", [1.0, 30.0, 200.0])
def test_activations(scale: float) -> None:
    x, y = scale * random(3, 50, 7000), random(3, 50, 7000, seed=1)
    expected = {"_silu": x * mx.sigmoid(x), "_gelu_approx": 0.5 * x * (1 + mx.tanh(
        (2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))}  # fmt: skip
    for name, wanted in expected.items():
        found = on_cpu._elementwise(getattr(on_cpu, name))(x)
        assert mx.abs(found - wanted).max() < 2e-6 * scale
    found = on_cpu._elementwise(on_cpu._swiglu)(x, y)
    assert mx.abs(found - expected["_silu"] * y).max() < 4e-6 * scale


def test_compiled_functions_and_gradients_go_on() -> None:
    on_cpu.install()
    on_cpu.install()
    x = random(2, 8)
    mx.enable_compile()
    try:
        found = mx.compile(lambda z: nn.silu(z) * 2)(x)
        assert mx.allclose(found, 2 * x * mx.sigmoid(x), atol=1e-6)
    finally:
        mx.disable_compile()


def test_gradients_are_those_of_mlx() -> None:
    """Whatever loads a model here may be trained afterwards, in the same process."""
    on_cpu.install()
    x, weight = random(2, 8), random(8, 8, seed=3)

    def silu(z: mx.array) -> mx.array:
        return z * mx.sigmoid(z)

    found = mx.grad(lambda w: (nn.silu(x @ w) ** 2).sum())(weight)
    wanted = mx.grad(lambda w: (silu(x @ w) ** 2).sum())(weight)
    assert mx.abs(wanted).max() > 0.1
    assert mx.allclose(found, wanted, atol=1e-5)
    q, k, v = (random(1, 2, 3, 4, seed=seed) for seed in (1, 2, 4))
    mask = mx.tril(mx.ones((3, 3), mx.bool_))

    def loss(attend: object, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return (attend(q, k, v, scale=0.5, mask=mask) ** 2).sum()  # type: ignore[operator]

    for which in range(3):
        ours, mlxs = (
            mx.grad(lambda *given, f=f: loss(f, *given), argnums=which)(q, k, v)
            for f in (mx.fast.scaled_dot_product_attention, ATTENTION)
        )
        assert mx.abs(mlxs).max() > 0.01
        assert mx.allclose(ours, mlxs, atol=1e-5)
