"""What a direction is made of: every formula against plain float64 NumPy, and planted topics."""

from __future__ import annotations

import numpy as np
import pytest

from abl_mlx.directions import decomposition

RANDOM = np.random.default_rng(7)
D = 40


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_cosines_with_vectors_and_subspaces() -> None:
    r, other = unit(RANDOM.normal(size=D)), RANDOM.normal(size=D) * 9
    assert decomposition.cosine(r, other) == pytest.approx(r @ other / np.linalg.norm(other))
    rows = RANDOM.normal(size=(3, D))
    basis = np.linalg.qr(rows.T)[0]
    share = float(((r @ basis) ** 2).sum())
    assert decomposition.inside(r, rows) == pytest.approx(share)
    assert decomposition.cosine(r, rows) == pytest.approx(np.sqrt(share))
    apart = np.linalg.qr(RANDOM.normal(size=(D, 20)))[0].T  # rounding makes 1 − |r|² negative
    for row in apart[2:]:
        assert decomposition.cosine(row, apart[:2]) == pytest.approx(0, abs=1e-12)
    many = RANDOM.normal(size=(6, D))
    wanted = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in many] for a in many]
    assert np.allclose(decomposition.matrix(many), wanted)
    draws = [unit(RANDOM.normal(size=D))[0] for _ in range(4000)]
    assert np.std(draws) == pytest.approx(decomposition.chance(D), rel=0.05)


def test_the_lead_of_a_subspace_is_where_the_means_differ() -> None:
    rows, difference = np.linalg.qr(RANDOM.normal(size=(D, 3)))[0].T, RANDOM.normal(size=D)
    wanted = unit(sum((row @ difference) * row for row in rows))
    assert np.allclose(decomposition.lead(rows, difference), wanted)
    assert np.allclose(decomposition.lead(rows[0] * 5, difference), rows[0])


def categories(count: int, n: int, common: np.ndarray, own: float) -> dict[str, np.ndarray]:
    """States around ``common`` plus a random vector of length ``own`` for each category."""
    return {
        f"c{k}": common + own * unit(RANDOM.normal(size=D)) + RANDOM.normal(size=(n, D))
        for k in range(count)
    }


def test_the_cone_of_categories() -> None:
    harmless = RANDOM.normal(size=(50, D))
    harmful = categories(4, 9, 3 * np.eye(D)[0], 2.0)
    found = decomposition.cone({**harmful, "few": harmless[:1]}, harmless)
    assert found is not None
    assert found.names == ("c0", "c1", "c2", "c3")
    differences = np.stack([one.mean(axis=0) - harmless.mean(axis=0) for one in harmful.values()])
    assert np.allclose(found.differences, differences)
    units = differences / np.linalg.norm(differences, axis=1, keepdims=True)
    values = np.linalg.svd(units, compute_uv=False)
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    first = harmful["c0"]
    noise = sum(np.trace(np.cov(one.T)) / len(one) for one in (first, harmless))
    assert found.noise[0] == pytest.approx(noise / (differences[0] @ differences[0]))
    assert decomposition.cone({"c0": first}, harmless) is None


@pytest.mark.parametrize("own", [0.0, 2.0, 6.0])
def test_what_categories_have_in_common_is_found_without_the_noise(own: float) -> None:
    common, shares, plain = 4 * np.eye(D)[0], [], []
    for _ in range(60):
        harmless = RANDOM.normal(size=(40, D))
        found = decomposition.cone(categories(8, 6, common, own), harmless)
        assert found is not None
        shares.append(found.common)
        mean = found.differences.mean(axis=0)
        plain.append(mean @ mean / (found.differences**2).sum(axis=1).mean())
    # Of the random vectors of 8 categories an eighth of the squared length is in their mean.
    wanted = (16 + own**2 / 8) / (16 + own**2)
    assert np.mean(shares) == pytest.approx(wanted, abs=0.06)
    assert abs(np.mean(plain) - wanted) > abs(np.mean(shares) - wanted)


def test_the_share_of_topics() -> None:
    harmless = {name: RANDOM.normal(size=(5, D)) + 4 * np.eye(D)[k] for k, name in enumerate("abc")}
    r = unit(RANDOM.normal(size=D))
    found = decomposition.topics(r, harmless)
    assert found is not None
    means = np.stack([one.mean(axis=0) for one in harmless.values()])
    centred = means - means.mean(axis=0)
    basis = np.linalg.svd(centred)[2][:2]
    assert found.share == pytest.approx(float(((basis @ r) ** 2).sum()))
    assert found.dimensions == 2
    along = decomposition.topics(unit(centred[0]), harmless)
    assert along is not None
    assert along.share == pytest.approx(1.0)
    assert decomposition.topics(r, {"a": harmless["a"]}) is None


def test_chance_is_the_share_with_shuffled_topics() -> None:
    # States fill few dimensions: a direction along one of these has a share without any topic.
    scale = np.where(np.arange(D) < 4, 5.0, 0.1)
    noise = {name: RANDOM.normal(size=(20, D)) * scale for name in "abcde"}
    shares, chances = [], []
    for _ in range(40):
        r = unit(RANDOM.normal(size=D) * scale)
        found = decomposition.topics(r, {n: RANDOM.permutation(one) for n, one in noise.items()})
        assert found is not None
        shares.append(found.share)
        chances.append(found.chance)
    assert np.mean(chances) > 0.6  # dimensions / d is 0.1
    assert np.mean(shares) == pytest.approx(np.mean(chances), abs=0.15)
    topic = {name: one + 9 * np.eye(D)[10 + k] for k, (name, one) in enumerate(noise.items())}
    found = decomposition.topics(unit(np.eye(D)[10] - np.eye(D)[11]), topic)
    assert found is not None
    assert found.share > 0.9
    assert found.chance < 0.6


def test_matched_categories_cancel_what_a_topic_adds() -> None:
    refusal, topics = (
        3 * np.eye(D)[0],
        {name: 8 * np.eye(D)[k + 1] for k, name in enumerate("abcd")},
    )

    def states(name: str, n: int, shift: np.ndarray) -> np.ndarray:
        return RANDOM.normal(size=(n, D)) * 0.1 + topics[name] + shift

    # The topics are not equally frequent in the two sets, so the plain difference holds topic.
    harmful = {n: states(n, c, refusal) for n, c in zip("abc", (30, 5, 5), strict=True)}
    harmless = {n: states(n, c, 0 * refusal) for n, c in zip("abd", (5, 30, 9), strict=True)}
    found = decomposition.matched(harmful, harmless)
    assert found is not None
    assert found[1] == ["a", "b"]
    assert decomposition.cosine(unit(refusal), found[0]) > 0.98
    plain = np.concatenate(list(harmful.values())).mean(axis=0)
    plain = plain - np.concatenate(list(harmless.values())).mean(axis=0)
    assert decomposition.cosine(unit(refusal), plain) < 0.6
    # It is the coefficient of the set in a regression on set and category, with equal weights.
    rows, weights, target = [], [], []
    for at, name in enumerate("ab"):
        for label, one in ((1.0, harmful[name]), (0.0, harmless[name])):
            for state in one:
                rows.append([label, float(at == 0), float(at == 1)])
                weights.append(1 / len(one))
                target.append(state)
    scale = np.sqrt(weights)[:, None]
    fitted = np.linalg.lstsq(np.array(rows) * scale, np.array(target) * scale, rcond=None)[0]
    assert np.allclose(fitted[0], found[0])
    assert decomposition.matched(harmful, {"d": harmless["d"]}) is None


def test_contrasts_are_mean_differences_of_pairs() -> None:
    high, low = RANDOM.normal(size=(6, D)), RANDOM.normal(size=(6, D))
    assert np.allclose(decomposition.contrast(high, low), (high - low).mean(axis=0))
    groups = decomposition.by_category(high, ["a", "", "b", "a", "b", "b"])
    assert list(groups) == ["a", "b"]
    assert np.array_equal(groups["a"], high[[0, 3]])
