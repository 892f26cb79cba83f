"""Scales near a tensor's own: they can be stored, and they hold edited weights as ggml's would."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from convert.base.near_scales import Choices, Less, search
from convert.gguf import ggml_types, near_scales

D, N = 256, 512
ERROR_BESIDE_FRESH = {
    Q.Q4_0: 1.05, Q.Q4_1: 1.1, Q.Q5_0: 1.05, Q.Q5_1: 1.1, Q.Q8_0: 1.1, Q.Q2_K: 1.05, Q.Q3_K: 1.05,
    Q.Q4_K: 1.05, Q.Q5_K: 1.05, Q.Q6_K: 1.03,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((D, N)).astype(np.float32)


def less(grid) -> Less:
    """The grid less its component along a random direction."""
    u = np.random.default_rng(1).standard_normal((1, D))
    u = (u / np.linalg.norm(u)).astype(np.float32)
    return Less(grid, u.T.copy(), (u @ grid.values()).astype(np.float32))


def spread_error(grid, wanted: np.ndarray) -> float:
    """Σ f (1 − f) of all weights, f their distance from a level, in squared steps: float64."""
    scales, offsets = (
        np.zeros_like(wanted, np.float64) if part is None else np.repeat(part, grid.group, axis=1)
        for part in (grid.scales.astype(np.float64), grid.offsets)
    )
    at = np.divide(wanted - offsets, scales, out=np.zeros_like(scales), where=scales != 0)
    f = np.abs(at - np.clip(np.round(at), grid.levels[0], grid.levels[-1]))
    return float(np.sum(np.maximum(f * (1 - f), f * f) * scales**2))


@pytest.mark.parametrize("kind", sorted(ERROR_BESIDE_FRESH), ids=lambda kind: kind.name)
def test_near_scales_are_stored_and_serve_nearly_as_ggmls_own(kind: Q, weights: np.ndarray) -> None:
    codec = ggml_types.grid_codec(kind)
    own = codec.decode(codec.encode(ggml_types.fresh(weights, kind)), N)
    wanted = less(own)
    target = own.values() - wanted.left @ wanted.right
    grid, _ = near_scales.near(wanted, codec)
    np.testing.assert_array_equal(grid.codes, own.codes)
    # What the bytes say is what the grid says.
    again = codec.decode(codec.encode(grid), N)
    for part in ("scales", "offsets", "codes"):
        np.testing.assert_array_equal(getattr(again, part), getattr(grid, part))
    fresh = spread_error(ggml_types.fresh(target, kind), target)
    assert spread_error(grid, target) < spread_error(own, target)
    assert spread_error(grid, target) <= ERROR_BESIDE_FRESH[kind] ** 2 * fresh


def test_weights_that_nothing_is_taken_from_keep_every_byte(weights: np.ndarray) -> None:
    for kind in ERROR_BESIDE_FRESH:
        own = ggml_types.fresh(weights, kind)
        nothing = Less(own, np.zeros((D, 1), np.float32), np.ones((1, N), np.float32))
        grid, past = near_scales.near(nothing, ggml_types.grid_codec(kind))
        assert grid is own
        assert not len(past)


def test_blocks_are_those_of_the_weights(weights: np.ndarray) -> None:
    own = ggml_types.fresh(weights, Q.Q4_K)
    wanted = less(own)
    target = own.values() - wanted.left @ wanted.right
    which = np.array([0, 3, 2 * D - 1])
    np.testing.assert_allclose(
        wanted.blocks(which, 256), target.reshape(-1, 256)[which], rtol=0, atol=1e-5
    )


def test_groups_with_weights_past_their_ends_are_found(weights: np.ndarray) -> None:
    own = ggml_types.fresh(weights, Q.Q4_0)
    left, right = np.zeros((D, 1), np.float32), np.zeros((1, N), np.float32)
    left[7], right[0, 40] = 1, 100
    found, past = search(Less(own, left, right), Choices.none(own))
    assert not found.any()
    assert past.tolist() == [7 * (N // 32) + 1]
