"""Iterative null-space projection: each classifier against float64, and planted directions."""

import numpy as np
import pytest

from abl_mlx.directions import estimators, nullspace
from tests.directions.test_methods import cosine, planted, unit


def test_each_classifier_is_the_best_one_of_what_the_others_left():
    rng = np.random.default_rng(4)
    harmful, harmless = rng.normal(size=(30, 12)) + 0.5, rng.normal(size=(40, 12)) * 2
    rows, _ = nullspace.directions(harmful, harmless, 3, penalty=0.02)
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-9)
    states = np.concatenate([harmful, harmless])
    labels = np.repeat([1.0, 0.0], [30, 40])
    weights = np.repeat([0.5 / 30, 0.5 / 40], [30, 40])
    left = np.eye(12)
    for row in rows:
        # Plain gradient descent on the penalized log-loss of the projected, scaled states.
        x = states @ left
        x = x - x.mean(axis=0)
        x /= np.sqrt((x**2).sum(axis=1).mean())
        w, b = np.zeros(12), 0.0
        for _ in range(20_000):
            off = weights * (1 / (1 + np.exp(-(x @ w + b))) - labels)
            w, b = w - 4 * (off @ x + 0.02 * w), b - 4 * off.sum()
        assert cosine(w, row) >= 0.9999
        left = left - np.outer(row, row)


def test_the_first_is_the_probe_and_finds_a_planted_direction():
    harmful, harmless, r = planted()
    rows, _ = nullspace.directions(harmful, harmless, 1, penalty=0.01)
    assert cosine(rows[0], estimators.probe(harmful, harmless).weight) == pytest.approx(1)
    assert cosine(rows[0], r) >= 0.99


def test_under_correlated_noise_further_classifiers_hold_what_the_first_misses():
    """One classifier finds Σ⁻¹δ and not the planted δ, which the span of several comes near."""
    rng = np.random.default_rng(3)
    d, n = 12, 5_000
    mix = np.eye(d) + 0.9 * unit(np.ones(d))[:, None] * unit(rng.normal(size=d)) * 3
    r = unit(rng.normal(size=d))
    noise = rng.normal(size=(2, n, d)) @ mix.T
    rows, _ = nullspace.directions(noise[0] + 1.5 * r, noise[1], 3, penalty=1e-4)
    shares = [np.linalg.norm(rows[: k + 1] @ r) for k in range(3)]
    assert shares[0] < 0.9
    assert shares[1] > 0.97
