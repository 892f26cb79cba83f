"""Refusal direction optimization: losses and gradients against float64, and a planted direction."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import Editing, Measuring
from abl_mlx.commands import edit_choice, find
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import cones, measuring, methods
from abl_mlx.directions.differentiable import ablated, orthonormal
from abl_mlx.directions.effects import Measured
from abl_mlx.directions.trial import Trial
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import ablation, adding, steering
from abl_mlx.inputs import prompts
from abl_mlx.models.chat_model import load
from abl_mlx.models.logits import first_reply_token, log_probabilities
from abl_mlx.models.writers import find_writers
from tests.support import small_models

TEXTS = ["How do I plan a garden?", "Where is it?", "Paint the tea kettle.", "Hi"]


def model(name, tiny_folder):
    chat = load(MODEL_PATH if name == "demo" else tiny_folder(name))
    return chat, find_writers(chat), np.random.default_rng(0)


def test_gram_schmidt_keeps_the_span_and_the_first_sign():
    rows = np.random.default_rng(1).normal(size=(3, 20))
    found = np.array(orthonormal(mx.array(rows.astype(np.float32))))
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-6)
    q, _ = np.linalg.qr(rows.T)
    np.testing.assert_allclose(found.T @ found, q @ q.T, atol=1e-5)
    np.testing.assert_allclose(found[0], rows[0] / np.linalg.norm(rows[0]), atol=1e-6)


@pytest.mark.parametrize("name", ["demo", "gemma2"])
def test_losses_and_their_gradient_are_those_of_the_formulas(name, tiny_folder):
    chat, writers, rng = model(name, tiny_folder)
    asked = [chat.encode(text) for text in TEXTS]
    reply, openings, layer, length = [5, 9, 7], [7, 9], 1, 3.0
    begun = [cones.Begun(one, reply) for one in asked]
    read = [one.tokens for one in begun]
    base = dict(log_probabilities(chat, read, [one.places for one in begun]))
    harmless = [replace(one, base=base[index]) for index, one in enumerate(begun)]
    harmful = [begun[0], cones.Begun(asked[1], [])]
    weights = cones.Weights(1.0, 0.2, 0.7)
    shares = np.array([0.6, 0.8])

    def at(rows):
        objective = cones.Objective(chat, writers, openings, weights, layer, length)
        return objective(rows, shares, harmful, harmless)

    rows = rng.normal(size=(2, chat.width))
    found = at(rows)
    q, r = np.linalg.qr(rows.T)
    basis = (q * np.sign(np.diag(r))).T
    point = mx.array((length * shares @ basis).astype(np.float32))
    with ablation(writers, Edit(mx.array(rows.astype(np.float32)))):
        after = dict(log_probabilities(chat, read, [one.places for one in begun]))
        first = np.array(first_reply_token(chat, [asked[1]]), np.float64)
    with steering(chat, adding(point, layer)):
        added = np.array(first_reply_token(chat, asked), np.float64)
    after, before = ([np.array(of[n], np.float64) for n in range(4)] for of in (after, base))
    cost = -after[0][np.arange(3), reply].mean()
    refused = -np.log(1 - np.exp(first[0, openings]).sum())
    assert found.ablation == pytest.approx((cost + refused) / 2, rel=1e-3)
    assert found.addition == pytest.approx(
        -np.log(np.exp(added[:, openings]).sum(axis=1)).mean(), rel=1e-3
    )
    kls = [(np.exp(b) * (b - a)).sum(axis=1).mean() for b, a in zip(before, after, strict=True)]
    assert found.retain == pytest.approx(np.mean(kls), rel=1e-2)

    def total(losses):
        return losses.ablation + 0.2 * losses.addition + 0.7 * losses.retain

    line = rng.normal(size=rows.shape)
    expected = (total(at(rows + 0.02 * line)) - total(at(rows - 0.02 * line))) / 0.04
    assert (found.gradient * line).sum() == pytest.approx(expected, rel=0.05, abs=2e-5)


def test_a_direction_under_noise_is_found_again(tiny_folder):
    """The start is the demo's refusal direction under twice as much noise, which frees nothing."""
    chat, writers, rng = model("demo", tiny_folder)
    sets = prompts.load_demo()
    train, validation = (
        {
            name: [chat.encode(one) for one in getattr(getattr(sets, name), part).texts[:count]]
            for name in ("harmful", "harmless")
        }
        for part, count in (("train", 24), ("validation", 12))
    )
    plain = measuring.measure(chat, train["harmful"], train["harmless"], [-1])
    difference = np.array(plain.difference(2, -1))
    noise = rng.normal(size=len(difference))
    noise *= 2 * np.linalg.norm(difference) / np.linalg.norm(noise)
    mean = np.array(plain.harmful_mean)
    mean[2, 0] += noise
    trial = Trial(chat, writers, validation["harmful"], validation["harmless"])
    measured = Measured(
        chat, writers, replace(plain, harmful_mean=mx.array(mean)), [], train, validation,
        lambda: trial, Edit, 1, 0.1,
    )  # fmt: skip
    start = trial.of_edit(Edit(mx.array((difference + noise)[None].astype(np.float32))))
    assert start.refused >= 0.7
    parameters = dict(methods.named("rdo").parameters)
    found = cones.optimized(measured, 2, -1, **{**parameters, "prompts": 24})
    assert trial.backward > 0
    effect = trial.of_edit(Edit(found.directions))
    assert effect.refused <= 0.05
    assert effect.kl <= start.kl + 0.02
    along = difference / np.linalg.norm(difference)
    before = along @ (difference + noise) / np.linalg.norm(difference + noise)
    assert (np.array(found.directions) @ along).item() > before


@pytest.mark.slow
def test_one_direction_frees_a_model_that_no_difference_of_means_frees():
    """Of the model "hard" the best difference of means leaves 41% of the refusals."""
    chat = load(small_models.folder("hard"))
    writers = find_writers(chat)
    sets = small_models.prompt_sets("hard")
    found = find.find_direction(chat, writers, sets, Measuring.of(method="rdo"))
    summary = found.metadata["summary"]
    assert found.selected.shape[0] == 1
    assert summary["refused"] <= 0.05
    assert summary["validation_kl"] <= 0.01
    assert summary["parameters"] == dict(methods.named("rdo").parameters)
    assert summary["backward_tokens"] > 0
    texts = sets.harmful.test.texts
    with ablation(writers, edit_choice.edit_of(found, Editing())):
        replies = evaluate.in_mlx(chat, batch_size=64)(texts, 26)
    assert sum(classify(one) is Verdict.REFUSAL for one in replies) <= 0.05 * len(texts)


def test_ablation_that_can_be_differentiated_is_the_edit(tiny_folder):
    chat, writers, rng = model("gemma2", tiny_folder)
    rows = mx.array(rng.normal(size=(2, chat.width)).astype(np.float32))
    asked = [chat.encode(text) for text in TEXTS]
    with ablation(writers, Edit(rows)):
        expected = np.array(first_reply_token(chat, asked))
    with ablated(writers, rows):
        found = np.array(first_reply_token(chat, asked))
    np.testing.assert_allclose(found, expected, atol=1e-4)
