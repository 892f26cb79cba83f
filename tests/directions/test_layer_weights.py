"""Gabliteration: its directions, its ridge and its layer weights against the paper's formulas."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from abl_mlx.choices import Editing, Measuring
from abl_mlx.commands import find
from abl_mlx.commands.edit_choice import edit_of, make_edit
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import estimators, methods
from abl_mlx.directions.trial import Trial
from abl_mlx.edits.edit import target
from abl_mlx.inputs import prompts
from abl_mlx.models.chat_model import load
from abl_mlx.models.writers import Writer, find_writers

RNG = np.random.default_rng(0)
D, L, RIDGE, BETA = 40, 9, 0.1, 0.5


def test_directions_are_the_top_right_singular_vectors_of_paired_differences():
    harmful, harmless = RNG.normal(size=(50, D)), RNG.normal(size=(44, D))
    basis, _ = np.linalg.qr(RNG.normal(size=(D, 2)))
    harmful[::2] += 18 * basis[:, 0]
    harmful[1::2] += 15 * basis[:, 1]
    found, facts = estimators.paired_singular_vectors(harmful, harmless, 2)
    _, _, right = np.linalg.svd(harmful[:44] - harmless)
    np.testing.assert_allclose(np.abs(np.sum(found * right[:2], axis=1)), 1, atol=1e-8)
    assert np.linalg.svd(found @ basis, compute_uv=False).min() > 0.97  # both planted ones
    assert facts["effective_rank"] > 2
    method = methods.named("gabliteration")
    again, _ = method.estimate(harmful, harmless, rank=2)
    np.testing.assert_allclose(again, found)


@pytest.mark.parametrize("base", [1.0, 0.3])
def test_weights_are_projected_with_the_ridge_and_the_layer_weights(base):
    strengths = methods.named("gabliteration").strengths(L)
    assert strengths is not None
    assert strengths[4] == max(strengths) == pytest.approx(1.5 / 1.1)
    assert strengths[0] == strengths[-1] == pytest.approx(1 / 1.1)
    columns, _ = np.linalg.qr(RNG.normal(size=(D, 2)))  # R
    recipe = {"profile": {"attention": strengths, "mlp": strengths}, "embedding": False}
    selected = mx.array(columns.T.astype(np.float32))
    edit = make_edit(selected, Editing(strength=base), recipe=recipe)
    values = RNG.normal(size=(D, 16))
    ridged = columns @ np.linalg.inv(columns.T @ columns + RIDGE * np.eye(2)) @ columns.T
    for layer in range(L):
        place = -1 + 2 * layer / (L - 1)
        wanted = values - base * (1 + BETA * (1 - abs(place))) * ridged @ values
        one = Writer(f"blk.{layer}.ffn_down.weight", "linear", layer, None, False, nn.Module())
        found = target(edit, one, "weight", mx.array(values.astype(np.float32)))
        np.testing.assert_allclose(np.array(found), wanted, atol=1e-5)
    embedding = Writer("token_embd.weight", "embedding", -1, None, False, nn.Module())
    assert not edit.touches(embedding)


def test_the_demo_stops_refusing():
    chat = load(MODEL_PATH)
    writers, sets = find_writers(chat), prompts.load_demo()
    found = find.find_direction(chat, writers, sets, Measuring.of(method="gabliteration"))
    assert found.metadata["recipe"]["embedding"] is False
    assert found.metadata["summary"]["parameters"] == {"ridge": RIDGE, "beta": BETA}
    harmful, harmless = (
        [chat.encode(text) for text in part.test.take(16).texts]
        for part in (sets.harmful, sets.harmless)
    )
    effect = Trial(chat, writers, harmful, harmless).of_edit(edit_of(found, Editing()))
    assert effect.refused == 0
    assert effect.kl < 0.05
