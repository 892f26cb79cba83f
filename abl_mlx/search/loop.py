"""`--search N`: looks for the edit with the lowest KL that meets a target share of refusals.

There are two objectives to be minimized: the refusal score of harmful validation prompts, and the
KL on harmless ones, both at the first reply token. Edits are tried at runtime
(`steering.ablation`), so no weight is written. In the end the edits on the Pareto front generate
replies, which are judged as in the evaluation, so that an edit which only changes how refusals open
is recognised.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from abl_mlx.behaviour.scorers import scorer
from abl_mlx.choices import Measuring
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.selection import Told
from abl_mlx.edits.edit import Edit
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import ByMode
from abl_mlx.models.writers import Writer
from abl_mlx.search import behaviours, outcome, polish, starts
from abl_mlx.search.behaviours import Behaviours, FigureScreen
from abl_mlx.search.front_replies import FrontReplies, further_of, questions_of
from abl_mlx.search.journal import Journal, identity, optuna_quietly
from abl_mlx.search.pareto import front, hypervolume, still
from abl_mlx.search.polish import LEAST_REFUSAL, logarithms, predicted
from abl_mlx.search.screening import Screen, Trial
from abl_mlx.search.sources import SearchPrompts, at_prompts, sources_of
from abl_mlx.search.space import Parameters, Space
from abl_mlx.search.survivors import MOST_ASKED, choose, meets, table, unmet
from abl_mlx.support import interrupts, ranks
from abl_mlx.support.console import progress, say
from abl_mlx.support.flags import first_given, not_together
from convert.base.errors import UsageError, UserError

#: The number of bisection steps that look for the weakest even strength.
HALVINGS = 4

#: The number of random neighbours of a trial, of which the most promising one is tried.
NEIGHBOURS = 64

#: A search ends when its front has not moved for this many trials, or for a third of all trials.
PATIENCE = 40


# --- the search ----------------------------------------------------------------------------------

#: Looks at a search that runs, between two trials.
Seen = Callable[["Search"], None]


@dataclass
class Search:
    """A search that runs trial by trial; each trial depends only on the earlier ones.

    Attributes:
        screen: scores edits.
        space: the parameters of edits.
        edit_for: makes the edit with some parameters.
        journal: keeps the trials.
        enough: whether a share of replies opening with a refusal is small enough.
        seed: the seed of random choices.
        starts: the parameters of edits to try right after the default one.
        default: the default edit, if it was scored already.
        clock: the time in seconds since some moment.
        seen: is called before the first trial and after each one.
        trials: the trials so far.
        volumes: the front's hypervolume after each trial.
        gentlest: after each trial, 1 minus the logarithm of the lowest KL of a trial that is good
            enough, as a share of the logarithm's range.
        ended: why the search ended.
    """

    screen: Screen
    space: Space
    edit_for: Callable[[Parameters], Edit]
    journal: Journal
    enough: Callable[[float], bool]
    max_kl: float = 0.1
    seed: int = 0
    starts: Sequence[Parameters] = ()
    default: Trial | None = None
    clock: Callable[[], float] = time.monotonic
    seen: Seen = field(default=lambda search: None)
    trials: list[Trial] = field(default_factory=list)
    volumes: list[float] = field(default_factory=list)
    gentlest: list[float] = field(default_factory=list)
    ended: str = ""

    def __post_init__(self) -> None:
        optuna = optuna_quietly()
        self._memory = optuna.create_study(directions=["minimize", "minimize"])
        for record, trial in self.journal.trials(self.space.distributions()):
            self._memory.add_trial(record)
            self._count(trial)

    def run(self, most: int | None, minutes: float | None = None) -> None:
        """Try edits until a limit is reached or the front has stopped moving.

        Ctrl-C ends the search but not the command: the best trial so far is used.

        Args:
            most: the largest number of trials, with those of the journal; None for no limit.
            minutes: the time after which no further trial begins; None for no limit. There is
                always one trial.
        """
        distributions = self.space.distributions()
        end = math.inf if minutes is None else self.clock() + 60 * minutes
        with progress(most, "search", "trial") as bar:
            bar.update(len(self.trials) if most is None else min(most, len(self.trials)))
            self.seen(self)
            try:
                # Another rank may have come to the end of its time already.
                while not (ended := ranks.first("the search", self._ended(most, end))):
                    interrupts.check()
                    trial = self._try(self._next())
                    record = self.journal.add(trial, distributions)
                    self._memory.add_trial(record)
                    self._count(trial)
                    bar.update()
                    bar.set_postfix_str(f"front {len(self.front())}", refresh=False)
                    self.seen(self)
            except KeyboardInterrupt:
                if not any(trial.screened.whole for trial in self.trials):
                    raise
                interrupts.forget()
                self.ended = "stopped by hand"
                kept = f"; {self.journal.path} keeps its trials" if self.journal.path else ""
                say(f"  search stopped: the front so far is used{kept}. Ctrl-C again ends all.")
                return
        self.ended = ended

    def _ended(self, most: int | None, end: float) -> str:
        """Why the search ends now; empty if it goes on.

        The front has stopped moving if neither it nor the lowest KL that is good enough has changed
        lately.
        """
        done = len(self.trials)
        if most is not None and done >= most:
            return "all trials made"
        patience = max(PATIENCE, (done if most is None else most) // 3)
        if still(self.volumes, patience) and still(self.gentlest, patience):
            return "the front stopped moving"
        return "the time was up" if done and self.clock() >= end else ""

    def front(self) -> list[Trial]:
        """The trials on the Pareto front, by rising KL; trials that ended early are left out."""
        whole = [trial for trial in self.trials if trial.screened.whole]
        points = [(trial.screened.kl, trial.screened.refusal) for trial in whole]
        return [whole[number] for number in front(points)]

    def _count(self, trial: Trial) -> None:
        self.trials.append(trial)
        points = [one.point(self.screen.before) for one in self.front()]
        self.volumes.append(hypervolume(points))
        good = [one for one in self.front() if self.enough(one.screened.refused)]
        # A quantity that grows, and in which a change of the KL by some percent is 0.001.
        self.gentlest.append(1 - good[0].point(self.screen.before)[1] if good else 0.5)

    def _next(self) -> dict[str, Any]:
        """The parameters to try next: given and analytic edits first, then neighbours of the front
        and suggestions of Optuna's TPE sampler."""
        done = len(self.trials)
        first = [self.space.uniform(), *map(dict, self.starts), self.space.even(1.0)]
        if done < len(first):
            return first[done]
        kin = self._kin(self.trials[: len(first)])
        # Bisection for the weakest even edit; the full one if even that leaves refusals.
        low, high, bisected = 0.0, 1.0, len(first) + HALVINGS
        for trial in self.trials[len(first) : bisected]:
            middle = (low + high) / 2
            low, high = (low, middle) if self.enough(trial.screened.refused) else (middle, high)
        if done < bisected:
            return self.space.even((low + high) / 2, **kin)
        analytic = self.space.analytic(high, **kin)
        if done < bisected + len(analytic):
            return analytic[done - bisected]
        random = np.random.default_rng([self.seed, done])
        # Of eight trials one explores, and two look where the front has its large steps. The others
        # start from trials that are good enough, most of them from that with the lowest KL.
        if done % 2 and (polished := self._polished(done // 2, random)):
            parameters = polished
        elif done % 8 == 0:
            parameters = self._sampled(done)
        elif done % 8 == 4:
            parameters = self._expected(*self._between(random), random)
        else:
            promising = self._promising()
            parent = promising[int(len(promising) * random.random() ** 2)]
            parameters = self._expected(parent, parent.screened.refusal, random)
        if not self.space.changes_something(parameters):
            parameters = self.space.uniform()
        # At the edge of its ranges a good edit would be tried again and again.
        for _ in range(NEIGHBOURS):
            if all(parameters != one.parameters for one in self.trials):
                break
            parameters = self.space.neighbour(parameters, random)
        return parameters

    def _kin(self, first: Sequence[Trial]) -> dict[str, Any]:
        """The direction of the first trial that is good enough at the lowest KL, as parameters."""
        good = [one for one in first if one.screened.whole and self.enough(one.screened.refused)]
        best = min(good, key=lambda one: one.screened.kl).parameters if good else {}
        return {name: best[name] for name in ("method", "index", "per_layer") if good}

    def _polished(self, number: int, random: np.random.Generator) -> dict[str, Any] | None:
        """A small step from the trial with the lowest KL that leaves hardly any refusals.

        At times it starts from a trial with other choices among the parameters, or leads into a
        large step of the front.
        """
        parent, turn = self._promising()[0], number % 4
        aim = parent.screened.refusal * (1.0, 0.5, 1.0, 0.25)[turn]
        if turn == 2:
            parent, aim = self._between(random)
        if turn == 3:
            best: dict[tuple[Any, ...], Trial] = {}
            for trial in sorted(self.trials, key=lambda one: one.screened.kl):
                if trial.screened.whole and self.enough(trial.screened.refused):
                    best.setdefault(self.space.kind(trial.parameters), trial)
            others = [one for one in best.values() if one is not parent][:3]
            if others:
                parent = others[number // 4 % len(others)]
                aim = parent.screened.refusal * 0.25
        return polish.step(self.space, self.trials, parent, aim, number, random)

    def _between(self, random: np.random.Generator) -> tuple[Trial, float]:
        """The lower end of a step of the front, and the refusal score in the middle of that step.

        The front is that of KL and refused shares, and begins with the unedited model. A step is
        drawn with the probability of its height, so that all refused shares are looked at alike.
        """
        whole = [trial for trial in self.trials if trial.screened.whole]
        points = [(trial.screened.kl, trial.screened.refused) for trial in whole]
        ends = [whole[place] for place in front(points) if points[place][1] < 1]
        if not ends:
            parent = self._promising()[0]
            return parent, parent.screened.refusal
        heights = -np.diff([1.0, *(one.screened.refused for one in ends)])
        place = int(random.choice(len(ends), p=heights / heights.sum()))
        scores = [self.screen.before, *(one.screened.refusal for one in ends)]
        return ends[place], math.sqrt(scores[place] * scores[place + 1])

    def _expected(self, parent: Trial, aim: float, random: np.random.Generator) -> dict[str, Any]:
        """Of random neighbours of a trial, the one with the best prediction.

        That is the lowest KL with a refusal score not above ``aim``. Both are predicted by
        regression from the trials with the same choices among the parameters.
        """
        neighbours = [self.space.neighbour(parent.parameters, random) for _ in range(NEIGHBOURS)]
        first = neighbours[0]
        kind = self.space.kind(first)
        known = [trial for trial in self.trials if self.space.kind(trial.parameters) == kind]
        neighbours = [one for one in neighbours if self.space.kind(one) == kind]
        if len(known) < 6:
            return first
        places = np.array([self.space.place(trial.parameters) for trial in known])
        values = logarithms(known)
        asked = np.array([self.space.place(one) for one in neighbours])
        # Predictions are lowered by one standard deviation, which favours unexplored edits.
        expected, doubt = predicted(places, values, asked)
        kl, refusal = (expected - doubt).T
        allowed = math.log(max(aim, LEAST_REFUSAL))
        # Too high a refusal score is penalized five times as much as a higher KL (in logarithms).
        return neighbours[int(np.argmin(kl + 5 * np.maximum(refusal - allowed, 0)))]

    def _promising(self) -> list[Trial]:
        """Trials of the front with hardly any replies opening with a refusal, lowest KL first."""
        found = self.front()
        for enough in (self.enough, lambda share: share <= 0.1, lambda share: share <= 0.5):
            few = [one for one in found if enough(one.screened.refused)]
            if few and few[0].screened.kl <= self.max_kl:
                return few
        return found[::-1]

    def _sampled(self, done: int) -> dict[str, Any]:
        optuna = optuna_quietly()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate is marked experimental
            # Each trial has a new sampler, so that a resumed search continues as one that was never
            # stopped.
            self._memory.sampler = optuna.samplers.TPESampler(
                seed=int(np.random.default_rng([self.seed, done]).integers(2**31)),
                multivariate=True,
                n_startup_trials=0,
            )
            sampled = self._memory.ask(self.space.distributions())
            self._memory.tell(sampled, state=optuna.trial.TrialState.FAIL)
        return dict(sampled.params)

    def _try(self, parameters: dict[str, Any]) -> Trial:
        if self.default is not None and parameters == self.default.parameters:
            return self.default
        ahead = self.front()

        def hopeless(early: tuple[float, float]) -> bool:
            refusal, kl = early
            return any(
                refusal > 1.5 * one.screened.early[0] + 0.1 and kl > 2 * one.screened.early[1]
                for one in ahead
            )

        return Trial(parameters, self.screen.score(self.edit_for(parameters), hopeless))


# --- as a part of run and measure ----------------------------------------------------------------


def improve(
    chat: ChatModel,
    writers: Sequence[Writer],
    prompts: ByMode,
    found: DirectionFile,
    how: Measuring,
    encoded: SearchPrompts | None = None,
    told: Told | None = None,
    seen: Seen | None = None,
) -> DirectionFile:
    """Search within ``--search`` trials and ``--minutes``; return a file with the best edit.

    Args:
        chat: the model.
        writers: its residual writers.
        prompts: in every mode of thinking.
        found: the analytic choice, which is the first trial.
        how: the chosen options.
        encoded: the prompts on which edits are screened; by default the ends of ``prompts``.
        told: what whole replies tell of the tokens that open refusals.
        seen: as of `Search`.

    Raises:
        UserError: when flags do not go together, or the journal is of another search.
    """
    trials, minutes, file = how.searching.search, how.searching.minutes, how.searching.warm_start
    check(how, len(chat.layers))
    first = next(iter(prompts.values()))
    encoded = encoded or at_prompts(first)
    space = Space(
        len(chat.layers), sources_of(chat, encoded, found, how), embedding=how.editing.embedding,
        profile=found.metadata.get("recipe", {}).get("profile"),
    )  # fmt: skip
    screen = _screen(chat, writers, encoded, how, told)

    def edit_for(parameters: Parameters) -> Edit:
        recipe = space.recipe(parameters)
        # Edits are tried at strength 1; --strength scales the result. Norms can be kept in weights
        # only; the evaluation shows the effect of that.
        directions, layers = space.directions(parameters), how.editing.layers
        return Edit(directions, 1.0, layers, recipe["embedding"], recipe["profile"])

    given = [] if file is None else [starts.read(file, len(chat.layers)).parameters(space)]
    replies = _replies(chat, writers, screen, edit_for, prompts, encoded, how)
    default = Trial(space.uniform(), screen.score(edit_for(space.uniform())))
    if misled := replies.misled(default):
        given += starts.beside(found, space)
    journal = Journal(how.searching.search_journal, identity(chat, first, space, how, given))
    tried: list[Trial] = []

    def enough(share: float) -> bool:
        if replies.target_figure is not None:
            return share * screen.before <= replies.target_figure
        as_default = misled and bool(tried) and share <= tried[0].screened.refused
        return as_default or meets(share, len(encoded.harmful), replies.target)

    search = Search(
        screen, space, edit_for, journal, enough, how.finding.max_kl, how.prompting.seed, given,
        default=None if misled else default, trials=tried,
    )  # fmt: skip
    search.seen = seen or search.seen
    say(_announced(search, trials, minutes, replies.longest))
    try:
        search.run(trials, minutes)
    finally:
        journal.close()
    asked = replies.of(search.trials, search.trials[0], enough)
    chosen = choose(asked)
    say(table(asked, chosen, space, how.scoring.search_for))
    if not chosen.meets:
        say(f"  {unmet(chosen, replies.aimed_at)}")
    figures = {
        **({} if minutes is None else {"minutes": minutes}),
        **({} if file is None else {"started_from": file.name}),
        "ended": search.ended,
        **replies.told_of(chosen),
        "hypervolume": search.volumes[-1],
        "generated_tokens": replies.generated,
    }
    return outcome.file_of(found, search.trials, space, asked, chosen, figures)


def _screen(
    chat: ChatModel,
    writers: Sequence[Writer],
    encoded: SearchPrompts,
    how: Measuring,
    told: Told | None,
) -> Screen:
    """What scores edits: refusal openings, or the scorer of ``--search-for``."""
    if (aim := scorer.aim_of(how.scoring)) is not None:
        return FigureScreen(chat, writers, encoded.harmless, aim, batch_size=how.batch_size)
    return Screen(
        chat, writers, encoded.harmful, encoded.harmless, batch_size=how.batch_size,
        staying=encoded.staying, told=told,
    )  # fmt: skip


def _replies(
    chat: ChatModel,
    writers: Sequence[Writer],
    screen: Screen,
    edit_for: Callable[[Parameters], Edit],
    prompts: ByMode,
    encoded: SearchPrompts,
    how: Measuring,
) -> FrontReplies:
    """What lets edits of the front reply."""
    scoring, sought = how.scoring, isinstance(screen, FigureScreen)
    target = screen.before / 2 if scoring.target_figure is None else scoring.target_figure
    asked, further = (
        [] if sought else of(prompts, how.prompting.thought_tokens)
        for of in (questions_of, further_of)
    )
    others = None
    if scoring.scorer is not None:
        others = Behaviours(chat, writers, scoring, how.batch_size)
    return FrontReplies(
        screen, edit_for, asked, how.searching.target_refusals, target if sought else None,
        encoded.staying, others, further,
    )  # fmt: skip


def _announced(search: Search, most: int | None, minutes: float | None, generated: int) -> str:
    """What a search will take at most.

    Args:
        search: the search, with the trials of its journal.
        most, minutes: as of `Search.run`.
        generated: the number of tokens that a trial on the front generates.
    """
    resumed, limits = len(search.trials), []
    if most is not None:
        more = max(0, most - resumed)
        limits.append(f"{more} trials, {more * search.screen.cost:,} forward tokens")
    if minutes is not None:
        limits.append(f"{minutes:g} minutes of trials")
    asked = MOST_ASKED if most is None else min(MOST_ASKED, most)
    kept = f"; {resumed} trials are in {search.journal.path}" if resumed else ""
    return (
        f"  search: at most {', or '.join(limits)}{' (whichever ends first)' * (len(limits) > 1)}, "
        f"then at most {asked * generated:,} generated tokens{kept}"
    )


def check(how: Measuring, layers: int) -> None:
    """Check, before any long work, that a search is possible with the chosen flags.

    Args:
        how: the chosen options.
        layers: L, the number of the model's layers.

    Raises:
        UserError: naming a flag that does not go with a search, or a file of ``--from`` without
            parameters for this model, or when Optuna is not installed.
    """
    optuna_quietly()
    behaviours.check(how)
    if how.searching.warm_start is not None:
        starts.read(how.searching.warm_start, layers)
    if how.editing.pin is not None:
        raise UserError(not_together("--search", "--pin"))
    editing = how.editing
    flag = first_given((
        (f"--kind {editing.kind}", editing.kind != "project"),
        (f"--edit {editing.edit}", editing.edit != "writers"),
        (f"--heads {editing.heads}", editing.heads),
        (f"--experts {editing.experts}", editing.experts),
    ))  # fmt: skip
    if flag is not None:
        raise UsageError(not_together("--search", flag))
    if how.finding.layer is not None:
        raise UserError("--search looks for the layer itself: leave --layer out.")
