"""`--search N`: looks for the edit with the lowest KL that meets a target share of refusals.

There are two objectives to be minimized: the refusal score of harmful validation prompts, and the
KL on harmless ones, both at the first reply token. Edits are tried at runtime
(`steering.ablation`), so no weight is written. In the end the edits on the Pareto front generate
replies, which are judged as in the evaluation, so that an edit which only changes how refusals open
is recognised.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from abl_mlx.behaviour import kept_refusals
from abl_mlx.behaviour.refusals import Verdict
from abl_mlx.choices import Measuring
from abl_mlx.directions import measuring
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.selection import Told
from abl_mlx.directions.staying import Staying
from abl_mlx.directions.variants import KINDS
from abl_mlx.edits.edit import Edit
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import ByMode
from abl_mlx.models.writers import Writer
from abl_mlx.records.evaluations import Kept
from abl_mlx.search import polish
from abl_mlx.search.journal import Journal, identity, optuna_quietly
from abl_mlx.search.pareto import front, hypervolume, still
from abl_mlx.search.polish import LEAST_REFUSAL, logarithms, predicted
from abl_mlx.search.screening import REPLY_TOKENS, Screen, Trial
from abl_mlx.search.sources import ENOUGH_PROMPTS, SearchPrompts, at_prompts, sources_of
from abl_mlx.search.space import DEFAULT, Parameters, Space
from abl_mlx.search.survivors import MOST_ASKED, Asked, ask_survivors, choose, meets, table, unmet
from abl_mlx.support import interrupts
from abl_mlx.support.console import progress, say
from convert.base.errors import UsageError, UserError

#: The number of bisection steps that look for the weakest even strength.
HALVINGS = 4

#: The number of random neighbours of a trial, of which the most promising one is tried.
NEIGHBOURS = 64

#: A search ends when its front has not moved for this many trials, or for a third of all trials.
PATIENCE = 40


# --- the search ----------------------------------------------------------------------------------


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

    def run(self, most: int) -> None:
        """Try edits until there are ``most`` trials, or the front has stopped moving.

        Ctrl-C ends the search but not the command: the best trial so far is used.
        """
        patience = max(PATIENCE, most // 3)
        distributions = self.space.distributions()
        with progress(most, "search", "trial") as bar:
            bar.update(min(most, len(self.trials)))
            try:
                while len(self.trials) < most and not self._ends(patience):
                    interrupts.check()
                    trial = self._try(self._next())
                    record = self.journal.add(trial, distributions)
                    self._memory.add_trial(record)
                    self._count(trial)
                    bar.update()
                    bar.set_postfix_str(f"front {len(self.front())}", refresh=False)
            except KeyboardInterrupt:
                if not any(trial.screened.whole for trial in self.trials):
                    raise
                interrupts.forget()
                self.ended = "stopped by hand"
                kept = f"; {self.journal.path} keeps its trials" if self.journal.path else ""
                say(f"  search stopped: the front so far is used{kept}. Ctrl-C again ends all.")
                return
        self.ended = "all trials made" if len(self.trials) >= most else "the front stopped moving"

    def _ends(self, patience: int) -> bool:
        """Whether neither the front nor the lowest KL that is good enough has changed lately."""
        return still(self.volumes, patience) and still(self.gentlest, patience)

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
        """The parameters to try next: analytic edits first, then neighbours of the front and
        suggestions of Optuna's TPE sampler."""
        done = len(self.trials)
        if done < 2:
            return (self.space.uniform(), self.space.even(1.0))[done]
        # Bisection for the weakest even edit; the full one if even that leaves refusals.
        low, high = 0.0, 1.0
        for trial in self.trials[2 : 2 + HALVINGS]:
            middle = (low + high) / 2
            low, high = (low, middle) if self.enough(trial.screened.refused) else (middle, high)
        if done < 2 + HALVINGS:
            return self.space.even((low + high) / 2)
        analytic = self.space.analytic(high)
        if done < 2 + HALVINGS + len(analytic):
            return analytic[done - 2 - HALVINGS]
        random = np.random.default_rng([self.seed, done])
        # Of eight trials one explores and one starts from anywhere on the front. The others start
        # from trials that are good enough, every second one from that with the lowest KL.
        if done % 2 and (polished := self._polished(done // 2, random)):
            parameters = polished
        elif done % 8 == 0:
            parameters = self._sampled(done)
        elif done % 8 == 4:
            whole = self.front()
            parameters = self._expected(whole[int(random.integers(len(whole)))], random)
        else:
            promising = self._promising()
            place = int(len(promising) * random.random() ** 2)
            parameters = self._expected(promising[place], random)
        return parameters if self.space.changes_something(parameters) else self.space.uniform()

    def _polished(self, number: int, random: np.random.Generator) -> dict[str, Any] | None:
        """A small step from the trial with the lowest KL that leaves hardly any refusals.

        At times it starts from a trial with other choices among the parameters.
        """
        parent = self._promising()[0]
        if number % 4 == 3:
            best: dict[tuple[Any, ...], Trial] = {}
            for trial in sorted(self.trials, key=lambda one: one.screened.kl):
                if trial.screened.whole and self.enough(trial.screened.refused):
                    best.setdefault(self.space.kind(trial.parameters), trial)
            others = [one for one in best.values() if one is not parent][:3]
            if others:
                parent = others[number // 4 % len(others)]
        return polish.step(self.space, self.trials, parent, number, random)

    def _expected(self, parent: Trial, random: np.random.Generator) -> dict[str, Any]:
        """Of random neighbours of a trial, the one with the best prediction.

        That is the lowest KL with a refusal score not above the parent's. Both are predicted by
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
        allowed = math.log(max(parent.screened.refusal, LEAST_REFUSAL))
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
) -> DirectionFile:
    """Search with at most ``--search`` trials; return a direction file with the best edit.

    Args:
        chat: the model.
        writers: its residual writers.
        prompts: in every mode of thinking.
        found: the analytic choice, which is the first trial.
        how: the chosen options.
        encoded: the prompts on which edits are screened; by default the ends of ``prompts``.
        told: what whole replies tell of the tokens that open refusals.

    Raises:
        UserError: when flags do not go together, or the journal is of another search.
    """
    trials = how.searching.search
    assert trials is not None
    check(how)
    first = next(iter(prompts.values()))
    encoded = encoded or at_prompts(first)
    harmful = encoded.harmful
    space = Space(
        len(chat.layers), sources_of(chat, encoded, found, how), embedding=how.editing.embedding,
        profile=found.metadata.get("recipe", {}).get("profile"),
    )  # fmt: skip
    staying = encoded.staying
    screen = Screen(
        chat, writers, harmful, encoded.harmless, batch_size=how.batch_size, staying=staying,
        told=told,
    )  # fmt: skip

    def edit_for(given: Parameters) -> Edit:
        recipe = space.recipe(given)
        # Edits are tried at strength 1; --strength scales the result. Norms can be kept in weights
        # only; the evaluation shows the effect of that.
        directions, layers = space.directions(given), how.editing.layers
        return Edit(directions, 1.0, layers, recipe["embedding"], recipe["profile"])

    journal = Journal(how.searching.search_journal, identity(chat, first, space, how))
    questions = _questions(prompts, how.prompting.thought_tokens)
    generated_most = sum(len(asked) * most for asked, most in questions)
    target = how.searching.target_refusals
    search = Search(
        screen,
        space,
        edit_for,
        journal,
        lambda share: meets(share, len(harmful), target),
        how.finding.max_kl,
        how.prompting.seed,
    )
    resumed = len(search.trials)
    more = max(0, trials - resumed)
    say(
        f"  search: at most {more} trials, {more * screen.cost:,} forward tokens, then at most "
        f"{min(MOST_ASKED, trials) * generated_most:,} generated ones"
        + (f"; {resumed} trials are in {journal.path}" if resumed else "")
    )
    try:
        search.run(trials)
    finally:
        journal.close()
    asked, generated = _ask_front(search, questions, target, staying)
    chosen = choose(asked)
    say(table(asked, chosen, space))
    if not chosen.meets:
        say(f"  {unmet(chosen, target)}")
    return _file(found, search, space, asked, chosen, generated, target)


def _questions(prompts: ByMode, thought_tokens: int) -> list[tuple[Sequence[Prompt], int]]:
    """Harmful prompts and the longest reply to them in tokens, for each mode of thinking."""
    return [
        (
            sets.filled_up("harmful", ENOUGH_PROMPTS).prompts,
            REPLY_TOKENS if mode is None else REPLY_TOKENS + thought_tokens,
        )
        for mode, sets in prompts.items()
    ]


def _ask_front(
    search: Search,
    questions: Sequence[tuple[Sequence[Prompt], int]],
    target: float,
    staying: Staying | None = None,
) -> tuple[list[Asked], int]:
    """Let trials on the Pareto front generate replies.

    Args:
        search: the search.
        questions: as of `_questions`. The mode with more refused and broken replies counts.
        target: the share of refused and broken replies that is good enough.
        staying: prompts whose refusals are to stay.

    Returns:
        The trials with the verdicts on their replies, and the number of generated tokens.
    """
    generated = 0

    def ask(trial: Trial) -> Asked:
        nonlocal generated
        edit = search.edit_for(trial.parameters)
        replied = [search.screen.ask(edit, prompts, most) for prompts, most in questions]
        generated += sum(tokens for _, _, tokens in replied)
        refused, broken, _ = max(replied, key=lambda one: one[0] + one[1])
        ends = meets(refused + broken, len(questions[0][0]), target)
        kept: dict[str, Kept] = {}
        for name, prompts in ({} if staying is None else staying.prompts).items():
            verdicts, tokens = search.screen.verdicts(edit, prompts)
            generated += tokens
            still = [one is Verdict.REFUSAL for one in verdicts]
            kept[name] = kept_refusals.kept([True] * len(still), still)
        enough = all(one.enough for one in kept.values())
        return Asked(trial, refused, broken, ends and enough, ends, kept)

    whole = search.front()
    some = [one for one in whole if one.screened.refused < 0.95] or whole[-1:]
    asked = ask_survivors(some, ask)
    first = search.trials[0]
    if staying is not None and all(one.trial is not first for one in asked):
        # The edit that was chosen before the search has shown what it keeps by whole replies.
        asked.append(ask(first))
    return sorted(asked, key=lambda one: one.trial.screened.kl), generated


def check(how: Measuring) -> None:
    """Check, before any long work, that a search is possible with the chosen flags.

    Raises:
        UserError: naming a flag that does not go with a search, or when Optuna is not installed.
    """
    optuna_quietly()
    if how.editing.pin is not None:
        raise UserError("--search and --pin do not go together: leave one of them out.")
    for flag, value, usual in (
        ("--kind", how.editing.kind, "project"), ("--edit", how.editing.edit, "writers"),
        ("--heads", how.editing.heads, None), ("--experts", how.editing.experts, None),
    ):  # fmt: skip
        if value != usual:
            raise UsageError(
                f"--search and {flag} {value} do not go together: leave one of them out."
            )
    if how.finding.layer is not None:
        raise UserError("--search looks for the layer itself: leave --layer out.")


def _file(
    found: DirectionFile,
    search: Search,
    space: Space,
    asked: Sequence[Asked],
    chosen: Asked,
    generated: int,
    target: float,
) -> DirectionFile:
    """The direction file with the chosen edit, and with all that was tried.

    Args:
        found: the choice before the search.
        search: the search.
        space: the parameters of edits.
        asked: the trials that generated replies.
        chosen: the one of them that was chosen.
        generated: the number of generated tokens.
        target: the share of refused and broken replies that is small enough.
    """
    parameters, screened = chosen.trial.parameters, chosen.trial.screened
    selected = space.directions(parameters)
    default = next(trial for trial in search.trials if trial.screened.whole)
    summary = _summary(found, parameters, int(selected.shape[-2])) | {
        "chosen_by": "search: lowest KL of those whose replies meet the target"
        if chosen.meets
        else "search: fewest refusals among the replies",
        "search": {
            "trials": len(search.trials),
            "ended": search.ended,
            "target_refusals": target,
            "refusal_rate": chosen.refused,
            "broken_rate": chosen.broken,
            "refusal_score": screened.refusal,
            "kl": screened.kl,
            "kl_default": default.screened.kl,
            "refusal_score_default": default.screened.refusal,
            "hypervolume": search.volumes[-1],
            "forward_tokens": sum(trial.screened.tokens for trial in search.trials),
            "generated_tokens": generated,
        },
    }
    if chosen.kept:
        summary["kept"] = {name: one.json for name, one in chosen.kept.items()}
        for name, kept in chosen.kept.items():
            say(f"  {'' if kept.enough else 'warning: '}{kept_refusals.sentence(name, kept)}")
    metadata = {key: value for key, value in found.metadata.items() if key != "pins"}
    metadata |= {
        "method": summary["method"],
        "summary": summary,
        "recipe": space.recipe(parameters),
        "search": {
            "front": [one.record() for one in asked],
            "trials": [trial.record() for trial in search.trials],
        },
    }
    return replace(found, selected=selected, metadata=metadata)


def _summary(found: DirectionFile, parameters: Parameters, rank: int) -> dict[str, Any]:
    """Where the directions of an edit come from, as in `records.directions.Selection`.

    Args:
        found: the choice before the search.
        parameters: of the edit.
        rank: the number of its directions.
    """
    before, name = found.metadata.get("summary", {}), parameters["method"]
    if name == DEFAULT:
        return dict(before)
    summary: dict[str, Any] = {"method": name}
    if name in KINDS:
        assert found.candidates is not None
        summary |= {"method": found.candidates.method, "orthogonal_to": name}
    if rank > 1:
        summary["rank"] = rank
    if "position" in before:
        summary["position"] = before["position"]
    if name.startswith("layers-rank"):
        return summary | {"method": measuring.METHOD, "across": "layers"}
    if parameters["per_layer"]:
        return summary | {"per_layer": True}
    return summary | {"layer": round(parameters["index"], 3)}


# --- messages ------------------------------------------------------------------------------------
