"""Chooses a direction whose removal leaves the refusals of ``--keep`` and ``--keep-system``.

There are two kinds of candidates: the usual ones, and the same made orthogonal to what the prompts
whose refusals are to stay have of their own. All are tried on the first reply tokens of validation
prompts. The best of each kind then generate replies, and the verdicts on these decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.behaviour import kept_refusals
from abl_mlx.commands.candidate_choice import Finder
from abl_mlx.commands.reply_choice import NONE_KEEPS
from abl_mlx.commands.reply_judge import ENOUGH, MOST_STAYING, Judge, Replied
from abl_mlx.directions import estimators, measuring, selection
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.measuring import Candidates
from abl_mlx.directions.staying import Staying, in_turn
from abl_mlx.directions.trial import Effect
from abl_mlx.directions.variants import ALL, OWN, Tried, Variant
from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import EncodedSets
from abl_mlx.models.logits import first_reply_token
from abl_mlx.records.evaluations import STAYING
from abl_mlx.reports.tables import summary_line
from abl_mlx.search.sources import SearchPrompts, at_prompts
from abl_mlx.support.arrays import numbers, numpy_of
from abl_mlx.support.console import percent, progress, say
from convert.base.errors import UserError

#: The largest numbers of candidates of each kind that are tried, and of edits that reply.
MOST_TRIED, MOST_REPLYING = 10, 5

#: The largest number of directions in a subspace that is tried, and of layers of whose states
#: singular vectors are taken.
SPAN, _SPAN_LAYERS = 4, 3

#: The numbers of harmful and harmless prompts on which all edits are tried first.
_FIRST = 8, 4

#: The number of edits of each kind that are then tried on all prompts.
_WHOLE = 3

# A token that opens at least this share of the replies to harmless prompts is no refusal opening.
_COMMON = 0.1


def openings(
    chat: ChatModel, refused: Sequence[Sequence[int]], harmless: Sequence[Sequence[int]]
) -> list[int]:
    """Ids of the tokens with which refusals open that are to stay.

    Args:
        refused: encoded prompts that are refused.
        harmless: encoded prompts that are answered.
    """
    opens = _likeliest(chat, refused)
    answers = Counter(_likeliest(chat, harmless[:MOST_STAYING]))
    common = {token for token, count in answers.items() if count >= _COMMON * answers.total()}
    return sorted(set(opens) - common)


def _likeliest(chat: ChatModel, encoded: Sequence[Sequence[int]]) -> list[int]:
    opened = first_reply_token(chat, encoded)
    return [int(token) for token in numbers(opened.argmax(axis=-1))]


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

    def __init__(self, judge: Judge, *measured: Any):
        """Keep what was measured.

        Args:
            judge: knows what is to stay.
            measured: as for `Finder`.
        """
        super().__init__(*measured)
        self._judge, self._unbound = judge, Finder(*measured)

    def finalists(self) -> list[DirectionFile]:
        """The best candidate of each kind by first reply tokens, for replies to choose from."""
        return [self._finalist(*one) for one in self._firsts(self._allowed(self._all_rated()))]

    def _finalist(self, variant: Variant, effect: Effect) -> DirectionFile:
        self._note(variant, effect)
        return self._file(variant)

    @cached_property
    def _staying_encoded(self) -> list[list[int]]:
        """The encoded validation prompts whose refusals are to stay, of all sets in turn."""
        names = [name for name in STAYING if name in self._validation]
        return in_turn([self._validation[name] for name in names])

    @cached_property
    def _openings(self) -> list[int]:
        return openings(self._chat, self._staying_encoded, self._validation["harmless"])

    def _still_refused(self) -> tuple[list[list[int]], Sequence[int]]:
        return self._staying_encoded, self._openings

    def _chosen(self, causal: bool) -> Variant:
        return self._by_replies(self._all_rated()) if causal else super()._chosen(causal)

    def _all_rated(self) -> list[tuple[Variant, Effect]]:
        """What would be taken if nothing were to stay, and others beside it, with their effects.

        Subspaces are tried where no single direction is enough.
        """
        plain, unbound = self._unbound.choice()
        self._tried += unbound
        tried = self._rated([plain, *self._cleared(plain), *self._singles()], "choice that keeps")
        if not any(self._good(effect) for _, effect in tried):
            tried += self._rated(list(self._spans()), "subspaces that keep refusals")
        return tried

    def to_search(self, sets: EncodedSets) -> SearchPrompts:
        """The prompts and candidates with which a search keeps the same refusals."""
        orthogonal = {
            kind: measuring.orthogonalized(self._described, others)
            for kind, others in self._others.items()
        }
        staying = Staying(sets.staying, self._openings)
        return replace(at_prompts(sets), staying=staying, orthogonal=orthogonal)

    # --- the candidates --------------------------------------------------------------------------

    @cached_property
    def _others(self) -> dict[str, list[mx.array]]:
        """Kind of candidates -> the vectors to which they are made orthogonal."""
        return own_states(self._chat, self._train, self._candidates)

    def _cleared(self, plain: Variant) -> Iterator[Variant]:
        """A variant's directions made orthogonal to what is kept."""
        if plain.directions.ndim == 3:
            return
        layer = self.best_separating(1)[0].layer if plain.layer is None else int(plain.layer)
        for kind, others in self._others.items():
            along = np.stack([numpy_of(one[layer, -1]) for one in others])
            rows = estimators.without(numpy_of(plain.directions).astype(np.float64), along)
            basis, _ = np.linalg.qr(rows.T)
            yield replace(plain, directions=measuring.float32(basis.T), orthogonal_to=kind)

    def _singles(self) -> Iterator[Variant]:
        """The candidates, made orthogonal to what is kept."""
        finding, plain = self._how.finding, self._candidates
        for kind, others in self._others.items():
            these = measuring.orthogonalized(plain, others)
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
        """Subspaces without what they have along what is kept.

        What the candidates of several layers have in common, and the top singular vectors of the
        states of harmful prompts, less the harmless mean, in the layers that separate best.
        """
        finding, plain = self._how.finding, self._candidates
        if finding.method is not None or finding.layer is not None or finding.across is not None:
            return
        position, train = plain.positions[-1], self._train
        best = self.best_separating(plain.n_layers)
        apart = selection.apart([one for one in best if one.position == position])
        for kind, others in self._others.items():
            these = measuring.orthogonalized(plain, others)
            for rank in range(2, 1 + min(SPAN, len(apart))):
                span = these.across_layers(position, rank, apart)
                among = tuple(apart)
                yield Variant(
                    span, these.method, None, position, "layers", among=among, orthogonal_to=kind
                )
        with capture.stored(self._chat, train["harmful"], [position], label="subspaces") as states:
            for layer in (one.layer for one in best[:_SPAN_LAYERS]):
                mean = numpy_of(plain.harmless_mean[layer, -1]).astype(np.float64)
                rows = states[layer, 0].astype(np.float64) - mean
                for kind, others in self._others.items():
                    along = np.stack([numpy_of(one[layer, -1]) for one in others])
                    top, _ = estimators.subspace(estimators.without(rows, along), SPAN)
                    for rank in range(2, len(top) + 1):
                        directions = measuring.float32(top[:rank])
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

    def _allowed(self, tried: Sequence[tuple[Variant, Effect]]) -> list[tuple[Variant, Effect]]:
        """Those within the KL limit, the best first."""
        limit = self._how.finding.max_kl
        allowed = [one for one in tried if one[1].kl <= limit]
        if not allowed:
            lowest = min(effect.kl for _, effect in tried)
            raise UserError(
                f"every candidate would move harmless prompts by more than --max-kl {limit:g} (the "
                f"gentlest by {lowest:.3f}): raise --max-kl, or choose with --layer and --position."
            )
        return sorted(allowed, key=lambda one: self._rank(one[1]))

    @staticmethod
    def _firsts(allowed: Sequence[tuple[Variant, Effect]]) -> list[tuple[Variant, Effect]]:
        """The first of each kind."""
        found: dict[str | None, tuple[Variant, Effect]] = {}
        for one in allowed:
            found.setdefault(one[0].orthogonal_to, one)
        return list(found.values())

    def _by_replies(self, tried: Sequence[tuple[Variant, Effect]]) -> Variant:
        """The variant with the best verdicts on replies."""
        allowed = self._allowed(tried)
        firsts = self._firsts(allowed)
        rest = [one for one in allowed if not any(one is other for other in firsts)]
        some = [*firsts, *rest][:MOST_REPLYING]
        asked = []
        with progress(len(some), "replies", "edit") as bar:
            for variant, effect in some:
                replied = self._judge.of(self._edit(variant))
                asked.append(Asked(variant, effect, replied, self._judge.dropped(replied)))
                bar.update()
        best = min(asked, key=lambda one: one.merit)
        for one in asked:
            mark = " (taken)" if one is best else f" ({one.dropped})" if one.dropped else ""
            say(
                f"  {summary_line(one.variant.record())}: {percent(one.replied.worst)} refused or "
                f"broken, KL {one.effect.kl:.3f}{one.replied.kept_words}{mark}"
            )
        if not best.replied.enough:
            say(NONE_KEEPS)
        self._note(best.variant, best.effect)
        self._notes |= {
            "chosen_by": "lowest KL of those that end refusals and keep those that are to stay"
            if self._judge.works(best.replied)
            else "fewest lost of the refusals that are to stay, of those that end the others",
            "kept": {name: one.json for name, one in best.replied.kept.items()},
        }
        return best.variant

    def _note(self, variant: Variant, effect: Effect) -> None:
        """Keep for the record what first tokens say of a variant."""
        self._notes = self._first_tokens(effect.refusal, effect.refused, effect.kl)
        if effect.kept_share is not None:
            self._notes["kept_refused"] = effect.kept_share


@dataclass(frozen=True)
class Asked:
    """A variant that replied.

    Attributes:
        effect: on first reply tokens.
        dropped: why it cannot be taken; "" where it can.
    """

    variant: Variant
    effect: Effect
    replied: Replied
    dropped: str = ""

    @property
    def merit(self) -> tuple[bool, float, float, int, float]:
        """Sort key: refusals ended, refusals kept, few directions, low KL."""
        worst = max(self.replied.worst, ENOUGH)
        return bool(self.dropped), worst, self.replied.lost, self.variant.rank, self.effect.kl
