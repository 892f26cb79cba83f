"""What edits do to the first reply token, tried on a loaded model without writing a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from abl_mlx.directions.selection import LEFT, openings, refusal_scores, refusal_tokens
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import Intervention, ablation, steering
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import kl_divergence, known
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.writers import Writer
from abl_mlx.support.arrays import numbers
from convert.base.errors import UserError

NO_REFUSAL = (
    "this model opens its replies to harmful and harmless prompts in the same way, so there is no "
    "refusal to find: check with `abl-mlx eval`, or choose a direction yourself with --layer and "
    "--position."
)


@dataclass(frozen=True)
class Effect:
    """What an edit does to the first reply token, on the validation prompts that were run so far.

    An edit that leaves logits that are no numbers has an infinite refusal score and KL, so that
    nothing chooses it.

    Attributes:
        scores: the refusal score (log-odds, nats) of each harmful prompt.
        opened: whether its likeliest first token opens a refusal.
        kls: KL(model ‖ edited), nats, of each harmless prompt.
        kept: of each prompt that should go on being refused, whether it opens as a refusal.
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
        """The share of kept prompts that open as refusals; None without any."""
        return _mean(self.kept) if self.kept else None

    @property
    def prompts(self) -> tuple[int, int]:
        """How many harmful and harmless prompts were run."""
        return len(self.scores), len(self.kls)


#: Of an edit that was not tried yet.
NOTHING_RUN = Effect()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


class Trial:
    """Tries edits on a loaded model at runtime, by what they do to the first reply token.

    Harmful prompts that the model opens with a refusal come first: of the others there is little to
    learn.

    Attributes:
        refusal_tokens: the token ids whose odds are the refusal score.
        refusal_before: (harmful, harmless) mean refusal scores of the unedited model.
        left: an edit ends refusals when at most this share of the harmful prompts still opens with
            the refusal tokens: `selection.LEFT`, and the mean probability of these tokens in the
            unedited model's replies to harmless prompts, because answers may open with "I", too.
        kept_before: the share of the kept prompts that the unedited model opens with a refusal.
        tokens: that were run so far, counting what prompts share once for each.
    """

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        harmful: Sequence[Sequence[int]],
        harmless: Sequence[Sequence[int]],
        kept: Sequence[Sequence[int]] = (),
        *,
        before: tuple[mx.array, mx.array] | None = None,
    ):
        """Run the model as it is once.

        Args:
            harmful, harmless: encoded prompts.
            kept: prompts that should go on being refused.
            before: the unedited model's `first_reply_token` of harmful and harmless prompts, where
                it is known already.

        Raises:
            UserError: when the model does not open refusals differently from answers.
        """
        self._chat, self._writers = chat, writers
        self._harmless, self._kept = harmless, kept
        self.tokens = 0
        first, self._base = before or (self._first(harmful), self._first(harmless))
        self.refusal_tokens = refusal_tokens(first, self._base)
        if not self.refusal_tokens:
            raise UserError(NO_REFUSAL)
        scores = refusal_scores(self._base, self.refusal_tokens)
        self.refusal_before = (
            _mean(numbers(refusal_scores(first, self.refusal_tokens))),
            _mean(numbers(scores)),
        )
        self.left = LEFT + _mean(numbers(mx.sigmoid(scores)))
        opened = openings(first, self.refusal_tokens)
        order = sorted(range(len(harmful)), key=lambda index: not opened[index])
        self._harmful = [harmful[index] for index in order]
        self.kept_before = (
            _mean(openings(self._first(kept), self.refusal_tokens)) if kept else math.nan
        )

    def of_edit(
        self,
        edit: Edit,
        known_effect: Effect = NOTHING_RUN,
        harmful: int | None = None,
        harmless: int | None = None,
    ) -> Effect:
        """Effect of an edit. Norm preservation is ignored: it has no runtime equivalent.

        Args:
            known_effect: on the prompts that were run before; only those behind them are.
            harmful, harmless: how many prompts of each set to go up to; all without it. Of kept
                prompts there are as many as of harmful ones.
        """
        before = known_effect
        bad = self._harmful[len(before.scores) : harmful]
        good = self._harmless[len(before.kls) : harmless]
        keep = self._kept[len(before.kept) : harmful]
        if not (bad or good or keep):
            return before
        with ablation(self._writers, replace(edit, norm="none")):
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
            kept += tuple(openings(opened[len(bad) + len(good) :], tokens))
        return Effect(scores, opens, kls, kept)

    def is_whole(self, effect: Effect) -> bool:
        """Whether an effect is that on all prompts."""
        return effect.prompts == (len(self._harmful), len(self._harmless))

    def of_adding(self, intervention: Intervention, harmless: int | None = None) -> float:
        """The mean refusal score of harmless prompts under an intervention on the stream.

        Args:
            harmless: of the first so many; all without it.
        """
        with steering(self._chat, intervention):
            opened = self._first(self._harmless[:harmless])
        scores = numbers(refusal_scores(opened, self.refusal_tokens))
        return _mean(scores) if known(opened) else -math.inf

    def _first(self, sequences: Sequence[Sequence[int]]) -> mx.array:
        self.tokens += sum(map(len, sequences))
        return first_reply_token(self._chat, sequences)
