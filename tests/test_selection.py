"""Separation scores, the refusal score and the causal choice, against NumPy and a planted case."""

import math

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx import selection
from abl_mlx.arrays import number
from abl_mlx.directions import Candidates
from abl_mlx.edits import Edit
from abl_mlx.logits import first_reply_token, log_probabilities
from abl_mlx.models import load
from abl_mlx.selection import Score
from abl_mlx.writers import find_writers
from convert.errors import UserError
from tests.test_writers import edit_in_place

RNG = np.random.default_rng(1)


def f32(values):
    return mx.array(np.asarray(values, dtype=np.float32))


def test_d_prime_and_cosine_are_their_formulas():
    a, b = RNG.normal(2, 3, size=(50, 4, 2)), RNG.normal(0, 1, size=(40, 4, 2))
    expected = (a.mean(0) - b.mean(0)) / np.sqrt((a.var(0) + b.var(0)) / 2)
    np.testing.assert_allclose(np.array(selection.d_prime(f32(a), f32(b))), expected, rtol=1e-4)
    m, n = RNG.normal(size=(4, 2, 16)), RNG.normal(size=(4, 2, 16))
    cosine = (m * n).sum(-1) / np.linalg.norm(m, axis=-1) / np.linalg.norm(n, axis=-1)
    found = selection.cosine_separation(Candidates(f32(m), f32(n), (-2, -1)))
    np.testing.assert_allclose(np.array(found), 1 - cosine, atol=1e-5)


def test_candidate_directions_are_unit_differences_of_means():
    m, n = RNG.normal(size=(4, 2, 16)), RNG.normal(size=(4, 2, 16))
    expected = (m - n) / np.linalg.norm(m - n, axis=-1, keepdims=True)
    found = Candidates(f32(m), f32(n), (-2, -1)).directions
    np.testing.assert_allclose(np.array(found), expected, atol=1e-6)


def test_refusal_score_is_log_odds_even_when_nearly_certain():
    logits = RNG.normal(size=(5, 30))
    logits[0, 3] += 40  # p = 1 − 1e-17: log(1 − p) from p would be −inf
    log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    log_p -= logits.max(1, keepdims=True)
    inside = np.array([3, 7])
    outside = np.setdiff1d(np.arange(30), inside)
    expected = np.logaddexp.reduce(log_p[:, inside], axis=1) - np.logaddexp.reduce(
        log_p[:, outside], axis=1
    )
    found = np.array(selection.refusal_scores(f32(log_p), [3, 7]))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_kl_is_its_formula_and_zero_for_equals():
    p, q = RNG.dirichlet(np.ones(20), size=6), RNG.dirichlet(np.ones(20), size=6)
    found = selection.kl_divergence(f32(np.log(p)), f32(np.log(q)))
    np.testing.assert_allclose(np.array(found), (p * np.log(p / q)).sum(1), rtol=1e-3)
    assert np.abs(np.array(selection.kl_divergence(f32(np.log(p)), f32(np.log(p))))).max() == 0


def test_what_has_no_probability_adds_nothing_to_a_kl():
    p, q = np.array([0.5, 0.5, 0, 0]), np.array([0.25, 0.25, 0.5, 0])
    with np.errstate(divide="ignore"):
        p, q = f32(np.log(p)), f32(np.log(q))
    assert number(selection.kl_divergence(p, p)) == 0
    assert number(selection.kl_divergence(p, q)) == pytest.approx(math.log(2))
    assert number(selection.kl_divergence(q, p)) == math.inf
    # e^−200 is 0 in float32, and the other rules the token out.
    assert number(selection.kl_divergence(f32([0, -200.0]), f32([0, -math.inf]))) == 0


@pytest.mark.parametrize("broken", [0, 1])
def test_an_edit_that_leaves_no_numbers_is_not_chosen(broken, tiny_folder, monkeypatch):
    chat = load(tiny_folder("gemma2"))
    candidates, prompts = planted(chat)
    monkeypatch.setattr(selection, "refusal_tokens", lambda harmful, harmless: [7, 9])

    def edit_for(score):
        direction = selection.direction_of(candidates, score.layer, score.position)
        return Edit(direction, math.nan if score.layer == broken else 1.0)

    choice = selection.choose(
        chat, find_writers(chat), candidates, prompts[:2], prompts[2:],
        edit_for=edit_for, max_kl=1e3,
    )  # fmt: skip
    assert choice.score.layer != broken
    assert {s.kl for s in choice.scores if s.layer == broken} == {math.inf}


def test_refusal_tokens_are_those_that_harmful_prompts_add():
    harmful, harmless = np.full((4, 10), 1e-4), np.full((6, 10), 1e-4)
    harmful[:, 2], harmful[:, 5], harmful[:, 8] = 0.6, 0.2, 0.19
    harmless[:, 8], harmless[:, 1] = 0.15, 0.8  # token 8 opens answers as well
    assert selection.refusal_tokens(f32(np.log(harmful)), f32(np.log(harmless))) == [2, 5]
    assert selection.refusal_tokens(f32(np.log(harmless)), f32(np.log(harmless))) == []


def test_logits_at_positions_equal_the_whole_forward(tiny_folder):
    for arch in ("llama", "gemma2", "granite"):
        chat = load(tiny_folder(arch))
        sequences = [chat.encode(text) for text in ("Hi", "How do I plan a garden?", "Why?")]
        positions = [[2, 5], [0], [len(sequences[2]) - 1, 1, 3]]
        for index, rows in log_probabilities(chat, sequences, positions):
            logits = np.array(chat.model(mx.array([sequences[index]]))[0]).astype(np.float64)
            expected = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            np.testing.assert_allclose(
                np.array(rows), expected[positions[index]], atol=1e-3, rtol=1e-4
            )


def test_shortlist_takes_every_allowed_layer_before_a_second_position():
    scores = [
        Score(layer, position, d_prime=10 * layer + position, cosine=0, mean=0)
        for layer in range(3)
        for position in (-3, -2, -1)
    ] + [Score(3, -1, 99, 0, 0, dropped="in the last 20% of the layers")]

    def chosen(most):
        return [(s.layer, s.position) for s in selection.shortlist(scores, most)]

    assert chosen(4) == [(2, -1), (1, -1), (0, -1), (2, -2)]
    assert chosen(99) == [(2, -1), (1, -1), (0, -1), (2, -2), (1, -2), (0, -2)]


def test_the_deepest_layers_are_left_out(tiny_folder):
    chat = load(tiny_folder("gemma2"))  # four layers
    rng = np.random.default_rng(0)
    candidates = Candidates(
        f32(rng.normal(size=(4, 1, chat.width))), f32(rng.normal(size=(4, 1, chat.width))), (-1,)
    )
    prompts = [chat.encode("Hi"), chat.encode("Why?")]
    scores = selection.separation(chat, candidates, prompts, prompts[::-1])
    assert [bool(score.dropped) for score in scores] == [False, False, False, True]


@pytest.mark.parametrize(("layer", "position", "flag"), [(9, -1, "--layer"), (0, -7, "--position")])
def test_candidates_that_do_not_exist_are_refused(layer, position, flag):
    candidates = Candidates(mx.ones((3, 1, 8)), mx.zeros((3, 1, 8)), (-1,))
    with pytest.raises(UserError, match=flag):
        selection.direction_of(candidates, layer, position)


def test_first_reply_token_keeps_the_order(tiny_folder):
    chat = load(tiny_folder("llama"))
    sequences = [chat.encode(text) for text in ("How do I plan a garden?", "Hi", "Why not?")]
    together = first_reply_token(chat, sequences)
    for row, sequence in zip(together, sequences, strict=True):
        alone = first_reply_token(chat, [sequence])[0]
        np.testing.assert_allclose(np.array(row), np.array(alone), atol=1e-4)


def planted(chat, size=6):
    """Candidates of which one, after layer 1, is strong; prompts of two kinds."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(len(chat.layers), 2, chat.width))
    candidates = Candidates(f32(means + size * rng.normal(size=means.shape)), f32(means), (-2, -1))
    texts = ["How do I plan a garden?", "Hi", "Why not?", "Where is it?"]
    return candidates, [chat.encode(text) for text in texts]


def test_effects_are_those_of_edited_weights_and_of_added_vectors(tiny_folder, monkeypatch):
    chat = load(tiny_folder("llama"))
    candidates, prompts = planted(chat)
    writers = find_writers(chat)
    monkeypatch.setattr(selection, "refusal_tokens", lambda harmful, harmless: [7, 9])
    trial = selection.Trial(chat, writers, prompts[:2], prompts[2:])

    def odds(sequences):
        logits = [np.array(chat.model(mx.array([one]))[0, -1]).astype(float) for one in sequences]
        p = [np.exp(row - np.logaddexp.reduce(row)) for row in logits]
        return np.array([np.log(q[[7, 9]].sum() / (1 - q[[7, 9]].sum())) for q in p]), np.array(p)

    before, base = odds(prompts[2:])
    assert trial.refusal_before == pytest.approx((odds(prompts[:2])[0].mean(), before.mean()), 1e-3)
    score = Score(1, -2, 0, 0, 0)
    added = trial.of_adding(selection.addition(candidates, score))
    effect = trial.of_edit(Edit(candidates.directions[1, 0][None], 0.8))

    block = chat.layers[1]
    vector = candidates.harmful_mean[1, 0] - candidates.harmless_mean[1, 0]
    plain = type(block)

    class Adding(plain):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) + vector

    block.__class__ = Adding
    assert added == pytest.approx(odds(prompts[2:])[0].mean(), rel=1e-3)
    block.__class__ = plain
    edit_in_place(writers, Edit(candidates.directions[1, 0][None], 0.8))
    assert effect.refusal == pytest.approx(odds(prompts[:2])[0].mean(), rel=1e-3)
    assert effect.refused == (odds(prompts[:2])[0] > 0).mean()
    after = odds(prompts[2:])[1]
    assert effect.kl == pytest.approx((base * np.log(base / after)).sum(1).mean(), rel=1e-2)
    assert effect.kl > 1e-3
    assert added != pytest.approx(before.mean(), rel=0.05)


@pytest.mark.parametrize("deep_helps", [True, False])
def test_the_deepest_layers_are_tried_when_nothing_before_them_helps(
    deep_helps, tiny_folder, monkeypatch
):
    chat = load(tiny_folder("gemma2"))  # four layers, of which the last is too deep
    candidates, prompts = planted(chat)

    class Told:
        """Effects as if by layer; everything else of the choice is real."""

        refusal_tokens, refusal_before, harmful_tokens, harmless_tokens = [7], (3.0, -3.0), 9, 9

        def __init__(self, *_):
            self.tried = tried

        def of_edit(self, edit):
            layer = next(
                layer for layer in range(4)
                if any(mx.allclose(edit.directions[0], candidates.directions[layer, p]).item()
                       for p in (0, 1))
            )  # fmt: skip
            tried.append(layer)
            works = layer == 3 if deep_helps else layer == 1
            return selection.Effect(-5.0 if works else 1.0 - layer, 0.0 if works else 0.9, 0.01)

        def of_adding(self, intervention):
            return 1.0 if 3 in intervention.layers else -1.0

    tried = []
    monkeypatch.setattr(selection, "Trial", Told)
    choice = selection.choose(
        chat, find_writers(chat), candidates, prompts[:2], prompts[2:],
        edit_for=lambda score: Edit(
            selection.direction_of(candidates, score.layer, score.position)
        ),
    )  # fmt: skip
    assert choice.score.layer == (3 if deep_helps else 1)
    assert (3 in tried) == deep_helps
    record = next(s for s in choice.scores if s.layer == choice.score.layer and s.refused == 0)
    assert record.record()["refused"] == 0
