"""Choosing a candidate direction by its causal effect, as in Arditi et al. 2024, in a race."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from abl_mlx.directions import race
from abl_mlx.directions.measuring import Candidates
from abl_mlx.directions.race import Runner
from abl_mlx.directions.selection import TOO_DEEP, Score, shortlist
from abl_mlx.directions.trial import Effect, Trial
from abl_mlx.directions.trimming import GENTLE
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import Intervention, adding
from abl_mlx.edits.weight_edit import WeightEdit
from convert.base.errors import UserError

#: The largest number of candidates that are tried.
MOST = 14

#: The number of harmless prompts on which the effect of adding a candidate is measured.
INDUCED = 12

#: The number of edits that reply, of those that are gentler than the one with the lowest score.
GENTLER = 3

#: The reason given for not choosing an edit that was dropped before it had run all prompts.
OUTRUN = "others did better on the first prompts"


@dataclass(frozen=True)
class Choice:
    """The chosen candidate and how it was found.

    Attributes:
        score: the score of the chosen candidate.
        scores: the scores of all candidates.
        by_replies: whether it was chosen by its KL and by whole replies.
    """

    score: Score
    scores: list[Score]
    by_replies: bool = False


def rank(
    effect: Effect, max_kl: float, most_left: float, whole: bool = True
) -> tuple[bool, bool, float]:
    """Sort key of edits: within the KL limit first, then without refusals, then by score.

    While only some prompts were run the KL is uncertain, so then only twice the limit counts.

    Args:
        effect: the edit's effect.
        max_kl: limit of the mean KL on harmless prompts, in nats.
        most_left: the largest share of harmful prompts opening with a refusal that counts as none
            (`Trial.left`).
        whole: whether the effect was measured on all prompts.
    """
    limit = max_kl if whole else 2 * max_kl
    return not effect.kl <= limit, effect.refused > most_left, effect.refusal


def gentle(
    effect: Effect, max_kl: float, most_left: float, whole: bool = True
) -> tuple[bool, bool, float]:
    """Sort key like `rank`, but with KL for edits that leave no refusals (see `variants.best`)."""
    over, left, score = rank(effect, max_kl, most_left, whole)
    return over, left, score if left else effect.kl


def choose(
    trial: Trial,
    candidates: Candidates,
    scores: Sequence[Score],
    *,
    edit_for: Callable[[Score], Edit],
    max_kl: float = 0.1,
    deepest: bool = True,
    answers: Callable[[WeightEdit], bool] | None = None,
) -> Choice:
    """Choose the candidate whose ablation has the best effect on the first reply token.

    Candidates are allowed if their ablation changes harmless prompts by at most ``max_kl`` (mean KL
    in nats at the first reply token). Of the shortlisted ones, the candidate that leaves the lowest
    refusal score on harmful prompts is chosen. But of those that ran all prompts of the race, a
    candidate whose addition makes the model refuse harmless prompts is preferred to one without
    this effect: a candidate that only stops refusals may have broken something else. If no other
    candidate ends refusals, those of the deepest layers are tried.

    A low refusal score may say that more is removed than refusal. With ``answers`` the candidate
    with the lowest KL whose whole replies show next to no refusals is chosen instead, if the one
    with the lowest score ends refusals at a KL above `trimming.GENTLE`.

    Args:
        trial: tries edits.
        candidates: all candidates.
        scores: the scores of all candidates, from `selection.separation`.
        edit_for: makes the edit with which a candidate is tried.
        max_kl: limit of the mean KL on harmless prompts, in nats.
        deepest: whether the deepest layers are tried if no other candidate ends refusals.
        answers: whether next to no reply to harmful prompts under an edit is refused or broken.

    Raises:
        UserError: when no candidate stays under the limit.
    """
    tried: dict[tuple[int, int], Score] = {}
    induced: dict[tuple[int, int], float] = {}

    def induces(score: Score) -> bool:
        """Whether adding a candidate causes refusals; computed only when it matters."""
        at = score.layer, score.position
        if at not in induced:
            induced[at] = trial.of_adding(addition(candidates, score), INDUCED)
        return induced[at] > 0

    def possible(effect: Effect) -> bool:
        return effect.kl <= max_kl

    def hopeful(effect: Effect) -> bool:
        return possible(effect) and effect.refused <= trial.left

    def works(score: Score) -> bool:
        return score.outcome(trial.left).works

    answered: list[Runner[Score]] = []

    def gentlest(order: Sequence[Runner[Score]]) -> Runner[Score] | None:
        found = _gentlest(trial, order, max_kl, answers) if answers and order else None
        answered.extend([] if found is None else [found])
        return found

    def attempt(chosen: Sequence[Score]) -> list[Score]:
        runners = [Runner(score, edit_for(score)) for score in chosen]
        finished = race.run(
            trial,
            runners,
            lambda effect: rank(effect, max_kl, trial.left, trial.is_whole(effect)),
            possible,
            hopeful,
            lambda runner: hopeful(runner.effect) and induces(runner.of),
            "causal choice",
            gentlest,
        )
        for one in runners:
            tried[one.of.layer, one.of.position] = _tried(one, max_kl, trial.is_whole(one.effect))
        return [tried[one.of.layer, one.of.position] for one in finished]

    finished = attempt(shortlist(scores, MOST))
    if deepest and not any(map(works, finished)):
        deep = [replace(score, dropped="") for score in scores if score.dropped == TOO_DEEP]
        finished += attempt(shortlist(deep, MOST))
    left = sorted(
        (one for one in finished if not one.dropped), key=lambda one: _preference(one, trial.left)
    )
    if not left:
        raise _none_gentle(tried.values(), max_kl)
    ending = [one for one in left if works(one)]
    # Candidates that end refusals come first; of these, one whose addition also induces refusals.
    best = left[0] if answered else next(filter(induces, ending), left[0])
    for at, value in induced.items():
        tried[at] = replace(tried[at], induced=value)
    best = tried[best.layer, best.position]
    every = [tried.get((one.layer, one.position), one) for one in scores]
    return Choice(best, every, bool(answered))


def _gentlest(
    trial: Trial,
    order: Sequence[Runner[Score]],
    max_kl: float,
    answers: Callable[[WeightEdit], bool],
) -> Runner[Score] | None:
    """The edit with the lowest KL whose replies are answers, run on all prompts.

    The prompts of the heats are few, and the refused ones come first, so that one refusal more than
    counts as none is allowed there. Of the edits that end refusals on them, only those reply whose
    KL is lower than that of the one with the lowest refusal score.

    Args:
        trial: tries edits.
        order: the edits after the heats, those with the lowest refusal score first.
        max_kl, answers: as of `choose`.

    Returns:
        None where that one is gentle, or no gentler one ends refusals.
    """

    def near(effect: Effect) -> bool:
        return effect.kl <= max_kl and sum(effect.opened) <= trial.left * len(effect.opened) + 1

    leading = [one for one in order if near(one.effect)]
    if not leading or leading[0].effect.kl <= GENTLE:
        return None
    highest = leading[0].effect.kl

    def gentler(some: Sequence[Runner[Score]]) -> list[Runner[Score]]:
        fit = [one for one in some if near(one.effect) and one.effect.kl < highest]
        return sorted(fit, key=lambda one: one.effect.kl)

    several = gentler(leading)[:GENTLER]
    for one in several:
        one.effect = trial.of_edit(one.edit, one.effect, *race.HEATS[-1][:2])
    for one in gentler(several):
        if answers(one.edit):
            one.effect = trial.of_edit(one.edit, one.effect)
            if one.effect.kl <= max_kl and one.effect.refused <= trial.left:
                return one
    return None


def _preference(score: Score, most_left: float) -> tuple[bool, float]:
    """Sort key of candidates that were tried: first those that end refusals, then by score."""
    assert score.refusal is not None
    return not score.outcome(most_left).works, score.refusal


def _none_gentle(tried: Iterable[Score], max_kl: float) -> UserError:
    lowest = min((score.kl for score in tried if score.kl is not None), default=0.0)
    return UserError(
        f"every candidate direction moves harmless prompts by more than --max-kl {max_kl:g} "
        f"(the gentlest by {lowest:.3f}): raise --max-kl, or choose with --layer and "
        "--position."
    )


def _tried(runner: Runner[Score], max_kl: float, whole: bool) -> Score:
    effect, dropped = runner.effect, ""
    if not effect.kl <= max_kl:
        dropped = f"KL {effect.kl:.3f} over the limit of {max_kl:g}"
    elif not whole:
        dropped = OUTRUN
    return replace(
        runner.of,
        refusal=effect.refusal,
        refused=effect.refused,
        kl=effect.kl,
        prompts=effect.prompts,
        dropped=dropped,
    )


def addition(candidates: Candidates, score: Score) -> Intervention:
    """The intervention that adds a candidate's difference of means, in its length, at its layer."""
    return adding(candidates.difference(score.layer, score.position), score.layer)
