"""`--method rome`: chooses how the MLPs of a model are changed, by what the changes do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from abl_mlx.choices import Measuring
from abl_mlx.commands import edit_choice, short_replies
from abl_mlx.commands.candidate_choice import Finder
from abl_mlx.commands.layer_strengths import BY_LEARNING
from abl_mlx.directions import choice, race, selection
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.learning import learned
from abl_mlx.directions.race import Runner
from abl_mlx.directions.rome import NULL_SPACE, Form, KeyPass
from abl_mlx.directions.selection import LEFT
from abl_mlx.directions.trial import Effect
from abl_mlx.directions.variants import SAME_KL, Variant
from abl_mlx.edits.update import Update
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.inputs import thinking
from abl_mlx.records.directions import TriedUpdate
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.console import say
from abl_mlx.support.flags import first_given, not_together
from convert.base.errors import UsageError, UserError

#: Prompts of each set whose inputs of MLPs are keys, or are kept.
KEY_PROMPTS = 128

# How far values of the first forms reach, and how the other forms differ from the best of these.
_REACHES = (1.0, 2.0)
_OTHERS: tuple[dict[str, Any], ...] = ({"reach": 3.0}, {"keep": 10.0}, {"form": NULL_SPACE})


def check(how: Measuring) -> None:
    """Check that no flag is given that has no meaning for changes of MLPs.

    Raises:
        UsageError: naming it.
    """
    finding, prompting, searching = how.finding, how.prompting, how.searching
    edit_choice.update_of({}, how.editing)
    flag = first_given((
        ("--rank", finding.rank), ("--across", finding.across), ("--per-layer", finding.per_layer),
        ("--layer", finding.layer), ("--position", finding.position), ("--sae", finding.sae),
        ("--search", searching.searches), ("--keep", prompting.keep),
        ("--keep-system", prompting.keep_system),
        ("--thinking", None if prompting.thinking == thinking.OFF else prompting.thinking),
    ))  # fmt: skip
    if flag is not None:
        raise UsageError(not_together("--method rome", flag))


#: The largest number of validation prompts whose replies are read.
_REPLIES = 48


@dataclass(frozen=True)
class Tuned:
    """Strengths of each layer for the chosen form.

    Attributes:
        edit: the change with these strengths.
        effect: its effect on all validation prompts.
    """

    edit: Update
    effect: Effect

    def strength_of(self, layer: int, plain: WeightEdit) -> float:
        """The strength of a layer beside the change with strength 1 everywhere."""
        assert isinstance(plain, Update)
        if (scaled := self.edit.factors.get(layer)) is None:
            return 0.0
        left = plain.factors[layer].left
        return float((scaled.left * left).sum() / (left * left).sum())


class RomeFinder(Finder):
    """Chooses among changes of MLPs made from the measured directions of all layers."""

    _judged: dict[Form, float]

    def file(self, *, causal: bool = True, trimming: bool = False) -> DirectionFile:
        """The direction file with the chosen changes.

        The window of layers and the reach of the values are chosen first. Unless that ends
        refusals at next to no KL, a longer reach, another weight of what is kept and the null space
        are tried. Each form costs one pass over the keys' prompts and its share of a race
        (`abl_mlx.directions.race`). There are at most 9 forms. With ``--learn-strengths`` the
        changes of the chosen form then get a strength for each layer.

        Args:
            causal: whether replies show refusals, which the choice needs.
            trimming: of no use here: strengths of each layer by a few steps are no better.

        Raises:
            UserError: when no form stays under the limit of KL, or replies show no refusals.
        """
        if not causal:
            raise UserError(
                "--method rome chooses by what ends refusals, and completions of this model show "
                "none: choose another method."
            )
        self._judged = {}
        done = self._chosen_first()
        best, limit = done[0], self._how.finding.max_kl
        if not best.effect.kl <= limit:
            raise UserError(
                f"every change of MLPs moves harmless prompts by more than --max-kl {limit:g} "
                f"(the gentlest by {best.effect.kl:.3f}): raise --max-kl, or choose another method."
            )
        tuned = self._tuned(best)
        assert isinstance(best.edit, Update)
        edit, effect = (best.edit, best.effect) if tuned is None else (tuned.edit, tuned.effect)
        by = "changes of MLPs, by first tokens and a few replies to validation prompts"
        self._notes.update(
            chosen_by=by if tuned is None else f"{by}; {BY_LEARNING}",
            **self._first_tokens(effect.refusal, effect.refused, effect.kl),
            update=self._record(best, tuned).json,
            **({} if tuned is None else {"uniform_kl": best.effect.kl}),
        )
        say(
            f"  layers {best.of.first} to {best.of.last} are changed: {effect.refused:.0%} of the "
            f"harmful prompts still open as refusals, KL {effect.kl:.4f}"
        )
        file = self._file(self._variant_of(best.of))
        updates = [self._record(best, tuned).json, *(self._record(one).json for one in done[1:])]
        metadata = {**file.metadata, "method": "rome", "updates": updates}
        return replace(file, metadata=metadata, updates=edit.factors)

    def _chosen_first(self) -> list[Runner[Form]]:
        """What ran all validation prompts, the chosen form first."""
        candidates = self._candidates
        keys = KeyPass(
            self._chat,
            self._writers,
            self._train["harmful"][:KEY_PROMPTS],
            self._train["harmless"][:KEY_PROMPTS],
            candidates.positions,
        )
        harmless = numpy_of(candidates.harmless_mean)
        directions = numpy_of(candidates.leads[:, -1])

        def made(forms: Sequence[Form]) -> list[Runner[Form]]:
            return [
                Runner(form, Update(keys.updates(form, directions, harmless))) for form in forms
            ]

        first = made([Form(*run, reach=reach) for run in self._windows() for reach in _REACHES])
        done = self._raced(first, "changes of MLPs")
        best, refusing = self._best(done)
        if refusing > LEFT:
            # To make a form costs more than to try it, so those that were outrun are tried first.
            for one in first:
                one.effect = self._trial.of_edit(one.edit, one.effect)
            done = sorted(first, key=self._order)
            best, refusing = self._best(done)
        if refusing > LEFT or best.effect.kl > SAME_KL:
            others = made([replace(best.of, **other) for other in _OTHERS])
            more = self._raced(others, "other changes of MLPs")
            done = sorted([*done, *more], key=self._order)
            best, refusing = self._best(done)
        self._trial.tokens += keys.tokens
        return [best, *(one for one in done if one is not best)]

    def _variant_of(self, form: Form) -> Variant:
        """What stands for the changes in records: the direction after the last of the layers."""
        variant = self._variant(float(form.last), self._candidates.positions[-1])
        return replace(variant, method="rome")

    def _tuned(self, best: Runner[Form]) -> Tuned | None:
        """What ``--learn-strengths`` finds, if it is better than strength 1 everywhere.

        It must leave no more of the few replies refused or broken.
        """
        steps = self._how.searching.learn_strengths
        if steps is None:
            return None
        assert isinstance(best.edit, Update)
        found = learned(self._trial, best.edit, len(self._chat.layers), steps, best.effect)
        if found is None:
            return None
        before, after = self._refusing(best.of, best.edit), self._wrong(found.edit)
        if after > max(before, LEFT):
            say(f"  with these strengths {after:.0%} of replies refuse or break: they stay 1")
            return None
        assert isinstance(found.edit, Update)
        return Tuned(found.edit, found.effect)

    def _windows(self) -> list[tuple[int, int]]:
        """The runs of layers that are tried: where the sets are apart, half of that, and all.

        All begin in the first half: what the last layers change, the reply's later tokens do not
        see, so that a refusal would go on.
        """
        count = self._candidates.n_layers
        last = self._candidates.positions[-1]
        here = [score for score in self._scores if score.position == last]
        apart = selection.apart(here) or tuple(range(count))
        first, deep = min(*apart, count // 2), max(apart)
        found = [(first, deep), (first, (first + deep) // 2), (0, count - 1)]
        return list(dict.fromkeys(found))

    def _raced(self, runners: Sequence[Runner[Form]], label: str) -> list[Runner[Form]]:
        trial, limit = self._trial, self._how.finding.max_kl
        return race.run(
            trial,
            runners,
            lambda effect: choice.gentle(effect, limit, trial.left, trial.is_whole(effect)),
            lambda effect: effect.kl <= limit,
            lambda effect: effect.kl <= limit and effect.refused <= trial.left,
            lambda runner: False,
            label,
        )

    def _order(self, runner: Runner[Form]) -> tuple[bool, bool, float]:
        return choice.gentle(runner.effect, self._how.finding.max_kl, self._trial.left)

    def _ends_refusals(self, effect: Effect) -> bool:
        """Whether an effect is good, with a refusal score nearer to that of harmless prompts."""
        trial, half = self._trial, sum(self._trial.refusal_before) / 2
        good = effect.kl <= self._how.finding.max_kl and effect.refused <= trial.left
        return good and effect.refusal <= half

    def _best(self, done: Sequence[Runner[Form]]) -> tuple[Runner[Form], float]:
        """The form whose replies refuse least, and the share of these that do.

        Those that end refusals by first tokens at about the lowest KL come first, and of these the
        one with the smallest reach: a longer one than is needed makes replies that are not the
        model's own. Where none ends them, the first is taken, unseen.

        Args:
            done: what ran all prompts, in their order.
        """
        ending = [one for one in done if self._ends_refusals(one.effect)]
        lowest = min((one.effect.kl for one in ending), default=0.0)
        ending.sort(key=lambda one: (one.effect.kl > lowest + SAME_KL, one.of.reach, one.effect.kl))
        shares: list[float] = []
        for one in ending:
            shares.append(self._refusing(one.of, one.edit))
            if shares[-1] <= LEFT:
                break
        if not shares:
            return done[0], 1.0
        return ending[int(np.argmin(shares))], min(shares)

    def _refusing(self, form: Form, edit: WeightEdit) -> float:
        """The share of refused or broken replies to a few harmful validation prompts.

        They are read because a change may only keep a refusal from opening as it used to.
        """
        if form not in self._judged:
            self._judged[form] = self._wrong(edit)
        return self._judged[form]

    def _wrong(self, edit: WeightEdit) -> float:
        """The same share for any edit."""
        asked = self._trial.harmful[:_REPLIES]
        found = short_replies.ask(self._chat, self._writers, edit, asked, self._how.batch_size)
        self._trial.tokens += found.tokens
        return found.share

    def _record(self, runner: Runner[Form], tuned: Tuned | None = None) -> TriedUpdate:
        form, effect = runner.of, runner.effect
        strengths = None
        if tuned is not None:
            strengths = [
                tuned.strength_of(layer, runner.edit) for layer in range(form.first, form.last + 1)
            ]
        return TriedUpdate(
            layers=[form.first, form.last],
            keep=form.keep,
            reach=form.reach,
            form=form.form,
            strengths=strengths,
            refusal=effect.refusal,
            refused=effect.refused,
            kl=effect.kl,
        )
