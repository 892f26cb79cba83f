"""COSMIC: its formulas in float64, a planted direction, and a choice without reply tokens."""

from dataclasses import replace

import numpy as np
import pytest

from abl_mlx.choices import Measuring
from abl_mlx.commands import find
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import cosmic, trial
from abl_mlx.inputs import prompts
from abl_mlx.models.chat_model import load
from abl_mlx.models.writers import find_writers
from tests.directions.test_methods import cosine, planted


def test_s_is_the_sum_of_two_cosines_over_the_layers_that_differ():
    rng = np.random.default_rng(0)
    ablated, added, harmful, harmless = rng.normal(size=(4, 5, 9)) + 1
    found = cosmic.inversion(ablated, added, harmful, harmless)
    means = [one.sum(axis=0) / 5 for one in (ablated, added, harmful, harmless)]
    assert found == pytest.approx(cosine(means[0], means[3]) + cosine(means[1], means[2]))
    alike = [cosine(a, b) for a, b in zip(harmful, harmless, strict=True)]
    assert cosmic.apart(harmful, harmless, 0.1) == [int(np.argmin(alike))]
    assert cosmic.apart(harmful, harmless, 0.4) == sorted(np.argsort(alike)[:2].tolist())


@pytest.mark.parametrize("massive", [False, True])
def test_a_planted_direction_has_the_largest_s(massive):
    harmful, harmless, r = planted(shift=12)
    rng = np.random.default_rng(1)
    if massive:  # two dimensions of every state outweigh the rest, so that all cosines are 1
        for states in (harmful, harmless):
            states[:, [3, 40]] += 3e5 * np.array([1, -1])
    others = rng.normal(size=(20, len(r)))
    bad, good = harmful.mean(axis=0), harmless.mean(axis=0)

    def s_of(v):
        v = v / np.linalg.norm(v)
        ablated, added = bad - (bad @ v) * v, good + 12 * v
        return cosmic.inversion(ablated[None], added[None], bad[None], good[None])

    best = max(s_of(one) for one in others)
    assert (s_of(r) > best + 1e-3) == (not massive)


def test_the_demos_direction_is_chosen_where_first_tokens_say_nothing(monkeypatch):
    def alike(*args, **kwargs):
        raise trial.OpensAlike("alike")

    monkeypatch.setattr("abl_mlx.commands.candidate_choice.Trial", alike)
    chat, sets = load(MODEL_PATH), prompts.load_demo()
    few = replace(Measuring.of(method="cosmic", limit=16))
    found = find.find_direction(chat, find_writers(chat), sets, few)
    summary = found.metadata["summary"]
    assert summary["layer"] == 2  # as by first tokens
    assert "validation_kl" not in summary
    sums = {one["layer"]: one["cosmic"] for one in found.metadata["scores"] if "cosmic" in one}
    assert max(sums, key=sums.get) == 2
