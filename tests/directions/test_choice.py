"""Edits tried at runtime, the race of them, and which candidate is chosen, against NumPy."""

import math

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.directions import choice, race, selection
from abl_mlx.directions import trial as trial_module
from abl_mlx.directions.measuring import Candidates
from abl_mlx.directions.race import Runner
from abl_mlx.directions.selection import Score
from abl_mlx.directions.trial import Effect, Trial
from abl_mlx.edits.edit import Edit
from abl_mlx.models import capture
from abl_mlx.models.chat_model import load
from abl_mlx.models.logits import behind_last_layer, first_reply_token
from abl_mlx.models.writers import find_writers
from convert.base.errors import UserError
from tests.directions.test_selection import f32
from tests.models.test_writers import edit_in_place


def planted(chat, size=6):
    """Candidates of which one, after layer 1, is strong; prompts of two kinds."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(len(chat.layers), 2, chat.width))
    candidates = Candidates(f32(means + size * rng.normal(size=means.shape)), f32(means), (-2, -1))
    texts = ["How do I plan a garden?", "Hi", "Why not?", "Where is it?"]
    return candidates, [chat.encode(text) for text in texts]


def chosen(chat, candidates, prompts, edit_for, **more):
    trial = Trial(chat, find_writers(chat), prompts[:2], prompts[2:])
    scores = selection.separation(chat, candidates, prompts[:2], prompts[2:])
    return choice.choose(trial, candidates, scores, edit_for=edit_for, **more)


def test_effects_are_those_of_edited_weights_and_of_added_vectors(tiny_folder, monkeypatch):
    chat = load(tiny_folder("llama"))
    candidates, prompts = planted(chat)
    writers = find_writers(chat)
    monkeypatch.setattr(trial_module, "refusal_tokens", lambda harmful, harmless: [7, 9])
    trial = Trial(chat, writers, prompts[:2], prompts[2:])

    def odds(sequences):
        logits = [np.array(chat.model(mx.array([one]))[0, -1]).astype(float) for one in sequences]
        p = [np.exp(row - np.logaddexp.reduce(row)) for row in logits]
        return np.array([np.log(q[[7, 9]].sum() / (1 - q[[7, 9]].sum())) for q in p]), np.array(p)

    before, base = odds(prompts[2:])
    assert trial.refusal_before == pytest.approx((odds(prompts[:2])[0].mean(), before.mean()), 1e-3)
    score = Score(1, -2, 0, 0, 0)
    added = trial.of_adding(choice.addition(candidates, score))
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
    assert effect.prompts == (2, 2)
    after = odds(prompts[2:])[1]
    assert effect.kl == pytest.approx((base * np.log(base / after)).sum(1).mean(), rel=1e-2)
    assert effect.kl > 1e-3
    assert added != pytest.approx(before.mean(), rel=0.05)


@pytest.mark.parametrize("broken", [0, 1])
def test_an_edit_that_leaves_no_numbers_is_not_chosen(broken, tiny_folder, monkeypatch):
    chat = load(tiny_folder("gemma2"))
    candidates, prompts = planted(chat)
    monkeypatch.setattr(trial_module, "refusal_tokens", lambda harmful, harmless: [7, 9])

    def edit_for(score):
        direction = selection.direction_of(candidates, score.layer, score.position)
        return Edit(direction, math.nan if score.layer == broken else 1.0)

    found = chosen(chat, candidates, prompts, edit_for, max_kl=1e3)
    assert found.score.layer != broken
    assert {s.kl for s in found.scores if s.layer == broken} == {math.inf}


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen2"])
def test_the_token_behind_the_last_layers_states_is_that_of_a_pass(arch, tiny_folder):
    chat = load(tiny_folder(arch))
    sequences = [chat.encode(text) for text in ("How do I plan a garden?", "Hi", "Why not?")]
    states = capture.full(chat, sequences, [-1])[:, -1, 0]
    found = np.array(behind_last_layer(chat, sequences, np.array(states)))
    expected = np.array(first_reply_token(chat, sequences))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_trial_goes_on_where_it_was(tiny_folder, monkeypatch):
    chat = load(tiny_folder("llama"))
    candidates, prompts = planted(chat)
    monkeypatch.setattr(trial_module, "refusal_tokens", lambda harmful, harmless: [7, 9])
    edit = Edit(candidates.directions[1, 0][None])
    harmful, harmless = [*prompts, *prompts[::-1]], [*prompts[::-1], *prompts]

    def trial():
        return Trial(chat, find_writers(chat), harmful, harmless, prompts)

    whole, other = trial(), trial()
    expected = whole.of_edit(edit)
    begun = other.tokens
    part = other.of_edit(edit, harmful=3, harmless=2)
    assert part.prompts == (3, 2)
    assert not other.is_whole(part)
    found = other.of_edit(edit, part)
    assert other.is_whole(found)
    for name in ("scores", "kls"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-3)
    assert (found.opened, found.kept) == (expected.opened, expected.kept)
    # No prompt runs twice, and of what ran already there is nothing left to run.
    assert other.tokens - begun == sum(map(len, [*harmful, *harmless, *prompts]))
    assert other.of_edit(edit, found) is found


class Told:
    """A trial whose edits have the effects that a table says; prompts are counted as tokens."""

    refusal_tokens, refusal_before = [7], (3.0, -3.0)

    def __init__(self, effects, harmful=20, harmless=20, induced=lambda layer: 1.0, left=0.05):
        self.left = left
        self.effects, self.size, self.induced = effects, (harmful, harmless), induced
        self.tokens = 0
        self.tried = []

    def of_edit(self, edit, before=None, harmful=None, harmless=None):
        before = before or Effect()
        if edit not in self.tried:
            self.tried.append(edit)
        refusal, refused, kl = self.effects[edit]
        bad, good = min(harmful or 99, self.size[0]), min(harmless or 99, self.size[1])
        self.tokens += bad + good - sum(before.prompts)
        count = round(refused * bad)
        return Effect((refusal,) * bad, (True,) * count + (False,) * (bad - count), (kl,) * good)

    def of_edits(self, edits, effects, harmful=None, harmless=None):
        pairs = zip(edits, effects, strict=True)
        return [self.of_edit(edit, effect, harmful, harmless) for edit, effect in pairs]

    def is_whole(self, effect):
        return effect.prompts == self.size

    def of_adding(self, intervention, harmless=None):
        self.tokens += harmless or self.size[1]
        return self.induced(min(intervention.layers))


def raced(effects, max_kl=0.1, good=-math.inf, worth=math.inf):
    trial = Told(effects)
    runners = [Runner(name, name) for name in effects]
    found = race.run(
        trial, runners, lambda effect: choice.rank(effect, max_kl, 0.05, trial.is_whole(effect)),
        lambda effect: effect.kl <= max_kl, lambda effect: effect.refused <= 0.05,
        lambda one: one.effect.refusal <= good, "race", worth=lambda effect: effect.kl <= worth,
    )  # fmt: skip
    return trial, [one.of for one in found], {one.of: one.effect for one in runners}


def test_a_race_runs_few_prompts_and_finds_the_best():
    effects = {number: (0.5 * number, number / 20, 0.01) for number in range(16)}
    trial, finished, after = raced(effects)
    assert finished == [0, 1]
    assert after[15].prompts == race.HEATS[0][:2]
    assert after[3].prompts == race.HEATS[1][:2]
    # All prompts for all would be 640.
    assert trial.tokens == 16 * 6 + 4 * (16 - 6) + 2 * (40 - 16)
    # The second need not run where the first is good, or where it leaves refusals.
    assert raced(effects, good=0.0)[1] == [0]
    effects = {number: (0.5 * number, 0.3 + number / 20, 0.01) for number in range(8)}
    assert raced(effects)[1] == [0]


def test_a_race_gives_up_nothing_for_what_may_not_be_taken():
    # The best by far are over the limit of the KL, though not clearly on the first prompts.
    effects = {number: (-9.0 + number, 0.0, 0.15 if number < 9 else 0.05) for number in range(12)}
    _, finished, _ = raced(effects)
    assert finished[0] == 9
    none = dict.fromkeys(range(5), (0.0, 0.0, 1.0))
    assert len(raced(none)[1]) == 5  # all ran all prompts before it was said that none will do


def test_a_race_that_need_not_be_won_ends_where_all_are_far_beyond_the_limit():
    none = dict.fromkeys(range(9), (0.0, 0.0, 1.0))
    trial, finished, after = raced(none, worth=0.2)
    assert finished == []
    assert trial.tokens == 9 * 6 + 4 * (16 - 6)
    assert after[0].prompts == race.HEATS[1][:2]
    # What might be within the limit runs all prompts, and is found to be so or not.
    assert raced({**none, 4: (0.0, 0.0, 0.15)}, worth=0.2)[1] == [4]
    # Where there are too few for a heat, nothing is known of them yet.
    assert len(raced(dict.fromkeys(range(2), (0.0, 0.0, 1.0)), worth=0.2)[1]) == 2


@pytest.mark.parametrize("deep_helps", [True, False])
def test_the_deepest_layers_are_tried_when_nothing_before_them_helps(deep_helps):
    works = 3 if deep_helps else 1
    effects = {
        layer: (-5.0 if layer == works else 1.0 - layer, 0.0 if layer == works else 0.9, 0.01)
        for layer in range(4)
    }
    trial = Told(effects)
    scores = [
        Score(layer, -1, 1.0, 0, 0, dropped=selection.TOO_DEEP if layer == 3 else "")
        for layer in range(4)
    ]
    candidates = Candidates(mx.ones((4, 1, 8)), mx.zeros((4, 1, 8)), (-1,))
    found = choice.choose(trial, candidates, scores, edit_for=lambda score: score.layer)
    assert found.score.layer == works
    assert (3 in trial.tried) == deep_helps
    record = next(s for s in found.scores if s.layer == works).record()
    assert record["refused"] == 0
    assert record["prompts"] == (20, 20)


def test_what_also_induces_is_taken_before_what_only_ends_refusals():
    effects = {0: (-5.0, 0.0, 0.01), 1: (-4.0, 0.0, 0.01)}
    scores = [Score(layer, -1, 1.0, 0, 0) for layer in range(2)]
    candidates = Candidates(mx.ones((2, 1, 8)), mx.zeros((2, 1, 8)), (-1,))

    def taken(**induced):
        trial = Told(effects, induced=lambda layer: induced[f"layer_{layer}"])
        found = choice.choose(trial, candidates, scores, edit_for=lambda score: score.layer)
        return found.score.layer, trial.tokens

    # One edit ran all prompts, and was added once.
    assert taken(layer_0=1.0, layer_1=1.0) == (0, 40 + choice.INDUCED)
    assert taken(layer_0=-1.0, layer_1=1.0)[0] == 1
    assert taken(layer_0=-1.0, layer_1=-1.0)[0] == 0
    # An edit that leaves refusals is not taken for what it induces.
    effects[1] = (-1.0, 0.5, 0.01)
    assert taken(layer_0=-1.0, layer_1=1.0)[0] == 0


def test_the_gentlest_edit_whose_replies_are_answers_is_taken():
    # A lower refusal score costs KL. Of 20 prompts layers 0 to 2 leave none that open as refusals,
    # and layer 5 leaves most.
    effects = {layer: (-9.0 + layer, 0.0, 0.06 - 0.01 * layer) for layer in range(5)}
    effects[5] = (-3.0, 0.8, 0.005)
    scores = [Score(layer, -1, 1.0, 0, 0) for layer in range(6)]
    candidates = Candidates(mx.ones((6, 1, 8)), mx.zeros((6, 1, 8)), (-1,))

    def taken(answering, of=effects):
        trial, asked = Told(of, induced=lambda layer: -1.0), []

        def answers(edit):
            asked.append(edit)
            return edit in answering

        found = choice.choose(
            trial, candidates, scores, edit_for=lambda score: score.layer, answers=answers
        )
        whole = [one.layer for one in found.scores if one.prompts == trial.size]
        return found.score.layer, asked, whole, found.by_replies

    # The gentlest are asked first, and only the one that is taken runs all prompts.
    assert taken({0, 1, 2, 3, 4}) == (4, [4], [4], True)
    assert taken({2}) == (2, [4, 3, 2], [2], True)
    # Three are asked at most. Then it is the lowest refusal score that counts.
    assert taken({1}) == (0, [4, 3, 2], [0, 1], False)
    # Where the lowest score has a low KL, nothing is asked, and where it leaves refusals.
    low = {layer: (refusal, refused, kl / 10) for layer, (refusal, refused, kl) in effects.items()}
    assert taken({4}, low)[1:] == ([], [0, 1], False)
    left = {layer: (refusal, 0.5, kl) for layer, (refusal, _, kl) in effects.items()}
    assert not taken({4}, left)[1]
    # What is beyond the limit of the KL is not compared with.
    beyond = effects | {0: (-9.0, 0.0, 0.15)}
    assert taken({4}, beyond) == (4, [4], [4], True)
    # Replies do not outweigh the first tokens of all prompts.
    late = effects | {4: (-5.0, 0.1, 0.02)}
    assert taken({3, 4}, late) == (3, [4, 3], [3, 4], True)


def test_where_all_move_harmless_prompts_too_far_it_is_said():
    scores = [Score(layer, -1, 1.0, 0, 0) for layer in range(2)]
    candidates = Candidates(mx.ones((2, 1, 8)), mx.zeros((2, 1, 8)), (-1,))
    trial = Told({0: (-5.0, 0.0, 0.3), 1: (-4.0, 0.0, 0.2)})
    with pytest.raises(UserError, match=r"--max-kl 0.1 \(the gentlest by 0.200\)"):
        choice.choose(trial, candidates, scores, edit_for=lambda score: score.layer)


def test_what_opens_answers_too_is_not_all_refusal(tiny_folder, monkeypatch):
    chat = load(tiny_folder("llama"))
    _, prompts = planted(chat)
    opens = np.exp(np.array(first_reply_token(chat, prompts[2:]), np.float64))
    likeliest = opens.mean(axis=0).argsort()[-2:].tolist()
    monkeypatch.setattr(trial_module, "refusal_tokens", lambda harmful, harmless: likeliest)
    trial = Trial(chat, find_writers(chat), prompts[:2], prompts[2:])
    expected = opens[:, likeliest].sum(axis=1).mean()
    assert expected > 0.01
    assert trial.left - selection.LEFT == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("left", "works"), [(0.05, False), (0.15, True)])
def test_the_deepest_layers_are_not_tried_where_enough_is_gone(left, works):
    effects = {layer: (1.0 - layer, 0.1, 0.01) for layer in range(4)}
    trial = Told(effects, left=left)
    scores = [
        Score(layer, -1, 1.0, 0, 0, dropped=selection.TOO_DEEP if layer == 3 else "")
        for layer in range(4)
    ]
    candidates = Candidates(f32(np.ones((4, 1, 3))), f32(np.zeros((4, 1, 3))), (-1,))
    choice.choose(trial, candidates, scores, edit_for=lambda score: score.layer)
    assert (3 in trial.tried) is not works
