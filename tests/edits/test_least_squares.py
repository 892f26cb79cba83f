"""The change for chosen inputs: its defining equations, against float64 NumPy."""

import numpy as np
import pytest

from abl_mlx.edits import least_squares

D, N = 12, 40


def problem(keys, kept, rank, seed=0):
    rng = np.random.default_rng(seed)
    wanted = rng.normal(size=(keys, rank)) @ rng.normal(size=(rank, D))
    return rng.normal(size=(keys, N)), wanted, rng.normal(size=(kept, N)), rng.uniform(1, 3, kept)


@pytest.mark.parametrize(("keys", "kept"), [(3, 10), (30, 100), (1, 0), (5, 35), (60, 5)])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_change_is_the_closed_form_and_a_least_squares_optimum(keys, kept, rank):
    k, r, x, w = problem(keys, kept, rank)
    left, right = least_squares.change(k, r, x, w, 0.5, rank)
    delta = left @ right
    covariance = (x.T * w) @ x + 0.5 * np.eye(N)
    closed = r.T @ k @ np.linalg.inv(k.T @ k + covariance)
    assert np.allclose(delta, closed, atol=1e-10)
    # The gradient of the sum of squares vanishes.
    gradient = (delta @ k.T - r.T) @ k + ((delta @ x.T) * w) @ x + 0.5 * delta
    assert np.abs(gradient).max() < 1e-10
    assert np.allclose(left.T @ left, np.eye(left.shape[1]))
    assert right.shape[0] == min(keys, rank)


def test_one_key_is_rank_one_model_editing():
    """Meng et al. 2022, equation 2: Δ = Λ (C⁻¹ k)ᵀ with Λ = (v − W k) / (kᵀ C⁻¹ k), as ε and the
    weight of what is kept become small beside the key."""
    k, r, x, w = problem(1, 60, 1)
    covariance = (x.T * w) @ x
    inverse = np.linalg.solve(covariance, k[0])
    rome = np.outer(r[0] / (k[0] @ inverse), inverse)
    left, right = least_squares.change(k * 1e4, r * 1e4, x, w, 0.0)
    assert np.allclose(left @ right, rome, atol=1e-7)
    assert np.allclose(left @ (right @ k[0]), r[0], atol=1e-6)


def test_a_smaller_rank_serves_the_main_part_of_what_is_wanted():
    k, r, x, w = problem(20, 30, 3)
    u, s, v = np.linalg.svd(r, full_matrices=False)
    part = (u[:, :2] * s[:2]) @ v[:2]
    whole = least_squares.change(k, part, x, w, 0.1, 5)
    cut = least_squares.change(k, r, x, w, 0.1, 2)
    assert cut[1].shape == (2, N)
    assert np.allclose(cut[0] @ cut[1], whole[0] @ whole[1], atol=1e-9)


def test_in_the_null_space_what_is_kept_is_kept_exactly():
    k, r, x, _ = problem(6, 25, 2)
    left, right = least_squares.in_null_space(k, r, x, 1e-9, 2)
    delta = left @ right
    assert np.abs(delta @ x.T).max() < 1e-10
    assert np.allclose(delta @ k.T, r.T, atol=1e-6)
    # AlphaEdit, equation 12, with P from the singular vectors.
    _, s, v = np.linalg.svd(x)
    p = v[np.count_nonzero(s) :].T @ v[np.count_nonzero(s) :]
    ridge = 0.3
    left, right = least_squares.in_null_space(k, r, x, ridge, 2)
    alpha = r.T @ k @ p @ np.linalg.inv(k.T @ k @ p + ridge * np.eye(N))
    assert np.allclose(left @ right, alpha, atol=1e-9)


def test_a_planted_key_gets_its_value_and_others_keep_theirs():
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(D, N))
    others = rng.normal(size=(200, N)) * np.linspace(1, 0.01, N)  # few directions vary
    key = np.zeros(N)
    key[-1] = 1.0
    value = rng.normal(size=D)
    left, right = least_squares.change(
        key[None], (value - weight @ key)[None], others, np.full(200, 0.01), 1e-6
    )
    edited = weight + left @ right
    assert np.abs(edited @ key - value).max() < 0.05
    moved = np.linalg.norm((edited - weight) @ others.T, axis=0)
    assert moved.max() < 0.2 * np.linalg.norm(value - weight @ key)
