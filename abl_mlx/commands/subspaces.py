"""Subspaces that are tried where one direction leaves refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from abl_mlx.directions import selection
from abl_mlx.directions.measuring import Candidates
from abl_mlx.directions.selection import Score
from abl_mlx.directions.variants import Variant
from convert.base.errors import UserError

# The largest number of layers whose singular vectors are tried.
_MOST_LAYERS = 3


@dataclass(frozen=True)
class Subspaces:
    """Subspaces of the candidates at one position.

    Attributes:
        means: the differences of means.
        spans: singular vectors of the states, at the same position.
        scores: the scores of the candidates.
        position: the token position.
    """

    means: Candidates
    spans: Candidates
    scores: Sequence[Score]
    position: int

    @cached_property
    def _here(self) -> list[Score]:
        here = [score for score in self.scores if score.position == self.position]
        return sorted(here, key=lambda score: -score.d_prime)

    @cached_property
    def deep(self) -> list[int]:
        """The layers of the last fifth, those that separate best first."""
        return [
            score.layer
            for score in self._here
            if (score.layer + 1) / self.means.n_layers > selection.DEEPEST
        ]

    @property
    def early(self) -> list[int]:
        """The other layers, those that separate best first."""
        return [score.layer for score in self._here if score.layer not in self.deep]

    def of_means(self) -> list[Variant]:
        """Subspaces across all layers and across those that separate, and one for each layer."""
        apart = selection.apart([score for score in self._here if score.layer in self.early])
        found = []
        for among in [None, apart] if 0 < len(apart) < self.means.n_layers else [None]:
            for rank in (2, 3, 4):
                try:
                    span = self.means.across_layers(self.position, rank, among)
                except UserError:  # these layers do not span more directions
                    break
                found.append(
                    Variant(span, self.means.method, None, self.position, "layers", among=among)
                )
        each = self.means.each_layer(self.position)
        return [*found, Variant(each, self.means.method, None, self.position, per_layer=True)]

    def of_states(self, layers: Sequence[int]) -> list[Variant]:
        """Singular vectors of the states of the first few of these layers."""
        return [
            Variant(self.spans.at(layer, self.position)[:k], "svd", layer, self.position)
            for layer in layers[:_MOST_LAYERS]
            for k in range(2, self.spans.rank + 1)
        ]
