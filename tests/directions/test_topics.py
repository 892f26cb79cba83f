"""Harmless prompts matched to topics (Petrov 2026): the formula of `benchmarks/topics.py`."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.topics import baselines

D, EACH = 32, 60
TOPICS = ("cloth", "metal", "stone")


def planted(shared: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """(harmful, harmless, topics of both, refusal r): states of three topics, with noise.

    Args:
        shared: how far refusal goes along r in harmless prompts of these topics too, of 1.
    """
    rng = np.random.default_rng(seed)
    r, *topics = np.linalg.qr(rng.normal(size=(D, 4)))[0].T
    kinds = [name for name in TOPICS for _ in range(EACH)]
    about = np.repeat(5 * np.stack(topics), EACH, axis=0)
    noise = 0.1 * rng.normal(size=(2, 3 * EACH, D))
    # As many harmless prompts have no topic of these, and nothing of refusal.
    other = 0.1 * rng.normal(size=(3 * EACH, D))
    harmless = np.concatenate([about + shared * r + noise[1], other])
    return about + r + noise[0], harmless, kinds, r


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b))


def test_directions_are_differences_of_means_by_topic() -> None:
    bad, good, kinds, _ = planted(0.0)
    found = baselines(bad, good, [kinds, [*kinds, *["none"] * len(kinds)]])
    for row, name in enumerate(sorted(TOPICS)):
        mine = np.array([kind == name for kind in kinds])
        here = bad[mine].astype(np.float64).mean(axis=0)
        matched = here - good[: len(kinds)][mine].mean(axis=0)
        np.testing.assert_allclose(found.matched[row], matched, atol=1e-9)
        np.testing.assert_allclose(found.unmatched[row], here - good.mean(axis=0), atol=1e-9)


@pytest.mark.parametrize("shared", [0.0, 0.95])
def test_what_a_topic_shares_with_refusal_is_taken_away(shared: float) -> None:
    bad, good, kinds, r = planted(shared)
    found = baselines(bad, good, [kinds, [*kinds, *["none"] * len(kinds)]])
    if shared:
        # Of the planted direction a twentieth is left, under noise.
        assert np.linalg.norm(found.matched, axis=1).max() < 0.2
        assert np.abs(found.unmatched @ r).min() > 0.4
        assert found.shorter < 0.1
    else:
        # Refusal alone is left, where the unmatched directions also have the topic.
        assert min(cosine(row, r) for row in found.matched) > 0.99
        assert max(cosine(row, r) for row in found.unmatched) < 0.5
