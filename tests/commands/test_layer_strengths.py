"""Whether strengths of each layer end the few refusals that a direction leaves."""

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.choices import Editing, Measuring
from abl_mlx.commands import edit_choice, layer_strengths, short_replies
from abl_mlx.commands.layer_strengths import NEAR, WEAKER, LayerStrengths
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import direction_file
from abl_mlx.directions import trial as trials
from abl_mlx.directions.trial import Effect
from abl_mlx.directions.trimming import Trimmed
from abl_mlx.directions.variants import Tried, Variant
from abl_mlx.edits.edit import Edit
from abl_mlx.inputs import prompts
from abl_mlx.models.chat_model import load
from abl_mlx.models.writers import find_writers


class Trial:
    """As much of a trial as is asked for."""

    left = 0.05


def opening(share: float) -> Effect:
    """An effect after which so many of a hundred prompts open with a refusal."""
    few = round(100 * share)
    return Effect((0.0,) * 100, (True,) * few + (False,) * (100 - few), (0.01,))


@pytest.fixture(scope="module")
def chat():
    return load(MODEL_PATH)


@pytest.fixture
def right(direction):
    """The edit that ends the demo's refusals."""
    return edit_choice.edit_of(direction_file.read(direction), Editing())


@pytest.fixture
def looked(chat, monkeypatch):
    """A function: an edit and its first tokens -> whether it ends refusals, and what was tried."""
    harmful = [chat.encode(text) for text in prompts.load_demo().harmful.validation.texts[:12]]
    writers = find_writers(chat)

    def ends(edit: Edit, opened: float, before: float = 0.1, wanted: bool = True):
        tried = []

        def trimmed(*given):
            tried.append(given)
            return Trimmed(edit, opening(opened))

        monkeypatch.setattr(layer_strengths, "trimmed", trimmed)
        strengths = LayerStrengths(chat, writers, Measuring())
        strengths.wanted = wanted
        known = Tried(Variant(edit.directions, "difference-of-means"), 0.0, before, 0.05)
        found = strengths.end_refusals(Trial(), edit, known, harmful)
        if tried:
            strengths.end_refusals(Trial(), edit, known, harmful)
            assert len(tried) == 1  # once for each variant
        return found, len(tried)

    return ends


def test_whole_replies_decide_where_first_tokens_tell_of_refusals(chat, right, looked):
    noise = np.random.default_rng(0).standard_normal((1, chat.width))
    other = Edit(mx.array(noise.astype(np.float32)))
    assert looked(right, 0.2) == (True, 1)
    assert looked(other, 0.2) == (False, 1)
    assert looked(other, 0.05) == (True, 1)  # first tokens tell of none


@pytest.mark.parametrize(("wrong", "enough"), [(3, True), (4, False)])
def test_one_reply_more_than_the_limit_is_chance(right, looked, monkeypatch, wrong, enough):
    told = short_replies.ShortReplies(wrong, asked=42, tokens=0)
    monkeypatch.setattr(short_replies, "ask", lambda *given: told)
    assert looked(right, 0.2) == (enough, 1)


def test_they_are_not_looked_for_where_many_refusals_are_left(right, looked):
    assert looked(right, 0.0, before=NEAR + 0.01) == (False, 0)
    assert looked(right, 0.0, wanted=False) == (False, 0)


def test_where_replies_chose_a_lower_strength_is_taken_if_they_stay_answers(chat, right):
    sets = prompts.load_demo()
    harmful, harmless = (
        [chat.encode(text) for text in part.validation.texts[:12]]
        for part in (sets.harmful, sets.harmless)
    )
    writers = find_writers(chat)

    def taken(edit: Edit, **flags: object):
        trial = trials.Trial(chat, writers, harmful, harmless)
        strengths = LayerStrengths(chat, writers, Measuring(editing=Editing(**flags)))
        strengths.by_replies = True
        before = trial.of_edit(edit)
        notes = {
            "refusal_score": {"harmful_ablated": before.refusal},
            "validation_kl": before.kl,
            "refused": before.refused,
        }
        variant = Variant(edit.directions, "difference-of-means")
        return before, strengths.better(trial, edit, variant, notes)

    before, found = taken(right)
    weaker, why, kl = found
    assert all(set(each) == {WEAKER} for each in weaker.edit.profile.values())
    assert why == layer_strengths.BY_REPLIES
    assert kl == before.kl > weaker.effect.kl
    noise = np.random.default_rng(0).standard_normal((1, chat.width))
    _, found = taken(Edit(mx.array(noise.astype(np.float32))))
    assert found is None  # the replies are refusals
    _, found = taken(right, layers=frozenset({1}))
    assert found is None
