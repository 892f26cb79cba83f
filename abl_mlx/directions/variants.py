"""The edits that a measurement may end in, and which of them is taken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from abl_mlx.directions.selection import LEFT, Outcome

# KLs closer than this (nats) are the same for all that a few dozen prompts can tell.
_SAME_KL = 1e-3


@dataclass(frozen=True)
class Variant:
    """An edit's directions, and what they are.

    Attributes:
        directions: (k, d) or (L, k, d).
        method: of `choices.METHODS`.
        layer: after which they were read; None for all of them together, or each for itself.
        position: token offset from the prompt's end; None for all of them together.
        across: ``layers`` or ``positions`` where those are taken together.
        among: the layers that are taken together, where these are not all.
        per_layer: whether the writers of each layer lose their own layer's.
    """

    directions: mx.array
    method: str
    layer: float | None = None
    position: int | None = -1
    across: str | None = None
    per_layer: bool = False
    among: tuple[int, ...] | None = None

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
        if self.among is not None:
            record["among"] = list(self.among)
        if self.per_layer:
            record["per_layer"] = True
        return record


@dataclass(frozen=True)
class Tried:
    """What an edit does to the first reply token, on validation prompts.

    Attributes:
        variant: what is removed.
        refusal: mean refusal score of harmful prompts.
        refused: share of them whose likeliest first token opens a refusal.
        kl: mean KL(model ‖ edited) on harmless prompts, nats.
        kept: share of the prompts opening with a refusal that should go on doing so; None without
            any.
        dropped: why it cannot be chosen.
        most_left: the largest share of refused prompts that counts as none: `trial.Trial.left`.
    """

    variant: Variant
    refusal: float
    refused: float
    kl: float
    kept: float | None = None
    dropped: str = ""
    most_left: float = LEFT

    @property
    def works(self) -> bool:
        """Whether refusals are gone, as far as first tokens tell."""
        return Outcome(self.refused, self.dropped, self.most_left).works

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        figures = {"refusal": self.refusal, "refused": self.refused, "kl": self.kl}
        return {
            **self.variant.record(),
            **figures,
            **({"kept_refused": self.kept} if self.kept is not None else {}),
            **({"dropped": self.dropped} if self.dropped else {}),
        }


def best(trials: Iterable[Tried]) -> Tried | None:
    """Of the trials that work, the gentlest; where none does, the one that leaves least refusals.

    Of edits about as gentle the one of fewer directions is taken, then that of lower score. None
    where all were dropped.
    """
    left = [one for one in trials if not one.dropped]
    working = [one for one in left if one.works]
    if working:
        lowest = min(one.kl for one in working)
        gentle = [one for one in working if one.kl <= lowest + _SAME_KL]
        return min(gentle, key=lambda one: (one.variant.rank, one.refusal))
    return min(left, key=lambda one: (one.refused, one.refusal), default=None)
