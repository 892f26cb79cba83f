"""Self-organizing maps: the batch map against its equations in float64, and planted directions."""

import numpy as np

from abl_mlx.directions import estimators, som
from tests.directions.test_methods import D, cosine, planted, unit


def test_each_neuron_is_the_weighted_mean_of_the_states_around_it():
    states = np.random.default_rng(0).normal(size=(80, 6)) * np.arange(1, 7)
    found = som.neurons(states, 3, 200)
    places = [(i, j) for i in range(3) for j in range(3)]
    nearest = [min(range(9), key=lambda n: ((one - found[n]) ** 2).sum()) for one in states]
    for n, place in enumerate(places):
        weights = [
            np.exp(-((places[m][0] - place[0]) ** 2 + (places[m][1] - place[1]) ** 2) / 0.18)
            for m in nearest
        ]
        expected = np.average(states, axis=0, weights=weights)
        np.testing.assert_allclose(found[n], expected, atol=1e-6)


def test_a_map_of_one_neuron_is_the_difference_of_means():
    harmful, harmless, r = planted()
    found, counts = som.directions(harmful, harmless, 1, 5)
    np.testing.assert_allclose(
        found[0], unit(harmful.mean(axis=0) - harmless.mean(axis=0)), atol=1e-12
    )
    assert counts.tolist() == [len(harmful)]
    assert cosine(found[0], r) >= 0.99


def test_directions_of_which_each_prompt_has_one_are_found_apart():
    """The mean of three planted directions is none of them; three neurons are."""
    rng = np.random.default_rng(5)
    harmful, harmless, _ = planted(shift=0)
    basis, _ = np.linalg.qr(rng.normal(size=(D, 3)))
    kinds = rng.integers(0, 3, size=len(harmful))
    harmful += 12 * basis.T[kinds]
    found, _ = som.directions(harmful, harmless, 4, 30)
    nearest = np.abs(found @ basis).max(axis=0)
    assert nearest.min() >= 0.97
    mean = unit(harmful.mean(axis=0) - harmless.mean(axis=0))
    assert np.abs(mean @ basis).max() <= 0.8
    rows = np.array(som._rows(found, range(len(found))))[:4]
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-5)


def test_massive_activations_lead_neurons_away():
    harmful, harmless, r = planted(shift=12, d=256)
    r[[3, 40]] = 0
    rng = np.random.default_rng(1)
    for states in (harmful, harmless):
        states[:, [3, 40]] += 900 * rng.lognormal(0, 1.0, size=(len(states), 2)) * [1, -1]
    found, _ = som.directions(harmful, harmless, 4, 30)
    assert np.abs(found @ r).max() < 0.9
    cut = [estimators.winsorized(one) for one in (harmful, harmless)]
    assert np.abs(som.directions(*cut, 4, 30)[0] @ unit(r)).max() > np.abs(found @ r).max()
