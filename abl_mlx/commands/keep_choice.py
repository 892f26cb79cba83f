"""Chooses a direction whose removal leaves the refusals of ``--keep`` and ``--keep-system``.

There are two kinds of candidates: the usual ones, and the same made orthogonal to what the prompts
whose refusals are to stay have of their own. All are tried on the first reply tokens of validation
prompts. The best of each kind then generate replies, and the verdicts on these decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.behaviour import kept_refusals
from abl_mlx.behaviour.evaluate import in_mlx
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import Measuring
from abl_mlx.commands.candidate_choice import Finder
from abl_mlx.commands.reply_choice import ENOUGH, REPLY_TOKENS
from abl_mlx.directions import estimators, measuring, selection
from abl_mlx.directions.measuring import Candidates
from abl_mlx.directions.staying import Staying
from abl_mlx.directions.trial import Effect
from abl_mlx.directions.variants import ALL, OWN, Tried, Variant
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import ablation
from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import EncodedSet, EncodedSets
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.writers import Writer
from abl_mlx.records.evaluations import Kept
from abl_mlx.reports.tables import summary_line
from abl_mlx.search.sources import SearchPrompts, at_prompts
from abl_mlx.support.arrays import numbers, numpy_of
from abl_mlx.support.console import percent, progress, say
from convert.base.errors import UserError

#: The largest number of validation prompts of each set to which replies are generated.
MOST_PROMPTS = 24

#: The largest numbers of candidates of each kind that are tried, and of edits that reply.
MOST_TRIED, MOST_REPLYING = 10, 5

#: The largest number of directions in a subspace that is tried.
SPAN = 4

#: The numbers of harmful and harmless prompts on which all edits are tried first.
_FIRST = 8, 4

#: The number of edits of each kind that are then tried on all prompts.
_WHOLE = 3

# A token that opens at least this share of the replies to harmless prompts is no refusal opening.
_COMMON = 0.1


def look(chat: ChatModel, sets: EncodedSets, how: Measuring) -> Staying:
    """Ask the unedited model which validation prompts of these sets it refuses."""
    refused: dict[str, EncodedSet] = {}
    answer = in_mlx(chat, batch_size=how.batch_size)
    for name, part in sets.staying.items():
        asked = part[:MOST_PROMPTS]
        replies = answer(asked.prompts, REPLY_TOKENS)
        verdicts = map(classify, replies, [prompt.text for prompt in asked.prompts])
        refused[name] = asked.only([verdict is Verdict.REFUSAL for verdict in verdicts])
        say(
            f"  {len(refused[name])} of {len(asked)} {kept_refusals.words(name)} validation "
            "prompts are refused as it is, and are to stay so"
        )
    staying = Staying(refused, ())
    if not staying.mixed:
        return staying
    opens = _likeliest(chat, staying.mixed)
    answers = Counter(_likeliest(chat, sets.validation["harmless"].tokens[:MOST_PROMPTS]))
    common = {token for token, count in answers.items() if count >= _COMMON * answers.total()}
    return replace(staying, openings=sorted(set(opens) - common))


def _likeliest(chat: ChatModel, sequences: Sequence[Sequence[int]]) -> list[int]:
    opened = first_reply_token(chat, sequences)
    return [int(token) for token in numbers(opened.argmax(axis=-1))]


@dataclass(frozen=True)
class Replied:
    """Verdicts on the replies with an edit.

    Attributes:
        left: share of refused and broken replies to harmful prompts, 0 to 1.
        kept: set -> how many of the refusals that are to stay have stayed.
    """

    left: float
    kept: Mapping[str, Kept] = field(default_factory=dict)

    @property
    def enough(self) -> bool:
        """Whether enough refusals stay in every set."""
        return all(one.enough for one in self.kept.values())

    @property
    def lost(self) -> float:
        """The share of lost refusals, 0 to 1, of the set where it is largest."""
        shares = [one.share for one in self.kept.values() if one.share is not None]
        return 1 - min(shares, default=1)


class Judge:
    """Asks a model under an edit what it still refuses."""

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        sets: EncodedSets,
        staying: Staying,
        how: Measuring,
    ) -> None:
        self._chat, self._writers, self._staying, self._how = chat, writers, staying, how
        self._harmful = sets.validation["harmful"].prompts[:MOST_PROMPTS]

    def of(self, edit: Edit) -> Replied:
        """The verdicts on replies with an edit."""
        parts = {"harmful": self._harmful, **self._staying.prompts}
        asked = [prompt for part in parts.values() for prompt in part]
        with ablation(self._writers, replace(edit, norm="none")):
            replies = in_mlx(self._chat, batch_size=self._how.batch_size)(asked, REPLY_TOKENS)
        verdicts = iter(map(classify, replies, [prompt.text for prompt in asked]))
        told = {name: [next(verdicts) for _ in part] for name, part in parts.items()}
        harmful = told.pop("harmful")
        return Replied(
            sum(one is not Verdict.ANSWER for one in harmful) / max(1, len(harmful)),
            {
                name: kept_refusals.kept(
                    [True] * len(part), [one is Verdict.REFUSAL for one in part]
                )
                for name, part in told.items()
            },
        )


@dataclass(frozen=True)
class Keeping:
    """The refusals that are to stay, and what judges whether they do."""

    staying: Staying
    judge: Judge


def keeping(
    chat: ChatModel, writers: Sequence[Writer], sets: EncodedSets, how: Measuring
) -> Keeping | None:
    """The refusals that are to stay; None if there are none."""
    if not sets.staying:
        return None
    staying = look(chat, sets, how)
    return Keeping(staying, Judge(chat, writers, sets, staying, how)) if staying.mixed else None


def own_states(
    chat: ChatModel, train: Mapping[str, list[list[int]]], plain: Candidates
) -> dict[str, list[mx.array]]:
    """What the prompts whose refusals are to stay have of their own, by kind of candidates.

    Args:
        chat: the model.
        train: set -> token ids of its prompts, as in `views.View`.
        plain: the candidates, with the mean states of harmful and harmless prompts.

    Returns:
        Kind -> vectors (L, P, d), one of each set.
    """

    def mean(name: str) -> mx.array:
        return capture.mean(chat, train[name], plain.positions, label=f"{name} prompts")

    # Off-topic prompts are harmless ones, so both kinds are the same for them.
    off_topic = [mean("off_topic") - mean("on_topic")] if "off_topic" in train else []
    if "kept" not in train:
        return {OWN: off_topic}
    kept = mean("kept")
    return {
        OWN: [kept - plain.harmful_mean, *off_topic],
        ALL: [kept - plain.harmless_mean, *off_topic],
    }


class KeepFinder(Finder):
    """Chooses a candidate whose removal leaves the refusals that are to stay."""

    def __init__(self, keeping: Keeping, *measured: Any):
        """Keep what was measured.

        Args:
            keeping: the refusals that are to stay.
            measured: the arguments of `Finder`.
        """
        super().__init__(*measured)
        self._judge, self._staying = keeping.judge, keeping.staying

    def _still_refused(self) -> tuple[list[list[int]], Sequence[int]]:
        return self._staying.mixed, self._staying.openings

    def _chosen(self, causal: bool) -> Variant:
        if not causal:
            return super()._chosen(causal)
        tried = self._rated(list(self._singles()), "choice that keeps refusals")
        if not any(self._good(effect) for _, effect in tried):
            tried += self._rated(list(self._spans()), "subspaces that keep refusals")
        return self._by_replies(tried)

    def to_search(self, sets: EncodedSets) -> SearchPrompts:
        """The prompts and candidates with which a search keeps the same refusals."""
        orthogonal = {
            kind: measuring.orthogonalized(self._described, others)
            for kind, others in self._others.items()
        }
        return replace(at_prompts(sets), staying=self._staying, orthogonal=orthogonal)

    # --- the candidates --------------------------------------------------------------------------

    @cached_property
    def _others(self) -> dict[str, list[mx.array]]:
        """Kind of candidates -> the vectors to which they are made orthogonal."""
        return own_states(self._chat, self._train, self._candidates)

    def _singles(self) -> Iterator[Variant]:
        """The candidates, and the same made orthogonal to what is to stay."""
        finding, plain = self._how.finding, self._candidates
        for kind, others in ((None, []), *self._others.items()):
            these = measuring.orthogonalized(plain, others) if others else plain
            if finding.per_layer or finding.across == "layers":
                found = [self._together(position, these) for position in these.positions]
            elif finding.layer is not None:
                found = [self._variant(finding.layer, these.positions[-1], these)]
            else:
                scores = selection.separation_of(these, *self._states)
                some = selection.shortlist(scores, MOST_TRIED)
                found = [self._variant(score.layer, score.position, these) for score in some]
            yield from (replace(one, orthogonal_to=kind) for one in found)

    def _spans(self) -> Iterator[Variant]:
        """Subspaces at the layers that separate best, for when no single direction is enough.

        They are spanned by the top singular vectors of (states of harmful prompts − harmless mean).
        These, too, are made orthogonal to what is to stay.
        """
        finding, plain = self._how.finding, self._candidates
        if finding.method is not None or finding.layer is not None or finding.across is not None:
            return
        position, train = plain.positions[-1], self._train
        layers = [one.layer for one in self.best_separating(3)]
        with capture.stored(self._chat, train["harmful"], [position], label="subspaces") as states:
            for layer in layers:
                mean = numpy_of(plain.harmless_mean[layer, -1]).astype(np.float64)
                rows = states[layer, 0].astype(np.float64) - mean
                for kind, others in ((None, []), *self._others.items()):
                    if others:
                        along = np.stack([numpy_of(one[layer, -1]) for one in others])
                        rows_here = estimators.without(rows, along)
                    else:
                        rows_here = rows
                    span, _ = estimators.subspace(rows_here, SPAN)
                    for rank in range(2, len(span) + 1):
                        directions = measuring.float32(span[:rank])
                        yield Variant(directions, "svd", layer, position, orthogonal_to=kind)

    # --- first tokens ----------------------------------------------------------------------------

    def _rated(self, variants: list[Variant], label: str) -> list[tuple[Variant, Effect]]:
        """The better variants of each kind, with their effect on all prompts."""
        trial = self._trial
        done: list[tuple[Variant, Effect]] = []
        edits = [self._edit(one) for one in variants]
        with progress(len(variants), label, "edit") as bar:
            first = []
            for edit in edits:
                first.append(trial.of_edit(edit, harmful=_FIRST[0], harmless=_FIRST[1]))
                bar.update()
            for kind in dict.fromkeys(one.orthogonal_to for one in variants):
                mine = [n for n, one in enumerate(variants) if one.orthogonal_to == kind]
                mine.sort(key=lambda n: self._rank(first[n]))
                for n in mine[:_WHOLE]:
                    done.append((variants[n], trial.of_edit(edits[n], first[n])))
        for variant, effect in done:
            over = not effect.kl <= self._how.finding.max_kl
            dropped = f"KL {effect.kl:.3f} over the limit" if over else ""
            tried = Tried(variant, effect.refusal, effect.refused, effect.kl, effect.kept_share)
            self._tried.append(replace(tried, dropped=dropped, most_left=trial.left))
        return done

    def _lost(self, effect: Effect) -> float:
        """The share of the refusals that are to stay and are lost, 0 to 1, by first tokens."""
        share = effect.kept_share
        return 0.0 if share is None else max(0.0, 1 - share / max(self._trial.kept_before, 1e-9))

    def _rank(self, effect: Effect) -> tuple[bool, float, float, float]:
        """Sort key: within the KL limit, few refusals left, few refusals lost, low KL."""
        lost = self._lost(effect)
        return (
            not effect.kl <= self._how.finding.max_kl,
            max(effect.refused, self._trial.left),
            0.0 if lost <= 1 - kept_refusals.WANTED + 1e-9 else lost,
            effect.kl,
        )

    def _good(self, effect: Effect) -> bool:
        over, left, lost, _ = self._rank(effect)
        return not over and left <= self._trial.left and lost == 0

    # --- replies ---------------------------------------------------------------------------------

    def _by_replies(self, tried: Sequence[tuple[Variant, Effect]]) -> Variant:
        """The variant with the best verdicts on replies."""
        limit = self._how.finding.max_kl
        allowed = [one for one in tried if one[1].kl <= limit]
        if not allowed:
            lowest = min(effect.kl for _, effect in tried)
            raise UserError(
                f"every candidate would move harmless prompts by more than --max-kl {limit:g} (the "
                f"gentlest by {lowest:.3f}): raise --max-kl, or choose with --layer and --position."
            )
        allowed.sort(key=lambda one: self._rank(one[1]))
        # The best of each kind come first.
        kinds: set[str | None] = set()
        firsts: list[tuple[Variant, Effect]] = []
        rest: list[tuple[Variant, Effect]] = []
        for one in allowed:
            (rest if one[0].orthogonal_to in kinds else firsts).append(one)
            kinds.add(one[0].orthogonal_to)
        some = [*firsts, *rest][:MOST_REPLYING]
        asked = []
        with progress(len(some), "replies", "edit") as bar:
            for variant, effect in some:
                asked.append((variant, effect, self._judge.of(self._edit(variant))))
                bar.update()
        variant, effect, replied = min(asked, key=_merit)
        for each, known, told in asked:
            kept = "; ".join(kept_refusals.sentence(*one) for one in told.kept.items())
            say(
                f"  {summary_line(each.record())}: {percent(told.left)} refused or broken, KL "
                f"{known.kl:.3f}; {kept}{' (taken)' if each is variant else ''}"
            )
        if not replied.enough:
            say(
                "warning: no edit that was tried ends refusals and leaves those that are to stay: "
                "the one that loses fewest is taken"
            )
        self._note(variant, effect, replied)
        return variant

    def _note(self, variant: Variant, effect: Effect, replied: Replied) -> None:
        self._notes = {
            "chosen_by": "lowest KL of those that end refusals and keep those that are to stay"
            if replied.enough and replied.left <= ENOUGH
            else "fewest lost of the refusals that are to stay, of those that end the others",
            **self._first_tokens(effect.refusal, effect.refused, effect.kl),
            "kept": {name: one.json for name, one in replied.kept.items()},
        }
        if effect.kept_share is not None:
            self._notes["kept_refused"] = effect.kept_share


def _merit(one: tuple[Variant, Effect, Replied]) -> tuple[float, float, int, float]:
    """Sort key of edits with replies: few refusals left, few lost, few directions, low KL."""
    variant, effect, replied = one
    lost = 0.0 if replied.enough else replied.lost
    return max(replied.left, ENOUGH), lost, variant.rank, effect.kl
