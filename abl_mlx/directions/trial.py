"""Trying edits at runtime: their effect on the first reply token, without writing weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.directions import slopes
from abl_mlx.directions.selection import LEFT, Told, openings, refusal_scores, refusal_tokens
from abl_mlx.directions.slopes import Slopes
from abl_mlx.edits.steering import Intervention, ablation, steering
from abl_mlx.edits.weight_edit import LayeredEdit, WeightEdit
from abl_mlx.models import sweeps
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import kl_divergence, known
from abl_mlx.models.layer_stages import has_stages
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.writers import Writer
from abl_mlx.support import ranks
from abl_mlx.support.arrays import numbers
from convert.base.errors import UserError

_NO_REFUSAL = (
    "this model opens its replies to harmful and harmless prompts in the same way, so there is no "
    "refusal to find: check with `abl-mlx eval`, or choose a direction yourself with --layer and "
    "--position."
)


class OpensAlike(UserError):
    """The first reply token does not tell refusals from answers; whole replies may."""


@dataclass(frozen=True)
class Effect:
    """The effect of an edit on the first reply token of the validation prompts run so far.

    An edit whose logits are not finite has an infinite refusal score and KL, so it is never chosen.

    Attributes:
        scores: for each harmful prompt, the refusal score (log-odds, nats).
        opened: for each harmful prompt, whether its likeliest first token opens a refusal.
        kls: for each harmless prompt, KL(model ‖ edited) in nats.
        kept: for each prompt that should still be refused, whether its likeliest first token opens
            a refusal.
    """

    scores: tuple[float, ...] = ()
    opened: tuple[bool, ...] = ()
    kls: tuple[float, ...] = ()
    kept: tuple[bool, ...] = ()

    @property
    def refusal(self) -> float:
        """The mean refusal score."""
        return _mean(self.scores)

    @property
    def refused(self) -> float:
        """The share of harmful prompts that still open as refusals."""
        return _mean(self.opened)

    @property
    def kl(self) -> float:
        """The mean KL."""
        return _mean(self.kls)

    @property
    def kept_share(self) -> float | None:
        """The share of the prompts that should still be refused whose reply opens with a refusal.

        None if there are no such prompts.
        """
        return _mean(self.kept) if self.kept else None

    @property
    def prompts(self) -> tuple[int, int]:
        """The numbers of harmful and harmless prompts that were run."""
        return len(self.scores), len(self.kls)


#: The effect of an edit that was not tried yet.
NOTHING_RUN = Effect()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


class Trial:
    """Tries edits on a loaded model at runtime and measures the effect on the first reply token.

    Harmful prompts whose reply opens with a refusal are run first, because the others show little.

    Attributes:
        refusal_tokens: the ids of the refusal openings, whose log-odds are the refusal score.
        refusal_before: (harmful, harmless) mean refusal scores of the unedited model.
        left: an edit ends refusals when at most this share of the harmful prompts still opens with
            a refusal opening. It is `selection.LEFT` plus the mean probability of these tokens in
            the unedited model's replies to harmless prompts, because answers may also open with
            "I"; but not more than the share of the answers that do, where that is known.
        kept_before: the share of the prompts in ``kept`` whose reply by the unedited model opens
            with a refusal.
        harmful: the encoded harmful prompts, those first whose reply opens with a refusal.
        refusing: the number of these, as the model is.
        tokens: how many tokens were run so far; tokens that prompts share count for each prompt.
        backward: how many of them were run backward, too.
    """

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        harmful: Sequence[Sequence[int]],
        harmless: Sequence[Sequence[int]],
        kept: Sequence[Sequence[int]] = (),
        *,
        kept_openings: Sequence[int] = (),
        before: tuple[mx.array, mx.array] | None = None,
        told: Told | None = None,
    ):
        """Run the unedited model once.

        Args:
            chat: the model.
            writers: its residual writers.
            harmful, harmless: encoded prompts.
            kept: encoded prompts that should still be refused.
            kept_openings: further tokens with which their refusals open.
            before: the unedited model's `first_reply_token` for harmful and harmless prompts, if it
                is already known.
            told: what whole replies tell of the refusal openings. It is used where the first tokens
                alone do not tell.

        Raises:
            OpensAlike: when the model does not open refusals differently from answers.
        """
        self._chat, self._writers = chat, writers
        self._harmless, self._kept = harmless, kept
        self.tokens = self.backward = 0
        self._gentlest = NOTHING_RUN
        first, self._base = before or (self._first(harmful), self._first(harmless))
        mx.eval(first, self._base)
        self.refusal_tokens = refusal_tokens(first, self._base)
        answers = 1.0
        if not self.refusal_tokens and told is not None:
            self.refusal_tokens, answers = list(told.tokens), told.answers
        if not self.refusal_tokens:
            raise OpensAlike(_NO_REFUSAL)
        scores = refusal_scores(self._base, self.refusal_tokens)
        self.refusal_before = (
            _mean(numbers(refusal_scores(first, self.refusal_tokens))),
            _mean(numbers(scores)),
        )
        self.left = LEFT + min(answers, _mean(numbers(mx.sigmoid(scores))))
        opened = openings(first, self.refusal_tokens)
        order = sorted(range(len(harmful)), key=lambda index: not opened[index])
        self.harmful = [harmful[index] for index in order]
        self.refusing = sum(opened)
        self._kept_tokens = [*self.refusal_tokens, *kept_openings]
        self.kept_before = (
            _mean(openings(self._first(kept), self._kept_tokens)) if kept else math.nan
        )

    def of_edit(
        self,
        edit: WeightEdit,
        known_effect: Effect = NOTHING_RUN,
        harmful: int | None = None,
        harmless: int | None = None,
    ) -> Effect:
        """The effect of an edit. Norm preservation is ignored: it has no runtime equivalent.

        Args:
            edit: the edit.
            known_effect: its effect on prompts that were already run, which are not run again.
            harmful, harmless: how many prompts of each set to have run in the end; None for all. Of
                the kept prompts as many are run as of the harmful ones.
        """
        before = known_effect
        bad = self.harmful[len(before.scores) : harmful]
        good = self._harmless[len(before.kls) : harmless]
        keep = self._kept[len(before.kept) : harmful]
        if not (bad or good or keep):
            return before
        with ablation(self._writers, edit.without_norms()):
            opened = self._first([*bad, *good, *keep])
        if not known(opened):
            return Effect(
                before.scores + (math.inf,) * len(bad),
                before.opened + (True,) * len(bad),
                before.kls + (math.inf,) * len(good),
                before.kept + (False,) * len(keep),
            )
        at, tokens = len(before.kls), self.refusal_tokens
        scores, opens = before.scores, before.opened
        kls, kept = before.kls, before.kept
        if bad:
            asked = opened[: len(bad)]
            scores += tuple(numbers(refusal_scores(asked, tokens)))
            opens += tuple(openings(asked, tokens))
        if good:
            rest = opened[len(bad) : len(bad) + len(good)]
            kls += tuple(numbers(kl_divergence(self._base[at : at + len(good)], rest)))
        if keep:
            kept += tuple(openings(opened[len(bad) + len(good) :], self._kept_tokens))
        effect = Effect(scores, opens, kls, kept)
        if self.is_whole(effect) and not effect.kl >= self._gentlest.kl:
            self._gentlest = effect
        return effect

    @property
    def moved(self) -> tuple[int, ...]:
        """Harmless prompts by their KL, the largest first: indices.

        It is that under the edit with the lowest mean KL of those that ran all prompts.
        """
        kls = self._gentlest.kls
        return tuple(sorted(range(len(self._harmless)), key=lambda n: -kls[n] if kls else n))

    def of_edits(
        self,
        edits: Sequence[WeightEdit],
        effects: Sequence[Effect],
        harmful: int | None = None,
        harmless: int | None = None,
    ) -> list[Effect]:
        """The effects of several edits, as of `of_edit`.

        Ranks share out the edits; a streamed model runs with all of them in one sweep.

        Args:
            edits: the edits.
            effects: their effects on prompts that were already run.
            harmful, harmless: as for `of_edit`.
        """
        pairs = list(zip(edits, effects, strict=True))
        if sweeps.of(self._chat.model) is not None:
            model = self._chat.model
            tried = sweeps.each(model, lambda one: self.of_edit(*one, harmful, harmless), pairs)
            return list(tried)
        if len(pairs) < ranks.size():  # then they share out the prompts
            return [self.of_edit(*one, harmful, harmless) for one in pairs]

        def told(pair: tuple[WeightEdit, Effect]) -> list[Any]:
            begun = self.tokens
            effect = self.of_edit(*pair, harmful, harmless)
            run, self.tokens = self.tokens - begun, begun
            return [run, effect.scores, effect.opened, effect.kls, effect.kept]

        found = ranks.each("the effects of edits", pairs, told)
        self.tokens += sum(run for run, *_ in found)
        return [Effect(*map(tuple, parts)) for _, *parts in found]

    def slopes(
        self,
        edit: LayeredEdit,
        strengths: np.ndarray,
        most: int,
        first: int = 0,
        ceilings: Sequence[float] | None = None,
        harmless: Sequence[int] | None = None,
    ) -> Slopes | None:
        """How the effect of an edit changes with its strength in each layer.

        Args:
            edit: the edit at strength 1.
            strengths: (2, L), by which it is multiplied, as of `slopes.slopes`.
            most: how many prompts of each set to run, forward and backward.
            first: the first of them; after the last prompt of a set comes its first.
            ceilings: as of `slopes.slopes`, of all harmful prompts in the order of `Effect`.
            harmless: the harmless prompts to choose from, as indices; None for all.

        Returns:
            None where a module of the model has no gradient, and where ranks have whole layers.
        """
        if has_stages(self._chat.model):
            return None
        bad, good = (
            [every[(first + index) % len(every)] for index in range(min(most, len(every)))]
            for every in (range(len(self.harmful)), harmless or range(len(self._harmless)))
        )
        asked = [self.harmful[n] for n in bad], [self._harmless[n] for n in good]
        tokens = sum(len(one) for part in asked for one in part)
        self.tokens += tokens
        self.backward += tokens
        plain = edit.without_norms()
        try:
            found = slopes.slopes(
                self._chat, self._writers, plain, strengths, *asked, self._base[mx.array(good)],
                self.refusal_tokens, ceilings and [ceilings[n] for n in bad],
            )  # fmt: skip
        except (NotImplementedError, RuntimeError, ValueError):
            return None
        known_all = all(map(math.isfinite, (found.refusal, found.kl)))
        return found if known_all and np.isfinite(found.of_refusal + found.of_kl).all() else None

    def is_whole(self, effect: Effect) -> bool:
        """Whether an effect was measured on all prompts."""
        return effect.prompts == (len(self.harmful), len(self._harmless))

    def of_adding(self, intervention: Intervention, harmless: int | None = None) -> float:
        """The mean refusal score of harmless prompts under an intervention on the stream.

        Args:
            intervention: the intervention.
            harmless: how many of the prompts to run, from the first on; None for all.
        """
        with steering(self._chat, intervention):
            opened = self._first(self._harmless[:harmless])
        scores = numbers(refusal_scores(opened, self.refusal_tokens))
        return _mean(scores) if known(opened) else -math.inf

    def _first(self, sequences: Sequence[Sequence[int]]) -> mx.array:
        self.tokens += sum(map(len, sequences))
        return first_reply_token(self._chat, sequences)
