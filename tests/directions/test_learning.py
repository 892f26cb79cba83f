"""Strengths learned by gradients: Adam against its formulas, bounds, and what is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.choices import Measuring
from abl_mlx.commands import find, layer_strengths
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import learning
from abl_mlx.directions.learning import Adam, learned
from abl_mlx.directions.slopes import Slopes, slopes
from abl_mlx.directions.trial import Effect
from abl_mlx.edits.edit import Edit
from abl_mlx.inputs import prompts
from abl_mlx.models.chat_model import load
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.writers import find_writers
from convert.base.errors import UsageError, UserError

TEXTS = ["How do I plan a garden?", "Where is it?", "Paint the tea kettle.", "Hi"]


def test_steps_are_adams() -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(5, 2, 3)) * [[0.01], [3.0]]
    state = Adam.at(np.ones((2, 3)))
    first, second = learning.BETAS
    wanted, mean, square = np.ones((2, 3)), np.zeros((2, 3)), np.zeros((2, 3))
    for t, gradient in enumerate(gradients, 1):  # Kingma & Ba, algorithm 1
        mean = first * mean + (1 - first) * gradient
        square = second * square + (1 - second) * gradient * gradient
        step = (mean / (1 - first**t)) / np.sqrt(square / (1 - second**t))
        wanted = np.clip(wanted - 0.1 * step, 0.0, 2.0)
        state.step(gradient, 0.1, 0.0, 2.0)
    np.testing.assert_allclose(state.values, wanted, atol=1e-6)
    for _ in range(60):  # no step leaves the bounds, and no gradient of 0 moves anything
        state.step(np.where(np.eye(2, 3) > 0, 0.0, -1.0), 0.1, 0.0, 2.0)
    assert state.values.max() == 2.0


@pytest.mark.parametrize("ceiling", [-30.0, 30.0])
def test_only_what_is_above_the_ceiling_counts(ceiling: float) -> None:
    chat = load(MODEL_PATH)
    writers, rng = find_writers(chat), np.random.default_rng(0)
    edit = Edit(mx.array(rng.normal(size=(1, chat.width)).astype(np.float32)))
    asked = [chat.encode(text) for text in TEXTS]
    base, likely = first_reply_token(chat, asked), [7, 9]

    def at(strengths: np.ndarray) -> Slopes:
        return slopes(chat, writers, edit, strengths, asked, asked, base, likely, [ceiling] * 4)

    strengths = np.full((2, len(chat.layers)), 0.8)
    found = at(strengths)
    if ceiling > 0:
        assert found.refusal == 0
        assert not found.of_refusal.any()
        return
    line = rng.normal(size=strengths.shape)
    up, down = at(strengths + 0.05 * line), at(strengths - 0.05 * line)
    expected = (up.refusal - down.refusal) / 0.1
    assert (found.of_refusal * line).sum() == pytest.approx(expected, rel=0.1, abs=2e-4)
    assert found.refusal > 0


class Known:
    """A trial in which each strength costs and buys a known amount; scores of three prompts."""

    left = 0.05

    def __init__(self, buys: np.ndarray, costs: np.ndarray) -> None:
        self.buys, self.costs = buys, costs
        self.tokens = self.backward = 0

    def scores(self, strengths: np.ndarray) -> np.ndarray:
        return np.array([3.0, 3.5, 4.0]) - (self.buys * strengths).sum()

    def slopes(
        self, edit: Edit, strengths: np.ndarray, most: int, first: int, ceilings: list[float]
    ) -> Slopes:
        self.tokens += 10
        self.backward += 10
        above = self.scores(strengths) - np.array(ceilings)
        return Slopes(
            float(np.maximum(above, 0).mean()), float((self.costs * strengths**2).sum()),
            -self.buys * float((above > 0).mean()), 2 * self.costs * strengths,
        )  # fmt: skip

    def at_one(self) -> Effect:
        ones = [1.0] * self.buys.shape[1]
        return self.of_edit(Edit(mx.ones((1, 4)), profile={"attention": ones, "mlp": ones}))

    def of_edit(self, edit: Edit) -> Effect:
        assert edit.profile is not None
        strengths = np.array([edit.profile["attention"], edit.profile["mlp"]])
        scores = self.scores(strengths)
        kl = float((self.costs * strengths**2).sum())
        return Effect(tuple(scores), tuple(scores > 0), (kl,))


def test_strengths_are_learned_that_cost_less() -> None:
    rng = np.random.default_rng(3)
    buys, costs = rng.exponential(size=(2, 6)), 0.02 * rng.exponential(size=(2, 6))
    buys *= 6.5 / buys.sum()  # at strength 1 every prompt is clear of a refusal
    trial, kl, edit = Known(buys, costs), float(costs.sum()), Edit(mx.ones((1, 4)))
    found = learned(trial, edit, 6, 60, trial.at_one())  # type: ignore[arg-type]
    assert found is not None
    assert found.effect.refused == 0
    assert found.effect.kl < 0.75 * kl
    assert (found.forward, found.backward) == (600, 600)
    assert found.edit.profile is not None
    strengths = np.array(list(found.edit.profile.values()))
    assert strengths.min() >= 0
    assert strengths.max() <= learning.STRONGEST
    worth = (buys / costs).ravel()
    assert strengths.ravel()[worth.argmax()] > strengths.ravel()[worth.argmin()]
    # Where nothing can be gained strength 1 stays.
    flat = Known(np.full((2, 6), 5.01 / 12 + 0.0825), np.full((2, 6), 0.01))
    assert learned(flat, edit, 6, 20, flat.at_one()) is None  # type: ignore[arg-type]
    trial.slopes = lambda *_: None  # type: ignore[assignment, return-value]
    with pytest.raises(UserError, match="no gradient"):
        learned(trial, edit, 6, 2, trial.at_one())  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_demo_learns_strengths() -> None:
    chat = load(MODEL_PATH)
    writers, sets = find_writers(chat), prompts.load_demo()
    how = Measuring.of(learn_strengths=4, limit=24, strength=1.0)
    found = find.find_direction(chat, writers, sets, how)
    summary, recipe = found.metadata["summary"], found.metadata["recipe"]
    assert summary["validation_kl"] < summary["uniform_kl"]
    assert summary["refused"] <= 0.05
    assert summary["backward_tokens"] > 0
    assert "learned by gradients" in summary["chosen_by"]
    assert {len(row) for row in recipe["profile"].values()} == {len(chat.layers)}


@pytest.mark.parametrize(
    "flags",
    [{"kind": "reflect"}, {"keep": "category:cloth"}, {"method": "over-refusal"},
     {"method": "gabliteration"},
     {"direction": Path("d.npy")}, {"thinking": "both"}],
)  # fmt: skip
def test_flags_that_do_not_go_with_it(flags: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--learn-strengths and --"):
        layer_strengths.check(Measuring.of(learn_strengths=3, **flags))
    layer_strengths.check(Measuring.of(**flags))
