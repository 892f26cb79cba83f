"""`--method rome`: chooses how the MLPs of a model are changed, by what the changes do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from abl_mlx.choices import Measuring
from abl_mlx.commands import edit_choice, short_replies
from abl_mlx.commands.candidate_choice import Finder
from abl_mlx.directions import choice, race, selection
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.race import Runner
from abl_mlx.directions.rome import NULL_SPACE, Form, KeyPass
from abl_mlx.directions.selection import LEFT
from abl_mlx.directions.trial import Effect
from abl_mlx.directions.variants import SAME_KL
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


class RomeFinder(Finder):
    """Chooses among changes of MLPs made from the measured directions of all layers."""

    _judged: dict[Form, float]

    def file(self, *, causal: bool = True, trimming: bool = False) -> DirectionFile:
        """The direction file with the chosen changes.

        The window of layers and the reach of the values are chosen first. Unless that ends
        refusals at next to no KL, a longer reach, another weight of what is kept and the null space
        are tried. Each form costs one pass over the keys' prompts and its share of a race
        (`abl_mlx.directions.race`). There are at most 9 forms.

        Args:
            causal: whether replies show refusals, which the choice needs.
            trimming: of no use for these changes.

        Raises:
            UserError: when no form stays under the limit of KL, or replies show no refusals.
        """
        if not causal:
            raise UserError(
                "--method rome chooses by what ends refusals, and completions of this model show "
                "none: choose another method."
            )
        self._judged = {}
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

        def race_of(forms: Sequence[Form], label: str) -> list[Runner[Form]]:
            made = [Update(keys.updates(form, directions, harmless)) for form in forms]
            runners = [Runner(form, update) for form, update in zip(forms, made, strict=True)]
            return self._raced(runners, label)

        first = [Form(*window, reach=reach) for window in self._windows() for reach in _REACHES]
        done = race_of(first, "changes of MLPs")
        best, refusing = self._best(done)
        if refusing > LEFT or best.effect.kl > SAME_KL:
            others = [replace(best.of, **other) for other in _OTHERS]
            done = sorted([*done, *race_of(others, "other changes of MLPs")], key=self._order)
            best, refusing = self._best(done)
        done = [best, *(one for one in done if one is not best)]
        effect = best.effect
        if not effect.kl <= self._how.finding.max_kl:
            raise UserError(
                f"every change of MLPs moves harmless prompts by more than --max-kl "
                f"{self._how.finding.max_kl:g} (the gentlest by {effect.kl:.3f}): raise --max-kl, "
                "or choose another method."
            )
        self._notes.update(
            chosen_by="changes of MLPs, by first tokens and a few replies to validation prompts",
            **self._first_tokens(effect.refusal, effect.refused, effect.kl),
            update=self._record(best).json,
        )
        say(
            f"  layers {best.of.first} to {best.of.last} are changed: {effect.refused:.0%} of the "
            f"harmful prompts still open as refusals, KL {effect.kl:.4f}"
        )
        self._trial.tokens += keys.tokens
        layer = float(best.of.last)
        file = self._file(replace(self._variant(layer, candidates.positions[-1]), method="rome"))
        assert isinstance(best.edit, Update)
        updates = [self._record(one).json for one in done]
        metadata = {**file.metadata, "method": "rome", "updates": updates}
        return replace(file, metadata=metadata, updates=best.edit.factors)

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
            asked = self._validation["harmful"][: short_replies.FEWEST]
            batch_size = self._how.batch_size
            found = short_replies.ask(self._chat, self._writers, edit, asked, batch_size)
            self._judged[form] = found.share
        return self._judged[form]

    def _record(self, runner: Runner[Form]) -> TriedUpdate:
        form, effect = runner.of, runner.effect
        return TriedUpdate(
            layers=[form.first, form.last],
            keep=form.keep,
            reach=form.reach,
            form=form.form,
            refusal=effect.refusal,
            refused=effect.refused,
            kl=effect.kl,
        )
