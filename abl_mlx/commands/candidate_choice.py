"""Choosing among measured candidates: by the user's flags, by causal effect, or a subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.choices import Finding, Measuring
from abl_mlx.commands import short_replies
from abl_mlx.commands.edit_choice import make_edit
from abl_mlx.commands.layer_strengths import LayerStrengths
from abl_mlx.commands.subspaces import Subspaces
from abl_mlx.directions import choice, estimators, measuring, methods, protecting, race, selection
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.effects import Measured
from abl_mlx.directions.measuring import Candidates
from abl_mlx.directions.methods import Method
from abl_mlx.directions.pinning import embedding_means, held_at
from abl_mlx.directions.race import Runner
from abl_mlx.directions.slopes import COMPONENTS
from abl_mlx.directions.trial import Effect, OpensAlike, Trial
from abl_mlx.directions.variants import Tried, Variant, best
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.models import sweeps
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.logits import behind_last_layer
from abl_mlx.models.writers import Writer
from abl_mlx.reports.tables import summary_line
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.console import say
from convert.base.errors import UserError

# The largest numbers of edits that are tried, and of deep layers, which are tried last.
_MOST_TRIALS, _MOST_DEEP = 16, 2

# Why a single direction was chosen, for the record.
_BY_SCORE = "lowest refusal score under ablation within the KL limit, on validation prompts"
_BY_REPLIES = "lowest KL of those under which short replies to validation prompts are answers"


def rank_of(finding: Finding) -> int:
    """The number of directions in a subspace: ``--rank``, or the method's default."""
    if finding.rank is not None:
        return finding.rank
    return 3 if finding.across is not None else methods.named(finding.method).rank


class Finder:
    """Chooses among candidates, and keeps what the record says about the choice."""

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        candidates: Candidates,
        train: Mapping[str, list[list[int]]],
        validation: Mapping[str, list[list[int]]],
        states: tuple[np.ndarray, np.ndarray],
        how: Measuring,
        told: selection.Told | None = None,
    ):
        """Keep what was measured.

        Args:
            chat: the model.
            writers: its residual writers.
            candidates: the measured candidates.
            train, validation: encoded prompts by name of the set.
            states: the states of the validation prompts that should no longer be refused, and of
                harmless ones, (L, P, N, d) each, at the candidates' positions and the last one.
            how: the chosen options.
            told: what whole replies tell of the tokens that open refusals.
        """
        self._chat, self._writers, self._how, self._told = chat, writers, how, told
        self._train, self._validation = train, validation
        self._candidates = candidates
        self._embedding = embedding_means(chat, writers, train["harmful"], train["harmless"])
        count = len(candidates.positions)
        self._states = states[0][:, :count], states[1][:, :count]
        self._last = states[0][-1, -1], states[1][-1, -1]
        self._scores = selection.separation_of(candidates, *self._states)
        self._tried: list[Tried] = []
        self._by_layer = LayerStrengths(chat, writers, how)
        self._notes: dict[str, Any] = {}

    def file(self, *, causal: bool = True, trimming: bool = False) -> DirectionFile:
        """The chosen direction with all facts about it, as a direction file.

        Args:
            causal: choose by what the removal does, and not by separation alone.
            trimming: look for strengths of each layer that have a lower KL.
        """
        self._by_layer.wanted = trimming and self._strengths is None
        variant = self._chosen(causal)
        recipe = self._recipe(variant) if self._by_layer.wanted else None
        file = self._file(variant)
        return file if recipe is None else replace(
            file, metadata={**file.metadata, "recipe": recipe}
        )  # fmt: skip

    def _recipe(self, variant: Variant) -> dict[str, Any] | None:
        """Strengths of each layer that are better than strength 1 everywhere, if there are."""
        notes = self._notes
        if self._how.searching.learn_strengths is None and "validation_kl" not in notes:
            return None
        better = self._by_layer.better(self._trial, self._edit(variant), variant, notes)
        if better is None:
            return None
        found, why, kl = better
        self._notes |= {
            "chosen_by": f"{notes['chosen_by']}; {why}",
            **self._first_tokens(found.effect.refusal, found.effect.refused, found.effect.kl),
            "uniform_kl": kl,
        }
        assert isinstance(found.edit, Edit)
        profile = dict(found.edit.profile or {})
        return {"profile": profile, "embedding": self._how.editing.embedding}

    def choice(self) -> tuple[Variant, list[Tried]]:
        """The chosen variant, by what its removal does, and what was tried for it."""
        return self._chosen(causal=True), self._tried

    def best_separating(self, most: int) -> list[selection.Score]:
        """The candidates that separate the validation prompts best, at most one of each layer.

        Args:
            most: their number at most.
        """
        return selection.shortlist(self._scores, most, each=1)

    def files_of(self, scores: Sequence[selection.Score]) -> list[DirectionFile]:
        """Candidates as direction files."""
        self._notes["chosen_by"] = "largest d′ of validation prompts"
        return [self._file(self._variant(score.layer, score.position)) for score in scores]

    def _file(self, variant: Variant) -> DirectionFile:
        """A variant with all facts about it, as a direction file."""
        candidates, how = self._described, self._how
        bad, good = self._states
        layer = candidates.n_layers - 1 if variant.layer is None else round(variant.layer)
        position = candidates.positions[-1] if variant.position is None else variant.position
        at = layer, candidates.positions.index(position)
        lead = variant.directions if variant.directions.ndim == 2 else candidates.bases[at]
        clouds = estimators.plane(bad[at], good[at], numpy_of(lead[0]))
        counted: dict[str, Any] = {}
        if "_trial" in vars(self):
            counted = {"forward_tokens": self._trial.tokens}
            counted |= {"backward_tokens": self._trial.backward} if self._trial.backward else {}
        if parameters := dict(self._method.parameters) | self._ridge:
            counted["parameters"] = parameters
        metadata = {
            "method": variant.method,
            "candidate_method": candidates.method,
            "summary": {**variant.record().json, **self._notes, **counted},
            "scores": [score.described(candidates) for score in self._scores],
            "trials": [tried.record().json for tried in self._tried],
            "cloud": {"layer": layer, "position": position},
            "embedding_scale": self._embedding.scale,
        }
        if pins := self._embedding.pins(variant.directions):
            metadata["pins"] = pins
        if self._strengths is not None:
            metadata["recipe"] = self._strengths
        if how.finding.across == "positions":
            metadata["across"] = "positions"
        return DirectionFile(variant.directions, candidates, metadata, clouds)

    @cached_property
    def _described(self) -> Candidates:
        """The candidates with what the validation prompts say of each."""
        return measuring.describe(self._candidates, *self._states)

    @property
    def _method(self) -> Method:
        return methods.named(self._how.finding.method)

    @property
    def _ridge(self) -> dict[str, float]:
        """The constant of ``--protect``, for the record."""
        return {} if self._how.finding.protect is None else {"ridge": protecting.RIDGE}

    @property
    def _strengths(self) -> dict[str, Any] | None:
        """The method's own strength in every layer, as a recipe; None for a plain removal."""
        each = self._method.strengths(len(self._chat.layers))
        if each is None:
            return None
        embedding = not self._method.layer_weights
        return {"profile": dict.fromkeys(COMPONENTS, each), "embedding": embedding}

    def _measured(self) -> Measured:
        return Measured(
            self._chat, self._writers, self._candidates, self._scores, self._train,
            self._validation, lambda: self._trial, self._edit_of,
            self._method.ranked(self._how.finding.rank), self._how.finding.max_kl,
        )  # fmt: skip

    def _chosen(self, causal: bool) -> Variant:
        finding, candidates, method = self._how.finding, self._candidates, self._method
        if finding.layer is not None:
            self._notes["chosen_by"] = "hand"
            position = candidates.positions[-1] if finding.across else self._position
            variant = self._variant(finding.layer, position)
            return self._refined(variant) if method.refine else variant
        if finding.per_layer or finding.across == "layers":
            return self._among([self._together(position) for position in candidates.positions])
        if finding.method == "over-refusal":
            return self._over_refusal()
        if method.choose:
            return self._by_method()
        if not causal:
            return self._by_separation()
        return self._refined(self._by_cause()) if method.refine else self._by_cause()

    def _by_method(self) -> Variant:
        """The candidate that the method chooses without the reply's first token."""
        chosen = self._method.chooser(self._measured())
        facts = {**self._described.facts, **chosen.facts}
        self._described = replace(self._described, facts=facts)
        self._notes |= {"chosen_by": chosen.by, "forward_tokens": chosen.tokens}
        variant = self._variant(chosen.score.layer, chosen.score.position)
        with suppress(OpensAlike):  # then first tokens say nothing of the choice
            (effect,) = self._try([variant], "effect on first tokens")
            self._trial.tokens += chosen.tokens
            self._notes |= self._first_tokens(effect.refusal, effect.refused, effect.kl)
        return replace(variant, method=self._method.name)

    def _refined(self, variant: Variant) -> Variant:
        """The chosen candidate as the method changes it with the loaded model."""
        assert variant.layer is not None
        assert variant.position is not None
        found = self._method.refiner(self._measured(), int(variant.layer), variant.position)
        refined = replace(variant, directions=found.directions, method=self._method.name)
        (effect,) = self._try([refined], found.by)
        self._notes |= {
            "chosen_by": f"{self._notes['chosen_by']}; {found.by}",
            **self._first_tokens(effect.refusal, effect.refused, effect.kl),
            "facts": dict(found.facts),
        }
        return refined

    @property
    def _position(self) -> int:
        return -1 if self._how.finding.position is None else self._candidates.positions[0]

    def _variant(
        self, layer: float, position: int, candidates: Candidates | None = None
    ) -> Variant:
        candidates = candidates or self._candidates
        several = self._how.finding.across == "positions"
        return Variant(
            candidates.for_edit(layer, position),
            candidates.method,
            layer,
            None if several else position,
            "positions" if several else None,
            methods.named(candidates.method).each_layer,
        )

    def _together(self, position: int, candidates: Candidates | None = None) -> Variant:
        candidates = candidates or self._candidates
        method = candidates.method
        if self._how.finding.per_layer:
            each = candidates.each_layer(position)
            return Variant(each, method, None, position, per_layer=True)
        span = candidates.across_layers(position, rank_of(self._how.finding))
        return Variant(span, method, None, position, "layers")

    def _edit(self, variant: Variant) -> Edit:
        """The full removal of a variant's directions, whatever strength is written later.

        With a full removal the remaining refusals differ most between directions.
        """
        return self._edit_of(variant.directions)

    def _edit_of(self, directions: mx.array) -> Edit:
        """The full removal of directions (k, d) or (L, k, d)."""
        embedding = self._embedding
        pins = None if self._how.editing.pin is None else embedding.pins(directions)
        pin = held_at(self._how.editing.pin, pins, embedding.scale, directions.shape[-2])
        editing = replace(self._how.editing, strength=1.0)
        return make_edit(directions, editing, recipe=self._strengths, pin=pin)

    @cached_property
    def _trial(self) -> Trial:
        validation = self._validation
        refused = validation.get("borderline", validation["harmful"])
        kept, kept_openings = self._still_refused()
        parts = list(zip((refused, validation["harmless"]), self._last, strict=True))
        chat = self._chat
        before = list(sweeps.each(chat.model, lambda part: behind_last_layer(chat, *part), parts))
        trial = Trial(
            self._chat, self._writers, refused, validation["harmless"], kept,
            kept_openings=kept_openings, before=(before[0], before[1]), told=self._told,
        )  # fmt: skip
        # The states came from one pass over both sets, whose tokens are counted here.
        trial.tokens += sum(map(len, [*refused, *validation["harmless"]]))
        return trial

    def _still_refused(self) -> tuple[list[list[int]], Sequence[int]]:
        """Encoded prompts whose refusals should stay, and further tokens that open them."""
        validation = self._validation
        return validation["harmful"] if "borderline" in validation else [], ()

    def _try(self, variants: Sequence[Variant], label: str, *, needed: bool = True) -> list[Tried]:
        """Race variants; unless one is ``needed``, those far beyond the KL limit end early."""
        trial, limit = self._trial, self._how.finding.max_kl

        def lost(effect: Effect) -> float:
            """The share of the prompts that should still be refused and no longer are."""
            return 0.0 if effect.kept_share is None else trial.kept_before - effect.kept_share

        def rank(effect: Effect) -> tuple[bool, bool, bool, float]:
            whole = trial.is_whole(effect)
            few = 1 if whole else 4
            return lost(effect) > few * selection.LEFT, *choice.gentle(
                effect, limit, trial.left, whole
            )

        def dropped(effect: Effect, so_far: bool = False) -> str:
            if not effect.kl <= limit:
                return f"KL {effect.kl:.3f} over the limit of {limit:g}"
            if lost(effect) > selection.LEFT:
                return f"{lost(effect):.0%} of the harmful prompts are no longer refused"
            return "" if so_far or trial.is_whole(effect) else choice.OUTRUN

        def tried(runner: Runner[Variant]) -> Tried:
            effect = runner.effect
            return Tried(
                runner.of, effect.refusal, effect.refused, effect.kl, effect.kept_share,
                dropped(effect), trial.left,
            )  # fmt: skip

        runners = [Runner(variant, self._edit(variant)) for variant in variants]
        race.run(
            trial,
            runners,
            rank,
            lambda effect: not dropped(effect),
            lambda effect: not dropped(effect, so_far=True) and effect.refused <= trial.left,
            lambda runner: tried(runner).works,
            label,
            worth=lambda effect: needed or not rank(effect)[1],  # not over the limit so far
        )
        done = [tried(one) for one in runners]
        self._tried += done
        return done

    def _take(self, tried: Tried | None) -> Variant:
        """The variant of a chosen trial; keeps for the record why it was chosen."""
        if tried is None:
            lowest = min(one.kl for one in self._tried)
            raise UserError(
                "every candidate would move harmless prompts by more than --max-kl "
                f"{self._how.finding.max_kl:g} (the gentlest by {lowest:.3f}) or undo refusals "
                "that should stay: raise --max-kl, or choose with --layer and --position."
            )
        why = (
            "lowest KL of those that leave no refusals"
            if tried.works
            else "least refusals left within the KL limit"
        )
        self._notes.update(
            chosen_by=f"{why}, by the first reply tokens to validation prompts",
            **self._first_tokens(tried.refusal, tried.refused, tried.kl),
        )
        if tried.kept is not None:
            self._notes["kept_refused"] = tried.kept
        return tried.variant

    def _first_tokens(
        self, refusal: float | None, refused: float | None, kl: float | None
    ) -> dict[str, Any]:
        """What the first reply tokens to validation prompts say of a choice, for the record.

        Args:
            refusal, refused, kl: as of `Effect`, with the chosen directions removed.
        """
        trial = self._trial
        harmful, harmless = trial.refusal_before
        words = [self._chat.tokenizer.decode([token]) for token in trial.refusal_tokens]
        return {
            "refusal_score": {
                "harmful": harmful, "harmless": harmless, "harmful_ablated": refusal,
            },
            "validation_kl": kl,
            "refused": refused,
            "refusal_tokens": words,
        }  # fmt: skip

    def _among(self, variants: Sequence[Variant]) -> Variant:
        return self._take(best(self._try(variants, "causal choice")))

    def _over_refusal(self) -> Variant:
        chosen = selection.shortlist(self._scores, _MOST_TRIALS)
        return self._among([self._variant(score.layer, score.position) for score in chosen])

    def _by_separation(self) -> Variant:
        """What tells the two sets apart best, where no refusal shows what a removal does."""
        allowed = selection.shortlist(self._scores, 1) or self._scores
        best = max(allowed, key=lambda score: score.d_prime)
        say(
            f"  completions show no refusal, so the direction that tells the two sets of prompts "
            f"apart best is taken (d′ {best.d_prime:.1f})"
        )
        self._notes["chosen_by"] = "largest d′ of validation prompts, as completions refuse none"
        return self._variant(best.layer, best.position)

    def _by_cause(self) -> Variant:
        def edit_for(score: selection.Score) -> Edit:
            return self._edit(self._variant(score.layer, score.position))

        trial = self._trial
        chosen = choice.choose(
            trial, self._candidates, self._scores, edit_for=edit_for,
            max_kl=self._how.finding.max_kl, deepest=self._how.finding.method is not None,
            answers=self._answers if self._how.finding.method is None else None,
        )  # fmt: skip
        score, self._scores = chosen.score, chosen.scores
        self._by_layer.by_replies = chosen.by_replies
        variant = self._variant(score.layer, score.position)
        self._notes = {
            "chosen_by": _BY_REPLIES if chosen.by_replies else _BY_SCORE,
            **self._first_tokens(score.refusal, score.refused, score.kl),
        }
        if self._how.finding.method is not None:
            return variant
        assert score.refusal is not None
        assert score.refused is not None
        assert score.kl is not None
        first = Tried(variant, score.refusal, score.refused, score.kl, most_left=trial.left)
        harmful = self._validation["harmful"]
        if first.works or self._by_layer.end_refusals(trial, self._edit(variant), first, harmful):
            return variant
        return self._several(first)

    def _answers(self, edit: WeightEdit) -> bool:
        """Whether next to no short reply to harmful prompts under an edit is refused or broken."""
        return short_replies.answers(
            self._chat, self._writers, self._trial, edit, self._how.batch_size,
            "a gentler direction",
        )  # fmt: skip

    def _several(self, first: Tried) -> Variant:
        """A subspace, where one direction leaves refusals and the subspace leaves fewer.

        First the variants from the means are tried (subspaces across all layers, and separate
        directions for each layer), and singular vectors of the states of the layers that separate
        best. Only if none of these is enough, those of the last fifth of the layers are tried as
        well, which are close to the output tokens.

        Args:
            first: the single direction, as it was tried.
        """
        single = first.variant
        say(
            f"  one direction leaves {first.refused:.0%} of the harmful prompts opening in the way "
            "that sets them apart: subspaces are tried"
        )
        assert single.layer is not None
        assert single.position is not None
        spans = measuring.measure(
            self._chat,
            self._train["harmful"],
            self._train["harmless"],
            [single.position],
            method="svd",
            rank=min(3, len(self._train["harmful"])),
        )
        spans = protecting.protected(self._chat, spans, self._train)
        others = Subspaces(self._candidates, spans, self._scores, single.position)
        variants = others.of_means() if self._how.editing.pin is None else []
        last = [self._variant(layer, single.position) for layer in others.deep[:_MOST_DEEP]]
        done = [
            first,
            *self._try(
                [*variants, *others.of_states(others.early), *last], "subspaces", needed=False
            ),
        ]
        if not any(one.works for one in done):
            done += self._try(others.of_states(others.deep), "subspaces, last layers", needed=False)
        taken = best(done)
        if taken is None or taken is first:
            say("  no subspace leaves fewer within the limit; the single direction is kept")
            return single
        alone = [one for one in done if one.variant.rank == 1 and not one.variant.per_layer]
        self._notes["single"] = min(alone, key=lambda one: one.refused).record().json
        say(f"  taken instead: {summary_line(taken.variant.record())}")
        return self._take(taken)
