"""`--method rome`: chooses how the MLPs of a model are changed, by what the changes do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from abl_mlx.choices import Measuring
from abl_mlx.commands import edit_choice
from abl_mlx.commands.candidate_choice import Finder
from abl_mlx.directions import choice, race, selection
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.race import Runner
from abl_mlx.directions.rome import NULL_SPACE, Form, KeyPass
from abl_mlx.directions.variants import SAME_KL
from abl_mlx.edits.update import Update
from abl_mlx.inputs import thinking
from abl_mlx.records.directions import TriedUpdate
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.console import say
from convert.base.errors import UsageError, UserError

#: Prompts of each set whose inputs of MLPs are keys, or are kept.
KEY_PROMPTS = 128

# How the other forms that are tried differ from the best of the windows.
_OTHERS: tuple[dict[str, Any], ...] = (
    {"reach": 1.0}, {"reach": 3.0}, {"keep": 10.0}, {"form": NULL_SPACE},
)  # fmt: skip


def check(how: Measuring) -> None:
    """Check that no flag is given that has no meaning for changes of MLPs.

    Raises:
        UsageError: naming it.
    """
    finding, prompting, searching = how.finding, how.prompting, how.searching
    edit_choice.update_of({}, how.editing)
    for flag, given in (
        ("--rank", finding.rank), ("--across", finding.across), ("--per-layer", finding.per_layer),
        ("--layer", finding.layer), ("--position", finding.position), ("--sae", finding.sae),
        ("--search", searching.searches), ("--keep", prompting.keep),
        ("--keep-system", prompting.keep_system),
        ("--thinking", None if prompting.thinking == thinking.OFF else prompting.thinking),
    ):  # fmt: skip
        if given not in (None, False):
            raise UsageError(f"--method rome and {flag} do not go together: leave one of them out.")


class RomeFinder(Finder):
    """Chooses among changes of MLPs made from the measured directions of all layers."""

    def file(self, *, causal: bool = True, trimming: bool = False) -> DirectionFile:
        """The direction file with the chosen changes.

        The window of layers is chosen first; then the reach of the values, the weight of what is
        kept, and the form. Each form costs one pass over the keys' prompts and its share of a race
        (`abl_mlx.directions.race`). There are at most 7 forms.

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

        done = race_of([Form(*window) for window in self._windows()], "changes of MLPs")
        others = [replace(done[0].of, **other) for other in _OTHERS]
        done = sorted([*done, *race_of(others, "weights of what is kept")], key=self._order)
        best = self._best(done)
        done = [best, *(one for one in done if one is not best)]
        effect = best.effect
        if not effect.kl <= self._how.finding.max_kl:
            raise UserError(
                f"every change of MLPs moves harmless prompts by more than --max-kl "
                f"{self._how.finding.max_kl:g} (the gentlest by {effect.kl:.3f}): raise --max-kl, "
                "or choose another method."
            )
        self._notes.update(
            chosen_by="changes of MLPs, by the first reply tokens to validation prompts",
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
        """The runs of layers that are tried: where the sets are apart, half of that, and all."""
        count = self._candidates.n_layers
        last = self._candidates.positions[-1]
        here = [score for score in self._scores if score.position == last]
        apart = selection.apart(here) or tuple(range(count))
        first, deep = min(apart), max(apart)
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

    def _best(self, done: Sequence[Runner[Form]]) -> Runner[Form]:
        """Of those that end refusals at about the lowest KL, the one with the lowest score.

        Args:
            done: what ran all prompts, in their order.
        """
        first, (over, left, _) = done[0], self._order(done[0])
        if over or left:
            return first
        same = [
            one
            for one in done
            if one.effect.kl <= first.effect.kl + SAME_KL and self._order(one)[:2] == (over, left)
        ]
        return min(same, key=lambda one: one.effect.refusal)

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
