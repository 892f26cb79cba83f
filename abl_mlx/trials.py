"""What edits do to the first tokens of replies: cheap enough to try many of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.arrays import number
from abl_mlx.edits import Edit
from abl_mlx.logits import first_reply_token
from abl_mlx.models import ChatModel
from abl_mlx.selection import kl_divergence, refusal_scores, refusal_tokens
from abl_mlx.steering import ablation
from abl_mlx.writers import Writer

#: An edit works when at most this share of harmful prompts is still answered with a refusal's
#: first token.
WORKS = 0.05

# KLs closer than this (nats) are the same for all that a few dozen prompts can tell.
_SAME_KL = 1e-3


@dataclass(frozen=True)
class Opened:
    """How replies open.

    Attributes:
        score: mean refusal score, log-odds in nats.
        refused: share of prompts whose likeliest first reply token opens a refusal.
    """

    score: float
    refused: float


@dataclass(frozen=True)
class Variant:
    """An edit's directions, and what they are.

    Attributes:
        directions: (k, d) or (L, k, d).
        method: of `directions.METHODS`.
        layer: after which they were read; None for all of them together, or each for itself.
        position: token offset from the prompt's end; None for all of them together.
        across: ``layers`` or ``positions`` where those are taken together.
        per_layer: whether the writers of each layer lose their own layer's.
    """

    directions: mx.array
    method: str
    layer: float | None = None
    position: int | None = -1
    across: str | None = None
    per_layer: bool = False

    @property
    def rank(self) -> int:
        """k."""
        return int(self.directions.shape[-2])

    def record(self) -> dict[str, Any]:
        """As JSON values, without the directions."""
        record: dict[str, Any] = {"method": self.method}
        if self.layer is not None:
            record["layer"] = int(self.layer) if self.layer == int(self.layer) else self.layer
        if self.position is not None:
            record["position"] = self.position
        if self.rank > 1:
            record["rank"] = self.rank
        if self.across is not None:
            record["across"] = self.across
        if self.per_layer:
            record["per_layer"] = True
        return record


@dataclass(frozen=True)
class Trial:
    """What an edit with a variant does.

    Attributes:
        variant: what is removed.
        harmful: how replies to harmful validation prompts open.
        kl: mean KL(model ‖ edited) at the first reply token of harmless ones, nats.
        kept: how replies to prompts open that should go on being refused; None without any.
        dropped: why it cannot be chosen.
    """

    variant: Variant
    harmful: Opened
    kl: float
    kept: Opened | None = None
    dropped: str = ""

    @property
    def works(self) -> bool:
        """Whether refusals are gone, as far as first tokens tell."""
        return not self.dropped and self.harmful.refused <= WORKS

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **self.variant.record(),
            "refusal": self.harmful.score,
            "refused": self.harmful.refused,
            "kl": self.kl,
            **({"kept_refused": self.kept.refused} if self.kept else {}),
            **({"dropped": self.dropped} if self.dropped else {}),
        }


class Trials:
    """Tries edits on the same prompts; what the unedited model does is measured once.

    Attributes:
        tokens: the ids of the tokens that open refusals.
        before: how replies to the harmful prompts open without an edit.
        kept_before: the same of the prompts that should go on being refused.
    """

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        harmful: Sequence[Sequence[int]],
        harmless: Sequence[Sequence[int]],
        *,
        tokens: Sequence[int] | None = None,
        kept: Sequence[Sequence[int]] = (),
        max_kl: float = 0.1,
    ):
        """Run the unedited model once over all prompts.

        Args:
            tokens: what opens refusals; found from the two sets without it.
            kept: encoded prompts that should go on being refused.
            max_kl: edits that move harmless prompts by more are dropped.
        """
        self._chat, self._writers = chat, writers
        self._harmful, self._harmless, self._kept = harmful, harmless, kept
        self._base = first_reply_token(chat, harmless)
        self._max_kl = max_kl
        opened = first_reply_token(chat, [*harmful, *kept])
        self.tokens = list(tokens or refusal_tokens(opened, self._base))
        self.before = self._opened(opened[: len(harmful)])
        self.kept_before = self._opened(opened[len(harmful) :]) if kept else None

    def _opened(self, log_probabilities: mx.array) -> Opened:
        if not self.tokens:
            return Opened(-np.inf, 0.0)
        first = np.array(log_probabilities.argmax(axis=-1))
        score = number(refusal_scores(log_probabilities, self.tokens).mean())
        return Opened(score, float(np.isin(first, self.tokens).mean()))

    def of(self, variant: Variant, edit: Edit) -> Trial:
        """Try an edit; norms are kept in weights only, so that is left out here."""
        with ablation(self._writers, replace(edit, norm="none")):
            opened = first_reply_token(self._chat, [*self._harmful, *self._kept])
            after = first_reply_token(self._chat, self._harmless)
        kl = number(kl_divergence(self._base, after).mean())
        kept = self._opened(opened[len(self._harmful) :]) if self._kept else None
        dropped = ""
        if not kl <= self._max_kl:
            dropped = f"KL {kl:.3f} over the limit of {self._max_kl:g}"
        elif kept is not None and self.kept_before is not None:
            lost = self.kept_before.refused - kept.refused
            if lost > WORKS:
                dropped = f"{lost:.0%} of the harmful prompts would no longer be refused"
        return Trial(variant, self._opened(opened[: len(self._harmful)]), kl, kept, dropped)


def best(trials: Iterable[Trial]) -> Trial | None:
    """Of the trials that work, the gentlest; where none does, the one that leaves least refusals.

    Of edits about as gentle the one of fewer directions is taken, then that of lower score. None
    where all were dropped.
    """
    left = [one for one in trials if not one.dropped]
    working = [one for one in left if one.works]
    if working:
        lowest = min(one.kl for one in working)
        gentle = [one for one in working if one.kl <= lowest + _SAME_KL]
        return min(gentle, key=lambda one: (one.variant.rank, one.harmful.score))
    return min(left, key=lambda one: (one.harmful.refused, one.harmful.score), default=None)
