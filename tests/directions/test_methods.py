"""Every formula against float64 NumPy, and a planted direction found again, or not, by each."""

import numpy as np
import pytest

from abl_mlx.behaviour import separation
from abl_mlx.directions import estimators, methods

RNG = np.random.default_rng(0)
N, D = 400, 48


def unit(vector):
    return vector / np.linalg.norm(vector)


def cosine(a, b):
    return float(unit(np.ravel(a)) @ unit(np.ravel(b)))


def planted(shift=8.0, n=N, d=D, seed=0, mean=20.0):
    """(harmful, harmless, r): states around a common mean of some length, r being orthogonal to it;
    the harmful ones shifted along r; noise of standard deviation 1."""
    rng = np.random.default_rng(seed)
    common = unit(rng.normal(size=d))
    r = rng.normal(size=d)
    r = unit(r - common * (r @ common))
    noise = rng.normal(size=(2, n, d))
    return noise[0] + mean * common + shift * r, noise[1] + mean * common, r


def mean_difference(harmful, harmless):
    return unit(harmful.mean(axis=0) - harmless.mean(axis=0))


FOUND_BY = {
    "difference-of-means": mean_difference,
    "winsorized-means": lambda a, b: mean_difference(*map(estimators.winsorized, (a, b))),
    "median-means": lambda a, b: estimators.median(a) - estimators.median(b),
    "projected": lambda a, b: estimators.without(mean_difference(a, b), b.mean(axis=0)),
    "biprojected": lambda a, b: estimators.projected(*(one.mean(axis=0) for one in (a, b))),
    "gabliteration": lambda a, b: estimators.paired_singular_vectors(a, b, 1)[0],
    "svd": lambda a, b: estimators.subspace(a - b.mean(axis=0), 1)[0],
    "probe": lambda a, b: estimators.probe(a, b).weight,
}


@pytest.mark.parametrize("method", FOUND_BY)
def test_a_planted_direction_is_found(method):
    harmful, harmless, r = planted()
    assert cosine(FOUND_BY[method](harmful, harmless), r) >= 0.99


@pytest.mark.parametrize("method", FOUND_BY)
def test_massive_activations_are_borne_by_winsorized_means_alone(method):
    """Two dimensions hundreds of times larger than the rest, in every state: their chance
    differences are all that a plain mean sees. Medians, projections, singular vectors and probes
    do not help: the dimensions are as wild in every one of them."""
    harmful, harmless, r = planted(shift=12, d=256)
    r[[3, 40]] = 0
    rng = np.random.default_rng(1)
    for states in (harmful, harmless):
        states[:, [3, 40]] += 900 * rng.lognormal(0, 1.0, size=(len(states), 2)) * [1, -1]
    found = cosine(FOUND_BY[method](harmful, harmless), r)
    if method == "winsorized-means":
        assert found >= 0.99
    elif method == "probe":
        # It weighs each dimension by what it tells, so that it is not led away entirely.
        assert found < 0.99
    else:
        assert abs(found) < 0.9


@pytest.mark.parametrize("method", ["difference-of-means", "winsorized-means", "median-means"])
def test_prompts_far_out_are_borne_by_medians_alone(method):
    """A few prompts whose whole state is a hundred times too long: winsorizing, which looks at
    one state at a time, cannot see them."""
    harmful, harmless, r = planted()
    harmful[:20] = 100 * np.random.default_rng(2).normal(size=(20, D))
    found = cosine(FOUND_BY[method](harmful, harmless), r)
    assert found >= 0.99 if method == "median-means" else abs(found) < 0.95


def test_projecting_off_the_harmless_mean_takes_that_and_nothing_else():
    harmful, harmless, r = planted()
    common = harmless.mean(axis=0)
    tilted = harmful + 0.6 * common  # harmful prompts are also represented more strongly
    assert cosine(mean_difference(tilted, harmless), r) < 0.9
    difference = tilted.mean(axis=0) - common
    found = estimators.without(difference, common)
    expected = difference - common * (difference @ common) / (common @ common)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert cosine(found, r) >= 0.99
    # Off two vectors at once, dependent ones among them.
    others = np.stack([common, RNG.normal(size=D), 2 * common])
    q, _ = np.linalg.qr(others[:2].T)
    np.testing.assert_allclose(
        estimators.without(difference, others), difference - q @ (q.T @ difference), atol=1e-9
    )


def test_a_probe_finds_what_tells_apart_and_not_what_differs():
    """Under correlated noise the best weight is Σ⁻¹(μ₁ − μ₀), and the direction planted is not."""
    rng = np.random.default_rng(3)
    d, n = 12, 20_000
    mix = np.eye(d) + 0.9 * unit(np.ones(d))[:, None] * unit(rng.normal(size=d)) * 3
    r = unit(rng.normal(size=d))
    noise = rng.normal(size=(2, n, d)) @ mix.T
    harmful, harmless = noise[0] + 1.5 * r, noise[1]
    best = np.linalg.solve(mix @ mix.T, r)
    assert cosine(best, r) < 0.9
    found = estimators.probe(harmful, harmless, penalty=1e-6)
    assert cosine(found.weight, best) >= 0.99
    assert cosine(mean_difference(harmful, harmless), r) >= 0.99


@pytest.mark.parametrize("shape", [(30, 20, 8), (25, 40, 200)])
def test_a_probe_is_at_the_bottom_of_its_loss(shape):
    """The penalized mean log-loss is strictly convex: where its gradient is zero is the answer."""
    n, m, d = shape
    rng = np.random.default_rng(4)
    harmful, harmless = rng.normal(size=(n, d)) + 0.3, rng.normal(size=(m, d)) * 3 - 0.1
    found = estimators.probe(harmful, harmless, penalty=0.02)
    states = np.concatenate([harmful, harmless])
    labels = np.array([1.0] * n + [0.0] * m)
    weights = np.array([0.5 / n] * n + [0.5 / m] * m)
    scale2 = ((states - states.mean(axis=0)) ** 2).sum(axis=1).mean()
    off = weights * (1 / (1 + np.exp(-(states @ found.weight + found.bias))) - labels)
    assert np.abs(off @ states + 0.02 * scale2 * found.weight).max() < 1e-7
    assert abs(off.sum()) < 1e-9
    np.testing.assert_allclose(found.scores(states), states @ found.weight + found.bias, atol=1e-9)


def test_auc_and_accuracy_are_their_definitions():
    a, b = RNG.integers(0, 6, size=40) - 2.5, RNG.integers(0, 6, size=70) - 3.5
    wins = (a[:, None] > b[None]).mean() + (a[:, None] == b[None]).mean() / 2
    assert separation.auc(a, b) == pytest.approx(wins)
    assert estimators.accuracy(a, b) == pytest.approx(((a > 0).mean() + (b <= 0).mean()) / 2)
    assert separation.auc(b - 9, a) == 0


# --- the table ---------------------------------------------------------------------------------


def test_every_entry_of_the_table_names_formulas_that_exist():
    assert len(set(methods.METHODS)) == len(methods.TABLE)
    for one in methods.TABLE:
        assert callable(one.estimate)
        assert not one.cut or callable(one.cut_off)
        assert one.ranked(None) == one.rank
        assert one.ranked(5) == (5 if one.subspace else one.rank)
    assert methods.named(None).name == "difference-of-means"


# --- subspaces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 12), (9, 40)])
def test_the_spectrum_is_the_singular_value_decomposition(shape):
    rows = RNG.normal(size=shape) * np.geomspace(1, 20, shape[1])
    found = estimators.spectrum(rows)
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    np.testing.assert_allclose(found.values, values, rtol=1e-9)
    turned = np.sign((found.vectors * vectors).sum(axis=1))[:, None]
    np.testing.assert_allclose(found.vectors * turned, vectors, atol=1e-7)
    np.testing.assert_allclose(found.explained, values**2 / (values**2).sum(), rtol=1e-8)
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_the_effective_rank_counts_equal_directions():
    q, _ = np.linalg.qr(RNG.normal(size=(20, 20)))
    for count in (1, 3, 5):
        rows = np.repeat(7 * q[:count], 4, axis=0)
        assert estimators.spectrum(rows).effective_rank == pytest.approx(count, rel=1e-3)


def test_a_planted_subspace_is_found_where_one_direction_is_not_enough():
    """Each prompt is refused along one of three directions; their mean is but one of them all."""
    rng = np.random.default_rng(5)
    harmful, harmless, _ = planted(shift=0)
    basis, _ = np.linalg.qr(rng.normal(size=(D, 3)))
    kinds = rng.integers(0, 3, size=N)
    harmful += 12 * basis.T[kinds] * rng.normal(1, 0.1, size=(N, 1))
    found, whole = estimators.subspace(harmful - harmless.mean(axis=0), 3)
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-9)
    angles = np.linalg.svd(found @ basis, compute_uv=False)
    assert angles.min() >= 0.99
    assert whole.explained[:3].sum() > 0.6
    # What the difference of means leaves of the three:
    left = estimators.without(basis.T, mean_difference(harmful, harmless))
    assert np.linalg.matrix_rank(left, tol=0.5) == 2
    # Each is turned to where harmful prompts lie.
    assert ((harmful - harmless.mean(axis=0)) @ found.T).mean(axis=0).min() >= 0


def test_rows_that_span_less_give_fewer_directions():
    rows = np.outer(RNG.normal(size=6), RNG.normal(size=30))
    assert estimators.subspace(rows, 4)[0].shape == (1, 30)


def test_explained_is_the_share_of_summed_squares():
    states, center = RNG.normal(size=(40, D)) + 2, RNG.normal(size=D)
    q, _ = np.linalg.qr(RNG.normal(size=(D, 3)))
    apart = states - center
    expected = ((apart @ q) ** 2).sum() / (apart**2).sum()
    assert estimators.explained(states, center, q.T) == pytest.approx(expected)
    assert estimators.explained(states, center, np.eye(D)) == pytest.approx(1)


def test_between_two_directions_lies_their_mixture():
    a, b = (unit(RNG.normal(size=D)) for _ in range(2))
    found = estimators.interpolated(a[None], b[None], 0.4)
    np.testing.assert_allclose(found[0], unit(0.6 * a + 0.4 * b), atol=1e-12)
    np.testing.assert_allclose(estimators.interpolated(a[None], b[None], 0)[0], a, atol=1e-12)


def test_between_two_bases_of_a_subspace_lies_that_subspace():
    """A basis is known up to a rotation, which must not tear it apart half way."""
    q, _ = np.linalg.qr(RNG.normal(size=(D, 3)))
    turn, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    for other in (turn, -np.eye(3), np.eye(3)[[1, 2, 0]]):
        found = estimators.interpolated(q.T, other @ q.T, 0.5)
        np.testing.assert_allclose(found.T @ found, q @ q.T, atol=1e-9)


# --- winsorizing, planes, over-refusal ---------------------------------------------------------


def test_winsorized_states_are_cut_at_their_own_quantile():
    states = RNG.normal(size=(5, 2, 200))
    found = estimators.winsorized(states, 0.9)
    for at in np.ndindex(5, 2):
        limit = np.quantile(np.abs(states[at]), 0.9)
        expected = [max(-limit, min(limit, value)) for value in states[at]]
        np.testing.assert_allclose(found[at], expected)
    np.testing.assert_array_equal(estimators.winsorized(states, 1.0), states)


def test_the_plane_shows_the_direction_and_what_differs_most_beside_it():
    harmful, harmless, r = planted()
    other = unit(RNG.normal(size=D))
    other = unit(other - r * (other @ r))
    for states in (harmful, harmless):
        states += 9 * RNG.normal(size=(N, 1)) * other
    first, second = estimators.plane(harmful, harmless, 3 * r)
    middle = (harmful.mean(axis=0) + harmless.mean(axis=0)) / 2
    np.testing.assert_allclose(first[:, 0], (harmful - middle) @ r, atol=1e-9)
    np.testing.assert_allclose(second[:, 0], (harmless - middle) @ r, atol=1e-9)
    up = np.corrcoef(first[:, 1], (harmful - middle) @ other)[0, 1]
    assert abs(up) > 0.99
    assert first[:, 0].mean() == pytest.approx(-second[:, 0].mean())


def test_the_over_refusal_direction_leaves_harmful_and_borderline_apart():
    harmful, borderline, harmless = RNG.normal(size=(3, 4, D))
    found = estimators.over_refusal(harmful, borderline, harmless)
    for row, a, b, c in zip(found, harmful, borderline, harmless, strict=True):
        t = a - b
        np.testing.assert_allclose(row, (b - c) - t * ((b - c) @ t) / (t @ t), atol=1e-12)
        cut = np.eye(D) - np.outer(unit(row), unit(row))
        np.testing.assert_allclose(cut @ (a - b), a - b, atol=1e-12)
        # Of borderline minus harmless nothing is left but what lies along t.
        left = cut @ (b - c)
        np.testing.assert_allclose(left, t * (left @ t) / (t @ t), atol=1e-12)
