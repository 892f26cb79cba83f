"""Variants: the edits between which a measurement chooses, and the choice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx

from abl_mlx.directions.selection import LEFT, Outcome
from abl_mlx.records.directions import Selection, TriedEdit

#: Kinds of directions that were made orthogonal: see `Variant.orthogonal_to`.
KINDS = OWN, ALL = "own", "all"

#: KLs that differ by less than this (in nats) count as equal: a few dozen prompts show no more.
SAME_KL = 1e-3


@dataclass(frozen=True)
class Variant:
    """The directions of an edit, and how they were made.

    Attributes:
        directions: (k, d) or (L, k, d).
        method: one of `methods.METHODS`.
        layer: the layer after which they were measured; None if several layers are combined, or
            each layer has its own.
        position: the token position, counted from the prompt's end; None if positions are combined.
        across: ``layers`` or ``positions`` if these are combined, else None.
        among: the layers that are combined, if these are not all.
        per_layer: whether the writers of each layer lose the directions of that layer.
        orthogonal_to: to what of the prompts whose refusals are to stay the directions were made
            orthogonal: ``own`` (what sets these apart from harmful prompts) or ``all`` (what sets
            them apart from harmless ones); None if they were not.
        features: the features of a sparse autoencoder whose decoder rows they are.
    """

    directions: mx.array
    method: str
    layer: float | None = None
    position: int | None = -1
    across: str | None = None
    per_layer: bool = False
    among: tuple[int, ...] | None = None
    orthogonal_to: str | None = None
    features: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """k."""
        return int(self.directions.shape[-2])

    def record(self) -> Selection:
        """The variant as a part of a record, without the directions."""
        layer = self.layer
        return Selection(
            method=self.method,
            layer=int(layer) if layer is not None and layer == int(layer) else layer,
            position=self.position,
            rank=self.rank if self.rank > 1 else None,
            across=self.across,
            among=None if self.among is None else list(self.among),
            per_layer=self.per_layer or None,
            orthogonal_to=self.orthogonal_to,
            features=None if self.features is None else list(self.features),
        )


@dataclass(frozen=True)
class Tried:
    """A variant with the effect of its edit on the first reply token of validation prompts.

    Attributes:
        variant: what is removed.
        refusal: mean refusal score of harmful prompts, in nats.
        refused: share of harmful prompts whose likeliest first token opens a refusal.
        kl: mean KL(model ‖ edited) on harmless prompts, in nats.
        kept: of the prompts that should still be refused, the share whose reply opens with a
            refusal; None if there are no such prompts.
        dropped: why the variant cannot be chosen; empty if it can.
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
        """Whether the edit ends refusals, judged by the first reply token."""
        return Outcome(self.refused, self.dropped, self.most_left).works

    def record(self) -> TriedEdit:
        """The variant and its effect as a part of a record."""
        return TriedEdit(
            **self.variant.record().values_by_field,
            refusal=self.refusal,
            refused=self.refused,
            kl=self.kl,
            kept_refused=self.kept,
            dropped=self.dropped or None,
        )


def best(trials: Iterable[Tried]) -> Tried | None:
    """The best of the tried variants; None if all were dropped.

    Of those that end refusals it is the one with the lowest KL; of variants with about the same KL
    the one with fewer directions, then the one with the lower refusal score. If none ends refusals,
    it is the one that leaves the fewest.
    """
    left = [one for one in trials if not one.dropped]
    working = [one for one in left if one.works]
    if working:
        lowest = min(one.kl for one in working)
        gentle = [one for one in working if one.kl <= lowest + SAME_KL]
        return min(gentle, key=lambda one: (one.variant.rank, one.refusal))
    return min(left, key=lambda one: (one.refused, one.refusal), default=None)
