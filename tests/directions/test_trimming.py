"""Strengths for each layer: their gradients against finite differences, and the steps taken."""

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.choices import Editing, Measuring
from abl_mlx.commands import edit_choice, find
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import trimming
from abl_mlx.directions.slopes import Slopes, slopes
from abl_mlx.directions.trial import Effect
from abl_mlx.directions.variants import Tried, Variant
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import ablation
from abl_mlx.edits.update import Factors, Update
from abl_mlx.inputs import prompts
from abl_mlx.models.chat_model import load
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.writers import find_writers
from convert.mlx import packed

TEXTS = ["How do I plan a garden?", "Where is it?", "Paint the tea kettle.", "Hi"]


def check_slopes(found, at, strengths, rng):
    """All strengths change along a line, so that the difference is far above rounding."""
    line = rng.normal(size=strengths.shape)
    up, down = at(strengths + 0.05 * line), at(strengths - 0.05 * line)
    for name in ("refusal", "kl"):
        expected = (getattr(up, name) - getattr(down, name)) / 0.1
        slope = (getattr(found, f"of_{name}") * line).sum()
        assert slope == pytest.approx(expected, rel=0.05, abs=2e-5), name


@pytest.mark.parametrize("model", ["demo", pytest.param("gemma2", marks=pytest.mark.slow), "qwen3"])
def test_slopes_are_those_of_finite_differences(model, tiny_folder):
    chat = load(MODEL_PATH if model == "demo" else tiny_folder(model))
    writers, rng = find_writers(chat), np.random.default_rng(0)
    edit = Edit(mx.array(rng.normal(size=(1, chat.width)).astype(np.float32)))
    asked = [chat.encode(text) for text in TEXTS]
    base, likely = first_reply_token(chat, asked), [7, 9]

    def at(strengths):
        return slopes(chat, writers, edit, strengths, asked[:3], asked, base, likely)

    strengths = np.full((2, len(chat.layers)), 0.8)
    found = at(strengths)
    # The values are those of the edit with these strengths.
    profile = {name: [0.8] * len(chat.layers) for name in ("attention", "mlp")}
    with ablation(writers, Edit(edit.directions, profile=profile)):
        after = np.array(first_reply_token(chat, asked), np.float64)
    before = np.array(base, np.float64)
    assert found.kl == pytest.approx((np.exp(before) * (before - after)).sum(1).mean(), 1e-2)
    inside = np.exp(after[:3, likely]).sum(axis=1)
    assert found.refusal == pytest.approx(np.log(inside / (1 - inside)).mean(), 1e-3)
    check_slopes(found, at, strengths, rng)


def test_slopes_of_changes_of_mlps_are_those_of_finite_differences():
    chat = load(MODEL_PATH)
    writers, rng = find_writers(chat), np.random.default_rng(0)
    width, inside = chat.width, 512

    def factors():
        left, right = rng.normal(size=(width, 1)), 0.1 * rng.normal(size=(1, inside))
        none = np.zeros((0, inside), np.float32)
        return Factors(left.astype(np.float32), right.astype(np.float32), none)

    edit = Update({layer: factors() for layer in (1, 3)})
    asked = [chat.encode(text) for text in TEXTS]
    base = first_reply_token(chat, asked)

    def at(strengths):
        return slopes(chat, writers, edit, strengths, asked[:3], asked, base, [7, 9])

    strengths = np.full((2, len(chat.layers)), 0.8)
    found = at(strengths)
    profile = {"attention": [1.0] * len(chat.layers), "mlp": [0.8] * len(chat.layers)}
    with ablation(writers, edit.with_profile(profile)):
        after = np.array(first_reply_token(chat, asked), np.float64)
    before = np.array(base, np.float64)
    assert found.kl == pytest.approx((np.exp(before) * (before - after)).sum(1).mean(), 1e-2)
    # Only the changed layers' MLPs have a strength that matters.
    assert np.flatnonzero(found.of_kl).tolist() == [len(chat.layers) + 1, len(chat.layers) + 3]
    check_slopes(found, at, strengths, rng)


def test_outside_of_gradients_a_product_keeps_nothing(tiny_folder):
    chat = load(MODEL_PATH)
    linear = next(w.module for w in find_writers(chat) if isinstance(w.module, packed.PackedLinear))
    x = mx.random.normal((3, linear.shape[1]))
    weight = np.array(linear.rows(0, linear.shape[0]))

    def total(x):
        return (linear(x) * mx.arange(linear.shape[0])).sum()

    with packed.gradients():
        found = mx.grad(total)(x)
    expected = np.arange(linear.shape[0]) @ weight
    np.testing.assert_allclose(np.array(found), np.tile(expected, (3, 1)), rtol=1e-4, atol=1e-3)


def test_a_step_lowers_the_kl_at_the_same_refusals():
    rng = np.random.default_rng(1)
    # Costs and gains as of a model: each writer adds to both, not in the same proportion.
    gain, cost = rng.exponential(size=(2, 12)), 0.02 * rng.exponential(size=(2, 12))
    found = Slopes(-3.0, 0.05, -gain, cost)
    start = np.ones((2, 12))
    moved = trimming.stepped(found, start, 0.0, 0.5)
    assert np.abs(moved - start).max() <= 0.5 + 1e-9
    assert (found.of_refusal * (moved - start)).sum() <= 1e-6
    assert (found.of_kl * (moved - start)).sum() <= -0.05
    # Strengths go up where they buy most, and down where they cost most.
    worth = (gain / cost).ravel()
    change = (moved - start).ravel()
    assert change[worth.argmax()] > 0 > change[worth.argmin()]
    # Where refusals are left, the score falls.
    further = trimming.stepped(found, start, -1.0, 0.5)
    assert (found.of_refusal * (further - start)).sum() <= -1.0
    # Strengths that multiply nothing do not count as small changes.
    idle = np.zeros((2, 12))
    wide = trimming.stepped(
        Slopes(-3.0, 0.05, np.vstack([-gain, idle]), np.vstack([cost, idle])),
        np.ones((4, 12)), 0.0, 0.5,
    )  # fmt: skip
    assert (wide[2:] == 1).all()
    np.testing.assert_allclose(wide[:2], moved)
    # No strength leaves its range.
    assert trimming.stepped(found, np.full((2, 12), 2.0), -9.0, 0.5).max() <= trimming.STRONGEST


class Told:
    """A trial whose strengths have a known effect: a KL of their squares, a score of their sum."""

    left = 0.05
    tokens = 0
    moved = (3, 1, 0, 2)

    def __init__(self, weights, works=True):
        self.weights, self.works = weights, works
        self.tried = []

    def slopes(self, edit, strengths, most, harmless):
        assert harmless == self.moved
        rows = np.ones_like(strengths)
        return Slopes(
            float(-strengths.sum()), float((self.weights * strengths**2).sum()),
            -rows, 2 * self.weights * strengths,
        )  # fmt: skip

    def of_edit(self, edit):
        strengths = np.array([edit.profile["attention"], edit.profile["mlp"]])
        self.tried.append(strengths)
        kl, enough = (self.weights * strengths**2).sum(), strengths.sum() >= 15.8 or not self.works
        return Effect((-1.0,), (not enough,), (float(kl),))


def known(refused, kl):
    """The effect of an edit at strength 1."""
    return Tried(Variant(mx.ones((1, 4)), "difference-of-means"), -0.5, refused, kl)


def test_strengths_are_taken_where_they_are_better_only():
    edit = Edit(mx.ones((1, 4)))
    weights = np.full((2, 8), 0.001)
    weights[1] = 0.01
    kl = float(weights.sum())
    found = trimming.trimmed(Told(weights), edit, 8, known(0.0, kl), 0.2)
    assert found is not None
    assert found.effect.kl < 0.8 * kl
    assert min(found.edit.profile["attention"]) > 1 > max(found.edit.profile["mlp"])
    # Nothing to gain: all cost the same; a KL that is low; a model without gradients.
    assert trimming.trimmed(Told(np.full((2, 8), 0.01)), edit, 8, known(0.0, 0.16), 0.2) is None
    quiet = Told(weights)
    assert trimming.trimmed(quiet, edit, 8, known(0.0, 0.009), 0.2) is None
    assert not quiet.tried
    quiet.slopes = lambda *_, **__: None
    assert trimming.trimmed(quiet, edit, 8, known(0.0, kl), 0.2) is None
    # Where the edit leaves refusals, a higher KL is paid to end them.
    left = Told(weights, works=False)
    found = trimming.trimmed(left, edit, 8, known(0.5, kl), 0.2)
    assert found is not None
    assert left.tried[0].sum() > 16
    assert len(left.tried) == 1
    # As much of it as the limit of the KL allows.
    left = Told(np.full((2, 8), 0.01), works=False)
    found = trimming.trimmed(left, edit, 8, known(0.5, 0.16), 0.21)
    assert found is not None
    assert 0.16 < found.effect.kl <= 0.21 < 0.01 * (left.tried[0] ** 2).sum()
    assert trimming.trimmed(left, edit, 8, known(0.5, 0.16), 0.16) is None


def test_the_default_takes_strengths_with_a_lower_kl(monkeypatch):
    monkeypatch.setattr(trimming, "GENTLE", 0.0)
    monkeypatch.setattr(trimming, "LESS", 1.0)
    chat = load(MODEL_PATH)
    writers, sets = find_writers(chat), prompts.load_demo()
    found = find.find_direction(chat, writers, sets, Measuring())
    summary, recipe = found.metadata["summary"], found.metadata["recipe"]
    assert summary["validation_kl"] < summary["uniform_kl"]
    assert {len(row) for row in recipe["profile"].values()} == {len(chat.layers)}
    edit = edit_choice.edit_of(found, Editing())
    assert edit.profile == recipe["profile"]
    # What a person says of layers is not second-guessed.
    by_hand = Measuring.of(layers=frozenset({1, 2, 3}))
    assert "recipe" not in find.find_direction(chat, writers, sets, by_hand).metadata
