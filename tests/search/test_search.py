"""The search: its mathematics against brute force, its journal, and real searches on the demo."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import Editing, Measuring, Searching
from abl_mlx.commands import prompt_choice
from abl_mlx.commands.edit_choice import edit_of
from abl_mlx.commands.find import find_direction
from abl_mlx.directions import direction_file
from abl_mlx.directions.selection import refusal_scores
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import ablation
from abl_mlx.inputs import prompts, sources
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models import chat_model
from abl_mlx.models.distributions import kl_divergence
from abl_mlx.models.generation import generate
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.writers import find_writers
from abl_mlx.search import acceptance, loop, pareto, polish, screening, survivors
from abl_mlx.search.front_replies import FrontReplies
from abl_mlx.search.journal import Journal
from abl_mlx.search.space import DEFAULT, Space, kernel
from abl_mlx.search.survivors import Asked, ask_survivors, choose, meets
from abl_mlx.support import interrupts
from abl_mlx.support.arrays import number
from convert.base.errors import UserError
from tests.support.places import ROOT

RNG = np.random.default_rng(6)

# --- mathematics ---------------------------------------------------------------------------------


def test_kernel_is_its_formula():
    for _ in range(50):
        layers, peak = int(RNG.integers(1, 9)), RNG.uniform(0, 8)
        strength, width, floor = RNG.uniform(0, 1.5), RNG.uniform(0.5, 9), RNG.uniform(0, 1)
        expected = [
            strength * floor
            if abs(layer - peak) > width
            else strength * (1 - (1 - floor) * abs(layer - peak) / width)
            for layer in range(layers)
        ]
        np.testing.assert_allclose(kernel(layers, peak, strength, width, floor), expected)


def test_kernel_has_its_peak_its_floor_and_may_reach_nothing():
    assert kernel(5, 2.0, 1.2, 2.0, 0.25) == pytest.approx([0.3, 0.75, 1.2, 0.75, 0.3])
    assert kernel(5, 2.0, 1.2, 1.0, 0.0) == pytest.approx([0, 0, 1.2, 0, 0])
    assert kernel(3, 0.7, 1.0, 2.0, 1.0) == pytest.approx([1, 1, 1])
    assert kernel(3, 1.0, 0.0, 2.0, 0.5) == [0, 0, 0]


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_front_is_that_of_brute_force(count):
    for _ in range(30):
        points = [tuple(map(float, row)) for row in RNG.integers(0, 8, size=(count, 2))]
        beaten = {
            number
            for number, (x, y) in enumerate(points)
            if any(a <= x and b <= y and (a < x or b < y) for a, b in points)
        }
        found = pareto.front(points)
        assert {points[n] for n in found} == {p for n, p in enumerate(points) if n not in beaten}
        assert len({points[n] for n in found}) == len(found)
        assert [points[n] for n in found] == sorted(points[n] for n in found)


def test_hypervolume_is_the_share_of_a_grid_that_is_beaten():
    for _ in range(20):
        points = [tuple(map(float, row)) for row in RNG.integers(0, 26, size=(6, 2)) / 20]
        cells = (np.arange(20) + 0.5) / 20
        x, y = np.meshgrid(cells, cells)
        beaten = np.zeros_like(x, bool)
        for a, b in points:
            beaten |= (x > a) & (y > b)
        assert pareto.hypervolume(points) == pytest.approx(beaten.mean())
    assert pareto.hypervolume([(1.0, 0.0), (0.2, 1.5)]) == 0


def test_a_search_ends_when_the_front_has_not_moved_for_long_enough():
    rising = [0.1 + 0.01 * n for n in range(30)]
    assert not pareto.still(rising, 10)
    assert not pareto.still([*rising, *[rising[-1]] * 9], 10)
    assert pareto.still([*rising, *[rising[-1]] * 10], 10)
    assert pareto.still([*rising, *[rising[-1] * 1.0005] * 10], 10)
    assert not pareto.still([*rising, *[rising[-1] * 1.01] * 10], 10)
    assert not pareto.still([0.0] * 50, 10)  # nothing found yet
    assert not pareto.still([0.5] * 10, 10)


def test_target_is_met_where_it_will_hold_for_others_as_well():
    assert meets(0, 8, 0.05)  # too few to ask for more
    assert not meets(1 / 8, 8, 0.2)
    assert not meets(1 / 32, 32, 0.05)
    assert meets(1 / 64, 64, 0.05)
    assert not meets(2 / 64, 64, 0.05)
    # (p + z²/2n + z √(pq/n + z²/4n²)) / (1 + z²/n) for 3 and 4 of 100: 0.048 and 0.061
    assert meets(3 / 100, 100, 0.05)
    assert not meets(4 / 100, 100, 0.05)


def test_predictions_find_a_smooth_function_again():
    places, asked = RNG.uniform(0, 1, size=(80, 3)), RNG.uniform(0.2, 0.8, size=(30, 3))

    def function(x):
        return np.stack([3 * x[:, 0] - x[:, 1], np.sin(2 * x[:, 2]) + x[:, 0] ** 2], axis=1)

    found, doubt = loop.predicted(places, function(places), asked)
    assert np.abs(found - function(asked)).max() < 0.05
    known, far = places[:5], np.full((1, 3), 9.0)
    certain, lost = (loop.predicted(places, function(places), x)[1] for x in (known, far))
    assert (certain.mean(axis=0) < 2 * doubt.mean(axis=0)).all()
    assert (lost > 5 * doubt.mean(axis=0)).all()
    line, _ = loop.predicted(places, places @ np.ones((3, 1)), asked)
    np.testing.assert_allclose(line[:, 0], asked.sum(axis=1), atol=0.02)


# --- the space -----------------------------------------------------------------------------------


def space_of(layers=4, width=8, **options):
    base = mx.array(RNG.normal(size=(1, width)).astype(np.float32))
    each = mx.array(RNG.normal(size=(layers, 1, width)).astype(np.float32))
    return Space(
        layers,
        {
            DEFAULT: lambda index, per_layer: base,
            "other": lambda index, per_layer: each if per_layer else each[int(index)],
        },
        **options,
    )


def test_the_first_trial_is_the_uniform_edit_of_the_chosen_direction():
    space = space_of()
    first = space.uniform()
    assert space.recipe(first) == {
        "profile": {"attention": [1.0] * 4, "mlp": [1.0] * 4},
        "embedding": True,
    }
    assert space.directions(first) is space.methods[DEFAULT](0, False)
    bounds = space.distributions()
    assert space.recipe(space.even(0.7)) == {
        "profile": {"attention": [0.7] * 4, "mlp": [0.7] * 4},
        "embedding": False,
    }
    for variant in [first, space.even(1.0), *space.analytic(0.7)]:
        assert variant.keys() == bounds.keys()
        for name, allowed in bounds.items():
            assert allowed._contains(allowed.to_internal_repr(variant[name])), name


def test_layers_outside_the_range_keep_their_weights():
    space = space_of()
    recipe = space.recipe(space.uniform(first_layer=2, last_layer=1, mlp_strength=0.5))
    assert recipe["profile"] == {"attention": [0, 1, 1, 0], "mlp": [0, 0.5, 0.5, 0]}
    nothing = space.uniform(attention_strength=0.0, mlp_strength=0.0, embedding=False)
    assert not space.changes_something(nothing)
    assert space.changes_something(nothing | {"embedding": True})


def test_neighbours_stay_inside_the_space_and_differ():
    space = space_of(embedding=False)
    bounds = space.distributions()
    start = space.uniform(embedding=False)
    for _ in range(200):
        moved = space.neighbour(start, RNG)
        for name, allowed in bounds.items():
            assert allowed._contains(allowed.to_internal_repr(moved[name])), name
        start = moved
    assert start != space.uniform(embedding=False)
    assert not start["embedding"]  # --no-embedding holds


def test_an_even_kernel_gives_way_to_one_of_the_same_mean():
    space = space_of()
    for _ in range(20):
        made = space._tent("mlp", 0.6, RNG)
        recipe = space.recipe(space.uniform(**made))["profile"]["mlp"]
        assert np.mean(recipe) == pytest.approx(0.6, abs=1e-6) or made["mlp_strength"] == 1.5
        assert len(set(recipe)) > 1


# --- small steps ---------------------------------------------------------------------------------


def scored(space, parameters):
    """A trial of a made-up model: KL rises with the strengths' squares, refusals fall with them."""
    strengths = np.array(space.place(parameters)[:-1])
    weights, pull = np.array([1, 4, 1, 9, 1, 1, 4, 1]), np.array([1, 1, 3, 1, 1, 2, 1, 1])
    kl = 1e-4 * float(weights @ strengths**2)
    refusal = float(np.exp(-0.6 * pull @ strengths))
    return loop.Trial(parameters, screening.Screened(refusal, 0.0, kl, (refusal, kl), True, 10))


@pytest.mark.parametrize("seed", range(3))
def test_small_steps_find_a_much_gentler_edit_of_the_same_score(seed):
    space, random = space_of(), np.random.default_rng(seed)
    trials = [scored(space, space.even(strength)) for strength in (1.0, 0.8, 0.6)]
    trials += [scored(space, space.neighbour(space.even(0.8), random)) for _ in range(12)]
    start, random_too = trials[1], list(trials)

    def gentlest(these):
        good = [one for one in these if one.screened.refusal <= start.screened.refusal]
        return min(good, key=lambda one: one.screened.kl)

    for number_ in range(40):
        made = polish.step(space, trials, gentlest(trials), start.screened.refusal, number_, random)
        trials.append(scored(space, made))
        neighbour = space.neighbour(gentlest(random_too).parameters, random)
        random_too.append(scored(space, neighbour))
    found = gentlest(trials).screened.kl
    assert found < 0.75 * start.screened.kl
    assert found < gentlest(random_too).screened.kl
    bounds = space.distributions()
    for one in trials:
        for name, allowed in bounds.items():
            assert allowed._contains(allowed.to_internal_repr(one.parameters[name])), name


def test_a_step_follows_from_the_trials_and_the_seed_and_needs_some():
    space = space_of()
    trials = [scored(space, space.even(strength)) for strength in np.linspace(0.4, 1, 7)]
    aim = trials[3].screened.refusal
    made = [
        polish.step(space, trials, trials[3], aim, 0, np.random.default_rng(seed))
        for seed in (5, 5, 6)
    ]
    assert made[0] == made[1] != made[2]
    assert polish.step(space, trials[:5], trials[3], aim, 0, RNG) is None


# --- limits and starts ---------------------------------------------------------------------------


class MadeUp:
    """A screen of the made-up model, on which each trial takes six seconds."""

    before = 3.0

    def __init__(self, space):
        self.space, self.seconds, self.seen = space, 0.0, []

    def score(self, parameters, hopeless):
        self.seen.append(parameters)
        self.seconds += 6
        return scored(self.space, parameters).screened

    def search(self, starts=(), journal=None):
        made = loop.Search(
            self, self.space, lambda given: given, journal or Journal(None, {}), lambda share: True,
            starts=starts, clock=lambda: self.seconds,
        )  # fmt: skip
        return made


@pytest.mark.parametrize(
    ("most", "minutes", "made", "ended"),
    [
        (None, 1.0, 10, "the time was up"),
        (7, 1.0, 7, "all trials made"),
        (20, 0.95, 10, "the time was up"),
        (20, 1e-9, 1, "the time was up"),
        (5, None, 5, "all trials made"),
    ],
)
def test_a_search_ends_by_the_first_limit_that_is_reached(most, minutes, made, ended):
    search = MadeUp(space_of()).search()
    search.run(most, minutes)
    assert (len(search.trials), search.ended) == (made, ended)


def test_time_counts_anew_for_a_search_that_goes_on(tmp_path):
    path, counts = tmp_path / "journal", []
    for _ in range(2):
        journal = Journal(path, {"model": "made up"})
        search = MadeUp(space_of()).search(journal=journal)
        search.run(None, 0.5)
        counts.append(len(search.trials))
        journal.close()
    assert counts == [5, 10]


def test_without_a_number_of_trials_the_front_may_still_end_a_search():
    screen = MadeUp(space_of())
    screen.score = lambda parameters, hopeless: trial(kl=0.01, refusal=1.0).screened
    search = screen.search()
    search.run(None, 60)
    assert search.ended == "the front stopped moving"
    assert len(search.trials) == loop.PATIENCE + 1


def test_given_edits_come_right_after_the_default_and_the_others_follow_as_before():
    space = space_of()
    given = [space.even(0.45, mlp_floor=0.5), space.even(0.55)]
    plain, started = MadeUp(space), MadeUp(space)
    plain.search().run(10)
    started.search(given).run(12)
    assert started.seen[1:3] == given
    assert started.seen[:1] + started.seen[3:] == plain.seen


def test_large_steps_of_the_front_are_aimed_at():
    """Which step, by its height; where to, by the scores of its ends."""
    space = space_of()
    search = MadeUp(space).search()
    for strength, kl, refused, score in (
        (0.2, 1e-6, 1.0, 3.0), (0.4, 1e-4, 1.0, 2.0), (0.5, 1e-3, 0.9, 1.6),
        (0.9, 1.1e-3, 0.02, 0.04), (1.0, 2e-3, 0.0, 0.01), (1.2, 3e-3, 0.5, 0.9),
    ):  # fmt: skip
        screened = screening.Screened(score, refused, kl, (score, kl), True, 10)
        search._count(loop.Trial(space.even(strength), screened))
    random = np.random.default_rng(0)
    drawn = [search._between(random) for _ in range(2000)]
    strengths = [one.parameters["mlp_strength"] for one, _ in drawn]
    counts = [strengths.count(one) for one in (0.5, 0.9, 1.0)]
    assert sum(counts) == len(drawn)
    np.testing.assert_allclose(np.array(counts) / 2000, [0.1, 0.88, 0.02], atol=0.03)
    aims = dict(zip(strengths, (aim for _, aim in drawn), strict=True))
    assert aims[0.5] == pytest.approx((3.0 * 1.6) ** 0.5)  # `before` of the unedited model is 3
    assert aims[0.9] == pytest.approx((1.6 * 0.04) ** 0.5)


def test_no_edit_is_tried_twice(monkeypatch):
    """A small step that ends at the edge of the ranges would lead there every other time."""
    space = space_of()
    monkeypatch.setattr(polish, "step", lambda *given: space.even(1.0))
    screen = MadeUp(space)
    screen.search().run(40)
    assert all(one not in screen.seen[:place] for place, one in enumerate(screen.seen))


# --- what is asked for replies -------------------------------------------------------------------


def trial(kl, refusal, refused=0.0, whole=True):
    return loop.Trial({}, screening.Screened(refusal, refused, kl, (refusal, kl), whole, 10))


@pytest.mark.parametrize(("count", "border"), [(40, 23), (40, 0), (40, 39), (7, 3), (1, 0)])
def test_the_gentlest_edit_that_meets_the_target_is_asked(count, border):
    trials = [trial(kl=0.001 * 1.1**place, refusal=1 / (place + 1)) for place in range(count)]
    seen = []

    def ask(one):
        seen.append(one)
        passes = one.screened.kl >= 0.001 * 1.1 ** (border - 0.5)
        return Asked(one, 0.0 if passes else 0.5, 0.0, passes)

    asked = ask_survivors(trials, ask)
    assert len(seen) == len(asked) <= survivors.MOST_ASKED
    assert choose(asked).trial is trials[border]


def test_where_first_tokens_call_none_good_replies_alone_decide():
    trials = [
        trial(kl=0.001 * 1.1**place, refusal=1 / (place + 1), refused=0.1) for place in range(40)
    ]

    def ask(one):
        passes = one.screened.kl >= 0.001 * 1.1**22.5
        return Asked(one, 0.0 if passes else 0.5, 0.0, passes)

    asked = ask_survivors(trials, ask, lambda share: share == 0)
    assert choose(asked).trial is trials[23]


def test_the_trials_that_are_asked_cover_the_front():
    """Six have nearly its whole area, as many as are wanted are the front itself."""
    trials = [
        trial(kl=10 ** RNG.uniform(-6, 0), refusal=1, refused=int(RNG.integers(0, 20)) / 20)
        for _ in range(60)
    ]
    points = [one.shares for one in trials]
    taken = survivors.spread(trials, 6)
    assert taken == sorted(set(taken))
    assert len(taken) <= 6
    whole = pareto.hypervolume(points)
    assert pareto.hypervolume([points[place] for place in taken]) > 0.9 * whole
    assert set(survivors.spread(trials, 60)) == set(pareto.front(points)) - {
        place for place, (kl, refused) in enumerate(points) if refused >= 1 or kl >= 1
    }
    first = survivors.spread(trials, 1)
    best = max(range(60), key=lambda place: pareto.hypervolume([points[place]]))
    assert first == [best]


def test_what_fails_by_replies_hides_no_other_trial():
    """First tokens of all are good; those with the lowest scores go on to refuse."""
    fooling = [trial(kl=0.001 + 0.0001 * n, refusal=0.01 - 0.001 * n) for n in range(8)]
    honest = [trial(kl=0.005 + 0.001 * n, refusal=0.05 - 0.005 * n) for n in range(5)]
    far = [trial(kl=0.5, refusal=0.0001)]

    def ask(one):
        passes = not any(one is other for other in fooling)
        return Asked(one, 0.0 if passes else 0.1, 0.0, passes)

    assert choose(ask_survivors([*fooling, *honest, *far], ask)).trial is honest[0]


@pytest.mark.parametrize(
    ("opened", "refused", "misled", "asked"),
    [(0.1, 0.0, True, 1), (0.1, 4 / 64, True, 1), (0.1, 0.5, False, 1), (0.0, 0, False, 0)],
)
def test_replies_tell_whether_first_tokens_mislead(opened, refused, misled, asked):
    """Where the first edit leaves openings of refusals, its replies tell what these are."""
    screen = Replying({0: range(round(64 * refused)), 1: range(round(64 * refused)), 2: range(12)})
    replies = FrontReplies(screen, lambda given: given["n"], [([Prompt("a")] * 64, 24)], 0.05)
    trials = [replace(trial(0.03, 0.1, opened), parameters={"n": n}) for n in range(3)]
    assert replies.misled(trials[0]) == misled
    assert (len(screen.seen), screen.read) == (asked, misled)
    # Another edit may leave as much as the first one, which is not asked again.
    assert [replies._ask(one).meets for one in trials] == [refused < 0.1] * 2 + [False]
    assert len(screen.seen) == 3


class Replying:
    """A screen on which edits leave the replies refused whose numbers are given."""

    prompts = 42

    def __init__(self, refused):
        self.refused, self.seen, self.read = refused, [], False

    def verdicts(self, edit, prompts, most):
        self.seen.append((edit, len(prompts)))
        left = self.refused[edit] if len(prompts) == 64 else self.refused[f"{edit} further"]
        return [Verdict.REFUSAL if n in left else Verdict.ANSWER for n in range(len(prompts))], 24

    def read_refusals(self):
        self.read = True
        return 500


def confirmed(left):
    """The edit that is taken of some by rising KL, of which the last is the default.

    Args:
        left: for each edit the prompts that stay refused, of the first 64 and of 128 further ones.
    """
    known = {n: first for n, (first, _) in enumerate(left)}
    screen = Replying(known | {f"{n} further": more for n, (_, more) in enumerate(left)})
    questions, further = [([Prompt("a")] * 64, 24)], [([Prompt("b")] * 128, 24)]
    replies = FrontReplies(
        screen, lambda given: given["n"], questions, 0.05, further=further
    )  # fmt: skip
    trials = [
        replace(trial(0.01 * (n + 1), 0.1 - 0.01 * n, 0.1), parameters={"n": n})
        for n in range(len(left))
    ]
    assert replies.misled(trials[-1])
    asked = replies.of(trials, trials[-1], lambda share: True)
    return choose(asked), [edit for edit, count in screen.seen if count == 128]


def test_a_gentler_edit_is_taken_that_leaves_as_few_refusals_as_far_as_replies_tell():
    """Of 64 replies it leaves 6 and the default 4, which chance explains; of 192 both leave 6."""
    taken, asked_further = confirmed([(range(6), ()), (range(4), range(2))])
    assert (taken.trial.parameters["n"], taken.meets) == (0, True)
    assert sorted(asked_further) == [0, 1]


def test_a_gentler_edit_is_not_taken_that_more_replies_show_to_be_worse():
    taken, asked_further = confirmed([(range(6), range(6)), (range(4), range(2))])
    assert (taken.trial.parameters["n"], taken.meets) == (1, True)
    assert sorted(asked_further) == [0, 1]
    # By bisection the third one is asked first, and then the next one by KL.
    worse, good, default = (range(6), range(6)), (range(5), range(3)), (range(4), range(2))
    taken, asked_further = confirmed([worse, good, default, default])
    assert taken.trial.parameters["n"] == 1
    assert sorted(asked_further) == [0, 1, 2, 3]


def test_an_edit_that_a_few_replies_show_to_be_worse_is_asked_nothing_more():
    taken, asked_further = confirmed([(range(20), ()), (range(4), ())])
    assert (taken.trial.parameters["n"], asked_further) == (1, [])


def test_an_edit_that_meets_the_target_needs_no_further_replies():
    taken, asked_further = confirmed([(range(1), ()), (range(4), ())])
    assert (taken.trial.parameters["n"], asked_further) == (0, [])


def test_mcnemars_test_is_that_of_all_ways_to_share_out_what_differs():
    for _ in range(30):
        wrong, others = RNG.random((2, 12)) < 0.4
        apart = [place for place in range(12) if wrong[place] != others[place]]
        more = sum(bool(wrong[place]) for place in apart)
        ways = list(itertools.product((0, 1), repeat=len(apart)))
        expected = sum(sum(one) >= more for one in ways) / len(ways)
        assert acceptance.mcnemar(list(wrong), list(others)) == pytest.approx(expected)
    four, five = [True] * 4 + [False] * 60, [True] * 5 + [False] * 59
    none = [False] * 64
    assert not acceptance.ruled_out(four, none)  # 1 of 16
    assert acceptance.ruled_out(five, none)  # 1 of 32


def test_as_few_allows_one_standard_error_and_nothing_above_none():
    def of(count):
        return [True] * count + [False] * (192 - count)

    # √(6 · 186 / 192) = 2.41
    assert [acceptance.as_few(of(left), of(6)) for left in (0, 6, 8, 9)] == [
        True,
        True,
        True,
        False,
    ]
    assert acceptance.as_few(of(0), of(0))
    assert not acceptance.as_few(of(1), of(0))
    assert acceptance.as_few([], [])


def test_without_any_that_meets_the_target_the_fewest_refusals_win_and_broken_ones_count():
    asked = [
        Asked(trial(0.1, 1), 0.5, 0.0, False),
        Asked(trial(0.2, 1), 0.1, 0.0, False),
        Asked(trial(0.3, 1), 0.0, 0.9, False),
    ]
    assert choose(asked) is asked[1]


# --- on the demo ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    chat = chat_model.load(sources.resolve("demo").path)
    sets = prompts.load_demo()
    few = {
        name: replace(split, train=split.train.take(16), validation=split.validation.take(12))
        for name, split in (("harmful", sets.harmful), ("harmless", sets.harmless))
    }
    sets = replace(sets, **few)
    writers = find_writers(chat)
    return chat, writers, sets, find_direction(chat, writers, sets, Measuring.of(position=-1))


def searched(demo, journal, trials, *, seed=0, **others):
    chat, writers, sets, found = demo
    options = Measuring.of(search=trials, search_journal=journal, seed=seed, **others)
    encoded = prompt_choice.encoded(chat, sets, options)
    return loop.improve(chat, writers, encoded, found, options)


def tried(file):
    return file.metadata["search"]["trials"]


@pytest.fixture(scope="module")
def whole(demo, tmp_path_factory):
    journal = tmp_path_factory.mktemp("search") / "one.journal"
    return journal, searched(demo, journal, 30)


def test_search_finds_a_gentler_edit_that_leaves_no_refusals(demo, whole):
    _, file = whole
    chat, writers, sets, found = demo
    default, chosen = tried(file)[0], file.metadata["summary"]["search"]
    assert chosen["refusal_rate"] == 0
    assert chosen["kl"] < 0.8 * default["kl"]
    # What is written down is the edit whose scores are written down, also through a file.
    edit = edit_of(file, Editing())
    harmful = [chat.encode(text) for text in sets.harmful.validation.texts]
    # Train prompts fill up what the validation part lacks.
    texts = [*sets.harmless.validation.texts, *sets.harmless.train.texts]
    harmless = [chat.encode(text) for text in texts]
    screen = loop.Screen(chat, writers, harmful, harmless)
    with ablation(writers, edit):
        opened, bad = first_reply_token(chat, harmless), first_reply_token(chat, harmful)
    kl = number(kl_divergence(first_reply_token(chat, harmless), opened).mean())
    assert kl == pytest.approx(chosen["kl"], rel=1e-2)
    odds = np.array(refusal_scores(bad, screen.tokens), np.float64)
    assert np.log1p(np.exp(odds)).mean() == pytest.approx(chosen["refusal_score"], rel=1e-2)
    # Fewer generated tokens than a hundred replies of the length that is read would have cost.
    assert 0 < chosen["generated_tokens"] < 100 * 64
    assert found.metadata.get("recipe") is None


def test_an_edit_that_leaves_no_numbers_is_worst(demo):
    chat, writers, sets, _ = demo
    harmful, harmless = (
        [chat.encode(text) for text in part.validation.texts[:3]]
        for part in (sets.harmful, sets.harmless)
    )
    screen = loop.Screen(chat, writers, harmful, harmless)
    direction = mx.ones((1, chat.width)) / chat.width**0.5
    worst = screen.score(Edit(direction, math.nan))
    assert worst.refused == 1
    assert np.isfinite([worst.refusal, worst.kl, *worst.early]).all()
    assert worst.kl > 1e2
    assert worst.refusal > 1e2


def test_refusals_are_read_token_by_token(demo):
    """Against plain passes of the model, token by token, with and without an edit."""
    chat, writers, sets, found = demo
    harmful, harmless = (
        [chat.encode(text) for text in part.validation.texts]
        for part in (sets.harmful, sets.harmless)
    )
    screen = loop.Screen(chat, writers, [*harmful, harmless[0]], harmless[:2])
    generated = screen.read_refusals()
    assert 13 * screening.SAID < generated <= 13 * screening.REPLY_TOKENS
    said = [generate(chat, [one], screening.SAID)[0] for one in harmful]
    strengths = (1e-6, 0.3, 0.5, 1.0)
    found_refused = []
    for strength in strengths:
        edit = Edit(found.selected, strength)
        nats, same = [], []
        for prompt, tokens in zip(harmful, said, strict=True):
            with ablation(writers, edit):
                logits = chat.model(mx.array([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
            rows = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64)
            p = np.exp(rows[np.arange(len(tokens)), tokens].sum())
            nats.append(-np.log1p(-min(p, screening.CERTAIN)))
            same.append(rows.argmax(axis=-1).tolist() == tokens)
        screened = screen.score(edit)
        # The last prompt is answered, and counts as such.
        assert screened.refusal == pytest.approx(sum(nats) / 13, rel=1e-2, abs=1e-5)
        assert screened.refused == pytest.approx(sum(same) / 13)
        found_refused.append(screened.refused)
    assert found_refused[0] == pytest.approx(12 / 13)
    assert found_refused[-1] == 0
    assert screen.before == pytest.approx(screen.score(Edit(found.selected, 1e-6)).refusal, 1e-2)
    run = sum(map(len, [*harmful, *harmless[:2]])) + sum(len(one) - 1 for one in said)
    assert screened.tokens == run


def test_a_refusal_that_was_cut_is_read_on(demo, monkeypatch):
    """It may turn into an answer, or stay one; one that has ended is not read on."""
    chat, writers, sets, found = demo
    cut = "I'm sorry, but I can't advise on that."
    texts = {
        1: cut, 2: " However, here are some steps: 1. Water the fern. 2. Turn the pot to the sun.",
        3: " It is not something that I can help with.", 4: "Water it once a week.",
    }  # fmt: skip
    asked = []

    def generate(chat, encoded, most, **options):
        asked.append((list(map(list, encoded)), most))
        return [[1] * 24, [1] * 24, [1] * 9, [4] * 24] if len(asked) == 1 else [[2] * 40, [3] * 12]

    def decode(chat, replies, prompts):
        return ["".join(texts[token] for token in dict.fromkeys(one)) for one in replies]

    harmful, harmless = (
        [chat.encode(text) for text in part.validation.texts[:2]]
        for part in (sets.harmful, sets.harmless)
    )
    screen = loop.Screen(chat, writers, harmful, harmless)
    monkeypatch.setattr(screening.evaluate, "generate", generate)
    monkeypatch.setattr(screening.evaluate, "decode", decode)
    prompts_ = list(sets.harmful.validation.prompts[:4])
    verdicts, tokens = screen.verdicts(Edit(found.selected), prompts_)
    assert verdicts == [Verdict.ANSWER, *[Verdict.REFUSAL] * 2, Verdict.ANSWER]
    assert asked[1] == ([[*chat.encode(one), *[1] * 24] for one in prompts_[:2]], 40)
    assert tokens == 24 * 3 + 10 + 40 + 13
    # Cut after 24 tokens, as before, all of the first three were refusals.
    assert [classify(one) for one in (cut, cut + texts[2])] == [Verdict.REFUSAL, Verdict.ANSWER]


def test_the_file_keeps_the_edit(whole, tmp_path):
    _, file = whole
    direction_file.save(tmp_path / "d.safetensors", file)
    back = direction_file.read(tmp_path / "d.safetensors")
    first, second = edit_of(file, Editing()), edit_of(back, Editing())
    assert second.profile == first.profile
    assert second.profile is not None
    assert second.embedding == first.embedding
    assert mx.array_equal(second.directions, first.directions)
    assert len(back.metadata["search"]["trials"]) == 30


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(demo, whole, tmp_path):
    _, file = whole
    journal = tmp_path / "two.journal"
    searched(demo, journal, 22)
    # What a kill leaves in the middle of a write is passed over.
    with open(journal, "a") as stream:
        stream.write('{"op_code": 4, "wor')
    file_2 = searched(demo, journal, 30)
    assert tried(file_2) == tried(file)
    assert mx.array_equal(file_2.selected, file.selected)
    # Nothing is run again where all trials are there.
    before = journal.read_bytes()
    assert tried(searched(demo, journal, 30)) == tried(file)
    assert len(journal.read_bytes()) - len(before) < 300


def test_another_seed_tries_other_edits(demo, whole):
    _, file = whole
    other = searched(demo, None, 22, seed=1)
    analytic = [one["kl"] for one in tried(file)[:20]]
    assert [one["kl"] for one in tried(other)[:20]] == analytic
    assert tried(other)[21] != tried(file)[21]


def test_ctrl_c_ends_the_search_and_uses_what_it_found(demo, tmp_path, monkeypatch, capsys):
    journal, real = tmp_path / "j", loop.Screen.score
    calls = []

    def score(self, *args):
        calls.append(args)
        if len(calls) == 8:
            interrupts._requested.append(2)
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(loop.Screen, "score", score)
    file = searched(demo, journal, 20)
    assert len(tried(file)) == 7
    assert file.metadata["summary"]["search"]["ended"] == "stopped by hand"
    assert "Ctrl-C again" in capsys.readouterr().err
    interrupts.check()  # the request was met
    calls.clear()
    monkeypatch.setattr(loop.Screen, "score", real)
    assert len(tried(searched(demo, journal, 9))) == 9
    # Before anything is known there is nothing to go on with.
    monkeypatch.setattr(loop.Screen, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        searched(demo, None, 5)


def test_journals_of_other_searches_are_refused(demo, whole, tmp_path):
    chat, writers, sets, found = demo
    journal, _ = whole
    with pytest.raises(UserError, match="another seed"):
        searched(demo, journal, 30, seed=5)
    with pytest.raises(UserError, match="another space or options"):
        searched(demo, journal, 30, max_kl=0.9)
    other = replace(sets, harmful=replace(sets.harmful, validation=sets.harmful.test.take(12)))
    with pytest.raises(UserError, match="another prompts"):
        searched((chat, writers, other, found), journal, 30)
    norm = chat.layers[0].input_layernorm
    kept = norm.weight
    norm.weight = kept * 1.01
    try:
        with pytest.raises(UserError, match="another model"):
            searched(demo, journal, 30)
    finally:
        norm.weight = kept
    broken = tmp_path / "notes.txt"
    broken.write_text("hello\n")
    for path in (broken, tmp_path):
        with pytest.raises(UserError, match="is not a search journal"):
            searched(demo, path, 30)
    assert broken.read_text() == "hello\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"whole":true', b'"whole":"yes"'),
        (b'"tokens":', b'"tokens":-0.5e'),
        (b'"refused":', b'"refused":NaN,"x":'),
        (b'"early":[', b'"early":[[],'),
        (b'"values":[', b'"values":["a",'),
        (b'"identity":{', b'"identity":["'),
        (b'"identity":{', b'"identity":[],"other":{'),
        (b'"op_code":', b'"op_code":99'),
        (b'"study_name":', b'"study_name":' + b"[" * 20_000),
        (rb"\"high\": ", rb"\"high\": 9"),
    ],
    ids=range(10),
)
def test_journals_that_were_changed_are_refused(demo, whole, tmp_path, old, new):
    content = whole[0].read_bytes()
    assert old in content
    path = tmp_path / "search.journal"
    path.write_bytes(content.replace(old, new))
    with pytest.raises(UserError, match="is not a search journal"):
        searched(demo, path, 30)


def test_a_search_with_minutes_starts_from_a_file_and_says_so(demo, tmp_path, capsys):
    chat, *_ = demo
    recipe = {"profile": {name: [0.6] * len(chat.layers) for name in ("attention", "mlp")}}
    path = tmp_path / "abl.json"
    direction = {"method": "difference-of-means", "layer": 1.5, "recipe": recipe}
    path.write_text(json.dumps({"direction": direction}))
    file = searched(demo, None, 3, minutes=60.0, warm_start=path)
    said = capsys.readouterr().err
    assert "search: at most 3 trials" in said
    assert "or 60 minutes of trials (whichever ends first)" in said
    assert "the search starts from abl.json: strengths within 0.00" in said
    given = tried(file)[1]
    assert (given["method"], given["index"]) == ("difference-of-means", 1.5)
    assert given["attention_strength"] == pytest.approx(0.6)
    summary = file.metadata["summary"]["search"]
    assert (summary["minutes"], summary["started_from"]) == (60, "abl.json")
    # A journal is of the searches with the same start.
    journal = tmp_path / "journal"
    searched(demo, journal, 2)
    with pytest.raises(UserError, match="another space or options"):
        searched(demo, journal, 3, warm_start=path)


def test_options_that_do_not_go_together(demo):
    for others, word in (({"pin": "harmless"}, "--pin"), ({"layer": 1}, "--layer")):
        with pytest.raises(UserError, match=word):
            searched(demo, None, 5, **others)


def test_journal_lies_beside_the_output(tmp_path):
    assert Searching().beside(tmp_path / "x").search_journal is None
    timed = Searching(minutes=5).beside(tmp_path / "x").search_journal
    assert timed == tmp_path / "x.search.journal"
    found = Searching(search=5).beside(tmp_path / "edited.gguf").search_journal
    assert found == tmp_path / "edited.gguf.search.journal"
    given = Searching(search=5, search_journal=tmp_path / "mine")
    assert given.beside(tmp_path / "x").search_journal == tmp_path / "mine"


def test_hopeless_edits_end_after_the_first_prompts(demo):
    chat, writers, sets, found = demo
    harmful, harmless = (
        [chat.encode(text) for text in split.validation.texts]
        for split in (sets.harmful, sets.harmless)
    )
    screen = loop.Screen(chat, writers, harmful, harmless)
    edit = Edit(found.selected)
    all_of, part = screen.score(edit), screen.score(edit, lambda early: True)
    assert all_of.whole
    assert not part.whole
    assert part.early == all_of.early == (part.refusal, part.kl)
    assert part.tokens == sum(map(len, [*harmful[:8], *harmless[:8]])) < all_of.tokens
    assert all_of.tokens == screen.cost


def test_trials_are_json(whole):
    _, file = whole
    assert json.loads(json.dumps(file.metadata["search"])) == file.metadata["search"]


HELD = """
import gc, weakref
import abl_mlx
model = abl_mlx.load("demo")
prompts = abl_mlx.load_prompts(model=model, limit=16)
abl_mlx.choose(model, prompts, search=2)
held = weakref.ref(model.chat.model)
del model
gc.collect()
print(held() is None)
"""


def test_a_search_keeps_no_model_in_memory() -> None:
    """In a process of its own: whoever imports Optuna first is what it would remember."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True\n", done.stderr
