"""float16 and bfloat16: the bits that NumPy and MLX make."""

import mlx.core as mx
import numpy as np
import pytest

from convert.base import halves


def numbers() -> np.ndarray:
    """Every float16, numbers between them and beside the middle of two, and all sizes: float32."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        middles = (every[:-1] + every[1:]) / 2
        beside = [np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)]
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    return np.concatenate([every, middles, *beside, random.view(np.float32)])


@pytest.mark.parametrize("count", [halves.SMALL, None])
def test_float16_is_numpys(count: int | None) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)[:count]
    np.testing.assert_array_equal(
        halves.widened(bits, "F16").view(np.uint32),
        bits.view(np.float16).astype(np.float32).view(np.uint32),
    )
    values = numbers()[:count]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    known = ~np.isnan(values)
    found = halves.narrowed(values, "F16")
    np.testing.assert_array_equal(found[known], expected.view(np.uint16)[known])
    assert np.isnan(found[~known].view(np.float16)).all()


def test_bfloat16_is_mlxs() -> None:
    values = numbers()
    known = ~np.isnan(values)
    found = halves.narrowed(values, "BF16")
    expected = mx.array(values).astype(mx.bfloat16)
    np.testing.assert_array_equal(found[known], np.array(expected.view(mx.uint16))[known])
    wide = halves.widened(found, "BF16")
    np.testing.assert_array_equal(wide[known], np.array(expected.astype(mx.float32))[known])
    assert np.isnan(wide[~known]).all()
