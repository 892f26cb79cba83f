"""Separation scores, the refusal score and the causal choice, against NumPy and a planted case."""

import math

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.directions import selection
from abl_mlx.directions.measuring import Candidates
from abl_mlx.directions.selection import Score
from abl_mlx.models.chat_model import load
from abl_mlx.models.distributions import kl_divergence
from abl_mlx.models.logits import first_reply_token, log_probabilities
from abl_mlx.support.arrays import number
from convert.base.errors import UserError

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
    found = kl_divergence(f32(np.log(p)), f32(np.log(q)))
    np.testing.assert_allclose(np.array(found), (p * np.log(p / q)).sum(1), rtol=1e-3)
    assert np.abs(np.array(kl_divergence(f32(np.log(p)), f32(np.log(p))))).max() == 0


def test_what_has_no_probability_adds_nothing_to_a_kl():
    p, q = np.array([0.5, 0.5, 0, 0]), np.array([0.25, 0.25, 0.5, 0])
    with np.errstate(divide="ignore"):
        p, q = f32(np.log(p)), f32(np.log(q))
    assert number(kl_divergence(p, p)) == 0
    assert number(kl_divergence(p, q)) == pytest.approx(math.log(2))
    assert number(kl_divergence(q, p)) == math.inf
    # e^−200 is 0 in float32, and the other rules the token out.
    assert number(kl_divergence(f32([0, -200.0]), f32([0, -math.inf]))) == 0


def test_refusal_tokens_are_those_that_harmful_prompts_add():
    harmful, harmless = np.full((4, 10), 1e-4), np.full((6, 10), 1e-4)
    harmful[:, 2], harmful[:, 5], harmful[:, 8] = 0.6, 0.2, 0.19
    harmless[:, 8], harmless[:, 1] = 0.15, 0.8  # token 8 opens answers as well
    assert selection.refusal_tokens(f32(np.log(harmful)), f32(np.log(harmless))) == [2, 5]
    assert selection.refusal_tokens(f32(np.log(harmless)), f32(np.log(harmless))) == []


def test_a_word_of_one_answer_opens_no_refusals():
    harmful, harmless = np.full((40, 10), 1e-4), np.full((40, 10), 1e-4)
    harmful[:, 2] = 0.6
    harmful[:2, 5] = 0.9  # two prompts of 40
    harmful[7, 8] = 0.99  # one, which is 0.025 in the mean
    assert selection.refusal_tokens(f32(np.log(harmful)), f32(np.log(harmless))) == [2, 5]


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


def test_layers_that_hold_the_sets_apart():
    def scores(*d_primes: float) -> list[selection.Score]:
        return [selection.Score(layer, -1, d, 0.0, 0.0) for layer, d in enumerate(d_primes)]

    assert selection.apart(scores(0.1, 2.0, 1.1, 0.9)) == (1, 2)
    # Validation prompts that lie the other way round are held apart nowhere.
    assert selection.apart(scores(-2.0, -1.0)) == ()
    assert selection.apart([]) == ()


def test_replies_tell_what_opens_refusals_where_harmless_prompts_are_refused_too():
    # Of 10 refusals 8 open with 5 and one each with 6 and 7; of 20 answers one opens with 5.
    refusals, answers = [5] * 8 + [6, 7], [5] + [8] * 12 + [6] * 7
    assert selection.told(refusals, answers) == selection.Told((5,), 1 / 20)
    # Where answers open in the same way, nothing is told; nor without any.
    assert selection.told(refusals, [5] * 10).tokens == ()
    assert selection.told(refusals, []) == selection.Told()
    assert selection.told([5], [8]).tokens == ()
